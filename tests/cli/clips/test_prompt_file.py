"""Prompts of other editors and encodings, of pipes, and of the command line."""

from __future__ import annotations

import codecs
import io
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dvdquant.cli.clips.prompt_file import MAX_PROMPT_FILE, check_prompt, decode_text, read_prompts
from dvdquant.errors import DvdquantError, OutputError, ShapeError
from dvdquant.system import piped_file
from tests.support.costs import Costs

LINES = ["a cat — in the snow", "猫が雪の中で", "ein Kätzchen", "🐈‍⬛ at night"]


def _read(tmp_path: Path, raw: bytes) -> list[str]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(raw)
    return read_prompts((), path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029", "\n\n \t\n", "\v", "\f"])
@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_every_encoding_with_a_mark_and_every_line_end(
    mark: bytes, encoding: str, end: str, closing: bool, tmp_path: Path
) -> None:
    text = end.join(LINES) + end * closing
    assert _read(tmp_path, mark + text.encode(encoding)) == LINES


def test_files_put_together_and_files_of_dos(tmp_path: Path) -> None:
    raw = codecs.BOM_UTF8 + b"one\r\n" + codecs.BOM_UTF8 + b"two \r\n\x1a"
    assert _read(tmp_path, raw) == ["one", "two"]
    assert _read(tmp_path, b"a\tcat\n# is no comment\n") == ["a\tcat", "# is no comment"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("Kätzchen".encode("latin-1"), ("byte 1, 0xe4, in line 1", "iconv -f WINDOWS-1252 -t UTF-8")),
        (b"one\r\ntwo\rthree \x93quoted\x94", ("byte 15, 0x93, in line 3", "UTF-8")),
        ("cat".encode("utf-16-le"), ("NUL byte, byte 1", "UTF-16LE")),
        ("cat".encode("utf-16-be"), ("NUL byte, byte 0", "UTF-16BE")),
        ("Kätzchen, ein é".encode("utf-16-le"), ("NUL byte, byte 1", "UTF-16LE")),
        ("ä cat".encode("utf-16-be"), ("NUL byte, byte 0", "UTF-16BE")),
        ("Āā cat".encode("utf-16-le"), ("NUL byte, byte 0", "UTF-16LE")),
        (codecs.BOM_UTF16_LE + b"a\0b", ("UTF-16-LE", "byte 4", "cut short")),
        (codecs.BOM_UTF8 + b"ok\n\xff", ("byte 6, 0xff, in line 2",)),
        (b"ok\nnot \x1b[31mred", ("control character, \\x1b, in line 2", "take it out")),
        (b"", ("is empty", "one prompt a line")),
        (codecs.BOM_UTF16_LE, ("is empty",)),
        (b"\n \r\n\x1a", ("is empty",)),
        (bytes(range(1, 256)), ("byte 127",)),
        (b"x" * (MAX_PROMPT_FILE + 1), (f"has {MAX_PROMPT_FILE + 1} bytes", "256 KiB")),
        (b"a\n" * 300, ("300 prompts", "up to 256")),
    ],
)
def test_what_is_no_text_is_refused_with_its_place_and_the_way_out(
    raw: bytes, said: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises((OutputError, ShapeError)) as caught:
        _read(tmp_path, raw)
    for text in said:
        assert text in str(caught.value)
    assert caught.value.fix


def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.touch()
    os.truncate(path, 1 << 30)
    with pytest.raises(OutputError, match=r"has 1073741824 bytes"):
        read_prompts((), path)
    with pytest.raises(OutputError, match="goes on and on"):
        read_prompts((), Path("/dev/zero"))


def test_a_pipe_without_a_writer_is_waited_for_with_a_message_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(piped_file, "NO_WRITER", 1.0)
    monkeypatch.setattr(piped_file, "SAY_AFTER", 0.3)
    with pytest.raises(OutputError, match="a pipe that nobody writes to") as caught:
        read_prompts((), pipe)
    assert caught.value.fix
    assert "waiting for what is written to" in caplog.text
    # A writer that comes late is heard, and one that comes and says nothing is an empty file.
    late = threading.Timer(0.5, pipe.write_bytes, (b"late",))
    late.start()
    assert read_prompts((), pipe) == ["late"]
    late.join()
    empty = threading.Timer(0.3, pipe.write_bytes, (b"",))
    empty.start()
    with pytest.raises(ShapeError, match="is empty"):
        read_prompts((), pipe)
    empty.join()


def test_pipes_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe is what <(command) gives; - is standard input."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo"))
    writer.start()
    assert read_prompts(("zero",), pipe) == ["zero", "one", "two"]
    writer.join()
    silent = os.open(pipe, os.O_RDWR)  # a writer that says nothing, and one that says a part
    monkeypatch.setattr(piped_file, "SILENT", 0.3)
    for part in (b"", b"one"):
        os.write(silent, part)
        with pytest.raises(OutputError, match="nothing came from it"):
            read_prompts((), pipe)
    os.close(silent)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("drei\r".encode("utf-16"))))
    assert read_prompts((), Path("-")) == ["drei"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xe9")))
    with pytest.raises(OutputError, match="standard input is no UTF-8"):
        read_prompts((), Path("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OutputError, match="standard input is closed"):
        read_prompts((), Path("-"))
    with pytest.raises(OutputError, match="Is a directory"):
        read_prompts((), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\x1b[31mcat", r"control character, \x1b, as character 2"),
        ("a\0b", r"control character, \x00"),
        (os.fsdecode(b"caf\xe9"), r"no UTF-8, \xe9, as character 4"),
        ("\ud800", r"control character, \ud800"),
    ],
)
def test_prompts_of_the_command_line(text: str, said: str) -> None:
    with pytest.raises(ShapeError) as caught:
        read_prompts((text,), None)
    assert said in str(caught.value)
    assert caught.value.fix
    assert str(caught.value).replace("\n", "").isprintable()


def test_prompts_that_are_none_of_our_business() -> None:
    """Several lines, tabs, joined emoji and text that runs from right to left are for the text encoder."""
    for text in ("a cat\nin the snow", "a\tcat", LINES[3], "שלום \u200f!"):
        assert read_prompts((text,), None) == [text]
    check_prompt("--negative-prompt", "", may_be_empty=True)
    with pytest.raises(ShapeError, match="there is no prompt"):
        read_prompts((), None)


def _error_of(raw: bytes, name: str = "the file") -> DvdquantError | None:
    """The error for these bytes; None if they are text."""
    try:
        decode_text(raw, name).encode()
    except DvdquantError as error:
        return error
    return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.sampled_from([b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF32_BE]))
@example(b"\xff\xfe\0\0", b"")
def test_any_bytes_are_text_or_a_clear_error(raw: bytes, mark: bytes) -> None:
    if error := _error_of(mark + raw):
        assert error.fix
        assert str(error).replace("\n", "").isprintable()


@pytest.mark.stress
def test_any_bytes_at_length() -> None:
    with Costs("files of prompts") as costs:

        @settings(max_examples=20_000, deadline=None)
        @given(st.binary(max_size=300))
        def look(raw: bytes) -> None:
            started = time.monotonic()
            error = _error_of(raw, "a\x1b[31m")
            costs.add(time.monotonic() - started, refused=error is not None)
            if error:
                assert error.fix
                assert str(error).replace("\n", "").isprintable()

        look()
