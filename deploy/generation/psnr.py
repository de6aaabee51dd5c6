"""How far one clip is from another, in dB."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dvdquant.errors import ShapeError

__all__ = ["psnr"]


def psnr(clip: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """Compute the peak signal-to-noise ratio of two clips in dB, 10 · log10(255² / mean((clip − reference)²)).

    It is infinite for equal clips.

    Args:
        clip: The clip, uint8 of any shape.
        reference: The clip it is compared with, of the same shape.

    Raises:
        ShapeError: One is of another dtype, or the shapes differ.
    """
    if clip.dtype != np.uint8 or reference.dtype != np.uint8 or clip.shape != reference.shape or not clip.size:
        raise ShapeError(
            f"PSNR of {clip.dtype} {list(clip.shape)} and {reference.dtype} {list(reference.shape)}",
            available="two uint8 arrays of one shape",
        )
    mse = float(np.mean((clip.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)
