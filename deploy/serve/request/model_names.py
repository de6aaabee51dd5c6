"""The names that exports get in requests: the word before the ``=`` of ``NAME=OUT``, or the folder's own name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dvdquant.errors import UnsupportedError
from dvdquant.text import shown

__all__ = ["named", "named_export"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}")


def named(text: str) -> tuple[str, str] | None:
    """Return (name, rest) of ``NAME=REST``; None where the text is a path, though it holds a ``=``.

    Args:
        text: The text.
    """
    name, sign, rest = text.partition("=")
    return (name, rest) if sign and rest and _NAME.fullmatch(name) and "/" not in name else None


def named_export(text: str) -> tuple[str, str]:
    """Return the name of an export and the absolute path of its folder.

    Args:
        text: ``OUT`` or ``NAME=OUT``.

    Raises:
        UnsupportedError: The name is of no use in requests.
    """
    name, place = named(text) or (Path(os.path.abspath(text)).name, text)
    if not _NAME.fullmatch(name):
        raise UnsupportedError(f"{shown(name)!r} is no name for a model", fix=f"give it one: NAME={shown(place)}")
    return name, os.path.abspath(place)
