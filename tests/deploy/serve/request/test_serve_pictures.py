"""Pictures of requests: how they come, what is refused, and what decoding one may cost."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.local import local_http
from dvdquant.deploy.serve.http import app
from dvdquant.deploy.serve.jobs import new_video_id
from dvdquant.deploy.serve.request import decoding
from dvdquant.deploy.serve.request.decoding import decode_picture
from dvdquant.deploy.serve.request.pictures import take_pictures
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import Limits, ServerSettings
from dvdquant.deploy.serve.store.files import FolderFiles
from dvdquant.errors import DvdquantError, ShapeError, UnsupportedError
from tests.support.costs import Costs

ROOT = Path(__file__).resolve().parents[4]
PIXELS = 1_000_000
RAW = b"\x89PNG and so on"
TEXT = base64.b64encode(RAW).decode()
LONG = base64.b64encode(RAW * 100).decode()


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 24), **more: Any) -> bytes:
    """A file with noise in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **more)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------ how they come


@pytest.mark.parametrize(
    "value",
    [
        RAW,
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(RAW).decode(),
        f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT[:4]}\n{TEXT[4:]}",
        {"image_url": f"data:image/png;base64,{TEXT}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;charset=x;base64,{TEXT}"}},
    ],
)
def test_every_way_to_send_a_picture(value: Any) -> None:
    fields = {"prompt": "x", "input_reference": value, "last_reference": None}
    assert take_pictures(fields, 100) == ({"prompt": "x"}, {"input_reference": RAW})


def test_an_object_in_a_form_as_openai_writes_it() -> None:
    rest, pictures = take_pictures({"input_reference[image_url]": f"data:image/png;base64,{TEXT}", "seed": "1"}, 100)
    assert (rest, pictures) == ({"seed": "1"}, {"input_reference": RAW})
    with pytest.raises(ShapeError, match="appears twice"):
        take_pictures({"input_reference[image_url]": TEXT, "input_reference": RAW}, 100)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("https://example.org/cat.png", UnsupportedError, "fetches nothing"),
        ("ftp://example.org/x", UnsupportedError, "fetches nothing"),
        ({"image_url": "http://169.254.169.254/"}, UnsupportedError, "fetches nothing"),
        ({"file_id": "file-1"}, UnsupportedError, "keeps no files"),
        ("data:image/png,abc", ShapeError, "without base64"),
        ("data:image/png;base64,", ShapeError, "is empty"),
        ("not base64!", ShapeError, "is no base64"),
        ("☃☃☃", ShapeError, "is no base64"),
        (7, ShapeError, "input_reference is 7"),
        ([TEXT], ShapeError, "input_reference is"),
        ({"image_url": 5}, ShapeError, "input_reference is 5"),
        ({"image_url": TEXT, "more": 1}, ShapeError, "input_reference is"),
        (b"x" * 101, ShapeError, "has 101 bytes"),
        (base64.b64encode(b"x" * 101).decode(), ShapeError, "has 101 bytes"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(value: Any, kind: type[DvdquantError], said: str) -> None:
    with pytest.raises(kind) as caught:
        take_pictures({"input_reference": value}, 100)
    assert said in str(caught.value)


def test_no_value_of_json_breaks_the_reader() -> None:
    chance, said = random.Random(0), []
    words = ["", "data:", "data:;base64", "data:x;base64,=", "[", "a" * 90, "\ud800", "\0", TEXT, None, True, 1e9]
    for _ in range(300):
        value: Any = chance.choice(words)
        for _ in range(chance.randrange(3)):
            name = chance.choice(["image_url", "url", "file_id", ""])
            value = chance.choice([{name: value}, [value], f"{value}{chance.choice(words)}"])
        try:
            take_pictures({"input_reference": value, "last_reference": chance.choice(words)}, 100)
        except DvdquantError as error:
            said.append(str(error))
    assert 0 < max(map(len, said)) < 1000


@pytest.mark.parametrize(
    ("body", "thread"),
    [
        ({"json": {"input_reference": LONG}}, "store"),
        ({"data": {"input_reference[image_url]": LONG}}, "store"),
        ({"json": {"input_reference": TEXT}}, "here"),
        ({"files": {"input_reference": ("a.png", RAW * 100)}}, "here"),
    ],
)
def test_long_base64_is_read_beside_the_loop(
    body: dict[str, Any], thread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest picture takes a third of a second, in which nobody else would get an answer."""
    names = []

    def taken(*given: Any) -> Any:
        names.append(threading.current_thread().name.partition("_")[0])
        return take_pictures(*given)

    monkeypatch.setattr(Service, "takes_pictures", True)
    monkeypatch.setattr(app, "take_pictures", taken)
    settings = ServerSettings((), tmp_path, devices=(), spare=False, limits=Limits(body=1024, picture=4096))
    with local_http(settings) as server:
        answer = httpx.post(f"{server.url}/preflight", **body)
    assert "prompt is missing" in answer.json()["error"]["message"]
    assert [name == "store" for name in names] == [thread == "store"]


# ------------------------------------------------------------------------------------------------------ decoding them


def test_a_picture_comes_back_upright_and_without_anything_but_pixels() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    exif[270] = "a secret of the camera"
    Image.open(io.BytesIO(picture())).save(file, "PNG", exif=exif)
    decoded = decode_picture(file.getvalue(), "input_reference", PIXELS)
    assert (decoded.width, decoded.height) == (24, 40)
    assert b"secret" not in decoded.png
    seen = Image.open(io.BytesIO(decoded.png))
    assert (seen.mode, seen.size, seen.info) == ("RGB", (24, 40), {})
    wanted = np.asarray(Image.open(io.BytesIO(picture())).rotate(-90, expand=True))
    assert np.array_equal(np.asarray(seen), wanted)


def _png_that_claims(width: int, height: int) -> bytes:
    """A PNG with another size in its head, and the right checksum for it."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    raw = picture()
    return raw[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + raw[33:]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no image"),
        (b"GIF89a" + b"\0" * 50, "no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (picture()[:300], "damaged"),
        (_png_that_claims(9000, 9000), "9000×9000 pixels"),
        (_png_that_claims(60_000, 60_000), "3600000000 pixels"),
        (picture(size=(1200, 900)), "1200×900 pixels"),
        (picture(size=(4, 4)), "4×4 pixels"),
    ],
)
def test_files_that_are_refused(raw: bytes, said: str) -> None:
    with pytest.raises(ShapeError) as caught:
        decode_picture(raw, "input_reference", PIXELS)
    assert said in str(caught.value)
    assert "input_reference" in str(caught.value)
    assert "/" not in str(caught.value).replace("and/or", "")


def test_a_decoder_that_hangs_grows_or_dies_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hole in a decoder could do, by a Pillow that does it; the limits are the product's."""
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text(
        "from PIL import Image\nclass UnidentifiedImageError(Exception): pass\n"
    )
    (tmp_path / "PIL" / "Image.py").write_text(
        """
import os, subprocess
def preinit(): pass
class Image: pass
class DecompressionBombError(Exception): pass
def open(file, formats):
    how = file.read().decode()
    if how == "grow":
        bytearray(4 << 30)
    elif how == "die":
        os.abort()
    elif how == "hang":
        import time; time.sleep(600)
    elif how == "secret":
        raise ValueError(str("DVDQ_API_KEY" in os.environ) + str("DVDQ_STORE" in os.environ))
    elif how == "write":
        for _ in range(1000):
            os.write(1, b"x" * 1000000)
"""
    )
    (tmp_path / "PIL" / "ImageOps.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DVDQ_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("DVDQ_STORE", "postgresql://user:secret@host/db")
    monkeypatch.setattr(decoding, "SECONDS", 30.0)
    said = {}
    for how in ("grow", "die", "secret", "write"):
        with pytest.raises(ShapeError) as caught:
            decode_picture(how.encode(), "input_reference", 10_000)
        said[how] = str(caught.value)
    assert "more memory than there is" in said["grow"]
    assert "cannot be decoded within" in said["die"]
    assert "FalseFalse" in said["secret"]
    assert "cannot be decoded within" in said["write"]
    monkeypatch.setattr(decoding, "SECONDS", 0.5)
    with pytest.raises(ShapeError, match="cannot be decoded within"):
        decode_picture(b"hang", "input_reference", 10_000)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [100, pytest.param(20_000, marks=pytest.mark.stress)])
def test_changed_files_are_decoded_or_refused(count: int) -> None:
    """With the product's limits, in the process that they protect; a refusal names the field, and nothing ends a process."""
    command = [sys.executable, "-m", "tests.support.picture_cases", str(count), str(count)]
    with Costs("pictures of requests") as costs:
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        for line in ended.stdout.splitlines():
            costs.add_all(**json.loads(line))
        assert ended.returncode == 0, ended.stderr
        assert costs.cases == count
        assert count / 4 < costs.refused < count


# --------------------------------------------------------------------------------------------------------- their files


def test_pictures_lie_beside_the_clips_and_go_with_their_job(tmp_path: Path) -> None:
    files, video = FolderFiles(tmp_path / "videos"), new_video_id()
    assert files.picture(video, "input_reference") is None
    files.write_picture(video, "input_reference", RAW)
    files.write_picture(video, "last_reference", b"other")
    assert files.picture(video, "input_reference") == RAW
    assert list(files.ids()) == [video]
    files.delete_clip(video)
    assert files.picture(video, "last_reference") == b"other"
    files.delete(video)
    assert list(files.ids()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    for name in ("../../x", "input_reference/../x", ""):
        with pytest.raises(ValueError, match="no picture"):
            files.write_picture(video, name, RAW)
    with pytest.raises(ValueError, match="no id"):
        files.picture("../" + video, "input_reference")
    assert os.listdir(tmp_path) in (["pictures"], [])
