"""Text from elsewhere as it may be shown: one line without characters that act on a terminal or reorder the text.

File names, tensor names, prompts and fields of files come from strangers. :func:`shown` makes them fit for a line of
text, :func:`json_text` for JSON, :func:`shell_word` for a command to copy, :func:`markdown` and :func:`markdown_code`
for a card, :func:`message_of` for an error of another library.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "amount",
    "escape_json",
    "first_of",
    "json_text",
    "markdown",
    "markdown_code",
    "message_of",
    "shell_line",
    "shell_word",
    "shown",
    "unsafe",
    "without_secrets",
]

# Control characters, marks that reorder or hide text, halves of surrogate pairs, private use, and line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# What stands for a secret: the user of a URL, parameters with such names, known kinds of token, and HTTP's own header.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,2})[^/\s@]+@")
_SECRET = r"token|secret|passw|api[-_]?key|access[-_]?key|auth|credential|signature|\bsig\b|\bkey\b"
_PARAMETER = re.compile(rf"(?i)([^=&?;#\s]{{0,60}}(?:{_SECRET})[^=&?;#\s]{{0,60}}=)[^&#;\s]+")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{8,}|gh[a-z]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|sk-[\w-]{12,}|glpat-[\w-]{8,}"
    r"|AKIA[0-9A-Z]{12,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{12,}")
_MARKDOWN = re.compile(r"[\\`*_\[\]|~#$]")


def unsafe(character: str) -> bool:
    """Return whether a character acts on a terminal, reorders text, or does not show.

    Args:
        character: One character.
    """
    return unicodedata.category(character) in _UNSAFE


def without_secrets(text: str) -> str:
    """Return ``text`` with an ellipsis for every secret of a URL and every known kind of token.

    Args:
        text: A text from elsewhere, such as an address or another library's message.
    """
    text = _PARAMETER.sub(r"\1…", _USER.sub(r"\1…@", text))
    return _BEARER.sub(r"\1 …", _TOKEN.sub("…", text))


def message_of(error: BaseException, limit: int = 200) -> str:
    """Return the first line of another library's error, safe to print and without secrets.

    Args:
        error: The error. Clients of a network quote addresses in it, which may hold a token or a password.
        limit: The number of characters kept.
    """
    return shown(without_secrets(str(error).strip().split("\n")[0][: 20 * limit]), limit)


def shown(value: object, limit: int = 200, *, keep: str = "") -> str:
    r"""Return ``value`` as text that is safe to print, because names and fields of files come from strangers.

    A control character, a bidirectional mark, a half surrogate (how Python holds a byte that is no UTF-8) or another
    invisible character becomes an escape such as ``\x1b`` or ``\u202e``.

    Args:
        value: The value to show, as ``str(value)``.
        limit: The number of characters kept; longer text ends in "…". 0 keeps all.
        keep: Characters that are never escaped, such as a line break of one's own.
    """
    text = str(value)
    if limit and len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not unsafe(c) else _escape(c) for c in text)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""Return ``value`` as JSON without any character that :func:`shown` would escape; a reader gets the same value.

    A byte that is no UTF-8 (half a surrogate pair) becomes the text ``\xff``: JSON has no way to write it.

    Args:
        value: Any value that JSON can carry.
        indent: The number of spaces per level; None writes one line.

    Raises:
        TypeError: A value has a type that JSON cannot carry.
        ValueError: A value is NaN or infinite.
    """
    return escape_json(json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False))


def escape_json(text: str) -> str:
    """Return a JSON text with every unsafe character of its strings as a JSON escape; line breaks stay.

    Args:
        text: The JSON text.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or not unsafe(c) else _json_escape(c) for c in text)


def shell_line(words: list[str]) -> str:
    """Return words as a command line to copy, each quoted by :func:`shell_word`.

    Args:
        words: The words of the command line.
    """
    return " ".join(shell_word(word) for word in words)


def shell_word(text: str) -> str:
    """Return a word quoted for a shell.

    A word with unsafe characters becomes ``$'…'`` (bash, zsh), which shows every byte.

    Args:
        text: The word.
    """
    if not any(unsafe(c) for c in text):
        return shlex.quote(text)
    plain = {"\\": "\\\\", "'": "\\'"}
    return f"$'{''.join(plain.get(c, c) if not unsafe(c) else _shell_escape(c) for c in text)}'"


def markdown(text: object) -> str:
    """Return a text as one line of Markdown that renders as that text: no markup, no HTML, no cell of a table.

    Args:
        text: The text, as ``str(text)``.
    """
    line = _MARKDOWN.sub(r"\\\g<0>", shown(text, 0))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: object, limit: int = 200) -> str:
    """Return a text as a code span, which is also possible inside a table; backticks become quotes.

    Args:
        text: The text, as ``str(text)``.
        limit: The greatest number of characters.
    """
    line = " ".join(shown(text, limit).replace("`", "'").split())
    return f"`{line}`".replace("|", "\\|") if line else ""


def _escape(character: str) -> str:
    """Return the escape of a character in the form of Python; a byte that is not UTF-8 gives that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    """Return the escape of a character in JSON: one or two UTF-16 units."""
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:
        return "\\" + _escape(character)
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _shell_escape(character: str) -> str:
    """Return the escape of a character inside ``$'…'``: its bytes."""
    # What os.fsdecode made of a byte becomes that byte again; no other half of a pair can come from a file name.
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


def first_of(problems: Sequence[str], count: int = 5) -> str:
    """Return the first problems as one text, and how many more there are.

    Args:
        problems: A clause for each.
        count: The number of those that are written out.
    """
    more = f" and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


def amount(nbytes: float) -> str:
    """Return a number of bytes for people, such as ``1.4 GiB``.

    Args:
        nbytes: The number of bytes.
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def count_in_words(count: float) -> str:
    """Return a large number for people, such as ``6.29 million`` or ``12.80 billion`` weights.

    Args:
        count: The number.
    """
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown.

    Args:
        head: The titles of the columns.
        rows: The cells of every row, as many as titles.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
