"""Options that exclude each other: one refusal for commands, requests and pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dvdquant.errors import UnsupportedError

__all__ = ["Clash", "refuse_clashes"]

_ONE_OUT = "leave one of the two out"


@dataclass(frozen=True)
class Clash:
    """Two options that exclude each other.

    Args:
        given: A value that is true where both were given.
        what: What they say against each other, for the error.
        fix: The way to solve it.
    """

    given: object
    what: str
    fix: str = _ONE_OUT


def refuse_clashes(clashes: Iterable[Clash]) -> None:
    """Refuse the first two options that exclude each other.

    Args:
        clashes: The pairs to look at, in the order in which they are refused.

    Raises:
        UnsupportedError: Both of two were given.
    """
    for clash in clashes:
        if clash.given:
            raise UnsupportedError(clash.what, fix=clash.fix)
