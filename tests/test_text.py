"""Names and values of strangers' files, as they are shown."""

from __future__ import annotations

import os

import pytest

from dvdquant.errors import CheckpointError
from dvdquant.text import shown


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("plain/é/漢字", "plain/é/漢字"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc", "a\\x0ab\\x09c"),
        ("exe.\u202efdp", "exe.\\u202efdp"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        (os.fsdecode(b"bad\xff"), "bad\\xff"),
        ("\ud800", "\\ud800"),
        ("\x9b2J", "\\x9b2J"),
        ("tag\U000e0041", "tag\\U000e0041"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(raw: str, safe: str) -> None:
    assert shown(raw) == safe
    assert shown(raw).encode()  # always UTF-8


def test_long_text_is_cut_and_own_line_breaks_stay() -> None:
    assert shown("x" * 500, 10) == "x" * 9 + "…"
    assert shown("x" * 500, 0) == "x" * 500
    assert shown("a\nb\x07", keep="\n") == "a\nb\\x07"


def test_an_error_is_safe_to_print() -> None:
    error = CheckpointError("\x1b]0;title\x07 is bad", available=["\u202e", "b"], fix="a\nb")
    assert str(error) == "\\x1b]0;title\\x07 is bad\n  available: \\u202e, b\n  fix: a\nb"
