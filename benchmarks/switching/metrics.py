"""Distances between clips, and confidence intervals of their means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bootstrap", "ssim"]


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of uint8 clips [F, H, W, 3]: an 11×11 Gaussian window of σ 1.5, K₁ = .01,
    K₂ = .03, L = 255, windows inside the picture only; mean over windows, channels and frames."""
    import torch  # not at import: a report of results takes intervals alone

    x, y = (
        torch.from_numpy(f.astype(np.float64)).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for f in (frames, reference)
    )
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(value: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(value, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(value.mean())


def bootstrap(values: list[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, lower, upper): the mean and its 95 % percentile bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return float(data.mean()), float(low), float(high)
