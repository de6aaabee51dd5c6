"""Blocks between marks in a page, which a benchmark writes anew."""

from __future__ import annotations

from dvdquant.errors import DvdquantError

__all__ = ["PageError", "replace_block"]


class PageError(DvdquantError, ValueError):
    """A page lacks the marks of a block."""


def replace_block(text: str, begin: str, end: str, body: str) -> str:
    """Return a page with one block written anew.

    Args:
        text: The page.
        begin: The mark before the block.
        end: The mark behind it.
        body: What stands between them, without the line breaks beside the marks.

    Raises:
        PageError: A mark is missing, there twice, or behind the other.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise PageError(
            f"the page has no block between {begin} and {end}", fix="put both marks in it, once, on own lines"
        )
    return f"{text[: text.index(begin)]}{begin}\n{body}\n{text[text.index(end) :]}"
