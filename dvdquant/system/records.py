"""Checks, by pydantic, of records that files hold (a manifest, a recipe, a schedule), with problems told in words."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dvdquant.errors import DvdquantError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["Problem", "brief", "first_problem"]


class _Brief(reprlib.Repr):
    """A shortener of values for messages: a hostile value may be megabytes long or a number of 4000 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = 4
        self.maxstring = self.maxother = 80
        self.maxlong = 40


_BRIEF = _Brief()


def brief(value: object) -> str:
    """Return ``repr(value)`` cut to about a line, without building the whole text first.

    Args:
        value: Any value. The result has at most 100 characters.
    """
    text = _BRIEF.repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


@dataclass(frozen=True)
class Problem:
    """A problem of one field of a record.

    Args:
        field: The path of the field, such as ``layers[0].features_in``.
        state: The problem in words: "is 0", "is missing" or "is unknown".
        allowed: The values that the field may have, or None if there is nothing to say.
        is_unknown: Whether the record has no field of this name.
    """

    field: str
    state: str
    allowed: str | None
    is_unknown: bool = False


def first_problem(error: ValidationError, data: Any) -> Problem:
    """Return the first problem of a record that pydantic refused.

    Args:
        error: The error of pydantic.
        data: The record that was checked, as parsed JSON. It is needed because pydantic's path also names the kinds
            that it tried, which are no fields.

    Raises:
        DvdquantError: A check of dvdquant itself found the problem. The error has its own words and is raised again.
    """
    found = error.errors(include_url=False)
    cause = found[0].get("ctx", {}).get("error")
    if isinstance(cause, DvdquantError):
        raise cause from None
    path, node, rest = _follow(found[0]["loc"], data)
    if found[0]["type"] == "missing":
        return Problem(_joined(path, rest[0]) if rest else path, "is missing", None)
    if found[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return Problem(path, "is unknown", None, is_unknown=True)
    # A field that may have several kinds has one problem for each kind.
    same = dict.fromkeys(_words(other["msg"]) for other in found[:8] if _follow(other["loc"], data)[0] == path)
    return Problem(path, f"is {brief(node)}", " or ".join(same))


def _follow(place: tuple[int | str, ...], data: Any) -> tuple[str, Any, tuple[int | str, ...]]:
    """Follow ``place`` into ``data`` as far as it leads.

    Args:
        place: The path of a problem as pydantic gives it: keys and indices.
        data: The record as parsed JSON.

    Returns:
        The path as text, the value that it leads to, and the rest of ``place`` that leads nowhere.
    """
    path, node = "", data
    for index, part in enumerate(place):
        listed = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if not listed and not (isinstance(node, dict) and part in node):
            return path, node, place[index:]
        path = _joined(path, part)
        node = node[part]
    return path, node, ()


def _words(message: str) -> str:
    """Return pydantic's message as a phrase that says what a value should be."""
    message = re.sub(r"^(Value error, |Input should be |\w+ should (have|match) )", "", message)
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def _joined(path: str, part: int | str) -> str:
    """Return ``path`` with one more part: an index in brackets, or a field after a dot."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    name = part if part.isidentifier() else brief(part)
    return f"{path}.{name}" if path else name
