"""The compiled loops of ``bgr.py``: scoring, descent and search of 4-bit grids, one row at a time.

A *segment* is the run of weights that share a scale: a group, or the whole row, normalized by ``backends/torch_rows.py``.

Levels are ``Δ·q``, ``q = clamp(round(w/Δ − half), low, high) + half``: half = 0.5, low..high = −8..7 for the mid-rise
grid; half = 0, low..high = −8−z..7−z for an integer zero-point z. Of given q the best scale is ``Δ = S1/S2`` with
``S1 = ⟨q, w⟩``, ``S2 = ⟨q, q⟩``, and the error there is ``‖w‖² − S1²/S2``: the *gain* ``S1²/S2`` ranks grids.

All functions release the GIL and start no threads: the caller hands row blocks to as many threads as it wants.
"""

from __future__ import annotations

import math

import numpy as np

from dvdquant.numerics.array_types import F32, F64, I8, U8
from dvdquant.quantize.backends.jit import jit, jit_part

__all__ = ["INTEGER", "MIDRISE", "MINMAX", "PAPER", "SCALE_FLOOR", "SEARCH", "SYMMETRIC", "quantize_rows", "solve_rows"]

MIDRISE, SYMMETRIC, INTEGER = 0, 1, 2
MINMAX, PAPER, SEARCH = 0, 1, 2
# Smallest row scale; times 1/255 it is still a normal fp32 number.
SCALE_FLOOR = 2.0**-118

Real = np.float32

_f = np.float32
_HALF, _NIL = _f(0.5), _f(0.0)
# The most scales scored at once, and the ratio of neighbours: descent covers the ground between two. Short groups have
# many narrow minima and get the finer scan.
_MOST, _STEP, _FINE_STEP = 256, 1.02, 1.008
# Up to this size SIMD lanes hold scales rather than weights: no sum across lanes at the end of every short loop.
_LANES = 256
# Factors tried around the best scale of a group, as ratios to it.
_WINDOW_LOW, _WINDOW_HIGH = 0.75, 1.25
# Bounded init of the paper solver: each end of the range moves inwards in so many steps of 4 %.
_SHRINKS, _SHRINK = 14, 0.04


@jit_part
def _moments(v: F32, inverse: Real, half: Real, low: Real, high: Real) -> tuple[float, float]:
    """Return S1, S2 of the nearest levels for one scale; inverse = 1/Δ."""
    s1, s2 = _f(0.0), _f(0.0)
    for k in range(v.shape[0]):
        q = min(max(np.rint(v[k] * inverse - half), low), high) + half
        s1 += q * v[k]
        s2 += q * q
    return np.float64(s1), np.float64(s2)


@jit_part
def _moments_of_scales(v: F32, inverse: F32, half: Real, low: Real, high: Real, s1: F32, s2: F32) -> None:
    """Write S1, S2 [scales] for many scales, of an even number of weights: pairs save loads and stores of the sums."""
    s1[:], s2[:] = _NIL, _NIL
    for k in range(0, v.shape[0], 2):
        a, b = v[k], v[k + 1]
        for j in range(inverse.shape[0]):
            p = min(max(np.rint(a * inverse[j] - half), low), high) + half
            q = min(max(np.rint(b * inverse[j] - half), low), high) + half
            s1[j] += p * a + q * b
            s2[j] += p * p + q * q


@jit_part
def _gain(v: F32, scale: float, half: Real, low: Real, high: Real) -> float:
    """Return the gain S1²/S2 of one scale; 0 where all levels are 0."""
    s1, s2 = _moments(v, _f(1.0 / scale), half, low, high)
    return s1 * s1 / s2 if s2 > 0.0 else 0.0


@jit_part
def _error(v: F32, scale: Real, half: Real, low: Real, high: Real) -> float:
    """Return ‖w − Δq‖² of the nearest levels, summed in fp64."""
    inverse, total = _f(1.0) / scale, 0.0
    for k in range(v.shape[0]):
        d = v[k] - scale * (min(max(np.rint(v[k] * inverse - half), low), high) + half)
        total += np.float64(d) * np.float64(d)
    return total


@jit_part
def _extent(v: F32) -> tuple[float, float, float]:
    """Return min(w, 0), max(w, 0) and the root mean square."""
    low, high, square = _f(0.0), _f(0.0), _f(0.0)
    for k in range(v.shape[0]):
        low = min(low, v[k])
        high = max(high, v[k])
        square += v[k] * v[k]
    return np.float64(low), np.float64(high), math.sqrt(float(square) / v.shape[0])


@jit_part
def _clip_range(low: float, high: float, mode: int) -> tuple[float, float]:
    """Return the grid whose ends lie on a clip range that holds 0: (scale, centred integer zero-point)."""
    if mode == INTEGER:
        scale = (high - low) / 15.0
        return scale, min(max(np.rint(-low / scale), 0.0), 15.0) - 8.0
    return max(-low, high) / (7.5 if mode == MIDRISE else 7.0), 0.0


@jit_part
def _descend(v: F32, scale: float, half: Real, zero: float, steps: int) -> tuple[float, float]:
    """Alternate nearest levels and Δ = S1/S2 until the gain stops rising; return (scale, gain)."""
    low, high = _f(-8.0 - zero), _f(7.0 - zero)
    best = 0.0
    for _ in range(steps):
        s1, s2 = _moments(v, _f(1.0 / scale), half, low, high)
        if s2 <= 0.0 or s1 * s1 <= best * s2:
            break
        best, scale = s1 * s1 / s2, s1 / s2
    return scale, best


@jit_part
def _climb_zero(v: F32, scale: float, zero: float) -> tuple[float, float]:
    """Return the integer zero-point next to which no other has a higher gain at this scale: (zero, gain)."""
    best = _gain(v, scale, _NIL, _f(-8.0 - zero), _f(7.0 - zero))
    for direction in (1.0, -1.0):
        start = zero
        while -8.0 <= zero + direction <= 7.0:
            gain = _gain(v, scale, _NIL, _f(-8.0 - zero - direction), _f(7.0 - zero - direction))
            if gain <= best:
                break
            best, zero = gain, zero + direction
        if zero != start:
            break
    return zero, best


@jit_part
def _scan(v: F32, mode: int, top: float, ratio: float, work: F32, gains: F64, zeros: F64) -> None:
    """Write the gain of every scale top·ratio^i and the integer zero-point that reaches it (``zeros[0]`` on entry)."""
    half = _HALF if mode == MIDRISE else _NIL
    count, zero, scale = gains.shape[0], zeros[0], top
    zeros[:] = zero
    if mode != INTEGER and v.shape[0] <= _LANES and v.shape[0] % 2 == 0:
        for i in range(count):
            work[0, i] = _f(1.0 / scale)
            scale *= ratio
        s1, s2 = work[1, :count], work[2, :count]
        _moments_of_scales(v, work[0, :count], half, _f(-8.0), _f(7.0), s1, s2)
        for i in range(count):
            gains[i] = s1[i] * s1[i] / max(s2[i], _f(1e-30))
        return
    for i in range(count):
        if mode == INTEGER:
            # The best zero-point moves slowly with the scale: the previous one is at most a step or two away.
            zero, gains[i] = _climb_zero(v, scale, zero)
        else:
            gains[i] = _gain(v, scale, half, _f(-8.0), _f(7.0))
        zeros[i] = zero
        scale *= ratio


@jit_part
def _search(v: F32, mode: int, starts: int, steps: int, work: F32, gains: F64, zeros: F64) -> tuple[float, float]:
    """Return the best grid of a geometric scan of scales, refined by descent from its highest gains: (scale, zero)."""
    # 1. Scan: the gain of every scale from above min-max down.
    low, high, rms = _extent(v)
    top, zeros[0] = _clip_range(low, high, mode)
    short = v.shape[0] <= _LANES
    top *= 1.4 if v.shape[0] <= 32 else 1.25 if short else 1.07
    # No 16-level grid is best below about 0.2 rms, unless the range itself is short (two-valued or one-sided weights).
    bottom = min((0.12 if mode == INTEGER else 0.2) * rms, 0.6 * top)
    count = min(int(math.log(top / bottom) / math.log(_FINE_STEP if short else _STEP)) + 2, _MOST)
    ratio = (bottom / top) ** (1.0 / (count - 1))
    gains, zeros = gains[:count], zeros[:count]
    _scan(v, mode, top, ratio, work, gains, zeros)
    half = _HALF if mode == MIDRISE else _NIL
    # 2. Descend from the highest gains; a peak and its neighbours are taken out once they were tried.
    best, scale, zero = -1.0, top, zeros[0]
    for _ in range(starts):
        peak = np.argmax(gains)
        start, gain = _descend(v, top * math.pow(ratio, float(peak)), half, zeros[peak], steps)
        if gain > best:
            best, scale, zero = gain, start, zeros[peak]
        gains[max(peak - 1, 0) : peak + 2] = -1.0
    # 3. The zero-point once more at the scale found, then the scale.
    if mode == INTEGER:
        zero, gain = _climb_zero(v, scale, zero)
        scale, gain = _descend(v, scale, half, zero, steps)
    return scale, zero


@jit_part
def _bounded_init(v: F32, mode: int) -> tuple[float, float]:
    """Return the clip range of least error among those shrunk by (δ_l, δ_u), min-max first: (scale, zero)."""
    low, high, _ = _extent(v)
    half = _HALF if mode == MIDRISE else _NIL
    least, scale, zero = math.inf, 0.0, 0.0
    for i in range(_SHRINKS):
        # A fixed zero-point leaves one end to move: both shrink together.
        for j in range(_SHRINKS) if mode == INTEGER else range(i, i + 1):
            s, z = _clip_range(low * (1.0 - _SHRINK * i), high * (1.0 - _SHRINK * j), mode)
            s1, s2 = _moments(v, _f(1.0 / s), half, _f(-8.0 - z), _f(7.0 - z))
            error = s * (s * s2 - 2.0 * s1)  # ‖w‖² left out
            if error < least:
                least, scale, zero = error, s, z
    return scale, zero


@jit_part
def _mean_zero(v: F32, scale: float, zero: float, new_scale: float) -> float:
    """Return z' = clamp(round(mean(W_q − W/Δ')), 0, 15), centred; W_q are the codes of the previous (scale, zero)."""
    inverse, new_inverse, total = _f(1.0 / scale), _f(1.0 / new_scale), _f(0.0)
    low, high = _f(-8.0 - zero), _f(7.0 - zero)
    for k in range(v.shape[0]):
        total += min(max(np.rint(v[k] * inverse), low), high) - v[k] * new_inverse
    return float(min(max(np.rint(zero + float(total) / v.shape[0]), -8.0), 7.0))


@jit_part
def _paper(v: F32, mode: int, steps: int) -> tuple[float, float]:
    """Run the bounded init, then Δ', z' and W_q in turn until the error stops falling; return (scale, zero)."""
    scale, zero = _bounded_init(v, mode)
    half = _HALF if mode == MIDRISE else _NIL
    least = _error(v, _f(scale), half, _f(-8.0 - zero), _f(7.0 - zero))
    for _ in range(steps):
        s1, s2 = _moments(v, _f(1.0 / scale), half, _f(-8.0 - zero), _f(7.0 - zero))
        if s1 <= 0.0 or s2 <= 0.0:
            break
        s = s1 / s2
        z = _mean_zero(v, scale, zero, s) if mode == INTEGER else 0.0
        error = _error(v, _f(s), half, _f(-8.0 - z), _f(7.0 - z))
        if error >= least:
            break
        least, scale, zero = error, s, z
    return scale, zero


@jit_part
def _solve_row(
    v: F32, units: F64, mode: int, solver: int, starts: int, steps: int, work: F32, memory: F64, scales: F64, zeros: F64
) -> None:
    """Write scale (in the weight's own units; 0 for a group of zeros) and integer zero-point of every group.

    starts 0 is for grids whose group scales are searched afterwards, around each scale: there a rough scale is enough,
    except in the group of the largest scale, which becomes the scale of the row.
    """
    size = v.shape[0] // units.shape[0]
    largest, descents = 0, max(starts, 1)
    for g in range(units.shape[0]):
        scale, zeros[g] = 0.0, 0.0
        part = v[g * size : (g + 1) * size]
        if units[g] > 0.0:
            if solver == SEARCH:
                scale, zeros[g] = _search(part, mode, descents, steps, work, memory[0], memory[1])
            elif solver == PAPER:
                scale, zeros[g] = _paper(part, mode, steps)
            else:
                low, high, _ = _extent(part)
                scale, zeros[g] = _clip_range(low, high, mode)
        scales[g] = scale * units[g]
        largest = g if scales[g] > scales[largest] else largest
    if solver == SEARCH and starts == 0:
        part = v[largest * size : (largest + 1) * size]
        scale, zeros[largest] = _search(part, mode, descents + 7, steps, work, memory[0], memory[1])
        scales[largest] = scale * units[largest]


@jit_part
def _best_group_scale(v: F32, first: int, last: int, step: float, half: Real, work: F32) -> int:
    """Return the group scale in first..last of least error at scale step · group scale, on a grid with a fixed zero-point."""
    count = last - first + 1
    for i in range(count):
        work[0, i] = _f(1.0 / (step * (first + i)))
    s1, s2 = work[1, :count], work[2, :count]
    _moments_of_scales(v, work[0, :count], half, _f(-8.0), _f(7.0), s1, s2)
    best, least = first, math.inf
    for i in range(count):
        error = step * (first + i) * (step * (first + i) * s2[i] - 2.0 * s1[i])
        if error < least:
            best, least = first + i, error
    return best


@jit_part
def _fit(
    v: F32, units: F64, scales: F64, zero: float, half: Real, solver: int, work: F32, group_scales: U8
) -> tuple[float, float]:
    """Write the 8-bit group scales beside the row's fp32 scale; return (row scale, squared error of the row)."""
    groups = units.shape[0]
    size = v.shape[0] // groups
    row_scale, total = _f(max(scales.max(), SCALE_FLOOR)), 0.0
    low, high = _f(-8.0 - zero), _f(7.0 - zero)
    for g in range(groups):
        near = 255.0 * scales[g] / row_scale if groups > 1 else 255.0
        group_scales[g] = min(max(int(np.rint(near)), 1), 255)
        if units[g] == 0.0:
            # The mid-rise grid has no level at zero: the smallest group scale keeps the nearest ones small.
            total += size * (float(half) * row_scale * group_scales[g] / 255.0) ** 2
            continue
        part = v[g * size : (g + 1) * size]
        if groups > 1 and solver != MINMAX:
            reach = solver == SEARCH
            first = max(min(int(near * _WINDOW_LOW) if reach else int(near) - 1, 255), 1)
            last = max(min(int(near * _WINDOW_HIGH) + 1 if reach else int(near) + 2, 255), first)
            group_scales[g] = _best_group_scale(part, first, last, row_scale / 255.0 / units[g], half, work)
        scale = _f(float(row_scale * (_f(group_scales[g]) / _f(255.0))) / units[g])
        total += _error(part, scale, half, low, high) * units[g] * units[g]
    return float(row_scale), total


@jit_part
def _encode(v: F32, units: F64, scale: Real, group_scales: U8, zero: float, half: Real, codes: I8) -> None:
    """Write the codes of the nearest levels under the stored scales."""
    size = v.shape[0] // units.shape[0]
    low, high, shift = _f(-8.0 - zero), _f(7.0 - zero), _f(zero)
    for g in range(units.shape[0]):
        stored = float(scale * (_f(group_scales[g]) / _f(255.0)))
        inverse = _f(1.0) / _f(stored / units[g]) if units[g] > 0.0 else _f(1.0)
        for k in range(g * size, (g + 1) * size):
            codes[k] = np.int8(min(max(np.rint(v[k] * inverse - half), low), high) + shift)


@jit
def solve_rows(v: F32, units: F64, mode: int, solver: int, starts: int, steps: int, scales: F64, zeros: F64) -> None:
    """Find the scale and the integer zero-point of every group of normalized rows.

    Args:
        v: fp32 [R, K], normalized by :func:`dvdquant.quantize.backends.torch_rows.load_rows`.
        units: fp64 [R, groups], the unit of every group; 0 for a group of zeros.
        mode: MIDRISE, SYMMETRIC or INTEGER.
        solver: MINMAX, PAPER or SEARCH.
        starts: Peaks of the scan from which the search descends; 0 for rough scales (all but the largest).
        steps: Most descent steps.
        scales: fp64 [R, groups], written: Δ in the weight's own units; 0 for a group of zeros.
        zeros: fp64 [R, groups], written: integers −8..7; 0 for MIDRISE, whose half is left to the caller.
    """
    # Scratch for up to _MOST scales at once, one scale a column.
    # work, fp32 [3, _MOST]: 1/Δ, S1, S2.
    # memory, fp64 [2, _MOST]: gain, integer zero-point.
    work, memory = np.empty((3, _MOST), np.float32), np.empty((2, _MOST))
    for r in range(v.shape[0]):
        _solve_row(v[r], units[r], mode, solver, starts, steps, work, memory, scales[r], zeros[r])


@jit
def quantize_rows(
    v: F32,
    units: F64,
    mode: int,
    solver: int,
    starts: int,
    steps: int,
    codes: I8,
    row_scales: F32,
    group_scales: U8,
    row_zeros: F32,
) -> None:
    """Quantize normalized rows on grids with a fixed zero-point, or one integer per row.

    The min-max grid comes first and wins ties.

    Args:
        v: fp32 [R, K], normalized by :func:`dvdquant.quantize.backends.torch_rows.load_rows`.
        units: fp64 [R, groups], the unit of every group; 0 for a group of zeros.
        mode: MIDRISE, SYMMETRIC or INTEGER.
        solver: MINMAX, PAPER or SEARCH.
        starts: Peaks of the scan from which the search descends; 0 for groups, whose scales are searched afterwards.
        steps: Most descent steps.
        codes: int8 [R, K], written: −8..7.
        row_scales: fp32 [R], written: the scale of each row.
        group_scales: uint8 [R, groups], written: 1..255.
        row_zeros: fp32 [R], written: centred zero-point, −0.5 for MIDRISE; 0 for a row of zeros.
    """
    groups = group_scales.shape[1]
    half = _HALF if mode == MIDRISE else _NIL
    # Scratch for up to _MOST scales at once, one scale a column.
    # work, fp32 [3, _MOST]: 1/Δ, S1, S2.
    # memory, fp64 [2, _MOST]: gain, integer zero-point.
    work, memory = np.empty((3, _MOST), np.float32), np.empty((2, _MOST))
    # One value a group: solved scale and zero-point, and the stored group scale of this attempt.
    scales, zeros, trial = np.empty(groups), np.empty(groups), np.empty(groups, np.uint8)
    for r in range(v.shape[0]):
        row_scale, zero, least = SCALE_FLOOR, 0.0, math.inf
        group_scales[r].fill(255)
        if units[r].max() <= SCALE_FLOOR:
            # Zeros, or too small for any grid: exactly zero, also where the mid-rise grid has no level at zero.
            codes[r].fill(0)
            row_scales[r], row_zeros[r] = _f(row_scale), _f(0.0)
            continue
        # Attempt 0 is min-max, attempt 1 the solver.
        for attempt in range(1 if solver == MINMAX else 2):
            kind = solver if attempt > 0 else MINMAX
            _solve_row(v[r], units[r], mode, kind, starts, steps, work, memory, scales, zeros)
            scale, error = _fit(v[r], units[r], scales, zeros[0], half, kind, work, trial)
            if error < least:
                row_scale, zero, least = scale, zeros[0], error
                for g in range(groups):
                    group_scales[r, g] = trial[g]
        _encode(v[r], units[r], _f(row_scale), group_scales[r], zero, half, codes[r])
        row_scales[r], row_zeros[r] = _f(row_scale), _f(zero - float(half))
