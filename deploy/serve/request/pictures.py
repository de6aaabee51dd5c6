"""The pictures of a request: OpenAI's ``input_reference``, and ``last_reference`` for the end of a clip.

A form brings a picture as a file; JSON brings it as base64, as a data URL, or as an object ``{"image_url": "data:..."}``.
Nothing is fetched from an address, and nothing is decoded here: see :mod:`.decoding`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.records import brief
from dvdquant.text import shown

__all__ = ["PICTURES", "about_pictures", "take_pictures"]

# The names of a request -> the fields of GenerateRequest.
PICTURES = {"input_reference": "image", "last_reference": "last_image"}
_TEXTS = {
    "input_reference": "The picture that the clip begins with, of a model that takes one.",
    "last_reference": "The picture that the clip ends with, of a model that takes one.",
}
_AVAILABLE = 'a file of a form, base64, a data URL, or {"image_url": "data:image/png;base64,..."}'
_PART = re.compile(r"(input_reference|last_reference)\[(\w{1,20})\]")
_DATA = re.compile(r"data:([\w.+/-]{0,80})((?:;[\w.+=-]{0,80})*),", re.ASCII)
_SPACE = re.compile(r"\s+")


def about_pictures(*, form: bool) -> dict[str, dict[str, Any]]:
    """Return the fields for the description of the interface.

    Args:
        form: True for those of a form.
    """
    text = {"type": "string", "description": "Base64, or a data URL."}
    url = {"type": "object", "properties": {"image_url": text}, "required": ["image_url"]}
    kind = {"type": "string", "format": "binary"} if form else {"anyOf": [text, url, {"type": "null"}]}
    return {name: {**kind, "description": about} for name, about in _TEXTS.items()}


def take_pictures(fields: Mapping[str, Any], most: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the fields of a body without its pictures, and the files of the pictures by name.

    Args:
        fields: The fields as they came; a file of a form as bytes.
        most: The most bytes of a picture.

    Raises:
        ShapeError: A picture is empty, too large, or no base64.
        UnsupportedError: It is the address or the id of something that the server does not have.
    """
    rest = dict(fields)
    for name, value in fields.items():
        # OpenAI's client writes an object in a form so.
        if match := _PART.fullmatch(name):
            if match[1] in fields:
                raise ShapeError(f"the field {match[1]!r} appears twice", fix="send each field once")
            rest.setdefault(match[1], {})[match[2]] = value
            del rest[name]
    pictures = {}
    for name in PICTURES:
        value = rest.pop(name, None)
        if value is None or value in ("", b""):
            continue
        raw = _file_of(name, value)
        if len(raw) > most:
            raise ShapeError(f"{name} has {len(raw)} bytes", available=f"up to {most} here", fix="send a smaller file")
        pictures[name] = raw
    return rest, pictures


def _file_of(name: str, value: Any) -> bytes:
    """Return the bytes of the file that a field stands for."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        value = _reference_of(name, value)
    if not isinstance(value, str):
        raise ShapeError(f"{name} is {brief(value)}", available=_AVAILABLE)
    text = value.strip()
    if match := _DATA.match(text):
        if "base64" not in match[2].lower().split(";"):
            raise ShapeError(f"{name} is a data URL without base64", available=_AVAILABLE)
        text = text[match.end() :]
    elif re.match(r"[a-zA-Z][\w+.-]{0,20}:", text):
        raise UnsupportedError(
            f"{name} is an address, and this server fetches nothing", available=_AVAILABLE, fix="send the file itself"
        )
    text = _SPACE.sub("", text).rstrip("=")
    try:
        # URL-safe letters are taken as well; the padding is often lost.
        standard = text.replace("-", "+").replace("_", "/").encode("ascii") + b"=" * (-len(text) % 4)
        raw = base64.b64decode(standard, validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ShapeError(f"{name} is no base64: {shown(text, 40)!r}", available=_AVAILABLE) from None
    if not raw:
        raise ShapeError(f"{name} is empty", available=_AVAILABLE)
    return raw


def _reference_of(name: str, value: dict[str, Any]) -> Any:
    """Return the address in an object, as OpenAI's videos and chats write it."""
    if "file_id" in value:
        raise UnsupportedError(
            f"{name} is the id of a file, and this server keeps no files", available=_AVAILABLE, fix="send the file"
        )
    inner = value.get("image_url")
    if isinstance(inner, dict):
        inner = inner.get("url")
    if inner is None or set(value) - {"image_url", "type"}:
        raise ShapeError(f"{name} is {brief(value)}", available=_AVAILABLE)
    return inner
