"""Images from anybody: decoded upright under limits, or refused in words."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dvdquant.deploy.generation import images
from dvdquant.deploy.generation.images import PictureCache, open_picture, stretch_text
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.errors import ShapeError
from tests.support.image_pipelines import picture


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file of it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of some dozen bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_what_cameras_and_browsers_write(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(0), kind, **({"lossless": True} if kind == "WEBP" else {})))
    read = open_picture(path, "--image")
    difference = np.abs(np.asarray(read.image, dtype=int) - np.asarray(picture(0), dtype=int))
    assert difference.max() <= (0 if kind != "JPEG" else 64)
    assert difference.mean() < 8
    assert read.image.size == (40, 36)
    assert read.to_json()["name"] == str(path)
    assert open_picture(path.read_bytes(), "--image").sha256 == read.sha256


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    read = open_picture(encoded(picture(0).convert(mode), kind), "--image").image
    assert (read.mode, read.size) == ("RGB", (40, 36))


def test_the_camera_s_orientation_is_applied() -> None:
    """All eight of them give the same upright image."""
    upright = picture(2)
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, turn in turns.items():
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = open_picture(encoded(stored, "PNG", exif=exif), "--image")
        np.testing.assert_array_equal(np.asarray(read.image), np.asarray(upright), str(orientation))


def _sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)), "PNG")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no image"),
        (b"a red cat", "no image"),
        (encoded(picture(0), "GIF"), "no image"),
        (encoded(picture(0), "TIFF"), "no image"),
        (png_of_size(60_000, 60_000), "64 million pixels"),
        (png_of_size(8_000, 8_001), "8000×8001 pixels"),
        (png_of_size(2, 2_000), "2×2000 pixels"),
        (encoded(picture(0), "PNG")[:-200], "damaged"),
        (encoded(picture(0), "JPEG")[:400], "damaged"),
        (_sixteen_bit(), "more than 8 bits"),
        (encoded(picture(0), "PNG", save_all=True, append_images=[picture(1)]), "animation of 2"),
        (encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)]), "animation of 2"),
    ],
)
def test_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "evil\x1b[31m\u202e.png"
    path.write_bytes(raw)
    with pytest.raises(ShapeError) as caught:
        open_picture(path, "--last-image")
    text = str(caught.value)
    assert said in text
    assert text.startswith("--last-image")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert caught.value.fix


def test_a_large_header_costs_no_memory() -> None:
    import tracemalloc

    raw = png_of_size(7_999, 9_999)
    tracemalloc.start()
    try:
        with pytest.raises(ShapeError):
            open_picture(raw, "--image")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


@pytest.mark.parametrize(
    "make", [_pipe, lambda folder: folder, lambda folder: folder / "gone.png", lambda _: Path("/dev/zero")]
)
def test_what_is_no_file(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="cannot be read"):
        open_picture(make(tmp_path), "--image")


def test_limits_and_other_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    for source in (encoded(picture(0), "PNG"), 3, object()):
        with pytest.raises(ShapeError, match="cannot be read"):
            open_picture(source, "--image")
    with pytest.raises(ShapeError, match="pixels"):
        open_picture(Image.new("RGB", (9_000, 9_000)), "--image")


def test_words_about_another_ratio() -> None:
    wide = open_picture(picture(0, 64, 32), "--image")
    assert stretch_text(wide, 480, 960) is None
    assert "64×32 pixels and is stretched to 832×480" in (stretch_text(wide, 480, 832) or "")


def test_a_request_says_its_images_in_json(tmp_path: Path) -> None:
    said = GenerateRequest("a cat", image=tmp_path / "a.png", last_image=b"12").to_json()
    assert said["image"] == str(tmp_path / "a.png")
    assert said["last_image"] == "an image file of 2 bytes"
    assert GenerateRequest("a cat").to_json()["image"] is None


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_decoded_again_once_it_has_changed(kind: Callable[[Path], str | Path], tmp_path: Path) -> None:
    """Written in its place, or replaced by another file of the same size and time; one file as first and last is one image."""
    cache, path, other = PictureCache(), tmp_path / "image.png", tmp_path / "other.png"
    source = kind(path)
    raw = [encoded(picture(seed), "PNG").ljust(1 << 14, b"\0") for seed in range(3)]
    path.write_bytes(raw[0] + b"\0")
    first, key = cache.open(source, "--image")
    assert cache.open(source, "--last-image")[0] is first
    path.write_bytes(raw[1])
    second, _ = cache.open(source, "--image")
    other.write_bytes(raw[2])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    third, _ = cache.open(source, "--image")
    for seen, seed in ((first, 0), (second, 1), (third, 2)):
        np.testing.assert_array_equal(np.asarray(seen.image), np.asarray(picture(seed)))
    path.unlink()
    assert cache.open(source, "--image", key)[0] is first  # whoever has begun with it goes on with it
    with pytest.raises(ShapeError, match=r"--image .*image.png cannot be read: No such file"):
        cache.open(source, "--image")


def test_the_last_images_are_kept() -> None:
    """By the bytes of their files; an image of Pillow may change at any time."""
    cache = PictureCache()
    files = [encoded(picture(seed), "PNG") for seed in range(6)]
    opened = [cache.open(file, "--image") for file in files]
    assert [key for _, key in opened] == files
    assert all(
        cache.open(bytes(bytearray(file)), "--image")[0] is seen for file, (seen, _) in zip(files[2:], opened[2:])
    )
    again, _ = cache.open(files[0], "--image", files[0])
    assert again is not opened[0][0]
    assert again.sha256 == opened[0][0].sha256
    of_pillow = picture(0)
    assert cache.open(of_pillow, "--image")[1] is None
    before = cache.open(of_pillow, "--image")[0].sha256
    of_pillow.putpixel((0, 0), (1, 2, 3))
    assert cache.open(of_pillow, "--image")[0].sha256 != before


def _mutated(count: int, seed: int) -> None:
    """Flip, cut and repeat bytes of good files: an image comes back, or ShapeError."""
    generator = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [encoded(picture(0), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")]
    read = 0
    for index in range(count):
        raw = bytearray(good[index % 3])
        for _ in range(int(generator.integers(1, 6))):
            place = int(generator.integers(len(raw)))
            raw[place] = int(generator.integers(256))
        if index % 5 == 0:
            raw = raw[: int(generator.integers(len(raw)))]
        try:
            image = open_picture(bytes(raw), "--image").image
        except ShapeError:
            continue
        read += 1
        assert image.mode == "RGB"
        assert image.width * image.height <= images.MAX_IMAGE_PIXELS
    assert 0 < read < count


def test_damaged_files() -> None:
    _mutated(600, 0)


@pytest.mark.stress
def test_damaged_files_many() -> None:
    _mutated(20_000, 1)
