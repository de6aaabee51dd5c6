"""Weights, ordinary and hostile, on which two searches of a grid are compared, and how close they must be."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dvdquant.export.options import ExportOptions
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress

__all__ = ["CLOSENESS", "GRIDS", "assert_as_good", "hostile_rows", "layer_errors", "weights"]

ROOT = Path(__file__).resolve().parents[2]

GRIDS = [("midrise", 0), ("midrise", 64), ("midrise", 128), ("symmetric", 0), ("symmetric", 16), ("float", 0)]
GRIDS += [("float", 32), ("float", 128)]


def weights(kind: str, rows: int = 32, features: int = 1024) -> Tensor:
    """Gaussian, or heavy-tailed with outlier channels, plain or rotated."""
    torch.manual_seed(3)
    if kind == "gaussian":
        return torch.randn(rows, features)
    w = torch.distributions.StudentT(4.0).sample((rows, features))
    w[:, :: features // 8] *= 10
    return rotate(w, Rotation.for_features(features, "auto")) if kind == "rotated" else w


def hostile_rows(largest: float) -> Tensor:
    """Rows [9, 256] of zeros, denormals, equal values, half a row of zeros, one huge value, one sign, huge ratios, one value."""
    w = torch.zeros(9, 256)
    w[1] = 1e-44
    w[2] = 3.0
    w[3, :128] = torch.linspace(-1, 1, 128)
    w[4, 0] = largest
    w[5] = torch.linspace(0, 1, 256)
    w[6, ::2], w[6, 1::2] = 1e-30, 1e30
    w[7] = -1e-3
    w[8, 17] = 1.0
    return w


# Between two searches that agree within 1 ‰. Feedback turns a last bit of a grid into other codes further along the row:
# single layers then differ either way by up to 3.1 % (6 ‰ root mean square over 42 layers), their mean by 1.2 ‰.
CLOSENESS = [("weights-only", 0.001, 0.001), ("w4a4", 0.04, 0.002)]


def layer_errors(folder: Path, recipe: str, device: str) -> dict[str, float]:
    """An export of tiny-wan; the relative error of each of its layers."""
    options = ExportOptions(
        str(ROOT / "examples/tiny-wan"),
        folder,
        get_recipe(recipe),
        targets=("graphs",),
        latent="8x24x24",
        text_tokens=5,
        device=device,
    )
    manifest = run_export(plan_export(options), Progress("quiet")).manifest
    return {entry["name"]: entry["relative_mse"] for entry in manifest.layers}


def assert_as_good(errors: dict[str, float], reference: dict[str, float], single: float, mean: float) -> None:
    """Every layer within ``single`` of the reference, and their mean ratio within ``mean`` of 1."""
    ratios = [errors[layer] / error for layer, error in reference.items()]
    assert all(abs(ratio - 1) <= single for ratio in ratios), ratios
    assert abs(sum(ratios) / len(ratios) - 1) <= mean
