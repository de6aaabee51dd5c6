"""The checks of gpu_check for the quantizer's kernels: grids against the CPU's search, codes against their definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from check_compare import Verdict, check_equal
from check_kernels import Bench, Outcome, Tally
from torch import Tensor

from dvdquant.numerics.packing import expand_zero
from dvdquant.quantize.backends.cuda_grid import QuantizerKernels
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight, relative_mse
from dvdquant.quantize.gptq import ErrorFeedback
from dvdquant.recipe import WeightSpec

__all__ = ["check_quantizer"]

GRIDS = tuple((zero, group) for zero in ("midrise", "symmetric", "float") for group in (0, 128, 64, 32, 16))
# Of the CPU's search, which is within 1 per mille of a dense one.
_WORSE = 0.002
# A last bit of an fp32 sum may turn a code at a tie, and with it some of those after it.
_OTHER_CODES = 0.002


def check_quantizer(bench: Bench, rows: int = 130, features: tuple[int, ...] = (256, 1920, 3072)) -> Iterator[Outcome]:
    """Every grid on heavy-tailed rows of several lengths, min-max, zeros and the smallest numbers; then feedback."""
    tally, kernels = Tally(), QuantizerKernels(bench.kernels.library)
    for k in features:
        w = _rows(rows, k)
        for zero, group in GRIDS:
            if k % (group or 1):
                continue
            where = f"{rows} x {k}, {zero}, groups of {group or 'the row'}"
            found = _search(kernels, w.to(bench.device), group, zero, "search")
            tally.add("quantizer: search", _as_good(w, found, zero, group, "search"), where)
            tally.add("quantizer: codes", _nearest(w, found), where)
            ends = _search(kernels, w.to(bench.device), group, zero, "minmax")
            tally.add("quantizer: min-max", _as_good(w, ends, zero, group, "minmax"), where)
            again = _search(kernels, w.to(bench.device), group, zero, "search")
            same = check_equal(again.codes.float(), found.codes.float(), "codes")
            tally.add("quantizer: two runs bit-equal", same, where)
            tally.add("quantizer: feedback", _rounded(kernels, bench, w, group, zero, math.gcd(k, 256)), where)
        nothing = _search(kernels, torch.tensor([0.0, 1e-44, 1e-30, 1e30]).repeat_interleave(k).view(4, k).to(bench.device), 0, "float", "search")  # fmt: skip # noqa: E501
        restored = nothing.dequantize(torch.float64)
        passed = bool((restored[:2] == 0).all()) and bool(torch.isfinite(restored).all())
        tally.add("quantizer: zeros and extremes", Verdict(passed, note="a row of zeros is not zero"), f"K {k}")
    yield from tally.rows.values()


def _rows(rows: int, features: int) -> Tensor:
    """Heavy-tailed, with outlier channels; one row in ten one-sided."""
    generator = torch.Generator().manual_seed(21)
    w = torch.randn(rows, features, generator=generator) / torch.rand(rows, features, generator=generator).clamp(
        min=0.02
    )
    w[:, 3::37] *= 8
    w[::10] = w[::10].abs()
    return w


def _search(kernels: QuantizerKernels, w: Tensor, group: int, zero: str, solver: str) -> QuantizedWeight:
    groups = w.shape[1] // group if group else 1
    return QuantizedWeight(*(t.cpu() for t in kernels.search(w, groups, zero, solver)))


def _as_good(w: Tensor, found: QuantizedWeight, zero: Any, group: int, solver: Any) -> Verdict:
    mine = relative_mse(w, found)
    theirs = relative_mse(w, quantize_weight(w, WeightSpec(group, zero, solver)))
    note = f"relative squared error {mine:.6g}, on the CPU {theirs:.6g}"
    return Verdict(mine <= theirs * (1 + _WORSE), max(0.0, (mine / theirs - 1) / _WORSE), note=note)


def _nearest(w: Tensor, found: QuantizedWeight) -> Verdict:
    """Codes are those nearest to the stored grid, up to ties."""
    groups = found.group_scale.shape[1]
    step = (found.scale[:, None] * (found.group_scale.float() / 255)).double()[..., None]
    exact = w.double().view(len(w), groups, -1) / step + expand_zero(found.zero).double()[..., None]
    codes = found.codes.double().view(exact.shape)
    away = (exact.clamp(-8, 7) - codes).abs()
    # fp32: a division and a multiply-add of numbers up to 16.
    bound = 0.5 + 16 * 2.0**-22
    return Verdict(
        bool((away <= bound).all()), float(away.max() / bound), int((exact.round().clamp(-8, 7) != codes).sum())
    )


def _rounded(kernels: QuantizerKernels, bench: Bench, w: Tensor, group: int, zero: Any, block: int) -> Verdict:
    """Against the compiled loop on the CPU."""
    generator = torch.Generator().manual_seed(22)
    falling = torch.randn(2 * block, block, generator=generator) * torch.arange(1, block + 1) ** -0.5
    turned = falling @ torch.linalg.qr(torch.randn(block, block, generator=generator))[0]
    gptq = ErrorFeedback((turned.T @ turned).expand(w.shape[1] // block, block, block))
    grid = quantize_weight(w, WeightSpec(group, zero))
    exact = gptq.round(w, grid).codes
    tensors = (t.to(bench.device) for t in (w, grid.scale, grid.group_scale, grid.zero, gptq.factors.float()))
    codes = kernels.round(*tensors).cpu()
    other = float((codes != exact).float().mean())
    return Verdict(
        other <= _OTHER_CODES, other / _OTHER_CODES, int((codes != exact).sum()), f"{100 * other:.3g} % other codes"
    )
