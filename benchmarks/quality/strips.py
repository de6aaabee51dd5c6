"""One prompt and seed by several methods at 4-bit activations, frame by frame, as a picture.

    python benchmarks/quality/strips.py                  after run.py, from what it left in out/quality

Left the model as it is, right the one with outlier channels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from run import MODEL
from work import Worker, find_method, in_16_bit

from dvdquant.deploy.planner import psnr
from dvdquant.deploy.prompt_table import frames_from_latents

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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--prompt", default="ring red right large black")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).resolve().parent / "strips.png")
    options = parser.parse_args()
    name = options.model.resolve().name
    folders = {name: options.model, f"{name}-outliers": options.work / f"{name}-outliers"}
    clip = [(tuple(options.prompt.split()), options.seed)]
    columns = []
    for model in folders:
        worker = Worker(folders, options.work, 50)
        worker.held_out(model)
        exact = _frames(worker, model, None, clip, options.bits)
        shown = [("fp32", exact, "")]
        for method in ROWS:
            frames = _frames(worker, model, method, clip, options.bits)
            shown.append((method, frames, f"{psnr(frames, exact):.1f} dB"))
        columns.append((model, shown))
    _draw(columns).quantize(128).save(options.output, optimize=True)
    print(options.output)


def _frames(worker: Worker, model: str, method: str | None, clip: list, bits: int):  # type: ignore[no-untyped-def, type-arg]
    from clips import generate

    if method is None:
        latents = generate(worker.bench(model), {16: worker.bench(model).model}, [clip[0][0]], [clip[0][1]]).latents
    else:
        simulated = worker.simulated(model, find_method(method), bits)
        latents = in_16_bit(worker.bench(model), {bits: simulated}, clip).latents
    return frames_from_latents(latents)


def _draw(columns):  # type: ignore[no-untyped-def]
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
