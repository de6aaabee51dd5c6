"""One compiled pass over the rows of a stored weight: its errors, and whether its codes are the nearest ones."""

from __future__ import annotations

import numpy as np

from dvdquant.numerics.array_types import F32, F64, I8, U8
from dvdquant.quantize.backends.jit import jit

__all__ = ["SUMS", "judge_rows"]


# The columns of the result of judge_rows.
SUMS = ("energy", "error", "nearest", "astray")


@jit
def judge_rows(w: F32, packed: I8, scale: F32, group_scale: U8, zero: F32, unit: float, out: F64) -> None:
    """Compute the errors of stored rows, and how far their codes are from the nearest ones.

    The columns of ``out`` are ‖w‖², ‖w − ŵ‖², and ‖w − ŵ′‖² where ŵ′ has the nearest codes on the same grid. The last
    column is how far the codes are beyond half a step from the nearest place on the grid, in steps, less the part that
    a rotation's rounding explains; 0 if no code is beyond.

    Args:
        w: The rotated weight, fp32 [R, K].
        packed: The stored codes, int8 [R, K/2], low nibble = even k.
        scale: The scales of the rows, fp32 [R].
        group_scale: The group scales, uint8 [R, groups].
        zero: The zero-points as :func:`dvdquant.numerics.packing.expand_zero` gives them, fp32 [R, 1] or [R, groups].
        unit: The error of an element of w over the norm of its row.
        out: The result, fp64 [R, 4], which is filled.
    """
    size = w.shape[1] // group_scale.shape[1]
    for r in range(w.shape[0]):
        # 1. The energy of the row, and the error that its rotation may have left in an element.
        energy = 0.0
        for k in range(w.shape[1]):
            energy += np.float64(w[r, k]) * np.float64(w[r, k])
        slack = unit * np.sqrt(energy)
        # 2. The errors, group by group.
        error, nearest, astray = 0.0, 0.0, 0.0
        for g in range(group_scale.shape[1]):
            centre = zero[r, min(g, zero.shape[1] - 1)]
            step = scale[r] * (np.float32(group_scale[r, g]) / np.float32(255.0))
            if step <= 0.0:
                step = np.float32(1e-38)  # no grid that is written has such a scale; the error says so
            for k in range(g * size, (g + 1) * size):
                byte = packed[r, k >> 1]
                code = (byte >> 4) if k & 1 else (((byte & 15) ^ 8) - 8)
                ideal = min(max(np.float64(w[r, k]) / np.float64(step) + np.float64(centre), -8.0), 7.0)
                difference = np.float64(w[r, k]) - np.float64(step) * (np.float64(code) - np.float64(centre))
                error += difference * difference
                difference = np.float64(w[r, k]) - np.float64(step) * (np.floor(ideal + 0.5) - np.float64(centre))
                nearest += difference * difference
                beyond = abs(np.float64(code) - ideal) - 0.5 - slack / np.float64(step)
                astray = max(astray, beyond)
        out[r, 0], out[r, 1], out[r, 2], out[r, 3] = energy, error, nearest, astray
