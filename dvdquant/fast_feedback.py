"""The compiled loop of rounding with feedback: rows in SIMD lanes, a few columns at a time in the L1 cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .jit import jit

__all__ = ["round_columns"]

F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]

_LANES = 8


@jit
def round_columns(left: F64, step: F64, zero: F64, group: int, first: int, factor: F64, codes: I8, errors: F64) -> None:
    """Codes of a few columns, each error passed on to the columns after it among these.

    Args:
        left: [R, c], what is left to round; not changed. step, zero: [R, groups] of the whole row; a step of 0 stands for
            a group of zeros. group: columns per group. first: place of the first column in the row.
        factor: [c, c], row i: how the columns after i move with the error of column i.
        codes: [R, c] and errors: [R, c], the results.
    """
    size = left.shape[1]
    tile, error = np.zeros((size, _LANES)), np.zeros(_LANES)
    for start in range(0, left.shape[0], _LANES):
        count = min(_LANES, left.shape[0] - start)
        for r in range(count):
            for i in range(size):
                tile[i, r] = left[start + r, i]
        for i in range(size):
            place = (first + i) // group
            for r in range(count):
                scale, centre = step[start + r, place], zero[start + r, place]
                code = centre
                if scale > 0.0:
                    code = tile[i, r] / scale + centre
                code = min(7.0, max(-8.0, np.rint(code)))
                codes[start + r, i] = np.int8(code)
                error[r] = tile[i, r] - scale * (code - centre)
                errors[start + r, i] = error[r]
            for j in range(i + 1, size):
                share = factor[i, j]
                for r in range(_LANES):
                    tile[j, r] -= error[r] * share
