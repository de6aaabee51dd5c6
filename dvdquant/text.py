"""Text from elsewhere as it may be shown: one line without characters that act on a terminal or reorder what is read.

File names, tensor names, prompts and fields of files come from strangers. :func:`shown` makes them fit for a line of text,
:func:`json_text` for JSON, :func:`shell_word` for a command to copy, :func:`markdown` and :func:`markdown_code` for a card.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from typing import Any

__all__ = [
    "amount",
    "escape_json",
    "json_text",
    "markdown",
    "markdown_code",
    "shell_line",
    "shell_word",
    "shown",
    "unsafe",
]

# Control characters, marks that reorder or hide text, halves of surrogate pairs, private use, and line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKDOWN = re.compile(r"[\\`*_\[\]|~#$]")


def unsafe(character: str) -> bool:
    """Return whether ``character`` acts on a terminal, reorders text, or does not show."""
    return unicodedata.category(character) in _UNSAFE


def shown(value: object, limit: int = 200, *, keep: str = "") -> str:
    """Return ``value`` as text that is safe to print: file names, tensor names and fields of files come from strangers.

    A control character, a bidirectional mark, a half surrogate (how Python holds a byte that is no UTF-8) or another
    invisible character becomes an escape such as ``\\x1b`` or ``\\u202e``.

    Args:
        value: what is shown; ``str(value)`` is taken.
        limit: characters kept; what is longer ends in "…". 0 keeps all.
        keep: characters left as they are, such as a line break of one's own.
    """
    text = str(value)
    if limit and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not unsafe(c) else _escape(c) for c in text)


def json_text(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON without any character that :func:`shown` would escape; a reader gets the same value.

    A byte that is no UTF-8 (half a surrogate pair) becomes the text ``\\xff``: JSON has no way to write it.

    Raises:
        TypeError, ValueError: a value that JSON cannot carry, NaN and infinities among them.
    """
    return escape_json(json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False))


def escape_json(text: str) -> str:
    """Return the JSON ``text`` with every unsafe character of its strings as a JSON escape; line breaks stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or not unsafe(c) else _json_escape(c) for c in text)


def shell_line(words: list[str]) -> str:
    """Return ``words`` as a command line to copy, each through :func:`shell_word`."""
    return " ".join(shell_word(word) for word in words)


def shell_word(text: str) -> str:
    """Return ``text`` quoted for a shell; one with unsafe characters as ``$'…'`` (bash, zsh), which shows every byte."""
    if not any(unsafe(c) for c in text):
        return shlex.quote(text)
    plain = {"\\": "\\\\", "'": "\\'"}
    return f"$'{''.join(plain.get(c, c) if not unsafe(c) else _shell_escape(c) for c in text)}'"


def markdown(text: object) -> str:
    """Return ``text`` as one line of Markdown that renders as that text: no markup, no HTML, no cell of a table."""
    line = _MARKDOWN.sub(r"\\\g<0>", shown(text, 0))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: object, limit: int = 200) -> str:
    """Return ``text`` as a code span, also inside a table: of at most ``limit`` characters, backticks as quotes."""
    line = " ".join(shown(text, limit).replace("`", "'").split())
    return f"`{line}`".replace("|", "\\|") if line else ""


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:
        return "\\" + _escape(character)
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _shell_escape(character: str) -> str:
    # What os.fsdecode made of a byte becomes that byte again; no other half of a pair can come from a file name.
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


def amount(nbytes: float) -> str:
    """Bytes for people: ``1.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
