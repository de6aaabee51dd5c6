"""Clips as files: what a decoder gets back, whole files or none, and PSNR."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dvdquant.deploy import video
from dvdquant.deploy.video import Row, atomic_path, check_target, enlarge, psnr, side_by_side
from dvdquant.errors import DvdquantError, OutputError, ShapeError
from tests.commands import environment
from tests.running import decode

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
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from dvdquant.deploy.video import write_mp4
from dvdquant.errors import DvdquantError
import diffusers.utils, imageio_ffmpeg
noise = np.random.default_rng(0).integers(0, 256, (20, 192, 192, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_mp4(Path(sys.argv[1]), noise, 4)
except DvdquantError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], env=environment(), capture_output=True, text=True, check=False
    )
    assert "refused:" in done.stdout, done.stderr
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_bad_clips_and_rates_are_refused(tmp_path: Path) -> None:
    for bad in (clip().astype(np.float32), clip()[0], clip()[..., :2], clip(0)):
        with pytest.raises(ShapeError):
            video.write_mp4(tmp_path / "a.mp4", bad, 4)
    for fps in (0, -1, float("nan"), 1000):
        with pytest.raises(ShapeError):
            video.write_gif(tmp_path / "a.gif", clip(), fps)
    assert list(tmp_path.iterdir()) == []
