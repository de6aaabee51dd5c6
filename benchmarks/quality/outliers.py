"""Gives a Wan model activation outliers that depend on the timestep, without changing what it computes.

    python -m benchmarks.quality outliers examples/tiny-wan out/tiny-wan-outliers

A modulated input is ``LN(h)·(1 + scale(t)) + shift(t)``, and ``scale(t) = table + projection(t)``. Multiplying
``1 + scale`` and ``shift`` of a channel by c, and dividing the column of every linear layer that reads it by c, leaves the
product as it was and makes that channel c times larger, more at timesteps where ``scale(t)`` is large: as in the large
models, where a few channels exceed the others a hundredfold at some steps. Written in fp32, so that the two models agree
to rounding (checked before anything is written).
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

__all__ = ["KINDS", "add_outliers", "modulation", "toy_folders"]

KINDS = ("plain", "outliers")  # of the toy models, as options name them

# scale_shift_table and the projection hold six rows: shift, scale, gate of attention, then of the feed-forward layer.
SHIFT, SCALE = (0, 3), (1, 4)


@torch.no_grad()
def modulation(model: WanTransformer3DModel, timesteps: Tensor) -> Tensor:
    """Return shift, scale, gate, shift, scale, gate of every block, fp32 [blocks, T, 6, D].

    Args:
        model: The transformer.
        timesteps: The timesteps [T].
    """
    embedder = model.condition_embedder
    embedding = embedder.time_embedder(embedder.timesteps_proj(timesteps.float()))
    projected = embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))
    return torch.stack([projected + block.scale_shift_table for block in model.blocks])


@torch.no_grad()
def add_outliers(
    model: WanTransformer3DModel, count: int, largest: float
) -> tuple[WanTransformer3DModel, dict[int, float]]:
    """Return a copy with outlier channels in the inputs of q, k, v (self- and cross-attention) and of the feed-forward layer.

    The channels are those whose modulation varies most over the timesteps; factors fall geometrically from ``largest`` to
    a quarter of it.

    Args:
        model: The transformer.
        count: The number of channels.
        largest: The largest factor.

    Returns:
        The model and {channel: factor}.
    """
    changed = copy.deepcopy(model).float()
    over_time = modulation(changed, torch.linspace(1, 1000, 50))[:, :, SCALE, :] + 1
    spread = over_time.std(1) / over_time.abs().mean(1)
    channels = spread.mean((0, 1)).topk(count).indices.tolist()
    factors = {c: largest * 4 ** (-i / max(1, count - 1)) for i, c in enumerate(channels)}
    multiply = torch.ones(over_time.shape[-1])
    for channel, factor in factors.items():
        multiply[channel] = factor
    projection = changed.condition_embedder.time_proj
    weight, bias = projection.weight.view(6, -1, projection.in_features), projection.bias.view(6, -1)
    for row in (*SHIFT, *SCALE):
        weight[row] *= multiply[:, None]
        bias[row] *= multiply
    for block in changed.blocks:
        table = block.scale_shift_table
        for row in SHIFT:
            table[0, row] *= multiply
        for row in SCALE:
            table[0, row] = (table[0, row] + 1) * multiply - 1
        block.norm2.weight.mul_(multiply)
        block.norm2.bias.mul_(multiply)
        readers = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn2.to_q, block.ffn.net[0].proj]
        for linear in readers:
            linear.weight.div_(multiply)
    return changed, factors


@torch.no_grad()
def difference(model: WanTransformer3DModel, changed: WanTransformer3DModel) -> float:
    """Return the largest relative L2 difference of the output over five timesteps, on noise.

    Args:
        model: The toy model in fp32.
        changed: The model that should compute the same.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 8, 24, 24, generator=generator)
    text = torch.randn(1, 5, model.config.text_dim, generator=generator)
    worst = 0.0
    for timestep in (1.0, 250.0, 500.0, 750.0, 1000.0):
        a, b = (m(x, torch.tensor([timestep]), text, return_dict=False)[0] for m in (model, changed))
        worst = max(worst, float((a - b).norm() / a.norm()))
    return worst


def write(source: Path, out: Path, count: int, largest: float) -> dict[int, float]:
    """Write the model of a folder with outlier channels; return channel -> factor.

    Args:
        source: Folder of the model.
        out: Folder that is written.
        count: Outlier channels per layer.
        largest: The largest factor.

    Raises:
        ValueError: The two models do not compute the same.
    """
    model = WanTransformer3DModel.from_pretrained(source / "transformer", torch_dtype=torch.float32).eval()
    changed, factors = add_outliers(model, count, largest)
    found = difference(model, changed)
    if not found < 1e-4:
        raise ValueError(f"the rewritten model differs from {source} by {found:.1e}; nothing was written")
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
    changed.save_pretrained(out / "transformer")
    print(
        f"{out}: outlier channels {', '.join(f'{c} x {f:.0f}' for c, f in factors.items())}; output within {found:.1e}"
    )
    return factors


def toy_folders(model: Path, work: Path) -> dict[str, Path]:
    """Return the folders of the toy model and of the one with outlier channels by their names; the latter is written once.

    Args:
        model: The folder of the toy model.
        work: The folder of what processes share.
    """
    plain, outliers = model.resolve(), (work / f"{model.resolve().name}-outliers").resolve()
    if not (outliers / "transformer" / "config.json").exists():
        write(model, outliers, count=5, largest=60.0)
    return {plain.name: plain, outliers.name: outliers}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=5, help="2 %% of 256")
    parser.add_argument("--largest", type=float, default=60.0, help="factor of the largest outlier")
    options = parser.parse_args()
    write(options.source, options.out, options.channels, options.largest)


if __name__ == "__main__":
    main()
