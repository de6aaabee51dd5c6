"""Trains tiny-wan further on moving shapes drawn by ``shapes.py``: rectified flow, v = ε − x₀.

    python -m benchmarks.quality train examples/tiny-wan out/tiny-wan-2

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
import sys
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.quality.toy.shapes import FRAMES, SIDE, Clip, draw, random_clip
from dvdquant.checkpoint.prompt_table import EMPTY_WORD, PromptTable
from dvdquant.system.devices import resolve_device

OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}


def batch(pairs: int, generator: torch.Generator) -> tuple[Tensor, list[Clip]]:
    """Draw clips, fp32 [2·pairs, 3, F, H, W] in [−1, 1]; each is followed by itself played backwards.

    Args:
        pairs: How many pairs.
        generator: Draws them.
    """
    clips, words = [], []
    for _ in range(pairs):
        clip = random_clip(generator)
        pixels = draw(clip)
        shape, colour, motion, size, background = clip.words
        clips += [pixels, pixels.flip(1)]
        words += [clip, Clip((shape, colour, OPPOSITE[motion], size, background), clip.start, clip.speed)]
    return torch.stack(clips), words


def sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw noise levels, fp32 [count], as the scheduler spaces them: more at the noisy end by the same shift.

    Args:
        count: How many.
        shift: The scheduler's shift.
        generator: Draws them.
    """
    u = torch.rand(count, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def forced_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels, fp32 [count, FRAMES], with one frame nearly clean and the others nearly noise.

    Where such a shape goes next is told by the prompt alone. At one level for all frames the sign of a motion only matters
    in a narrow band of levels: below it the frames show it, above it nothing does.

    Args:
        count: The number of clips.
        generator: Draws them.
    """
    levels = (0.8 + 0.2 * torch.rand(count, 1, generator=generator)).repeat(1, FRAMES)
    seen = torch.randint(FRAMES, (count, 1), generator=generator)
    return levels.scatter(1, seen, 0.3 * torch.rand(count, 1, generator=generator))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drop", type=float, default=0.1, help="share of prompts replaced by the empty word")
    parser.add_argument("--shift", type=float, default=4.0, help="of the noise levels; motion is decided at high ones")
    parser.add_argument("--forcing", type=float, default=0.5, help="share of batches with one frame shown")
    parser.add_argument("--save", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    # 1. The model, its words, and the state to go on from.
    device = resolve_device("auto")
    table = PromptTable.open(options.source)
    rows = {word: index for index, word in enumerate(table.words)}
    embeddings = table.embeddings.float().to(device)
    model = WanTransformer3DModel.from_pretrained(options.source / "transformer", torch_dtype=torch.float32).to(device)
    optimizers = _optimizers(model, options.lr)
    state = options.out / "training.pt"
    first = 0
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    if options.resume and state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(values)
        average, first = saved["average"], saved["step"]
    generator = torch.Generator().manual_seed(options.seed + first)
    started, losses = time.monotonic(), []
    bar = trange(first, options.steps, desc="train", unit=" steps")
    for step in bar:
        # 2. Pairs of clips with one noise; some without words, some with a frame that is nearly free of noise.
        clips, drawn = batch(options.pairs, generator)
        ids = torch.tensor([[rows[word] for word in clip.words] for clip in drawn])
        dropped = torch.rand(options.pairs, generator=generator).repeat_interleave(2) < options.drop
        ids[dropped] = rows[EMPTY_WORD]
        noise = torch.randn(options.pairs, 3, FRAMES, SIDE, SIDE, generator=generator).repeat_interleave(2, 0)
        sigma = sigmas(options.pairs, options.shift, generator)[:, None].expand(-1, FRAMES)
        if float(torch.rand((), generator=generator)) < options.forcing:
            sigma = forced_sigmas(options.pairs, generator)
        sigma = sigma.repeat_interleave(2, 0)
        clips, noise, sigma, ids = (t.to(device) for t in (clips, noise, sigma, ids))
        # 3. The loss of the velocity, noise − clip.
        noisy = torch.lerp(clips, noise, sigma[:, None, :, None, None])
        tokens = sigma.repeat_interleave((SIDE // model.config.patch_size[1]) ** 2, 1)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(noisy, 1000 * tokens, embeddings[ids], return_dict=False)[0]
        # Near σ = 0 the loss is large (only the noise's own detail is left to guess) and says nothing about the clip.
        weight = (sigma / 0.3).clamp(max=1).square()
        loss = ((predicted.float() - (noise - clips)).square().mean((1, 3, 4)) * weight).mean()
        # 4. A step of the optimizers, and of the average of the weights.
        warm = min(1.0, (step - first + 1) / 50)
        rate = options.lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        # 5. The figures, and the state from time to time.
        losses.append(float(loss))
        bar.set_postfix_str(f"loss {sum(losses[-100:]) / len(losses[-100:]):.5f}")
        if (step + 1) % options.save == 0 or step + 1 == options.steps:
            bar.write(
                f"{step + 1}: loss {sum(losses[-100:]) / len(losses[-100:]):.5f}, {_sign(model, embeddings, rows)}"
            )
            _save(options.source, options.out, model, average, step + 1, sum(losses[-100:]) / len(losses[-100:]))
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(saved | {"average": average, "step": step + 1}, state)
    print(f"{options.steps - first} steps in {time.monotonic() - started:.0f} s on {device}")


def _optimizers(model: WanTransformer3DModel, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


@torch.no_grad()
def _sign(model: WanTransformer3DModel, embeddings: Tensor, rows: dict[str, int]) -> str:
    """Say how often the asked-for motion explains a noisy clip better than the opposite one, per noise level.

    Args:
        model: The transformer.
        embeddings: Embeddings of the words, fp32 [words, text_dim].
        rows: Word -> its row among them.
    """
    generator = torch.Generator().manual_seed(1)
    clips, words = batch(16, generator)
    ids = torch.tensor([[rows[word] for word in clip.words] for clip in words])
    noise = torch.randn(clips.shape, generator=generator)
    clips, noise, ids = (t.to(embeddings.device) for t in (clips, noise, ids))
    found = []
    for level in (0.95, 0.9, 0.8):
        sigma = torch.full((len(words),), level, device=clips.device)
        noisy = torch.lerp(clips, noise, level)
        right, wrong = (
            (model(noisy, 1000 * sigma, embeddings[i], return_dict=False)[0] - (noise - clips))
            .square()
            .mean((1, 2, 3, 4))
            for i in (ids, ids.view(-1, 2, ids.shape[1]).flip(1).reshape(ids.shape))
        )
        found.append(
            f"{float((right < wrong).float().mean()):.2f} ({float((wrong / right - 1).mean()):+.4f}) at σ {level}"
        )
    return "sign of motion " + ", ".join(found)


def _save(
    source: Path, out: Path, model: WanTransformer3DModel, average: dict[str, Tensor], step: int, loss: float
) -> None:
    """Write the averaged weights in bf16, with the tables of the source.

    Args:
        source: The folder of the model that was trained further.
        out: The folder that is written.
        model: The transformer.
        average: Name -> the average of a parameter over the steps.
        step: The steps so far.
        loss: The mean loss of the last of them.
    """
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
