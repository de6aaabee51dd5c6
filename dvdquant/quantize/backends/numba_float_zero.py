"""The compiled loops of ``bgr.py`` for grids with a float zero-point: ``w ≈ Δ·(c − z)``, c in −8..7, per segment.

A segment is a group, or the whole row, normalized by ``backends/torch_rows.py``. Of given codes the best (Δ, z) is the
linear regression of w on them: ``Δ = cov(c, w)/var(c)``, ``z = mean(c) − mean(w)/Δ``. Where z leaves −8..7 15/16 it stays
on that end and ``Δ = ⟨c − z, w⟩/⟨c − z, c − z⟩``. The *gain* ``⟨c − z, w⟩²/⟨c − z, c − z⟩`` is ‖w‖² less the error.

Many grids are scored together: SIMD lanes hold grids, not weights. A search is a scan of ranges laid over the weights,
one regression of each, descent (nearest codes and regression in turn) from the best, and at last every stored grid around
the result, with codes of its own: 8-bit group scale by z in steps of 1/16.
"""

from __future__ import annotations

import math

import numpy as np

from dvdquant.numerics.array_types import F32, F64, I8, U8
from dvdquant.quantize.backends.jit import jit, jit_part

__all__ = ["quantize_rows", "solve_rows"]

MINMAX, PAPER, SEARCH = 0, 1, 2
SCALE_FLOOR = 2.0**-118

Real = np.float32

_f = np.float32
_LOW, _HIGH = -8.0, 7.9375
# Weights summed in fp32 before the sums go to fp64.
_RUN = 256
# The most grids scored at once.
_MOST = 256
# A scan lays grids over the range of the weights, from wider than it down: so many scales, and for each so many places;
# the outermost hang over by half a level. Short segments have many narrow minima and little to clip.
_SHORT, _WIDEST, _NARROWEST, _OVERHANG = 256, 1.1, 0.45, 0.5
_SCALES_SHORT, _PLACES_SHORT = 16, 8
_SCALES_LONG, _PLACES_LONG = 64, 4
# Short segments: descent from the best place of every scale, so many steps at most.
_STEPS = 4
# Long ones, smooth but slow to descend: from the best scales, so many apart, 8 x 8 grids around each, 2.5 % of the scale
# and half a level apart, then ever closer by a factor of 4.
_PEAKS, _APART = 2, 4
_SIDE, _ZOOMS, _NEAR_SCALE, _NEAR_ZERO = 8, 3, 0.025, 0.5
# Bounded init of the paper solver: each end of the range moves inwards in so many steps of 4 %.
_SHRINKS, _SHRINK = 14, 0.04
# Stored grids tried around a solution: group scales and zero-points on either side.
_GROUP_SCALES, _ZEROS = 8, 8


@jit_part
def _moments(v: F32, scale: F64, zero: F64, lanes: F32, sums: F64) -> None:
    """Write Σc, Σc², Σcw, fp64 [3, grids], of the nearest codes c = clamp(round(w/Δ + z), −8, 7) on every grid."""
    count, n = scale.shape[0], v.shape[0]
    inverse, shift = lanes[0, :count], lanes[1, :count]
    s0, s1, s2 = lanes[2, :count], lanes[3, :count], lanes[4, :count]
    low, high = _f(-8.0), _f(7.0)
    for j in range(count):
        inverse[j], shift[j] = _f(1.0 / scale[j]), _f(zero[j])
    sums[:, :count] = 0.0
    for start in range(0, n, _RUN):
        stop = min(start + _RUN, n)
        s0[:], s1[:], s2[:] = _f(0.0), _f(0.0), _f(0.0)
        for k in range(start, stop - 1, 2):  # pairs save loads and stores of the sums
            a, b = v[k], v[k + 1]
            for j in range(count):
                c = min(max(np.rint(a * inverse[j] + shift[j]), low), high)
                d = min(max(np.rint(b * inverse[j] + shift[j]), low), high)
                s0[j] += c + d
                s1[j] += c * c + d * d
                s2[j] += c * a + d * b
        if (stop - start) % 2:
            a = v[stop - 1]
            for j in range(count):
                c = min(max(np.rint(a * inverse[j] + shift[j]), low), high)
                s0[j] += c
                s1[j] += c * c
                s2[j] += c * a
        for j in range(count):
            sums[0, j] += np.float64(s0[j])
            sums[1, j] += np.float64(s1[j])
            sums[2, j] += np.float64(s2[j])


@jit_part
def _regress(n: int, total: float, sums: F64, scale: F64, zero: F64, gain: F64) -> None:
    """Set (Δ, z) to those of least error for the codes behind ``sums``, and write the gain; ``total`` is Σw.

    A grid that no regression can help keeps its (Δ, z) and gets the gain −1.
    """
    for j in range(scale.shape[0]):
        s0, s1, s2 = sums[0, j], sums[1, j], sums[2, j]
        slope = max(s2 - s0 * total / n, 1e-30) / max(s1 - s0 * s0 / n, 1e-30)
        z = min(max((s0 - total / slope) / n, _LOW), _HIGH)
        t1, t2 = s2 - z * total, s1 - 2.0 * z * s0 + n * z * z
        good = t1 > 1e-30 and t2 > 1e-30
        zero[j] = z if good else zero[j]
        scale[j] = t1 / t2 if good else scale[j]
        gain[j] = t1 * t1 / t2 if good else -1.0


@jit_part
def _extent(v: F32) -> tuple[float, float, float, float]:
    """Return min(w, 0), max(w, 0), Σw and Σw²."""
    low, high, total, energy = _f(0.0), _f(0.0), 0.0, 0.0
    for start in range(0, v.shape[0], _RUN):
        s, t = _f(0.0), _f(0.0)
        for k in range(start, min(start + _RUN, v.shape[0])):
            low = min(low, v[k])
            high = max(high, v[k])
            s += v[k]
            t += v[k] * v[k]
        total += np.float64(s)
        energy += np.float64(t)
    return np.float64(low), np.float64(high), total, energy


@jit_part
def _error(v: F32, scale: Real, zero: Real) -> float:
    """Return ‖w − Δ(c − z)‖² of the nearest codes, summed in fp64."""
    inverse, total = _f(1.0) / scale, 0.0
    for k in range(v.shape[0]):
        d = v[k] - scale * (min(max(np.rint(v[k] * inverse + zero), _f(-8.0)), _f(7.0)) - zero)
        total += np.float64(d) * np.float64(d)
    return total


@jit_part
def _to_front(scale: F64, zero: F64, gain: F64, kept: int) -> None:
    """Move the grid of highest gain to the front of every run of places kept, 2 kept, …; ``kept`` divides the count.

    Places i, i + kept, i + 2 kept, … compete with each other: afterwards place i < kept holds the best of them.
    """
    for first in range(kept, scale.shape[0], kept):
        for i in range(kept):
            if gain[first + i] > gain[i]:
                scale[i], zero[i], gain[i] = scale[first + i], zero[first + i], gain[first + i]


@jit_part
def _lay_ranges(low: float, high: float, rms: float, short: bool, scale: F64, zero: F64) -> int:
    """Lay grids over [low, high] and return the number of scales.

    Scales go down from more than the whole range; grid p · count + i has scale i and place p.
    """
    count, places = (_SCALES_SHORT, _PLACES_SHORT) if short else (_SCALES_LONG, _PLACES_LONG)
    top = (high - low) / 15.0 * _WIDEST
    # No 16-level grid is best below about 0.12 rms, unless the range itself is short.
    bottom = _NARROWEST * top if short else min(0.12 * rms, 0.6 * top)
    s, ratio = top, math.pow(bottom / top, 1.0 / (count - 1))
    for i in range(count):
        a, b = -8.0 - low / s, 7.0 - high / s  # the first, the last level on its end of the range
        first, last = min(a, b) - _OVERHANG, max(a, b) + _OVERHANG
        for p in range(places):
            scale[p * count + i] = s
            zero[p * count + i] = min(max(first + (last - first) * (p + 0.5) / places, _LOW), _HIGH)
        s *= ratio
    return count


@jit_part
def _descend(v: F32, total: float, steps: int, scale: F64, zero: F64, gain: F64, lanes: F32, sums: F64) -> None:
    """Find nearest codes and regress in turn, on all grids, until the sum of the gains stops rising."""
    before = -math.inf
    for _ in range(steps):
        risen = gain.sum()
        if risen <= before:
            break
        before = risen
        _moments(v, scale, zero, lanes, sums)
        _regress(v.shape[0], total, sums, scale, zero, gain)


@jit_part
def _zoom(v: F32, total: float, steps: int, scale: F64, zero: F64, gain: F64, lanes: F32, sums: F64) -> None:
    """Regress each grid around the best once, ever closer; all arrays hold _SIDE² grids, the best in front."""
    width = 1.0
    for _ in range(steps):
        s, z = scale[0], zero[0]
        for i in range(_SIDE):
            for p in range(_SIDE):  # (s, z) itself is one of them: the error never rises
                scale[i * _SIDE + p] = s * (1.0 + _NEAR_SCALE * width * (i - _SIDE // 2))
                zero[i * _SIDE + p] = min(max(z + _NEAR_ZERO * width * (p - _SIDE // 2), _LOW), _HIGH)
        _moments(v, scale, zero, lanes, sums)
        _regress(v.shape[0], total, sums, scale, zero, gain)
        _to_front(scale, zero, gain, 1)
        width *= 0.25


@jit_part
def _search(v: F32, steps: int, scale: F64, zero: F64, gain: F64, lanes: F32, sums: F64) -> tuple[float, float]:
    """Return the best grid of a scan of ranges, refined from its highest gains: (scale, zero)."""
    # 1. Scan: one regression of every grid, then the best place of every scale to the front.
    n = v.shape[0]
    low, high, total, energy = _extent(v)
    short = n <= _SHORT
    kept = _lay_ranges(low, high, math.sqrt(energy / n), short, scale, zero)
    count = kept * (_PLACES_SHORT if short else _PLACES_LONG)
    _moments(v, scale[:count], zero[:count], lanes, sums)
    _regress(n, total, sums, scale[:count], zero[:count], gain[:count])
    _to_front(scale[:count], zero[:count], gain[:count], kept)
    # 2. Short segments: descend from all of them.
    if short:
        _descend(v, total, min(steps, _STEPS), scale[:kept], zero[:kept], gain[:kept], lanes, sums)
        _to_front(scale[:kept], zero[:kept], gain[:kept], 1)
        return scale[0], zero[0]
    # 3. Long segments: zoom in on the highest peaks. The grids behind the first ``kept`` are free for it.
    most, s, z, around = -math.inf, 0.0, 0.0, slice(kept, kept + _SIDE * _SIDE)
    for _ in range(_PEAKS):
        peak = np.argmax(gain[:kept])
        scale[kept], zero[kept], gain[kept] = scale[peak], zero[peak], gain[peak]
        gain[max(peak - _APART, 0) : min(peak + _APART + 1, kept)] = -1.0
        _zoom(v, total, min(steps, _ZOOMS), scale[around], zero[around], gain[around], lanes, sums)
        if gain[kept] > most:
            most, s, z = gain[kept], scale[kept], zero[kept]
    return s, z


@jit_part
def _products(n: int, total: float, sums: F64, j: int, zero: float) -> tuple[float, float]:
    """Return ⟨c − z, w⟩ and ⟨c − z, c − z⟩ of grid j.

    The error at Δ is ‖w‖² less Δ(2⟨c − z, w⟩ − Δ⟨c − z, c − z⟩).
    """
    return sums[2, j] - zero * total, sums[1, j] - 2.0 * zero * sums[0, j] + n * zero * zero


@jit_part
def _bounded_init(v: F32, scale: F64, zero: F64, lanes: F32, sums: F64) -> tuple[float, float]:
    """Return the clip range of least error among those shrunk by (δ_l, δ_u), min-max first: (scale, zero)."""
    low, high, total, _ = _extent(v)
    count = _SHRINKS * _SHRINKS
    for i in range(_SHRINKS):
        for j in range(_SHRINKS):
            a, b = low * (1.0 - _SHRINK * i), high * (1.0 - _SHRINK * j)
            s = (b - a) / 15.0
            scale[i * _SHRINKS + j], zero[i * _SHRINKS + j] = s, -8.0 - a / s
    _moments(v, scale[:count], zero[:count], lanes, sums)
    best, most = 0, -math.inf
    for j in range(count):
        t1, t2 = _products(v.shape[0], total, sums, j, zero[j])
        if scale[j] * (2.0 * t1 - scale[j] * t2) > most:
            best, most = j, scale[j] * (2.0 * t1 - scale[j] * t2)
    return scale[best], zero[best]


@jit_part
def _paper(v: F32, steps: int, scale: F64, zero: F64, lanes: F32, sums: F64) -> tuple[float, float]:
    """Run the bounded init, then Δ', z' (a mean that is not rounded) and W_q in turn until the error stops falling."""
    n, total, least = v.shape[0], _extent(v)[2], math.inf
    s, z = best_s, best_z = _bounded_init(v, scale, zero, lanes, sums)
    for step in range(steps + 1):
        error = _error(v, _f(s), _f(z))
        if error >= least:
            break
        best_s, best_z, least = s, z, error
        if step == steps:
            break
        scale[0], zero[0] = s, z
        _moments(v, scale[:1], zero[:1], lanes, sums)
        t1, t2 = _products(n, total, sums, 0, z)
        if t1 <= 0.0 or t2 <= 0.0:
            break
        s = t1 / t2
        z = min(max((sums[0, 0] - total / s) / n, _LOW), _HIGH)
    return best_s, best_z


@jit_part
def _solve_row(
    v: F32, units: F64, solver: int, steps: int, grids: F64, lanes: F32, sums: F64, scales: F64, zeros: F64
) -> None:
    """Write scale (in the weight's own units; 0 for a group of zeros) and zero-point of every group."""
    size = v.shape[0] // units.shape[0]
    for g in range(units.shape[0]):
        scale, zeros[g] = 0.0, 0.0
        part = v[g * size : (g + 1) * size]
        if units[g] > 0.0:
            if solver == SEARCH:
                scale, zeros[g] = _search(part, steps, grids[0], grids[1], grids[2], lanes, sums)
            elif solver == PAPER:
                scale, zeros[g] = _paper(part, steps, grids[0], grids[1], lanes, sums)
            else:
                low, high, _, _ = _extent(part)
                scale = (high - low) / 15.0
                zeros[g] = -8.0 - low / scale
        scales[g] = scale * units[g]


@jit_part
def _code(zero: float) -> int:
    """Return the byte of a zero-point, z = byte/16 − 8."""
    return int(min(max(np.rint((zero + 8.0) * 16.0), 0.0), 255.0))


@jit_part
def _stored_near(v: F32, step: float, near: float, zero: float, grids: F64, lanes: F32, sums: F64) -> tuple[int, int]:
    """Return the best group scale and zero-point byte around (near, z), each grid with its own codes; Δ = step · group scale."""
    total, count = _extent(v)[2], _GROUP_SCALES * _ZEROS
    first = min(max(int(np.rint(near)) - _GROUP_SCALES // 2, 1), 256 - _GROUP_SCALES)
    lowest = min(max(_code(zero) - _ZEROS // 2, 0), 256 - _ZEROS)
    scale, zeros = grids[0, :count], grids[1, :count]
    for i in range(count):
        scale[i], zeros[i] = step * (first + i // _ZEROS), (lowest + i % _ZEROS) / 16.0 - 8.0
    _moments(v, scale, zeros, lanes, sums)
    best, most = 0, -math.inf
    for i in range(count):
        t1, t2 = _products(v.shape[0], total, sums, i, zeros[i])
        if scale[i] * (2.0 * t1 - scale[i] * t2) > most:
            best, most = i, scale[i] * (2.0 * t1 - scale[i] * t2)
    return first + best // _ZEROS, lowest + best % _ZEROS


@jit_part
def _row_near(v: F32, scale: float, zero: float, grids: F64, lanes: F32, sums: F64) -> tuple[float, int]:
    """Return the best scale and zero-point byte around (Δ, z) where the scale is fp32."""
    total, n = _extent(v)[2], v.shape[0]
    lowest = min(max(_code(zero) - _ZEROS // 2, 0), 256 - _ZEROS)
    scales, zeros = grids[0, :_ZEROS], grids[1, :_ZEROS]
    for i in range(_ZEROS):
        scales[i], zeros[i] = scale, (lowest + i) / 16.0 - 8.0
    best, most, found = 0, -math.inf, scale
    for _ in range(3):
        _moments(v, scales, zeros, lanes, sums)
        for i in range(_ZEROS):
            t1, t2 = _products(n, total, sums, i, zeros[i])
            if scales[i] * (2.0 * t1 - scales[i] * t2) > most:
                best, most, found = i, scales[i] * (2.0 * t1 - scales[i] * t2), scales[i]
            scales[i] = t1 / t2 if t1 > 0.0 and t2 > 0.0 else scales[i]
    return found, lowest + best


@jit_part
def _fit(
    v: F32,
    units: F64,
    solver: int,
    grids: F64,
    lanes: F32,
    sums: F64,
    scales: F64,
    zeros: F64,
    group_scales: U8,
    bytes_: U8,
) -> tuple[float, float]:
    """Write group scales and zero-point bytes beside the row's fp32 scale; return (row scale, squared error of the row)."""
    groups = units.shape[0]
    size = v.shape[0] // groups
    if groups == 1:
        bytes_[0] = _code(zeros[0])
        if solver != MINMAX:
            scale, bytes_[0] = _row_near(v, scales[0] / units[0], zeros[0], grids, lanes, sums)
            scales[0] = scale * units[0]
    row_scale, total = _f(max(scales.max(), SCALE_FLOOR)), 0.0
    for g in range(groups):
        near = 255.0 * scales[g] / row_scale if groups > 1 else 255.0
        group_scales[g] = min(max(int(np.rint(near)), 1), 255)
        if units[g] == 0.0:
            bytes_[g] = _code(0.0)
            continue
        part = v[g * size : (g + 1) * size]
        if groups > 1:
            bytes_[g] = _code(zeros[g])
            if solver != MINMAX:
                step = row_scale / 255.0 / units[g]
                group_scales[g], bytes_[g] = _stored_near(part, step, near, zeros[g], grids, lanes, sums)
        stored = _f(float(row_scale * (_f(group_scales[g]) / _f(255.0))) / units[g])
        total += _error(part, stored, _f(bytes_[g]) / _f(16.0) - _f(8.0)) * units[g] * units[g]
    return float(row_scale), total


@jit_part
def _encode(v: F32, units: F64, scale: Real, group_scales: U8, bytes_: U8, codes: I8) -> None:
    """Write the codes of the nearest levels under the stored grids; 0, whose level is 0, for a group of zeros."""
    size = v.shape[0] // units.shape[0]
    for g in range(units.shape[0]):
        stored = float(scale * (_f(group_scales[g]) / _f(255.0)))
        inverse = _f(1.0) / _f(stored / units[g]) if units[g] > 0.0 else _f(1.0)
        zero = _f(bytes_[g]) / _f(16.0) - _f(8.0)
        for k in range(g * size, (g + 1) * size):
            codes[k] = np.int8(min(max(np.rint(v[k] * inverse + zero), _f(-8.0)), _f(7.0)))


@jit
def solve_rows(v: F32, units: F64, solver: int, steps: int, scales: F64, zeros: F64) -> None:
    """Find the scale and the float zero-point of every group of normalized rows.

    Args:
        v: fp32 [R, K], normalized by :func:`dvdquant.quantize.backends.torch_rows.load_rows`.
        units: fp64 [R, groups], the unit of every group; 0 for a group of zeros.
        solver: MINMAX, PAPER or SEARCH.
        steps: Most descent steps.
        scales: fp64 [R, groups], written: Δ in the weight's own units; 0 for a group of zeros.
        zeros: fp64 [R, groups], written: centred zero-points, not rounded to bytes.
    """
    # Scratch for up to _MOST grids at once, one grid a column.
    # grids, fp64 [3, _MOST]: scale, zero-point, gain.
    # lanes, fp32 [5, _MOST]: 1/Δ, z, and the sums Σc, Σc², Σcw of one run of weights.
    # sums, fp64 [3, _MOST]: Σc, Σc², Σcw of the whole segment.
    grids, lanes, sums = np.empty((3, _MOST)), np.empty((5, _MOST), np.float32), np.empty((3, _MOST))
    for r in range(v.shape[0]):
        _solve_row(v[r], units[r], solver, steps, grids, lanes, sums, scales[r], zeros[r])


@jit
def quantize_rows(
    v: F32, units: F64, solver: int, steps: int, codes: I8, row_scales: F32, group_scales: U8, row_zeros: U8
) -> None:
    """Quantize normalized rows on grids with a float zero-point per group.

    The min-max grid comes first and wins ties.

    Args:
        v: fp32 [R, K], normalized by :func:`dvdquant.quantize.backends.torch_rows.load_rows`.
        units: fp64 [R, groups], the unit of every group; 0 for a group of zeros.
        solver: MINMAX, PAPER or SEARCH.
        steps: Most descent steps.
        codes: int8 [R, K], written: −8..7.
        row_scales: fp32 [R], written: the scale of each row.
        group_scales: uint8 [R, groups], written: 1..255.
        row_zeros: uint8 [R, groups], written: zero-point bytes, z = byte/16 − 8.
    """
    groups = group_scales.shape[1]
    # Scratch for up to _MOST grids at once, one grid a column.
    # grids, fp64 [3, _MOST]: scale, zero-point, gain.
    # lanes, fp32 [5, _MOST]: 1/Δ, z, and the sums Σc, Σc², Σcw of one run of weights.
    # sums, fp64 [3, _MOST]: Σc, Σc², Σcw of the whole segment.
    grids, lanes, sums = np.empty((3, _MOST)), np.empty((5, _MOST), np.float32), np.empty((3, _MOST))
    # One value a group: solved scale and zero-point, then the stored group scale and zero-point byte of this attempt.
    scales, zeros = np.empty(groups), np.empty(groups)
    trial, trial_bytes = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    for r in range(v.shape[0]):
        row_scale, least = SCALE_FLOOR, math.inf
        group_scales[r].fill(255)
        row_zeros[r].fill(128)
        if units[r].max() > SCALE_FLOOR:
            # Attempt 0 is min-max, attempt 1 the solver.
            for attempt in range(1 if solver == MINMAX else 2):
                kind = solver if attempt > 0 else MINMAX
                _solve_row(v[r], units[r], kind, steps, grids, lanes, sums, scales, zeros)
                scale, error = _fit(v[r], units[r], kind, grids, lanes, sums, scales, zeros, trial, trial_bytes)
                if error < least:
                    row_scale, least = scale, error
                    for g in range(groups):
                        group_scales[r, g], row_zeros[r, g] = trial[g], trial_bytes[g]
            _encode(v[r], units[r], _f(row_scale), group_scales[r], row_zeros[r], codes[r])
        else:
            codes[r].fill(0)  # zeros, or too small for any grid
        row_scales[r] = _f(row_scale)
