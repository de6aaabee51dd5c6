"""Prompts as people give them: on the command line, and in text files of any editor."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dvdquant.errors import OutputError, ShapeError
from dvdquant.system.piped_file import read_piped
from dvdquant.text import shown

__all__ = ["MAX_PROMPTS", "MAX_PROMPT_FILE", "check_prompt", "decode_text", "read_prompts"]

MAX_PROMPT_FILE, MAX_PROMPTS = 1 << 18, 256
_FORMS = f"text, one prompt a line, in UTF-8 or with a byte order mark, up to {MAX_PROMPT_FILE >> 10} KiB"

# UTF-32's mark begins with that of UTF-16: longest first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Of Windows, Unix, old Macs, mainframes (NEL), and the two of Unicode; form feed and vertical tab also end a line.
_LINE_END = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read_prompts(texts: Sequence[str], path: Path | None) -> list[str]:
    """Return the prompts ``texts`` of ``--prompt`` and those of the file of ``--prompts``; ``-`` is standard input.

    Args:
        texts: The values of ``--prompt``.
        path: The value of ``--prompts``, or None.

    Raises:
        ShapeError: There is none, one is empty or holds a control character, or there are too many.
        OutputError: The file cannot be read or is no text.
    """
    for text in texts:
        check_prompt("--prompt", text)
    prompts = list(texts)
    if path is not None:
        prompts += _read_file(path)
    if not prompts:
        raise ShapeError("there is no prompt", fix='give --prompt "..." or --prompts FILE')
    if len(prompts) > MAX_PROMPTS:
        raise ShapeError(f"{len(prompts)} prompts", available=f"up to {MAX_PROMPTS} in one run", fix="split them")
    return prompts


def check_prompt(option: str, text: str, *, may_be_empty: bool = False) -> None:
    """Refuse a text of the command line that is empty, or holds what no tokenizer takes for text.

    Args:
        option: The option that gave the text, or a file and a line, for the message.
        text: The text.
        may_be_empty: Whether an empty text is one, as a negative prompt is.

    Raises:
        ShapeError: It is such a text.
    """
    if not text.strip() and not may_be_empty:
        raise ShapeError("the prompt is empty", fix='describe the clip: --prompt "..."')
    if found := _CONTROL.search(text):
        character = found.group()
        byte = "\udc80" <= character <= "\udcff"
        what = "a byte that is no UTF-8" if byte else "a control character"
        raise ShapeError(
            f"{option} holds {what}, {shown(character)}, as character {found.start() + 1}: {shown(text, 80)}",
            fix="type it in a UTF-8 terminal, or put it into a UTF-8 file for --prompts" if byte else "leave it out",
        )


def _read_file(path: Path) -> list[str]:
    name = "standard input" if path == Path("-") else f"the prompt file {path}"
    text = decode_text(_read(path, name), name)
    prompts = []
    for number, line in enumerate(_LINE_END.split(text), 1):
        # A mark inside is left of files that were put together; Ctrl-Z ended a file of DOS.
        prompt = line.replace("\ufeff", "").rstrip("\x1a").strip()
        if found := _CONTROL.search(prompt):
            raise ShapeError(
                f"{name} holds a control character, {shown(found.group())}, in line {number}: {shown(prompt, 80)}",
                available=_FORMS,
                fix="take it out",
            )
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise ShapeError(f"{name} is empty", fix="write one prompt a line")
    return prompts


def _read(path: Path, name: str) -> bytes:
    """Up to the limit, also from a pipe, as ``<(command)`` gives one."""
    try:
        if path == Path("-"):
            if sys.stdin is None:
                raise OutputError("standard input is closed", fix="give --prompts FILE")
            raw = sys.stdin.buffer.read(MAX_PROMPT_FILE + 1)
        else:
            raw, size = read_piped(path, MAX_PROMPT_FILE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{name} cannot be used: {reason}", available=_FORMS, fix="name a text file") from error
    if len(raw) > MAX_PROMPT_FILE:
        known = f"has {size} bytes" if path != Path("-") and size > MAX_PROMPT_FILE else "goes on and on"
        raise OutputError(
            f"{name} cannot be used: it {known}, more than {MAX_PROMPT_FILE}", available=_FORMS, fix="split it"
        )
    return raw


def decode_text(raw: bytes, name: str) -> str:
    """Return the text of ``raw``: by its byte order mark, else UTF-8.

    Args:
        raw: The bytes of a file.
        name: What the message calls the file.

    Raises:
        OutputError: The bytes are no such text. The error names the byte and the line, and how to convert the file.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return _decoded(raw[len(mark) :], encoding, len(mark), name)
    # Before it is decoded: UTF-16 of any letter beyond ASCII is no UTF-8 either, and no code page helps it.
    if b"\0" in raw:
        little = raw[1::2].count(0) >= raw[::2].count(0)
        raise OutputError(
            f"{name} holds a NUL byte, byte {raw.index(0)}",
            available=_FORMS,
            fix=f"if it is UTF-16 without a mark, convert it: {_iconv('UTF-16LE' if little else 'UTF-16BE')}",
        )
    return _decoded(raw, "utf-8", 0, name)


def _decoded(raw: bytes, encoding: str, skipped: int, name: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(_LINE_END.split(raw[: error.start].decode(encoding, "replace")))
        byte = raw[error.start]
        raise OutputError(
            f"{name} is no {encoding.upper()}: byte {error.start + skipped}, 0x{byte:02x}, in line {line} ({error.reason})",
            available=_FORMS,
            fix=f"save it as UTF-8, or convert it, such as {_iconv('WINDOWS-1252')}"
            if encoding == "utf-8"
            else "it is cut short or damaged: save it again, as UTF-8",
        ) from error


def _iconv(encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 FILE > NEW"
