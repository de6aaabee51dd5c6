"""Text from elsewhere as it may be shown: one line without characters that act on a terminal or reorder what is read."""

from __future__ import annotations

import unicodedata

__all__ = ["shown"]

# Control characters, marks that reorder or hide text, halves of surrogate pairs, private use, and line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


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
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
