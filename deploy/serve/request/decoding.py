"""Decoding pictures of strangers in a process of their own, with little memory, little time and no secrets.

    python -m dvdquant.deploy.serve.request.decoding NAME PIXELS < FILE > PICTURE

The decoders of image files are large programs in C. So the process that runs them has nothing to lose: it may not fork, open
a file for writing or take more than its share of memory and time, and it does not get the environment of the server. What it
gives back is a line of JSON and, behind it, the picture as a plain PNG, which is all that server and workers ever read.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, Any

from dvdquant.errors import DvdquantError, ResourceError, ShapeError
from dvdquant.system.files import strict_json

__all__ = ["DecodedPicture", "answer", "decode_picture", "limit_process", "prepare", "result_of"]

SECONDS = 20.0  # for one picture; the largest takes two or three
_CPU_SECONDS = 15
_MEMORY = 768 << 20  # of addresses, beside what the pixels take
_PIXEL_BYTES = 32  # of addresses: as it was written, upright, RGB, PNG
_OPEN_FILES = 16
_LONGEST_LINE = 1 << 16
_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TMPDIR")


@dataclass(frozen=True)
class DecodedPicture:
    """A picture that was decoded and written anew.

    Args:
        png: The picture as PNG: RGB, 8 bits a channel, upright, and only pixels.
        width: The width in pixels.
        height: The height in pixels.
        sha256: The SHA-256 of the file that was sent.
    """

    png: bytes
    width: int
    height: int
    sha256: str

    def facts(self) -> dict[str, Any]:
        """Return size and SHA-256 of the picture, as its job shows them."""
        return {"width": self.width, "height": self.height, "sha256": self.sha256}


def decode_picture(raw: bytes, name: str, pixels: int) -> DecodedPicture:
    """Decode a picture; several threads may do so at the same time.

    Args:
        raw: The file.
        name: The field that it came in.
        pixels: Width x height at most.

    Raises:
        ShapeError: It is no picture, damaged, too large, or takes more time or memory than a picture may.
        ResourceError: This machine cannot start a process now.
    """
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "dvdquant.deploy.serve.request.decoding", name, str(pixels)]
    with tempfile.TemporaryFile() as result:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=result,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(f"the picture cannot be decoded now: {error.strerror}", fix="try again later") from None
        with process:
            try:
                process.communicate(raw, SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return result_of(result, name, pixels)


def result_of(result: IO[bytes], name: str, pixels: int) -> DecodedPicture:
    """Read what the process wrote, which is as untrusted as the picture.

    Args:
        result: The file that it wrote.
        name: What the picture is called in errors.
        pixels: The most pixels it may have.

    Raises:
        ShapeError: The picture was refused, or the process did not come to an answer.
    """
    result.seek(0)
    line = result.readline(_LONGEST_LINE)
    try:
        said = strict_json(line, max_depth=2)
        if "what" in said:
            raise ShapeError(str(said["what"]), available=said["available"], fix=said["fix"])
        width, height, sha256 = int(said["width"]), int(said["height"]), str(said["sha256"])[:64]
        png = result.read(4 * pixels + _LONGEST_LINE)
        whole = len(png) == said["bytes"] and png.startswith(b"\x89PNG\r\n\x1a\n")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, DvdquantError):
            raise
        whole = False
    if not whole or not 0 < width * height <= pixels:
        raise ShapeError(
            f"{name} cannot be decoded within the time and the memory that a picture gets",
            available=f"up to {pixels / 1e6:.3g} million pixels",
            fix="save it again as PNG or JPEG",
        )
    return DecodedPicture(png, width, height, sha256)


# ------------------------------------------------------------------------------------------------------- the process


def limit_process(pixels: int) -> None:
    """Take away from this process what decoding does not need.

    Args:
        pixels: The most pixels of a picture, by which memory is limited.
    """
    import resource

    memory = _MEMORY + _PIXEL_BYTES * pixels
    limits = {
        resource.RLIMIT_CPU: _CPU_SECONDS,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 4 * pixels + 2 * _LONGEST_LINE,  # the result's file, which is open
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
    os.nice(5)


def answer(raw: bytes, name: str, pixels: int) -> bytes:
    """Return what the process says of a picture: a line of JSON, and the PNG behind it if it is one.

    Args:
        raw: The bytes of the picture.
        name: What it is called in errors.
        pixels: The most pixels it may have.
    """
    from dvdquant.deploy.generation.images import open_picture

    png = io.BytesIO()
    said: dict[str, Any]
    try:
        picture = open_picture(raw, name, pixels)
        picture.image.save(png, "PNG", compress_level=1)
        width, height = picture.image.size
        said = {"width": width, "height": height, "sha256": picture.sha256, "bytes": png.tell()}
    except ShapeError as error:
        said = {"what": error.what, "available": error.available, "fix": error.fix if error.has_own_fix else None}
    return json.dumps(said).encode() + b"\n" + (png.getvalue() if "bytes" in said else b"")


def main(words: list[str]) -> None:
    """Decode the picture on stdin.

    Args:
        words: The name of the field, and the most pixels.
    """
    prepare()
    name, pixels = words[0], int(words[1])
    limit_process(pixels)
    out = sys.stdout.buffer
    out.write(answer(sys.stdin.buffer.read(), name, pixels))
    out.flush()


def prepare() -> None:
    """Import what decodes, which opens more files than the limits allow."""
    from PIL import Image

    import dvdquant.deploy.generation.images  # noqa: F401  (imported for answer)

    Image.preinit()


if __name__ == "__main__":
    main(sys.argv[1:])
