"""Compiled loop of rounding with feedback: four rows at a time, the remaining columns in SIMD lanes."""

from __future__ import annotations

import numpy as np

from dvdquant.numerics.array_types import F32, I8
from dvdquant.quantize.backends.jit import jit

__all__ = ["round_columns"]


# Rows that share each value of the factor that is loaded.
_ROWS = 4
_NIL, _LOW, _HIGH = np.float32(0), np.float32(-8), np.float32(7)


@jit
def round_columns(left: F32, step: F32, zero: F32, group: int, first: int, factor: F32, codes: I8, errors: F32) -> None:
    """Round a few hundred columns one by one, and pass each error on to the columns after it among these.

    Args:
        left: fp32 [R, c], what is left to round; not changed.
        step: fp32 [R, groups], Δ of every group of the whole row; 0 stands for a group of zeros.
        zero: fp32 [R, groups], centred zero-point of every group of the whole row.
        group: Columns per group.
        first: Place of the first column in the row.
        factor: fp32 [c, c], unit upper triangular; row i says how the columns after i move with the error of column i.
        codes: int8 [R, c], written: the codes, −8..7.
        errors: fp32 [R, c], written: the error of every column; [R, 0] where nobody asks for them.
    """
    size, wanted = left.shape[1], errors.shape[1] > 0
    # rows, fp32 [_ROWS, c]: working copy of what is left to round; error, fp32 [_ROWS]: errors of the current column.
    rows, error = np.zeros((_ROWS, size), np.float32), np.zeros(_ROWS, np.float32)
    for start in range(0, left.shape[0], _ROWS):
        count = min(_ROWS, left.shape[0] - start)
        for r in range(count):
            for i in range(size):
                rows[r, i] = left[start + r, i]
        for i in range(size):
            # 1. Round column i of every row.
            place = (first + i) // group
            for r in range(count):
                scale, centre = step[start + r, place], zero[start + r, place]
                code = centre
                if scale > _NIL:
                    code = rows[r, i] / scale + centre
                code = min(_HIGH, max(_LOW, np.rint(code)))
                codes[start + r, i] = np.int8(code)
                error[r] = rows[r, i] - scale * (code - centre)
                if wanted:
                    errors[start + r, i] = error[r]
            # 2. Move the columns after it.
            # Views and plain counters: with rows[r, j] and j from i + 1 on, the loop is not vectorized.
            share, after = factor[i, i + 1 :], size - i - 1
            row0, row1, row2, row3 = rows[0, i + 1 :], rows[1, i + 1 :], rows[2, i + 1 :], rows[3, i + 1 :]
            error0, error1, error2, error3 = error[0], error[1], error[2], error[3]
            for j in range(after):
                moved = share[j]
                row0[j] -= error0 * moved
                row1[j] -= error1 * moved
                row2[j] -= error2 * moved
                row3[j] -= error3 * moved
