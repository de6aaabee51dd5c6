"""Names and values of strangers' files, as they are shown."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from dvdquant.checkpoint.locate import locate_model
from dvdquant.errors import CheckpointError
from dvdquant.hub.names import hub_failure
from dvdquant.text import (
    amount,
    count_in_words,
    json_text,
    markdown,
    markdown_code,
    message_of,
    shell_line,
    shell_word,
    shown,
    unsafe,
)
from tests.support.exporting import REPOSITORY
from tests.support.secret_texts import SECRETS


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


# What acts on a terminal, on Markdown, on a shell and on JSON.
EVIL = "a\x1b[31m\u202e\x7f\x9b\u2028\U000e0041 b'\\\"$(x)`y` |<b>&[c](d)*_#\n-é漢"


def test_json_is_the_same_value_without_what_acts_on_a_terminal() -> None:
    for indent in (None, 1):
        text = json_text({EVIL: [EVIL, 1, None]}, indent)
        assert json.loads(text) == {EVIL: [EVIL, 1, None]}
        assert not {c for c in text if unsafe(c)} - {"\n"}
        assert "é漢" in text
    # Half a pair has no JSON: it is shown as the byte it stands for.
    assert json.loads(json_text(os.fsdecode(b"caf\xe9"))) == "caf\\xe9"
    assert json.loads(json_text("\ud800")) == "\\ud800"
    with pytest.raises(ValueError):
        json_text(float("nan"))


def test_a_shell_gets_the_very_bytes_from_printable_words() -> None:
    words = [EVIL, os.fsdecode(b"caf\xe9 \xff"), "plain", "", "it's", "é漢 x"]
    line = shell_line(words)
    assert not any(unsafe(c) for c in line)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]
    assert shell_word("a b") == "'a b'"


def test_sizes_and_counts_are_worded_in_one_place() -> None:
    sizes = (0, 1023, 1536, 5 << 20, 3 << 29, 1 << 40)
    assert [amount(size) for size in sizes] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "1.5 GiB", "1.0 TiB"]
    assert [count_in_words(count) for count in (6_291_456, 12_800_000_000)] == ["6.29 million", "12.80 billion"]
    by_hand = re.compile(r"/ (1e9|2\*\*30|\w*GIB|1024):\.")
    rooms = [REPOSITORY / room for room in ("dvdquant", "deploy", "export")]
    found = [path.name for room in rooms for path in room.rglob("*.py") if by_hand.search(path.read_text())]
    assert set(found) == {"text.py"}, found


def test_markdown_is_the_text_and_no_markup() -> None:
    plain = markdown(EVIL)
    assert not any(unsafe(c) for c in plain)
    assert "<b>" not in plain
    assert "\\|" in plain
    assert "\\[c\\](d)" in plain
    code = markdown_code(EVIL)
    assert code.startswith("`")
    assert code.count("`") == 2
    assert not any(unsafe(c) for c in code)
    assert markdown_code("onnx/a_b*.onnx") == "`onnx/a_b*.onnx`"
    assert markdown_code("") == ""


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_errors_of_other_libraries_do_not_bring_secrets_along(
    text: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an error of the hub's client, as readers of exports, pushes and downloads of models say it."""
    error = ConnectionError(f"no answer from {text}\nand more")
    assert secret not in message_of(error)
    assert "no answer from" in message_of(error)
    assert secret not in str(hub_failure(error, "org/name", None, "read"))

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(CheckpointError) as caught:
        locate_model("org/name", None, ["*.json"])
    assert secret not in str(caught.value)
    assert "no answer from" in str(caught.value)


def test_an_error_of_another_library_is_one_line_that_acts_on_nothing() -> None:
    assert message_of(ValueError("a\x1b[31m\u202eb\nsecond line")) == "a\\x1b[31m\\u202eb"
