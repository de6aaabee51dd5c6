"""One prompt and seed by several methods at 4-bit activations, frame by frame, as a picture.

    python -m benchmarks.quality strips                  after run, from what it left in out/quality

Left the model as it is, right the one with outlier channels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.quality.page import MODEL
from benchmarks.quality.toy.clips import generate
from benchmarks.quality.work import Worker, find_method
from dvdquant.checkpoint.prompt_table import PromptTable, frames_from_latents
from dvdquant.deploy.generation.psnr import psnr

ROWS = (
    "RTN",
    "QuaRot-style",
    "DVD-Quant as published",
    "ViDiT-Q-style",
    "SVDQuant rank K/96 (modelopt)",
    "dvdquant w4a4",
    "dvdquant w4a4-g64",
)
SCALE, LABEL, GAP = 2, 214, 12

# A model, and of each method the frames and what is said of them.
Column = tuple[str, list[tuple[str, npt.NDArray[np.uint8], str]]]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--prompt", default="ring red right large black")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).resolve().parents[2] / "docs" / "quality" / "strips.png"
    )
    options = parser.parse_args()
    name = options.model.resolve().name
    folders = {name: options.model, f"{name}-outliers": options.work / f"{name}-outliers"}
    prompt = tuple(options.prompt.split())
    worker = Worker(folders, options.work, PromptTable.open(options.model).steps)
    columns: list[Column] = []
    for model in folders:
        worker.held_out(model)
        bench = worker.bench(model)
        exact = frames_from_latents(generate(bench, {16: bench.model}, [prompt], [options.seed]).latents)
        shown = [("fp32", exact, "")]
        for method in ROWS:
            simulated = worker.simulated(model, find_method(method), options.bits)
            clips = generate(bench, {options.bits: simulated}, [prompt], [options.seed])
            frames = frames_from_latents(clips.latents)
            shown.append((method, frames, f"{psnr(frames, exact):.1f} dB"))
        columns.append((model, shown))
    _draw(columns).quantize(128).save(options.output, optimize=True)
    print(options.output)


def _draw(columns: list[Column]) -> Image.Image:
    """Return a picture: a column for each model, a row of frames for each method, its text below.

    Args:
        columns: A model, and of each method its name, the frames uint8 [F, H, W, 3] and the text.
    """
    frames, side = columns[0][1][0][1].shape[:2]
    cell = side * SCALE
    width = frames * cell + GAP
    picture = Image.new("RGB", (LABEL + len(columns) * width, 24 + len(columns[0][1]) * (cell + 14)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for c, (model, shown) in enumerate(columns):
        left = LABEL + c * width
        pen.text((left, 4), model, "black", font)
        for r, (method, clip, text) in enumerate(shown):
            top = 24 + r * (cell + 14)
            if c == 0:
                pen.text((6, top + cell // 2 - 8), method, "black", font)
            for f in range(frames):
                tile = Image.fromarray(clip[f]).resize((cell, cell), Image.Resampling.NEAREST)
                picture.paste(tile, (left + f * cell, top))
            pen.text((left + 2, top + cell), text, "#444444", ImageFont.load_default(11))
    return picture


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
