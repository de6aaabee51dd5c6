"""Clips as files: what a decoder gets back, whole files or none, and PSNR."""

from __future__ import annotations

import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dvdquant.deploy.generation import encoder, video
from dvdquant.deploy.generation.psnr import psnr
from dvdquant.deploy.generation.video import Row, atomic_path, check_target, enlarge, side_by_side
from dvdquant.errors import DvdquantError, OutputError, ShapeError
from tests.support.children import in_child
from tests.support.running import decode

Clip = np.ndarray[Any, np.dtype[np.uint8]]


def clip(frames: int = 5, height: int = 24, width: int = 24) -> Clip:
    """A red square that moves one pixel a frame on grey."""
    made = np.full((frames, height, width, 3), 127, np.uint8)
    for index in range(frames):
        made[index, 8:16, 4 + index : 12 + index] = (250, 40, 40)
    return made


def test_psnr_is_its_definition() -> None:
    reference = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    other = reference.copy()
    other[0, 0, 0, 0] ^= 255
    difference = float(int(other[0, 0, 0, 0]) - int(reference[0, 0, 0, 0])) ** 2
    assert psnr(other, reference) == pytest.approx(10 * math.log10(255**2 * reference.size / difference), rel=1e-12)
    assert psnr(reference, reference) == math.inf
    # Unsigned differences must not wrap around: 0 and 255 are as far apart as can be.
    assert psnr(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)) == pytest.approx(0.0)
    for bad in (reference[:2], reference.astype(np.float32)):
        with pytest.raises(ShapeError):
            psnr(bad, reference)


def test_enlarge_repeats_pixels() -> None:
    small = clip()
    large = enlarge(small, 192)
    assert large.shape == (5, 192, 192, 3)
    assert np.array_equal(large[:, ::8, ::8], small)
    assert np.array_equal(large[:, 7::8, 7::8], small)
    assert enlarge(large) is large
    assert enlarge(clip(2, 480, 832)).shape == (2, 480, 832, 3)


@pytest.mark.parametrize("size", [(24, 24), (33, 47)])
def test_mp4_decodes_to_what_went_in(tmp_path: Path, size: tuple[int, int]) -> None:
    made = enlarge(clip(6, *size))
    video.write_mp4(tmp_path / "clip.mp4", made, 4)
    got = decode(tmp_path / "clip.mp4")
    height, width = made.shape[1:3]
    assert got.shape == (6, height + height % 2, width + width % 2, 3)
    # H.264 at this quality: a few levels. A frame out of place or swapped colours would be tens.
    assert np.abs(got[:, :height, :width].astype(float) - made).mean() < 4
    wrong = np.abs(got[:, :height, :width].astype(float) - np.roll(made, 1, axis=0)).mean()
    assert wrong > 2 * np.abs(got[:, :height, :width].astype(float) - made).mean()


def test_gif_holds_every_frame(tmp_path: Path) -> None:
    still = np.repeat(enlarge(clip(1)), 3, axis=0)
    made = np.concatenate([enlarge(clip(5)), still])
    video.write_gif(tmp_path / "clip.gif", made, 5)
    assert np.array_equal(decode(tmp_path / "clip.gif")[:5], made[:5])
    picture = Image.open(tmp_path / "clip.gif")
    total = 0
    for index in range(picture.n_frames):  # type: ignore[attr-defined]
        picture.seek(index)
        total += picture.info["duration"]
    assert total == 8 * 200
    assert picture.info["loop"] == 0


def test_strip_shows_first_and_last_frame_untouched(tmp_path: Path) -> None:
    made = clip(30)
    video.write_strip(tmp_path / "s.png", [Row(made, "16 bit"), Row(made[:3], "a4", "24.1 dB")], columns=4)
    picture = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    for frame in (made[0], made[-1], made[2]):
        assert _found(picture, enlarge(frame[None], 96)[0])
    assert not _found(picture, enlarge(made[1:2] // 2, 96)[0])


def _found(picture: Clip, part: Clip) -> bool:
    height, width = part.shape[:2]
    spots = np.argwhere((picture[: 1 - height or None, : 1 - width or None] == part[0, 0]).all(-1))
    return any(np.array_equal(picture[y : y + height, x : x + width], part) for y, x in spots)


def test_side_by_side_keeps_every_clip(tmp_path: Path) -> None:
    first, second = clip(4), clip(4)[:, ::-1].copy()
    joined = side_by_side([Row(first, "16 bit"), Row(second, "a4", "20 dB to 16 bit")])
    assert joined.shape[0] == 4
    for frame in range(4):
        for each in (first, second):
            assert _found(joined[frame], enlarge(each[frame : frame + 1])[0])
    with pytest.raises(ShapeError):
        side_by_side([Row(first, "a"), Row(clip(3), "b")])


def test_atomic_path_writes_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.suffix == ".txt"
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _fail_within(target, error)
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]
    assert target.read_text() == "one"
    assert target.stat().st_mode & 0o444 == 0o444 & ~_umask()


def _fail_within(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("two")
        raise error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_check_target(tmp_path: Path) -> None:
    assert check_target(tmp_path / "a" / "b" / "c.MP4", (".mp4",)) == tmp_path / "a" / "b" / "c.MP4"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for bad in ("a.avi", "a", "folder.mp4", "file/a.mp4"):
        with pytest.raises(OutputError):
            check_target(tmp_path / bad, (".mp4", ".gif"))
    with pytest.raises(DvdquantError):
        check_target(Path("/proc/none/a.mp4"), (".mp4",))


def test_a_full_disk_leaves_the_old_clip(tmp_path: Path) -> None:
    """The encoder is a process of its own: a file size limit stops it as a full disk does."""
    target = tmp_path / "clip.mp4"
    video.write_mp4(target, enlarge(clip()), 4)
    before = target.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (20, 192, 192, 3), dtype=np.uint8)

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(DvdquantError):
            video.write_mp4(target, noise, 4)

    assert in_child(write) == 0
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


# ------------------------------------------------------------------------------------------------- encoders that fail

LISTING = 'case "$*" in *-encoders*) echo " V....D libx264 H.264"; exit 0;; esac\n'


def _encoder(tmp_path: Path, script: str) -> str:
    """A program that stands in for ffmpeg; it lists an H.264 encoder, and then runs ``script``. $out is the clip."""
    path = tmp_path / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{LISTING}for out; do :; done\n{script}\n")
    path.chmod(0o755)
    return str(path)


FAILING = {
    "does nothing": ("cat > /dev/null; exit 0", "no mp4"),
    "writes words": ("cat > /dev/null; echo hello > $out", "no mp4"),
    "writes the head of an mp4": (
        "cat > /dev/null; printf '\\000\\000\\000\\020ftypisom\\000\\000\\000\\000' > $out",
        "no mp4",
    ),
    "dies half-way": ("head -c 1000 > /dev/null; echo 'out of \033[31mideas'; exit 3", "failed with code 3"),
    "is killed": ("head -c 1000 > /dev/null; kill -9 $$", "was killed by SIGKILL"),
    "says that the disk is full": ("cat > /dev/null; echo 'No space left on device'; exit 1", "free disk space"),
    "never answers": ("exec sleep 60", "has not answered for 1 s"),
    "takes a little and stops": ("head -c 5000 > /dev/null; exec sleep 60", "has not answered for 1 s"),
    "leaves a child behind": ("cat > /dev/null; sleep 60 & exit 0", "no mp4"),
}


@pytest.mark.parametrize("what", FAILING)
def test_an_encoder_that_fails_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, said = FAILING[what]
    exe = _encoder(tmp_path, script)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", exe)
    monkeypatch.setattr(encoder, "PATIENCE", 1.0)
    target = tmp_path / "clips" / "clip.mp4"
    target.parent.mkdir()
    target.write_bytes(b"the clip of yesterday")
    started = time.monotonic()
    with pytest.raises(OutputError) as caught:
        video.write_mp4(target, enlarge(clip()), 4)
    assert time.monotonic() - started < 20
    text = str(caught.value)
    assert said in text
    assert exe in text
    assert caught.value.fix
    assert "\x1b" not in text
    assert [(p.name, p.read_bytes()) for p in target.parent.iterdir()] == [("clip.mp4", b"the clip of yesterday")]


def test_too_few_frames_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole mp4 of another clip: the sample table and the decoder both tell."""
    other = tmp_path / "other.mp4"
    video.write_mp4(other, enlarge(clip(3)), 4)
    assert encoder.mp4_frames(other) == encoder.count_frames(other) == 3
    for length in (8, 40, other.stat().st_size - 1):
        (tmp_path / "stump.mp4").write_bytes(other.read_bytes()[:length])
        assert encoder.mp4_frames(tmp_path / "stump.mp4") is None
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", _encoder(tmp_path, f"cat > /dev/null; cp {other} $out"))
    with pytest.raises(OutputError, match="3 of 5 frames"):
        video.write_mp4(tmp_path / "clip.mp4", enlarge(clip(5)), 4)
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize(
    ("exe", "said"),
    [
        ("/bin/true", "does not answer like ffmpeg"),
        ("/bin/false", "failed with code 1"),
        ("/bin/echo", "does not answer like ffmpeg"),
        ("/nowhere/ffmpeg", "No such file"),
        ("/etc/passwd", "Permission denied"),
        ("/", "Permission denied"),
    ],
)
def test_what_is_no_ffmpeg_is_named_before_any_work(
    exe: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", exe)
    with pytest.raises(OutputError) as caught:
        check_target(tmp_path / "clip.mp4", (".mp4", ".gif"))
    assert said in str(caught.value)
    assert f"IMAGEIO_FFMPEG_EXE={exe}" in str(caught.value)
    assert "IMAGEIO_FFMPEG_EXE" in (caught.value.fix or "")
    check_target(tmp_path / "clip.gif", (".mp4", ".gif"))  # which needs none
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_never_lists_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ffmpeg"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    monkeypatch.setattr(encoder, "PATIENCE", 0.5)
    with pytest.raises(OutputError, match="has not answered"):
        check_target(tmp_path / "clip.mp4", (".mp4",))


def test_bad_clips_and_rates_are_refused(tmp_path: Path) -> None:
    for bad in (clip().astype(np.float32), clip()[0], clip()[..., :2], clip(0)):
        with pytest.raises(ShapeError):
            video.write_mp4(tmp_path / "a.mp4", bad, 4)
    for fps in (0, -1, float("nan"), 1000):
        with pytest.raises(ShapeError):
            video.write_gif(tmp_path / "a.gif", clip(), fps)
    assert list(tmp_path.iterdir()) == []
