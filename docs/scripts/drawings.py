"""Draw the pictures of docs/method.md: ``python docs/scripts/drawings.py``.

One row of a weight of tiny-wan on its grids, random tokens with outlier channels before and after the rotation, and the
changes of one clip of tiny-wan.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dvdquant.checkpoint.opening import open_checkpoint  # noqa: E402
from dvdquant.deploy.switching.gbs import relative_change, switch_bits  # noqa: E402
from dvdquant.numerics.hadamard import Rotation, rotate  # noqa: E402
from dvdquant.quantize.bgr import quantize_weight  # noqa: E402
from dvdquant.recipe import WeightSpec  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MODEL = ROOT / "examples" / "tiny-wan"
LAYER = "blocks.3.ffn.net.2"
OURS, THEIRS, NEUTRAL = "#0969da", "#cf222e", "#8c959f"


def draw_bgr() -> None:
    """Draw one row of a rotated weight with the values of the min-max grid and of BGR's."""
    weight = open_checkpoint(MODEL).read(f"{LAYER}.weight").float()
    rotated = rotate(weight, Rotation.for_features(weight.shape[1], "auto"))
    row = int((rotated.abs().amax(1) / rotated.std(1)).argmax())
    values = rotated[row : row + 1].contiguous()
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.hist(values[0].numpy(), bins=120, color=NEUTRAL)
    top = axes.get_ylim()[1]
    for solver, color, low, name in (("minmax", THEIRS, 0.5, "min-max"), ("search", OURS, 0.0, "BGR")):
        grid = quantize_weight(values, WeightSpec(0, "midrise", solver))  # type: ignore[arg-type]
        error = float(((grid.dequantize() - values) ** 2).sum() / (values**2).sum())
        points = (float(grid.scale[0]) * (torch.arange(-8, 8) - float(grid.zero[0]))).tolist()
        axes.vlines(
            points, low * top, (low + 0.5) * top, color=color, lw=1.4, label=f"{name}: relative MSE {error:.4f}"
        )
    axes.set_xlabel(f"one row of {LAYER}, rotated")
    axes.set_ylabel("weights")
    axes.legend(loc="upper left")
    figure.savefig(IMAGES / "bgr.png", dpi=110)


def draw_arq() -> None:
    """Draw the largest value of every channel of random tokens with five outlier channels, before and after the rotation."""
    torch.manual_seed(0)
    features = 256
    x = torch.randn(512, features)
    x[:, torch.randperm(features)[:5]] *= torch.tensor([15.0, 22.0, 30.0, 45.0, 60.0])
    rotated = rotate(x, Rotation.for_features(features, "auto"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    for place, values, color, name in zip(axes, (x, rotated), (THEIRS, OURS), ("x", "x H")):
        place.bar(range(features), values.abs().amax(0).tolist(), width=1.0, color=color)
        place.set_title(f"largest |{name}| of each channel")
        place.set_xlabel("channel")
    figure.savefig(IMAGES / "arq.png", dpi=110)


def draw_gbs(steps: int = 50, delta: float = 0.12) -> None:
    """Draw the changes of one clip of tiny-wan in 16 bit, their sum since the last a8 step, and the bits of δ."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from safetensors.torch import load_file

    model = WanTransformer3DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.float32).eval()
    words = load_file(MODEL / "prompts.safetensors")["words"].float()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    latent = torch.randn(1, 3, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    text, empty = words[None, :5], words[-1:].expand(5, -1)[None]
    outputs = []
    with torch.inference_mode():
        for t in scheduler.timesteps:
            both = [model(latent, t[None], states, return_dict=False)[0] for states in (text, empty)]
            outputs.append(both[0])
            latent = scheduler.step(both[1] + 3 * (both[0] - both[1]), t, latent, return_dict=False)[0]
    changes = [relative_change(now, before) for before, now in pairwise(outputs)]
    bits = switch_bits(changes, delta)
    sums, total = [], 0.0
    for change, width in zip([0.0, *changes], bits):
        total = (0.0 if width == 8 else total) + change
        sums.append(total)
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.bar(range(1, steps), changes, color=NEUTRAL, label="L1(t)")
    axes.plot(range(steps), sums, color=OURS, drawstyle="steps-mid", label="since the last a8 step")
    axes.axhline(delta, color=THEIRS, ls="--", lw=1, label=f"δ = {delta}")
    axes.set_ylim(0, max(max(sums), delta) * 1.35)
    for step, width in enumerate(bits):
        axes.text(step, axes.get_ylim()[1] * 0.96, str(width), ha="center", va="top", fontsize=7)
    axes.set_xlabel("step, with its activation bits above")
    axes.legend(loc="center left")
    figure.savefig(IMAGES / "gbs.png", dpi=110)


if __name__ == "__main__":
    draw_bgr()
    draw_arq()
    draw_gbs()
