"""The images that a clip begins and ends with, decoded from files that may come from anybody.

A file is read up to a limit of bytes, and only the formats that cameras and browsers write are decoded, by Pillow. Its
size in pixels is compared with a limit before a pixel is decoded: a file of some kilobytes can stand for gigabytes. What
the camera noted of its orientation is applied. The pipeline then stretches the image to the size of the clip.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.errors import ShapeError
from dvdquant.system.files import read_limited
from dvdquant.text import shown

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_IMAGE_BYTES",
    "MAX_IMAGE_PIXELS",
    "ImageSource",
    "Picture",
    "PictureCache",
    "grey_picture",
    "image_text",
    "open_picture",
    "stretch_text",
]

MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64_000_000  # a camera's best; decoded, 192 MB
FORMATS = ("PNG", "JPEG", "WEBP")
_KEPT = 4  # decoded images that the next request may ask for again
_WARNINGS = threading.RLock()
_LEAST = 8  # pixels of a side
_STRETCH = 0.02  # a difference of the aspect ratios that nobody sees

ImageSource = str | os.PathLike[str] | bytes | Any
"""A path, the bytes of a file, or an image of Pillow."""


@dataclass(frozen=True)
class Picture:
    """An image that was decoded.

    Args:
        image: RGB, 8 bits a channel, upright.
        name: What errors and traces call it.
        sha256: Of the file, or of the pixels of an image that was none.
    """

    image: Image
    name: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return name, hash and size for a trace."""
        return {"name": self.name, "sha256": self.sha256, "size": list(self.image.size)}


def grey_picture() -> Image:
    """Return a small picture for questions in which only its presence counts."""
    from PIL import Image

    return Image.new("RGB", (64, 64), (128, 128, 128))


def image_text(source: ImageSource | None) -> str | None:
    """Return what a trace calls an image before it is decoded.

    Args:
        source: A picture, its path or None.
    """
    if source is None:
        return None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"an image file of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(os.fspath(source)).encode(errors="replace").decode()
    return "a Pillow image" if hasattr(source, "convert") else f"a {type(source).__name__}"


def open_picture(source: ImageSource, option: str, pixels: int = MAX_IMAGE_PIXELS) -> Picture:
    """Decode an image.

    Args:
        source: A path, the bytes of a file, or an image of Pillow.
        option: The option that it was given with, for errors.
        pixels: Width x height at most.

    Raises:
        ShapeError: It cannot be read, is too large, of another format, damaged, or an animation.
    """
    from PIL import Image

    name = image_text(source) or ""
    if isinstance(source, Image.Image):
        picture = source
        _check_size(picture, option, name, pixels)
        upright = _upright(picture, option, name)
        return Picture(upright, name, hashlib.sha256(upright.tobytes()).hexdigest())
    raw = _read(source, option, name)
    return Picture(_decode(raw, option, name, pixels), name, hashlib.sha256(raw).hexdigest())


class PictureCache:
    """The images that were decoded last. One source is decoded once, as long as its file stays what it is."""

    def __init__(self) -> None:
        self._decoded: dict[Hashable, Picture] = {}
        self._lock = threading.Lock()

    def open(self, source: ImageSource, option: str, known: Hashable = None) -> tuple[Picture, Hashable]:
        """Decode an image, or return it as it was decoded before.

        Args:
            source: A path, the bytes of a file, or an image of Pillow.
            option: The option that it was given with, for errors.
            known: The key of an earlier call, or None. While that image is kept it is returned, whatever its file holds now.

        Returns:
            The image and its key, which is None for an image that is not kept: one of Pillow may change at any time.

        Raises:
            ShapeError: It cannot be read, see :func:`open_picture`.
        """
        with self._lock:
            if known is not None and (picture := self._decoded.get(known)) is not None:
                return picture, known
        if (key := _key(source)) is None:
            return open_picture(source, option), None
        with self._lock:
            if (picture := self._decoded.get(key)) is None:
                picture = open_picture(source, option)
                for old in list(self._decoded)[: max(0, len(self._decoded) - _KEPT + 1)]:
                    del self._decoded[old]
                self._decoded[key] = picture
            return picture, key


def stretch_text(picture: Picture, height: int, width: int) -> str | None:
    """Return what is said of an image whose sides have another ratio than those of the clip; None where they agree.

    Args:
        picture: The image.
        height: The height of the clip in pixels.
        width: Its width.
    """
    own_width, own_height = picture.image.size
    if abs(own_width * height / (own_height * width) - 1) <= _STRETCH:
        return None
    return (
        f"the image {shown(picture.name, 200)} has {own_width}×{own_height} pixels and is stretched to {width}×{height}; crop it "
        "first, or draw at another --width and --height, to keep its shapes"
    )


def _key(source: ImageSource) -> Hashable:
    """Return what tells an image from others: the bytes of a file, or its path and what changes when it is written."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        found = os.stat(_path(source))
    except (OSError, ValueError, RuntimeError):  # open_picture says why
        return None
    return os.fsdecode(os.fspath(source)), found.st_mtime_ns, found.st_size, found.st_ino


def _path(source: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(os.fsdecode(os.fspath(source))))


def _read(source: ImageSource, option: str, name: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) <= MAX_IMAGE_BYTES:
            return bytes(source)
        reason: object = f"{len(source)} bytes, more than the {MAX_IMAGE_BYTES} allowed"
    elif isinstance(source, (str, os.PathLike)):
        try:
            return read_limited(_path(source), MAX_IMAGE_BYTES)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder to expand to
            reason = getattr(error, "strerror", None) or error
    else:
        reason = "it is neither a path, nor bytes, nor an image of Pillow"
    raise ShapeError(
        f"{option} {shown(name, 300)} cannot be read: {reason}",
        available=f"an image file ({', '.join(FORMATS)}) of up to {MAX_IMAGE_BYTES >> 20} MiB",
        fix="give the path of an image",
    )


def _decode(raw: bytes, option: str, name: str, pixels: int) -> Image:
    from PIL import Image, UnidentifiedImageError

    what = f"{option} {shown(name, 300)}"
    try:
        with _quiet():
            picture = Image.open(io.BytesIO(raw), formats=FORMATS)
            _check_size(picture, option, name, pixels)
            if getattr(picture, "n_frames", 1) > 1:
                raise ShapeError(f"{what} is an animation of {picture.n_frames} frames", fix="give one of its frames")  # type: ignore[attr-defined]
            picture.load()
    except ShapeError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is higher
        raise _too_large(f"{what}: {error!s:.200}", pixels) from error
    except UnidentifiedImageError as error:
        raise ShapeError(
            f"{what} is no image that can be read", available=FORMATS, fix="save it as PNG or JPEG"
        ) from error
    except MemoryError as error:
        raise ShapeError(f"{what} takes more memory than there is", fix="make it smaller") from error
    except (
        Exception
    ) as error:  # Pillow's decoders: OSError, ValueError, SyntaxError, struct.error and others of their own
        raise ShapeError(
            f"{what} is damaged: {error!s:.200}", available=FORMATS, fix="save it again as PNG or JPEG"
        ) from error
    return _upright(picture, option, name)


def _check_size(picture: Image, option: str, name: str, pixels: int) -> None:
    """Refuse a size by what the header says, before a pixel is decoded."""
    width, height = picture.size
    what = f"{option} {shown(name, 300)} has {width}×{height} pixels"
    if width * height > pixels:
        raise _too_large(what, pixels)
    if min(width, height) < _LEAST:
        raise ShapeError(what, available=f"sides of {_LEAST} pixels or more", fix="give a larger one")


def _too_large(what: str, pixels: int) -> ShapeError:
    return ShapeError(
        what, available=f"up to {pixels / 1e6:.3g} million pixels", fix="make it smaller: a clip has fewer"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings of palettes, metadata and sizes, which are judged here."""
    with _WARNINGS, warnings.catch_warnings():  # the filters are the process's
        warnings.simplefilter("ignore")
        yield


def _upright(picture: Image, option: str, name: str) -> Image:
    """Return an image as RGB of 8 bits, turned as its metadata says.

    Raises:
        ShapeError: It has more than 8 bits a channel, which Pillow would clip to white, or its metadata cannot be read.
    """
    from PIL import ImageOps

    what = f"{option} {shown(name, 300)}"
    if picture.mode.startswith(("I", "F")):
        raise ShapeError(f"{what} has more than 8 bits a channel ({picture.mode})", fix="save it with 8 bits a channel")
    try:
        with _quiet():
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # metadata of a stranger, parsed by Pillow
        raise ShapeError(f"{what} is damaged: {error!s:.200}", fix="save it again as PNG or JPEG") from error
