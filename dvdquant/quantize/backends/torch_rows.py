"""Rows of weights made ready for the solvers of ``bgr.py``: every group scaled by a power of two of its own.

amax of a group is then in [0.5, 1), so squares neither overflow nor vanish in fp32 whatever the weights are.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dvdquant.numerics.array_types import F32, F64
from dvdquant.quantize.backends.jit import jit, jit_part

__all__ = ["load_rows"]


@jit_part
def _normalize(bits: npt.NDArray[np.int32], row: F32, v: F32) -> float:
    """Write v = row · 2^−e with amax(v) in [0.5, 1); return 2^e, 0 for a row of zeros, −1 for one with NaN or Inf.

    ``bits`` are the bits of ``row`` as int32: compiled code may not look for a NaN as a float.
    """
    top, amax = np.int32(0), np.float32(0.0)
    for k in range(row.shape[0]):
        top = max(top, bits[k] & np.int32(0x7FFFFFFF))  # compiled code may not look for a NaN as a float
        amax = max(amax, abs(row[k]))
    if top >= 0x7F800000:
        return -1.0
    _, exponent = math.frexp(float(amax))
    shrink = math.ldexp(1.0, -exponent)
    for k in range(row.shape[0]):
        v[k] = np.float32(np.float64(row[k]) * shrink)
    return math.ldexp(1.0, exponent) if top > 0 else 0.0


@jit
def load_rows(w: F32, v: F32, units: F64) -> bool:
    """Normalize every group of the rows; return whether all weights are finite.

    Args:
        w: fp32 [R, K], the weights.
        v: fp32 [R, K], written: the weights divided by their group's unit.
        units: fp64 [R, groups], written: a power of two per group; 0 for a group of zeros.
    """
    groups = units.shape[1]
    size = w.shape[1] // groups
    for r in range(w.shape[0]):
        bits = w[r].view(np.int32)
        largest = 0.0
        for g in range(groups):
            a, b = g * size, (g + 1) * size
            units[r, g] = _normalize(bits[a:b], w[r, a:b], v[r, a:b])
            if units[r, g] < 0.0:
                return False
            largest = max(largest, units[r, g])
        for g in range(groups):
            # Far below any error of the row: zero, so that fp32 holds every ratio.
            if units[r, g] < largest * 2.0**-100:
                units[r, g], v[r, g * size : (g + 1) * size] = 0.0, np.float32(0.0)
    return True
