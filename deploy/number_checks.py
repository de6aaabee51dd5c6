"""Whether a value that a caller gives is a number: those of numpy are, truth values are not."""

from __future__ import annotations

from numbers import Integral, Real

__all__ = ["is_number", "is_whole"]


def is_number(value: object) -> bool:
    """Return whether a value is a real number.

    Args:
        value: Any value.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number.

    Args:
        value: Any value.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)
