"""Arguments of Python functions that are one value or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

__all__ = ["one_or_several"]


def one_or_several(value: Any, kinds: tuple[type, ...] = (str, os.PathLike)) -> tuple[Any, ...]:
    """Return the values of an argument: of several all, of one it alone. Whoever asks checks what they are.

    Args:
        value: One value, or an iterable of them.
        kinds: The kinds that are one value although they can be iterated.
    """
    return (value,) if isinstance(value, kinds) or not isinstance(value, Iterable) else tuple(value)
