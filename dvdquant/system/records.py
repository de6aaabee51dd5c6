"""Records that files hold (a manifest, a recipe, a schedule), checked by pydantic: what is wrong first, in words."""

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
    """Values of a file as a message shows them: a hostile one may be megabytes long or a number of 4000 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = 4
        self.maxstring = self.maxother = 80
        self.maxlong = 40


_BRIEF = _Brief()


def brief(value: object) -> str:
    """Return ``repr(value)`` cut to about a line, without making the whole of it first."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


@dataclass(frozen=True)
class Problem:
    """What is wrong with one field of a record.

    Args:
        field: its path, such as ``layers[0].features_in``.
        state: "is 0", "is missing" or "is unknown".
        allowed: what it may be, None where there is nothing to say.
    """

    field: str
    state: str
    allowed: str | None


def first_problem(error: ValidationError, data: Any) -> Problem:
    """Return the first problem of a record that pydantic refused.

    Args:
        data: what was checked, as parsed JSON; pydantic's path also names the kinds it tried, which are no fields.

    Raises:
        DvdquantError: a check of our own found the problem; it has its own words.
    """
    found = error.errors(include_url=False)
    cause = found[0].get("ctx", {}).get("error")
    if isinstance(cause, DvdquantError):
        raise cause from None
    path, node, rest = _follow(found[0]["loc"], data)
    if found[0]["type"] == "missing":
        return Problem(_joined(path, rest[0]) if rest else path, "is missing", None)
    if found[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return Problem(path, "is unknown", None)
    # A field of several kinds has a problem with each of them.
    same = dict.fromkeys(_words(other["msg"]) for other in found[:8] if _follow(other["loc"], data)[0] == path)
    return Problem(path, f"is {brief(node)}", " or ".join(same))


def _follow(place: tuple[int | str, ...], data: Any) -> tuple[str, Any, tuple[int | str, ...]]:
    """The path and the value as far as ``place`` leads into ``data``, and the parts that lead nowhere."""
    path, node = "", data
    for index, part in enumerate(place):
        listed = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if not listed and not (isinstance(node, dict) and part in node):
            return path, node, place[index:]
        path = _joined(path, part)
        node = node[part]
    return path, node, ()


def _words(message: str) -> str:
    """What pydantic says a value should be, as a phrase."""
    message = re.sub(r"^(Value error, |Input should be |\w+ should (have|match) )", "", message)
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def _joined(path: str, part: int | str) -> str:
    if isinstance(part, int):
        return f"{path}[{part}]"
    name = part if part.isidentifier() else brief(part)
    return f"{path}.{name}" if path else name
