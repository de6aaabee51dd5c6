"""BGR in tensor operations, for weights on a GPU: the solvers ``minmax`` and ``search`` of ``bgr.py``.

Every segment (a group, or the whole row) is sorted once. The nearest codes ``c = clamp(round(w/Δ + z), −8, 7)`` of any grid
(Δ, z) are then 15 cuts of the sorted weights, and from prefix sums at the cuts follow

    Σc = −8n + Σ_b (n − i_b),   Σc² = 64n + Σ_b (2b − 1)(n − i_b),   Σcw = −8Σw + Σ_b Σ_{i ≥ i_b} w_i,   b = −7..7

with ``i_b`` the first weight from ``Δ(b − ½ − z)`` on. So a grid costs 15 look-ups whatever the length of the segment, and
thousands can be tried: there is no loop over weights, and nothing returns to the host before the result. The mid-rise grid
is z = −½, the symmetric one z = 0; a float z is the regression of the weights on the codes, as in ``numba_float_zero.py``.

Runs on any device; on the CPU the compiled loops of ``backends/numba_search.py`` are faster, and on a GPU the kernels of
``backends/cuda_grid.py`` where they are built: this moves 3 to 50 KB for each weight (``benchmarks/quantize.py --traffic``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["quantize_rows", "solves"]

# Smallest row scale, as in numba_search; times 1/255 it is still a normal fp32 number.
SCALE_FLOOR = 2.0**-118
_LOW, _HIGH = -8.0, 7.9375
LOOKUPS_AT_ONCE = 1 << 23
"""The number of look-ups at a time: it bounds the memory of one block of segments to a few hundred megabytes."""
# Scales scanned of a row and of a group, which is searched again afterwards as it is stored; descents from the best of them.
_SCALES, _GROUP_SCALES, _STARTS, _STEPS = 192, 64, 8, 12
# Zero-points tried with each scale in the scan of a float zero-point, and the narrowest scale of a short segment.
_PLACES, _SHORT, _NARROWEST, _SHORT_SCALES, _SHORT_PLACES = 4, 256, 0.45, 16, 8
# Long segments with a float zero-point: 8 x 8 grids around the best, 2.5 % of the scale and half a level apart, then closer.
_PEAKS, _SIDE, _ZOOMS, _NEAR_SCALE, _NEAR_ZERO = 8, 8, 3, 0.025, 0.5
# Factors tried around the best scale of a group, as ratios to it; stored zero-points on either side.
_WINDOW_LOW, _WINDOW_HIGH, _WINDOW, _ZEROS = 0.75, 1.25, 96, 4


@dataclass(frozen=True)
class _Segments:
    """Segments [S, n], normalized by powers of two so that amax is in [0.5, 1), sorted, with prefix sums in fp64.

    Args:
        values: fp32 [S, n], ascending.
        prefix: fp64 [S, n + 1], sums of the first i values.
        total: fp64 [S, 1], Σw.
        energy: fp64 [S, 1], ‖w‖².
    """

    values: Tensor
    prefix: Tensor
    total: Tensor
    energy: Tensor

    @classmethod
    def of(cls, v: Tensor) -> _Segments:
        """Return the sorted segments of normalized weights v, fp32 [S, n]."""
        values = v.sort(dim=1).values
        prefix = torch.nn.functional.pad(values.double().cumsum(1), (1, 0))
        return cls(values, prefix, prefix[:, -1:].clone(), values.double().square().sum(1, keepdim=True))

    def take(self, rows: slice) -> _Segments:
        """Return some segments, as views."""
        return _Segments(self.values[rows], self.prefix[rows], self.total[rows], self.energy[rows])

    def moments(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σc, Σc², Σcw fp64 [S, J] of the grids (scale, zero) [S, J]."""
        n = self.values.shape[1]
        s0, s1 = torch.full_like(scale, -8.0 * n), torch.full_like(scale, 64.0 * n)
        s2 = -8.0 * self.total.expand_as(scale)
        for b in range(-7, 8):
            cut = (scale * (b - 0.5 - zero)).float().contiguous()
            index = torch.searchsorted(self.values, cut)
            above = (n - index).double()
            s0 = s0 + above
            s1 = s1 + (2 * b - 1) * above
            s2 = s2 + (self.total - self.prefix.gather(1, index))
        return s0, s1, s2

    def products(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨c − z, w⟩ and ⟨c − z, c − z⟩ of the nearest codes, [S, J]."""
        s0, s1, s2 = self.moments(scale, zero)
        return s2 - zero * self.total, s1 - 2.0 * zero * s0 + self.values.shape[1] * zero.square()

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return ‖w − Δ(c − z)‖² [S, J]."""
        t1, t2 = self.products(scale, zero)
        return self.energy - scale * (2.0 * t1 - scale * t2)

    def regress(self, scale: Tensor, zero: Tensor, float_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return (Δ, z) of least error for the codes of each grid, and the gain ‖w‖² less that error.

        z stays as it is unless ``float_zero``.
        """
        n = self.values.shape[1]
        s0, s1, s2 = self.moments(scale, zero)
        if float_zero:
            slope = (s2 - s0 * self.total / n).clamp(min=1e-30) / (s1 - s0.square() / n).clamp(min=1e-30)
            moved = ((s0 - self.total / slope) / n).clamp(_LOW, _HIGH)
        else:
            moved = zero
        t1, t2 = s2 - moved * self.total, s1 - 2.0 * moved * s0 + n * moved.square()
        good = (t1 > 1e-30) & (t2 > 1e-30)
        gain = torch.where(good, t1.square() / t2.clamp(min=1e-30), -1.0)
        return torch.where(good, t1 / t2.clamp(min=1e-30), scale), torch.where(good, moved, zero), gain


def solves(device: torch.device, zero_point: str, solver: str) -> bool:
    """Return whether weights on ``device`` are quantized here: not on the CPU, and not by the paper's own algorithm.

    Args:
        device: The device of the weight.
        zero_point: Zero-point of the recipe.
        solver: Solver of the recipe.
    """
    return device.type != "cpu" and zero_point != "paper" and solver != "paper"


def quantize_rows(w: Tensor, groups: int, zero_point: str, solver: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize rows on the device of ``w``.

    Args:
        w: fp32 [N, K], finite.
        groups: Segments of a row; divides K.
        zero_point: ``midrise``, ``symmetric`` or ``float``.
        solver: ``minmax`` or ``search``.

    Returns:
        codes int8 [N, K], scale fp32 [N], group_scale uint8 [N, groups], zero fp32 [N] or, for ``float``, uint8 [N, groups].
    """
    rows, features = w.shape
    per_segment = (_WINDOW + _GROUP_SCALES) if groups > 1 else _SCALES * _PLACES
    step = max(1, LOOKUPS_AT_ONCE // max(features, per_segment * groups))
    parts = [_quantize_block(w[i : i + step], groups, zero_point, solver) for i in range(0, rows, step)]
    codes, scale, group_scale, zero = (torch.cat(p) for p in zip(*parts))
    return codes, scale, group_scale, zero


def _quantize_block(w: Tensor, groups: int, zero_point: str, solver: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize some rows: arguments and results as :func:`quantize_rows`."""
    rows, features = w.shape
    # 1. Normalize every segment by a power of two.
    parts = w.reshape(rows * groups, features // groups)
    amax = parts.abs().amax(1, keepdim=True)
    unit = torch.ldexp(torch.ones_like(amax, dtype=torch.float64), torch.frexp(amax).exponent)
    unit = torch.where(amax > 0, unit, 0.0).reshape(rows, groups)
    # Far below any error of the row: zero, so that fp32 holds every ratio.
    unit = torch.where(unit < unit.amax(1, keepdim=True) * 2.0**-100, 0.0, unit)
    live = (unit > 0).reshape(-1, 1)
    inverse = torch.where(live, 1.0 / unit.reshape(-1, 1).clamp(min=1e-300), 0.0)
    v = (parts.double() * inverse).float()
    # 2. Min-max, and the search where it is better.
    segments = _Segments.of(v)
    best = _solve(segments, unit, zero_point, "minmax")
    if solver == "search":
        found = _solve(segments, unit, zero_point, "search")
        better = (found.error < best.error)[:, None]  # the min-max grid comes first and wins ties
        scale, group_scale, zero = (torch.where(better, a, b) for a, b in zip(found.grids, best.grids))
        best = _Stored(scale, group_scale, zero, torch.minimum(found.error, best.error))
    return _encode(v, unit, best, zero_point)


@dataclass(frozen=True)
class _Stored:
    """Grids as they are stored, and their error.

    Args:
        scale: Row scale, fp32 [N, 1].
        group_scale: fp64 [N, groups], whole numbers 1..255.
        zero: fp64 [N, groups], centred zero-points.
        error: fp64 [N], squared error of each row.
    """

    scale: Tensor
    group_scale: Tensor
    zero: Tensor
    error: Tensor

    @property
    def grids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (scale, group_scale, zero)."""
        return self.scale, self.group_scale, self.zero


def _solve(segments: _Segments, unit: Tensor, zero_point: str, solver: str) -> _Stored:
    """Find the best grid of every segment, then the stored one nearest to it, or around it, of least error."""
    rows, groups = unit.shape
    float_zero = zero_point == "float"
    # 1. The best grid of every segment.
    if solver == "search":
        scale, zero = _search(segments, zero_point, groups > 1)
        if float_zero and groups == 1:
            scale, zero = _row_around(segments, scale, _stored_zero(zero))
    else:
        scale, zero = _min_max(segments, zero_point)
    # 2. As it is stored: the largest scale becomes the row's, the others 255ths of it.
    scale = (scale.reshape(rows, groups) * unit).clamp(min=0)
    row = scale.amax(1, keepdim=True).clamp(min=SCALE_FLOOR).float()
    zero = _stored_zero(zero) if float_zero else zero
    near = 255.0 * scale / row.double()
    group_scale = near.round().clamp(1, 255) if groups > 1 else torch.full_like(near, 255.0)
    safe = torch.where(unit > 0, unit, 1.0).reshape(-1, 1)
    if solver == "search" and groups > 1:
        step = (row.double() / 255.0).expand(rows, groups).reshape(-1, 1) / safe
        group_scale, zero = _stored_around(segments, step, near.reshape(-1, 1), zero, float_zero)
    # 3. The error of what is stored.
    flat = group_scale.reshape(-1, 1)
    stored = (row * (group_scale.reshape(rows, groups).float() / 255.0)).double().reshape(-1, 1) / safe
    error = segments.error(stored, zero) * unit.reshape(-1, 1).square()
    if not float_zero:
        # Of a group of zeros, the nearest levels of a grid without one at zero.
        level = (row.double() * zero.reshape(rows, groups)[:, :1]).expand(rows, groups).reshape(-1, 1) / 255.0
        dead = segments.values.shape[1] * level.square()
        flat = torch.where(unit.reshape(-1, 1) > 0, flat, 1.0 if groups > 1 else 255.0)
        error = torch.where(unit.reshape(-1, 1) > 0, error, dead)
    return _Stored(row, flat.reshape(rows, groups), zero.reshape(rows, groups), error.reshape(rows, groups).sum(1))


def _min_max(segments: _Segments, zero_point: str) -> tuple[Tensor, Tensor]:
    """Return the grid whose ends lie on the extremes of the segment, 0 among them: (scale, zero) [S, 1]."""
    low = segments.values[:, :1].double().clamp(max=0)
    high = segments.values[:, -1:].double().clamp(min=0)
    if zero_point == "float":
        scale = ((high - low) / 15.0).clamp(min=1e-30)
        return scale, -8.0 - low / scale
    half = 0.5 if zero_point == "midrise" else 0.0
    return torch.maximum(-low, high) / (7.0 + half), torch.full_like(low, -half)


def _scan(segments: _Segments, zero_point: str, count: int, places: int) -> tuple[Tensor, Tensor]:
    """Return grids [S, count · places]: a geometric row of scales, each with every place of a float zero-point."""
    n, float_zero = segments.values.shape[1], zero_point == "float"
    rms = (segments.energy / n).sqrt()
    if float_zero:
        low = segments.values[:, :1].double().clamp(max=0)
        high = segments.values[:, -1:].double().clamp(min=0)
        top = (high - low) / 15.0 * 1.1
        bottom = _NARROWEST * top if n <= _SHORT else torch.minimum(0.12 * rms, 0.6 * top)
    else:
        widest, zero = _min_max(segments, zero_point)
        top = widest * (1.4 if n <= 32 else 1.25 if n <= 256 else 1.07)
        # No 16-level grid is best below about 0.2 rms, unless the range itself is short.
        bottom = torch.minimum(0.2 * rms, 0.6 * top)
    top, bottom = top.clamp(min=1e-30), bottom.clamp(min=1e-31)
    scale = top * (bottom / top) ** torch.linspace(0, 1, count, dtype=torch.float64, device=top.device)
    if not float_zero:
        return scale, zero.expand_as(scale)
    scale = scale.repeat_interleave(places, 1)
    ends = -8.0 - low / scale, 7.0 - high / scale
    first, last = torch.minimum(*ends) - 0.5, torch.maximum(*ends) + 0.5
    place = (torch.arange(places, dtype=torch.float64, device=top.device) + 0.5) / places
    return scale, (first + (last - first) * place.repeat(count)).clamp(_LOW, _HIGH)


def _search(segments: _Segments, zero_point: str, grouped: bool) -> tuple[Tensor, Tensor]:
    """Return the best grid of a scan, refined by descent from its highest gains: (scale, zero) [S, 1]."""
    n, float_zero = segments.values.shape[1], zero_point == "float"
    many = float_zero and n <= _SHORT  # many narrow minima: descent from the best place of every scale
    count = _SHORT_SCALES if many else _GROUP_SCALES if grouped else _SCALES
    places = (_SHORT_PLACES if many else _PLACES) if float_zero else 1
    # 1. Scan.
    scale, zero = _scan(segments, zero_point, count, places)
    refined = segments.regress(scale, zero, float_zero)
    # 2. Choose starts. Peaks only: neighbours of the highest descend into the same minimum.
    gain = refined[2]
    spaced = gain.reshape(len(gain), count, -1).amax(2)
    padded = torch.nn.functional.pad(spaced, (1, 1), value=-2.0)
    peak = (spaced >= padded[:, :-2]) & (spaced >= padded[:, 2:]) | many
    ranked = (
        torch.where(peak, spaced, spaced - 2.0 * segments.energy)
        .topk(count if many else min(_STARTS, count), dim=1)
        .indices
    )
    inside = gain.reshape(len(gain), count, -1).argmax(2).gather(1, ranked)
    chosen = ranked * places + inside
    scale, zero, gain = (t.gather(1, chosen) for t in refined)
    # 3. Descend from each.
    for _ in range(_STEPS):
        new = segments.regress(scale, zero, float_zero)
        risen = new[2] > gain
        scale, zero, gain = (torch.where(risen, a, b) for a, b in zip(new, (scale, zero, gain)))
    winner = gain.argmax(1, keepdim=True)
    if float_zero and n > _SHORT:
        return _zoom(segments, *(t.gather(1, gain.topk(_PEAKS, dim=1).indices) for t in (scale, zero, gain)))
    return scale.gather(1, winner), zero.gather(1, winner)


def _zoom(segments: _Segments, scale: Tensor, zero: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Regress each grid around the best once, ever closer: long segments are smooth, but descent is slow there."""
    side = torch.arange(_SIDE, dtype=torch.float64, device=scale.device) - _SIDE // 2
    across, along = side.repeat_interleave(_SIDE), side.repeat(_SIDE)
    for zoom in range(_ZOOMS):
        width = 0.25**zoom
        # Offset 0 is one of them: the error never rises.
        scales = (scale[..., None] * (1.0 + _NEAR_SCALE * width * across)).flatten(1)
        zeros = (zero[..., None] + _NEAR_ZERO * width * along).flatten(1).clamp(_LOW, _HIGH)
        grids = [t.reshape(len(t), -1, _SIDE * _SIDE) for t in segments.regress(scales, zeros, True)]
        best = grids[2].argmax(2, keepdim=True)
        scale, zero, gain = (t.gather(2, best).squeeze(2) for t in grids)
    winner = gain.argmax(1, keepdim=True)
    return scale.gather(1, winner), zero.gather(1, winner)


def _stored_zero(zero: Tensor) -> Tensor:
    """Return the nearest zero-point of the byte format, z = byte/16 − 8."""
    return ((zero + 8.0) * 16.0).round().clamp(0, 255) / 16.0 - 8.0


def _row_around(segments: _Segments, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stored zero-point next to ``zero`` of least error, with the fp32 scale that fits it."""
    reach = torch.arange(-_ZEROS, _ZEROS, dtype=torch.float64, device=scale.device) / 16.0
    zeros = (zero + reach).clamp(_LOW, _HIGH)
    scales = scale.expand_as(zeros)
    for _ in range(3):
        t1, t2 = segments.products(scales, zeros)
        scales = torch.where((t1 > 1e-30) & (t2 > 1e-30), t1 / t2.clamp(min=1e-30), scales)
    best = segments.error(scales, zeros).argmin(1, keepdim=True)
    return scales.gather(1, best), zeros.gather(1, best)


def _stored_around(
    segments: _Segments, step: Tensor, near: Tensor, zero: Tensor, float_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return the stored group scale, and zero-point if ``float_zero``, of least error around (near, zero)."""
    if float_zero:
        reach = torch.arange(-_ZEROS, _ZEROS, dtype=torch.float64, device=step.device)
        group_scales = (near.round() + reach.repeat_interleave(2 * _ZEROS)).clamp(1, 255)
        zeros = (zero + reach.repeat(2 * _ZEROS) / 16.0).clamp(_LOW, _HIGH)
    else:
        first = (near * _WINDOW_LOW).floor().clamp(1, 255)
        last = torch.maximum((near * _WINDOW_HIGH).ceil().clamp(1, 255), first)
        ratio = torch.linspace(0, 1, _WINDOW, dtype=torch.float64, device=step.device)
        group_scales = (first + (last - first) * ratio).round()
        zeros = zero.expand_as(group_scales)
    best = segments.error(step * group_scales, zeros).argmin(1, keepdim=True)
    return group_scales.gather(1, best), zeros.gather(1, best)


def _encode(v: Tensor, unit: Tensor, best: _Stored, zero_point: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the nearest codes under the stored grids, by the fp32 arithmetic of the compiled loops."""
    rows, groups = unit.shape
    group_scale = best.group_scale.to(torch.uint8)
    stored = best.scale * (group_scale.float() / 255.0)
    live = unit > 0
    inverse = torch.where(live, 1.0 / (stored.double() / torch.where(live, unit, 1.0)).float(), 1.0)
    codes = (v.reshape(rows, groups, -1) * inverse[:, :, None] + best.zero.float()[:, :, None]).round().clamp(-8, 7)
    # Zeros, or too small for any grid: exactly zero, also where the mid-rise grid has no level at zero.
    nothing = unit.amax(1) <= SCALE_FLOOR
    codes = torch.where(nothing[:, None, None], 0.0, codes).to(torch.int8).reshape(rows, -1)
    scale = torch.where(nothing, SCALE_FLOOR, best.scale[:, 0]).float()
    group_scale = torch.where(nothing[:, None], 255, group_scale).to(torch.uint8)
    if zero_point == "float":
        byte = ((best.zero + 8.0) * 16.0).round()
        zero = torch.where(live & ~nothing[:, None], byte, 128.0).to(torch.uint8)
        codes = torch.where(live.repeat_interleave(v.shape[1], 1), codes, 0).to(torch.int8)
        return codes, scale, group_scale, zero
    return codes, scale, group_scale, torch.where(nothing, 0.0, best.zero[:, 0]).float()
