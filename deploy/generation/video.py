"""Clips as files: mp4, GIF and a strip of frames, each written whole or not at all.

A clip is an array [F, H, W, 3] uint8. Tiny clips are enlarged by whole factors with nearest neighbour, so that a player
shows the pixels the model made and not a blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvdquant.deploy.generation.encoder import encode_mp4, find_encoder
from dvdquant.errors import OutputError, ShapeError
from dvdquant.system.whole_file import atomic_path, check_writable
from dvdquant.text import shown

__all__ = [
    "Row",
    "atomic_path",
    "check_target",
    "enlarge",
    "side_by_side",
    "write_gif",
    "write_mp4",
    "write_strip",
]

Clip = np.ndarray[Any, np.dtype[np.uint8]]

MIN_SIDE = 192  # pixels; smaller clips are enlarged
PAPER, INK, FAINT = (255, 255, 255), (24, 28, 34), (110, 118, 129)
_FONT = 15


@dataclass(frozen=True)
class Row:
    """One clip of a strip; title and note stand left of its frames.

    Args:
        frames: uint8 [F, H, W, 3].
        title: The title.
        note: A line below it, or an empty text.
    """

    frames: Clip
    title: str
    note: str = ""


def enlarge(clip: Clip, min_side: int = MIN_SIDE) -> Clip:
    """Enlarge ``clip`` by the smallest whole factor that brings its shorter side to ``min_side`` pixels, nearest neighbour.

    Args:
        clip: The frames, uint8 [F, H, W, 3].
        min_side: The least length of the shorter side in pixels.
    """
    _check_clip(clip)
    factor = max(1, math.ceil(min_side / min(clip.shape[1:3])))
    return clip.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else clip


# -------------------------------------------------------------------------------------------------------- whole files


def check_target(path: Path, suffixes: Sequence[str]) -> Path:
    """Return ``path`` if a file of that kind can be written there, found out before hours of work.

    Args:
        path: The path of the file.
        suffixes: The suffixes that are allowed, with their dot.

    Raises:
        OutputError: The suffix is another, a folder or a device is in the file's place, its folder cannot be written or made, or
            there is no encoder for .mp4.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(
            f"{path} does not say what it is to be: suffix {path.suffix!r}",
            available=suffixes,
            fix=f"call it {path.with_suffix(suffixes[0]).name}",
        )
    check_writable(path)
    if path.suffix.lower() == ".mp4":
        find_encoder()
    return path


def write_mp4(path: Path, clip: Clip, fps: float) -> None:
    """Write an H.264 file that players show: even sizes (the last row or column is repeated), yuv420p.

    Args:
        path: The path of the file.
        clip: The frames, uint8 [F, H, W, 3].
        fps: Frames per second.

    Raises:
        OutputError: The encoder failed, did not answer, or wrote another number of frames than it was given.
    """
    _check_clip(clip)
    _check_fps(fps)
    padded = np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
    with atomic_path(path) as temporary:
        encode_mp4(temporary, padded, fps)


def write_gif(path: Path, clip: Clip, fps: float) -> None:
    """Write a GIF that loops; 256 colours of its own for each frame. OutputError as :func:`atomic_path`.

    Args:
        path: The path of the file.
        clip: The frames, uint8 [F, H, W, 3].
        fps: Frames per second.
    """
    from PIL import Image

    _check_clip(clip)
    _check_fps(fps)
    palettes = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in clip]
    with atomic_path(path) as temporary:
        # GIF counts hundredths of a second. Equal frames would be merged, and the count of frames with them.
        duration = max(20, round(100 / fps) * 10)
        palettes[0].save(
            temporary, save_all=True, append_images=palettes[1:], duration=duration, loop=0, optimize=False
        )


# ------------------------------------------------------------------------------------------------- pictures of clips


def write_strip(path: Path, rows: Sequence[Row], columns: int = 8, min_side: int = 96) -> None:
    """Write a PNG with one row a clip.

    A row has title and note, then up to ``columns`` frames spaced evenly from first to last, numbered from 1 along the top.

    Args:
        path: The path of the file.
        rows: The clips, each with a title and a note.
        columns: The most frames of a row.
        min_side: The shortest side of a picture in pixels.
    """
    with atomic_path(path) as temporary:
        draw_strip(rows, columns, min_side).save(temporary)


def draw_strip(rows: Sequence[Row], columns: int = 8, min_side: int = 96) -> Any:
    """Return the picture of :func:`write_strip` as a PIL image.

    Args:
        rows: The clips, each with a title and a note.
        columns: The most frames of a row.
        min_side: The shortest side of a picture in pixels.

    Raises:
        ShapeError: There are no clips, or one is not uint8 [F, H, W, 3].
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise ShapeError("a strip of no clips", fix="give at least one clip")
    font, small = _fonts()
    picked = [_evenly(len(row.frames), columns) for row in rows]
    clips = [_shrink(enlarge(row.frames[pick], min_side), 320) for row, pick in zip(rows, picked)]
    labels = [[*_wrap(row.title, 24), *_wrap(row.note, 24)] for row in rows]
    gap, head, line = 6, 24, _FONT + 5
    left = 2 * gap + max(int(font.getlength(text)) for texts in labels for text in texts)
    heights = [max(clip.shape[1], line * len(texts)) for clip, texts in zip(clips, labels)]
    width = left + max(len(clip) * (clip.shape[2] + gap) for clip in clips)
    image = Image.new("RGB", (width, head + sum(heights) + gap * len(rows)), PAPER)
    draw, top = ImageDraw.Draw(image), head
    for row, clip, pick, texts, height in zip(rows, clips, picked, labels, heights):
        titles = len(_wrap(row.title, 24))
        for i, text in enumerate(texts):
            draw.text((gap, top + line * i), text, fill=INK if i < titles else FAINT, font=font)
        for i, frame in enumerate(clip):
            x = left + i * (clip.shape[2] + gap)
            image.paste(Image.fromarray(frame), (x, top))
            if top == head:
                draw.text((x, 4), f"frame {pick[i] + 1}" if i == 0 else str(pick[i] + 1), fill=FAINT, font=small)
        top += height + gap
    return image


def side_by_side(rows: Sequence[Row]) -> Clip:
    """Return the clips of ``rows``, of one shape [F, H, W, 3], beside each other under their titles and notes, as one clip.

    Args:
        rows: The clips, each with a title and a note.

    Raises:
        ShapeError: Their shapes differ.
    """
    from PIL import Image, ImageDraw

    if len({row.frames.shape for row in rows}) != 1:
        raise ShapeError(
            "clips of different sizes cannot stand side by side", fix="draw all clips with one height and width"
        )
    clips = [enlarge(row.frames) for row in rows]
    frames, height, width = clips[0].shape[:3]
    font, _ = _fonts()
    gap, line = 8, _FONT + 5
    chars = max(8, int((width - 4) / font.getlength("n")))
    texts = [[*_wrap(row.title, chars), *_wrap(row.note, chars)] for row in rows]
    head = 6 + line * max(map(len, texts))
    base = Image.new("RGB", (len(rows) * width + (len(rows) - 1) * gap, head + height), PAPER)
    draw = ImageDraw.Draw(base)
    for i, lines in enumerate(texts):
        titles = len(_wrap(rows[i].title, chars))
        for j, text in enumerate(lines):
            place = (i * (width + gap) + 2, 3 + line * j)
            draw.text(place, text, fill=INK if j < titles else FAINT, font=font)
    joined = np.repeat(np.asarray(base)[None], frames, axis=0)
    for i, clip in enumerate(clips):
        x = i * (width + gap)
        joined[:, head:, x : x + width] = clip
    return joined


def _evenly(count: int, columns: int) -> list[int]:
    """Up to ``columns`` indices from 0 to count − 1, spaced evenly, both ends among them."""
    picks = min(count, max(1, columns))
    return [round(i * (count - 1) / max(1, picks - 1)) for i in range(picks)]


def _shrink(clip: Clip, longest: int) -> Clip:
    """Large frames scaled down (area average) so that a strip stays a picture and not a wall."""
    from PIL import Image

    height, width = clip.shape[1:3]
    if max(height, width) <= longest:
        return clip
    factor = longest / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip])


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return [line for part in shown(text, 0, keep="\n").split("\n") if part for line in textwrap.wrap(part, width)]


def _fonts() -> tuple[Any, Any]:
    from PIL import ImageFont

    return ImageFont.load_default(_FONT), ImageFont.load_default(_FONT - 3)


def _check_clip(clip: Clip) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not clip.size:
        raise ShapeError(f"{clip.dtype} {list(clip.shape)} is no clip", available="uint8 [frames, height, width, 3]")


def _check_fps(fps: float) -> None:
    if not 0.1 <= fps <= 240:
        raise ShapeError(f"{fps} frames per second", available="0.1 to 240")
