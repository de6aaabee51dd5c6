"""Trains tiny-wan further on moving shapes drawn by ``shapes.py``: rectified flow, v = ε − x₀.

    python benchmarks/quality/train.py examples/tiny-wan out/tiny-wan-2 --steps 4000

Reads the model and the words' embeddings from SOURCE and writes a folder of the same form. Runs on a GPU where there is
one. The learning rate falls along a cosine; a checkpoint is written every ``--save`` steps, and ``--resume`` goes on from
it. Wan's rotary embedding is relative, so the sign of a motion is the last thing the model learns: clips that differ from
each other only in the sign of their motion come in pairs, with the same noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from shapes import FRAMES, SIDE, Clip, draw, random_clip
from torch import Tensor
from tqdm import trange

from dvdquant.deploy.prompt_table import EMPTY_WORD, PromptTable

OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}


def batch(pairs: int, generator: torch.Generator) -> tuple[Tensor, list[Clip]]:
    """Clips [2·pairs, 3, F, H, W]; each is followed by itself played backwards."""
    clips, words = [], []
    for _ in range(pairs):
        clip = random_clip(generator)
        pixels = draw(clip)
        shape, colour, motion, size, background = clip.words
        clips += [pixels, pixels.flip(1)]
        words += [clip, Clip((shape, colour, OPPOSITE[motion], size, background), clip.start, clip.speed)]
    return torch.stack(clips), words


def sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels as the scheduler spaces them, more at the noisy end by the same shift."""
    u = torch.rand(count, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--drop", type=float, default=0.1, help="share of prompts replaced by the empty word")
    parser.add_argument("--save", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = PromptTable.open(options.source)
    rows = {word: index for index, word in enumerate(table.words)}
    embeddings = table.embeddings.float().to(device)
    model = WanTransformer3DModel.from_pretrained(options.source / "transformer", torch_dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    state = options.out / "training.pt"
    first = 0
    if options.resume and state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(options.seed + first)
    started, losses = time.monotonic(), []
    bar = trange(first, options.steps, desc="train", unit=" steps")
    for step in bar:
        clips, drawn = batch(options.pairs, generator)
        ids = torch.tensor([[rows[word] for word in clip.words] for clip in drawn])
        dropped = torch.rand(options.pairs, generator=generator).repeat_interleave(2) < options.drop
        ids[dropped] = rows[EMPTY_WORD]
        noise = torch.randn(options.pairs, 3, FRAMES, SIDE, SIDE, generator=generator).repeat_interleave(2, 0)
        sigma = sigmas(options.pairs, 3.0, generator).repeat_interleave(2)
        clips, noise, sigma, ids = (t.to(device) for t in (clips, noise, sigma, ids))
        noisy = torch.lerp(clips, noise, sigma[:, None, None, None, None])
        predicted = model(noisy, 1000 * sigma, embeddings[ids], return_dict=False)[0]
        loss = (predicted - (noise - clips)).square().mean()
        warm = min(1.0, (step - first + 1) / 50)
        rate = options.lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step - first + 1) / (step - first + 20))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        losses.append(float(loss))
        bar.set_postfix_str(f"loss {sum(losses[-100:]) / len(losses[-100:]):.5f}")
        if (step + 1) % options.save == 0 or step + 1 == options.steps:
            _save(options.source, options.out, model, average, step + 1, sum(losses[-100:]) / len(losses[-100:]))
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved, state)
    print(f"{options.steps - first} steps in {time.monotonic() - started:.0f} s on {device}")


def _save(
    source: Path, out: Path, model: WanTransformer3DModel, average: dict[str, Tensor], step: int, loss: float
) -> None:
    """The averaged weights in bf16, with the tables of the source."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("scheduler", "prompts.safetensors"):
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)
        else:
            shutil.copy2(source / name, out / name)
    prompts = json.loads((source / "prompts.json").read_text())
    prompts |= {"train_steps": prompts.get("train_steps", 0) + step, "train_loss": loss}
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    current = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(average, strict=False)
    copy = WanTransformer3DModel.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out / "transformer")
    model.load_state_dict(current, strict=False)


if __name__ == "__main__":
    main()
