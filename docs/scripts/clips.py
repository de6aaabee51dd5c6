"""Draw the clips of the documentation: ``python docs/scripts/clips.py EXPORT``, an export of examples/tiny-wan with a4 and a8.

Every clip is 8 frames of 24 × 24 pixels, as the toy model was trained; each pixel is shown as a square of whole pixels, and
nothing is smoothed. Clips that are drawn are kept in build/clips, so that a change of the layout draws none again.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dvdquant.deploy.artifact import Artifact  # noqa: E402
from dvdquant.deploy.generation.generate import GenerateRequest, Generator, open_generator  # noqa: E402
from dvdquant.deploy.generation.psnr import psnr  # noqa: E402
from dvdquant.deploy.generation.video import FAINT, INK, PAPER  # noqa: E402

IMAGES = ROOT / "docs" / "images"
KEPT = ROOT / "build" / "clips"
STEPS, DELTA, SEED, FRAME_MS = 20, 0.2, 0, 250
MODES = {"16": "16 bit", "a8": "a8", "switch": "switching", "a4": "a4"}
COMPARED = (
    "ring red right large black",
    "square blue down small grey",
    "triangle yellow up large black",
    "circle green left large grey",
)
OTHERS = (
    "circle red down small black",
    "square yellow right large grey",
    "triangle green left large black",
    "ring blue up large grey",
)
GRID_MODES = ("16", "switch", "a4")
AMPLIFIED = 4

Clip = np.ndarray[Any, np.dtype[np.uint8]]


def main(export: Path) -> None:
    """Write compare.webp and grid.webp with their posters into docs/images.

    Args:
        export: The export.
    """
    clips = draw_all(export)
    write(IMAGES / "clips-compare", [f for prompt in COMPARED for f in compared(prompt, clips)], poster=5)
    frames = [frame for mode in GRID_MODES for frame in grid(mode, clips)]
    write(IMAGES / "clips-grid", frames, poster=8 + 5)
    for path in sorted(IMAGES.glob("clips-*")):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


def draw_all(export: Path) -> dict[tuple[str, str], tuple[Clip, float]]:
    """Return the frames [F, H, W, 3] and the average bits of every prompt and mode.

    Args:
        export: The export.
    """
    artifact = Artifact.open(export)
    state = hashlib.sha256(repr(sorted(artifact.manifest.files.items())).encode()).hexdigest()[:16]
    folder = KEPT / state
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(prompt, mode) for prompt in COMPARED for mode in MODES]
    wanted += [(prompt, mode) for prompt in OTHERS for mode in GRID_MODES]
    found = {}
    with open_generator(artifact, backend="onnxruntime", device="cpu") as generator:
        for prompt, mode in wanted:
            path = folder / f"{prompt.replace(' ', '-')}-{mode}-{STEPS}-{DELTA}-{SEED}.npz"
            if not path.exists():
                frames, bits = draw(generator, prompt, mode)
                np.savez(path, frames=frames, bits=bits)
                print(f"{prompt}  {MODES[mode]}", flush=True)
            kept = np.load(path)
            found[prompt, mode] = kept["frames"], float(kept["bits"])
    return found


def draw(generator: Generator, prompt: str, mode: Any) -> tuple[Clip, float]:
    """Return frames and average bits of one clip.

    Args:
        generator: The generator of the export.
        prompt: Words of the toy model.
        mode: ``16``, ``a8``, ``switch`` or ``a4``.
    """
    delta = DELTA if mode == "switch" else None
    result = generator.generate(GenerateRequest(prompt, steps=STEPS, seed=SEED, mode=mode, delta=delta))
    return result.frames, 16.0 if mode == "16" else float(result.summary["average_bits"])


def compared(prompt: str, clips: dict[tuple[str, str], tuple[Clip, float]]) -> list[Image.Image]:
    """Return the frames of one prompt: every mode beside the other, and below it what differs from 16 bit.

    Args:
        prompt: The prompt.
        clips: The clips of :func:`draw_all`.
    """
    side, gap, head, line = 192, 10, 30, 22
    reference = clips[prompt, "16"][0]
    width = len(MODES) * (side + gap) + gap
    below = head + 2 * line + side
    base = Image.new("RGB", (width, below + line + side + gap), PAPER)
    pen, font, small = ImageDraw.Draw(base), ImageFont.load_default(17), ImageFont.load_default(14)
    pen.text((gap, 6), prompt, fill=INK, font=font)
    for column, (mode, title) in enumerate(MODES.items()):
        left, (frames, bits) = gap + column * (side + gap), clips[prompt, mode]
        note = "the original" if mode == "16" else f"{psnr(frames, reference):.1f} dB"
        note += f", {bits:.1f} bits on average" if mode == "switch" else ""
        pen.text((left, head), title, fill=INK, font=small)
        pen.text((left, head + line - 4), note, fill=FAINT, font=small)
    pen.text((gap, below + side // 2), f"difference to 16 bit,\nenlarged {AMPLIFIED} times", fill=FAINT, font=small)
    made = []
    for index in range(len(reference)):
        image = base.copy()
        for column, mode in enumerate(MODES):
            left, frame = gap + column * (side + gap), clips[prompt, mode][0][index]
            image.paste(squares(frame, side), (left, head + 2 * line))
            if mode != "16":
                apart = np.abs(frame.astype(int) - reference[index].astype(int)) * AMPLIFIED
                image.paste(squares(apart.clip(0, 255).astype(np.uint8), side), (left, below + line - 8))
        made.append(image)
    return made


def grid(mode: str, clips: dict[tuple[str, str], tuple[Clip, float]]) -> list[Image.Image]:
    """Return the frames of all prompts in one mode.

    Args:
        mode: The mode.
        clips: The clips of :func:`draw_all`.
    """
    side, gap, head, line, columns = 168, 10, 34, 20, 4
    prompts = COMPARED + OTHERS
    rows = -(-len(prompts) // columns)
    base = Image.new("RGB", (columns * (side + gap) + gap, head + rows * (side + line + gap)), PAPER)
    pen, font, small = ImageDraw.Draw(base), ImageFont.load_default(17), ImageFont.load_default(12)
    bits = [clips[prompt, mode][1] for prompt in prompts]
    width = "" if mode == "16" else f", activations of {sum(bits) / len(bits):.1f} bits on average"
    weights = "16-bit weights" if mode == "16" else "4-bit weights"
    pen.text((gap, 8), f"{MODES[mode]}: {weights}{width}", fill=INK, font=font)
    places = [
        (gap + i % columns * (side + gap), head + i // columns * (side + line + gap)) for i in range(len(prompts))
    ]
    for prompt, (left, top) in zip(prompts, places):
        pen.text((left, top + 3), prompt, fill=FAINT, font=small)
    made = []
    for index in range(len(clips[prompts[0], mode][0])):
        image = base.copy()
        for prompt, (left, top) in zip(prompts, places):
            image.paste(squares(clips[prompt, mode][0][index], side), (left, top + line))
        made.append(image)
    return made


def squares(frame: Clip, side: int) -> Image.Image:
    """Return a frame with every pixel as a square.

    Args:
        frame: uint8 [H, W, 3], whose height divides ``side``.
        side: The height of the picture in pixels.
    """
    factor = side // frame.shape[0]
    return Image.fromarray(frame.repeat(factor, axis=0).repeat(factor, axis=1))


def write(path: Path, frames: list[Image.Image], poster: int) -> None:
    """Write an animated WebP without loss, and one frame of it as a PNG.

    Args:
        path: The path without a suffix.
        frames: The frames.
        poster: The index of the frame that stands for the clip.
    """
    frames[0].save(
        path.with_suffix(".webp"),
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MS,
        loop=0,
        lossless=True,
        method=6,
    )
    frames[poster].quantize(128).save(path.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: clips.py EXPORT")
    main(Path(sys.argv[1]))
