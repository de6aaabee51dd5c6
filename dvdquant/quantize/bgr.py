"""BGR, Bounded-init Grid Refinement: 4-bit weight grids of least squared error, found from the weights alone.

``W ≈ scale[n] · (group_scale[n, g] / 255) · (codes[n, k] − zero)``, codes −8..7, for the already rotated weight W [N, K]; zero
is one number per row, or for the ``float`` zero-point one per row and group.

Solvers:
    ``minmax``: the ends of the grid lie on the extremes of the row (round to nearest).
    ``paper``: Algorithm 1 of DVD-Quant. Bounded init keeps the best of a lattice of shrunk clip ranges, min-max among
    them; then Δ = ⟨q, w⟩/⟨q, q⟩, z = round(mean(codes − w/Δ)) and the codes in turn, until the error stops falling.
    ``search``: scales from the whole range in steps of 2 %, each scored by the error it has after one such Δ, then
    descent from the best peaks; within 1 ‰ of a dense search on rows and groups from 32 weights up, and within 5 ‰ on
    groups of 16, where the 8-bit group scale is the limit. Of groups, every group scale around the best one is tried.
    A float zero-point is searched together with the scale, by linear regression of the weights on the codes.

The loops are compiled by numba for the CPU they run on. Weights on a GPU are quantized there, by the kernels of
``backends/cuda_grid.py`` where they are built, else by ``backends/torch_grid.py`` (``paper`` excepted: its blocks go through
the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dvdquant.errors import CheckpointError, RecipeError, ShapeError
from dvdquant.numerics.array_types import F32, F64
from dvdquant.numerics.packing import expand_zero
from dvdquant.recipe import SOLVERS, ZERO_POINTS, WeightSpec

__all__ = ["Grid", "QuantizedWeight", "quantize_weight", "refine_grid", "relative_mse"]


_FLOAT = 3
_MODES = {"midrise": 0, "symmetric": 1, "paper": 2, "float": _FLOAT}
_SOLVER_CODES = {"minmax": 0, "paper": 1, "search": 2}
# Weights converted to fp32 and handed to the threads at a time: 16 MiB.
_BLOCK = 1 << 22
# Weights normalized at a time, so that they are still in the cache when they are solved: 256 KiB.
_PART = 1 << 16
# Enough for every row seen; each step lowers the error, so the loop ends by itself long before.
_STEPS = 50
# Peaks of the scan from which the search descends.
_STARTS = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] on its grid.

    Args:
        codes: int8 [N, K] in −8..7.
        scale: fp32 [N], finite and at least 2⁻¹¹⁸.
        group_scale: uint8 [N, groups] in 1..255; groups = K / group size, [N, 1] of 255 for per-row scales.
        zero: The centred zero-point: fp32 [N], or for ``float`` uint8 [N, groups] (see :func:`packing.expand_zero`). 0
            for a row of zeros in every mode, and for a group of zeros in ``float``, so that it reconstructs exactly.
    """

    codes: Tensor
    scale: Tensor
    group_scale: Tensor
    zero: Tensor

    def rows(self, part: slice) -> QuantizedWeight:
        """Return some rows, as views.

        Args:
            part: The rows, as a slice of 0 to N.
        """
        return QuantizedWeight(self.codes[part], self.scale[part], self.group_scale[part], self.zero[part])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``scale · (group_scale/255) · (codes − zero)`` [N, K], scales rounded to fp32 as every kernel does.

        Args:
            dtype: Dtype of the result; float64 also computes in float64, all others in fp32.
        """
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        groups = self.group_scale.shape[1]
        scale = (self.scale[:, None] * (self.group_scale.to(torch.float32) / 255)).to(compute)
        codes = self.codes.to(compute).reshape(len(self.codes), groups, -1)
        centred = codes - expand_zero(self.zero).to(compute)[..., None]
        return (centred * scale[..., None]).reshape(self.codes.shape).to(dtype)


@dataclass(frozen=True)
class Grid:
    """Scales and zero-points of segments before they are stored, for studies.

    Args:
        scale: fp64 [N, groups]; 0 for a group of zeros.
        zero: fp64 [N, groups], centred zero-point of each group.
        error: fp64 [N, groups], ‖w − ŵ‖² of each group.
    """

    scale: Tensor
    zero: Tensor
    error: Tensor


def quantize_weight(w: Tensor, spec: WeightSpec) -> QuantizedWeight:
    """Quantize a rotated weight as the recipe says.

    The result is never worse, row by row, than the min-max grid of the same ``spec`` stored in the same format.
    A group of zeros in a row that is not all zero reconstructs exactly, except on the mid-rise grid, which has no level
    at zero: there |ŵ| = scale/510.

    Args:
        w: [N, K], fp32, bf16 or fp16 (fp64 is rounded to fp32).
        spec: Zero-point, solver and group size of the grid.

    Returns:
        Codes and scales on the device of w.

    Raises:
        ShapeError: w is not a non-empty [N, K], or the group size is odd or does not divide K.
        CheckpointError: w has NaN or Inf.
        RecipeError: The solver or the zero-point is unknown, or an integer zero-point is asked for with groups.
    """
    mode, solver = _check_names(spec.zero_point, spec.solver)
    if spec.zero_point == "paper" and spec.group_size:
        raise RecipeError(
            "zero_point 'paper' is one integer per row and cannot be combined with weight groups",
            fix="take group_size 0, or zero_point 'float' or 'midrise'",
        )
    groups = _check_shape(w, spec.group_size)
    if spec.group_size % 2:
        raise ShapeError(f"weight groups of {spec.group_size} are odd", available="even group sizes, or 0 for the row")
    # 1. On a GPU: by the kernels where they take these rows, else by tensor operations.
    from dvdquant.quantize.backends import torch_grid

    if torch_grid.solves(w.device, spec.zero_point, spec.solver):
        exact = w.detach().to(torch.float32)
        if not bool(torch.isfinite(exact).all()):
            raise _nonfinite(w)
        from dvdquant.quantize.backends.cuda_grid import quantizer_kernels

        kernels, search = quantizer_kernels(w.device), torch_grid.quantize_rows
        if kernels is not None and kernels.searches(w.shape[1], groups, spec.zero_point, spec.solver):
            search = kernels.search
        return QuantizedWeight(*search(exact, groups, spec.zero_point, spec.solver))
    # 2. On the CPU, or by the paper's algorithm: by compiled loops, blocks of rows on all threads.
    # numba takes a second to import: only those who quantize pay for it.
    from dvdquant.quantize.backends import numba_float_zero, numba_search

    # The group scales are searched afterwards, over the neighbourhood of each scale.
    starts = _STARTS if groups == 1 else 0
    # Results, filled block by block through their numpy views.
    rows, features = w.shape
    codes = torch.empty(rows, features, dtype=torch.int8)
    scale, group_scale = torch.empty(rows), torch.empty(rows, groups, dtype=torch.uint8)
    zero = torch.empty_like(group_scale) if mode == _FLOAT else torch.empty(rows)
    outputs = [t.numpy() for t in (codes, scale, group_scale, zero)]

    def work(v: F32, units: F64, rows: slice) -> None:
        out = [o[rows] for o in outputs]
        if mode == _FLOAT:
            numba_float_zero.quantize_rows(v, units, solver, _STEPS, *out)
        else:
            numba_search.quantize_rows(v, units, mode, solver, starts, _STEPS, *out)

    _for_row_blocks(w, groups, work)
    return QuantizedWeight(*(t.to(w.device) for t in (codes, scale, group_scale, zero)))


def refine_grid(
    w: Tensor, group_size: int = 0, zero_point: str = "midrise", solver: str = "search", iterations: int = _STEPS
) -> Grid:
    """Find the grid of every row or group on its own, with scales that are not rounded to the stored format.

    ``paper`` and ``float`` have a zero-point for each row or group.

    Args:
        w: [N, K], floating.
        group_size: Weights that share a scale, any divisor of K; 0 is the row.
        zero_point: ``midrise``, ``symmetric``, ``paper`` or ``float``.
        solver: ``minmax``, ``paper`` or ``search``.
        iterations: Most descent steps; 0 shows the start of the descent. The error does not rise with it.

    Returns:
        Scales, zero-points and errors on the CPU.

    Raises:
        ShapeError: w is not a non-empty [N, K], or the group size does not divide K.
        CheckpointError: w has NaN or Inf.
        RecipeError: The solver or the zero-point is unknown.
    """
    mode, solver_code = _check_names(zero_point, solver)
    groups = _check_shape(w, group_size)
    from dvdquant.quantize.backends import numba_float_zero, numba_search

    outputs = [torch.empty(len(w), groups, dtype=torch.float64) for _ in range(2)]
    arrays = [t.numpy() for t in outputs]

    def work(v: F32, units: F64, rows: slice) -> None:
        scale, zero = (a[rows] for a in arrays)
        if mode == _FLOAT:
            numba_float_zero.solve_rows(v, units, solver_code, iterations, scale, zero)
        else:
            numba_search.solve_rows(v, units, mode, solver_code, _STARTS, iterations, scale, zero)

    _for_row_blocks(w, groups, work)
    scale, zero = outputs
    if zero_point == "midrise":
        zero -= 0.5
    return Grid(scale, zero, _squared_error(w, scale, zero))


def relative_mse(w: Tensor, quantized: QuantizedWeight | Tensor) -> float:
    """Return ``‖w − ŵ‖² / ‖w‖²`` in fp64; 0 where both are zero, 1 where only ``‖w‖`` is.

    Args:
        w: [N, K], floating.
        quantized: A quantized weight, or its dequantized tensor ŵ [N, K].
    """
    total = error = 0.0
    step = max(1, _BLOCK // max(1, w.shape[-1]))
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        if isinstance(quantized, Tensor):
            part = quantized[rows]
        else:
            part = quantized.rows(rows).dequantize(torch.float64)
        exact = w[rows].to(device="cpu", dtype=torch.float64)
        total += float(exact.square().sum())
        error += float((exact - part.to(device="cpu", dtype=torch.float64)).square().sum())
    return error / total if total else float(error > 0)


def _squared_error(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return ‖w − Δ(codes − z)‖² fp64 [N, groups] of the nearest codes in −8..7."""
    errors = []
    for start, block in _row_blocks(w, _BLOCK // 8):
        rows = slice(start, start + len(block))
        exact = block.double().reshape(len(block), scale.shape[1], -1)
        step, z = scale[rows, :, None], zero[rows, :, None]
        # A scale of 0 stands for a group of zeros; dividing by 1 there keeps 0/0 out.
        codes = (exact / torch.where(step > 0, step, 1.0) + z).round().clamp(-8, 7)
        errors.append((exact - step * (codes - z)).square().sum(-1))
    return torch.cat(errors)


def _check_names(zero_point: str, solver: str) -> tuple[int, int]:
    if zero_point not in _MODES:
        raise RecipeError(f"zero_point is {zero_point!r}", available=ZERO_POINTS)
    if solver not in _SOLVER_CODES:
        raise RecipeError(f"solver is {solver!r}", available=SOLVERS)
    return _MODES[zero_point], _SOLVER_CODES[solver]


def _check_shape(w: Tensor, group_size: int) -> int:
    """Return the number of groups per row.

    Raises:
        ShapeError: w is not a non-empty floating [N, K], or the group size does not divide K.
    """
    if w.ndim != 2 or not w.numel() or not w.dtype.is_floating_point:
        raise ShapeError(
            f"a weight is a non-empty floating tensor [N, K], not {w.dtype} of shape {tuple(w.shape)}",
            fix="give one matrix at a time, in fp32, bf16 or fp16",
        )
    features = w.shape[1]
    size = group_size or features
    if size < 1 or features % size:
        raise ShapeError(
            f"weight groups of {group_size} do not divide {features} input channels",
            fix="use a group size that does, or 0 for one scale per row",
        )
    return features // size


def _for_row_blocks(w: Tensor, groups: int, work: Callable[[F32, F64, slice], None]) -> None:
    """Call ``work(normalized rows, their units, their place)`` for all rows, on as many threads as PyTorch may use.

    Raises:
        CheckpointError: w has NaN or Inf.
    """
    from dvdquant.quantize.backends.torch_rows import load_rows

    features = w.shape[1]

    def part(block: F32, start: int) -> bool:
        step = max(1, _PART // features)
        v, units = np.empty((step, features), np.float32), np.empty((step, groups))
        for first in range(0, len(block), step):
            rows = block[first : first + step]
            count = len(rows)
            if not load_rows(rows, v[:count], units[:count]):
                return False
            work(v[:count], units[:count], slice(start + first, start + first + count))
        return True

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for start, block in _row_blocks(w):
            # More parts than threads, so that a thread that lost its core does not hold up the block.
            step = max(1, -(-len(block) // (4 * threads)))
            rows = block.numpy()
            jobs = [pool.submit(part, rows[i : i + step], start + i) for i in range(0, len(rows), step)]
            finite = [job.result() for job in jobs]
            if not all(finite):
                raise _nonfinite(w)


def _nonfinite(w: Tensor) -> CheckpointError:
    bad = sum(int(block.numel() - torch.isfinite(block).sum()) for _, block in _row_blocks(w))
    return CheckpointError(
        f"weight has {bad} non-finite values", fix="check the checkpoint; such a layer cannot be quantized"
    )


def _row_blocks(w: Tensor, weights: int = _BLOCK) -> Iterator[tuple[int, Tensor]]:
    """Yield slices of rows as contiguous fp32 on the CPU, and where each starts; a slice is valid until the next."""
    step = max(1, weights // w.shape[1])
    w = w.detach()
    as_it_is = w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()
    # One buffer for all slices: allocating each anew leaves the heap in pieces several times its size.
    buffer = torch.empty(0 if as_it_is else min(step, len(w)), w.shape[1])
    for start in range(0, len(w), step):
        rows = w[start : start + step]
        yield start, rows if as_it_is else buffer[: len(rows)].copy_(rows)
