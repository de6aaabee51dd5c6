"""Codes that pass their rounding error on: the columns that are rounded later compensate the error of each column.

A grid of least squared weight error treats all inputs alike. With the second moments of the inputs, ``M = E[xᵀx]``, the
error of the output is ``(w − ŵ) M (w − ŵ)ᵀ`` for every row, and rounding one column after the other while moving the rest
of the row along the inverse of M lowers it (optimal brain quantization with a fixed order, as GPTQ does it). The scales
and zero-points stay those of BGR: only codes change, so every kernel, graph and engine runs the result as it is.

M may be predicted without data; see ``hessian.py``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.numerics.array_types import F32, I8
from dvdquant.numerics.packing import expand_zero
from dvdquant.quantize.bgr import QuantizedWeight

__all__ = ["ErrorFeedback", "gptq_round", "output_energy", "round_by_loops", "round_by_tensors"]


# Columns rounded before the rest of the row is brought up to date by one matrix product: by compiled loops, and by tensors.
_LAZY, _LAZY_TENSORS = 256, 32


def gptq_round(w: Tensor, grid: QuantizedWeight, hessian: Tensor, damping: float = 0.05) -> QuantizedWeight:
    """Return new codes on the same grid, for all rows of one matrix; use :class:`ErrorFeedback` where rows come in parts.

    Args:
        w: The rotated weight [N, K], floating.
        grid: Its BGR grid; scales, group scales and zero-points are kept.
        hessian: Second moments of the rotated inputs, [K, K] or [K/b, b, b]; see :class:`ErrorFeedback`.
        damping: λ, added to the diagonal as λ·mean(diag M); see :class:`ErrorFeedback`.

    Returns:
        The grid with new codes.

    Raises:
        ShapeError: The moments do not fit K.
    """
    return ErrorFeedback(hessian, damping).round(w, grid)


class ErrorFeedback:
    """The rule by which errors of a row are passed on: it is computed once for a layer and used for all its rows.

    ``factors`` is what was worked out: fp64 [K/b, b, b], unit upper triangular; row i of a block says how the columns
    after i move with its error.

    Args:
        hessian: Second moments of the rotated inputs, [K, K], or [K/b, b, b] for blocks along the diagonal, between
            which nothing is passed on. Any scale; positive semidefinite.
        damping: λ, added to the diagonal as λ·mean(diag M): the larger it is, the less the moments are trusted.

    Raises:
        ShapeError: The moments are not square.
    """

    factors: Tensor

    def __init__(self, hessian: Tensor, damping: float = 0.05) -> None:
        blocks = hessian if hessian.ndim == 3 else hessian[None]
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise ShapeError(
                f"second moments {list(hessian.shape)} for {len(blocks) * blocks.shape[1]} inputs",
                available="[K, K], or blocks [K/b, b, b]",
            )
        self.factors = _passed_on(blocks.double(), damping)

    @classmethod
    def of_factors(cls, factors: Tensor) -> ErrorFeedback:
        """Return the feedback that an earlier one has worked out.

        Args:
            factors: fp64 [K/b, b, b], unit upper triangular.
        """
        gptq = cls.__new__(cls)
        gptq.factors = factors
        return gptq

    def round(self, w: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
        """Return the grid of ``w`` with new codes.

        Args:
            w: The rotated weight [N, K], floating.
            grid: Its BGR grid; scales, group scales and zero-points are kept.

        Raises:
            ShapeError: K is not that of the moments.
        """
        features, (count, size, _) = w.shape[1], self.factors.shape
        if count * size != features:
            raise ShapeError(
                f"second moments {[count, size, size]} for {features} inputs",
                available=f"[{features}, {features}], or blocks",
            )
        if w.device.type != "cpu" and (found := self._by_kernel(w, grid)) is not None:
            return QuantizedWeight(found, grid.scale, grid.group_scale, grid.zero)
        step = grid.scale[:, None] * (grid.group_scale.float() / 255)
        zero = expand_zero(grid.zero).float().expand(step.shape).contiguous()
        rounded = round_by_tensors if w.device.type != "cpu" else round_by_loops
        codes = rounded(w, step, zero, self.factors.to(w.device))
        return QuantizedWeight(codes, grid.scale, grid.group_scale, grid.zero)

    def _by_kernel(self, w: Tensor, grid: QuantizedWeight) -> Tensor | None:
        """Return the codes by the CUDA kernel, or None where there is none for this device, row and block."""
        from dvdquant.quantize.backends.cuda_grid import quantizer_kernels

        kernels = quantizer_kernels(w.device)
        if kernels is None or not kernels.rounds(w.shape[1], grid.group_scale.shape[1], self.factors.shape[1]):
            return None
        factors = self.factors.to(w.device, torch.float32)
        return kernels.round(w.float(), grid.scale, grid.group_scale, grid.zero, factors)


def _passed_on(hessian: Tensor, damping: float) -> Tensor:
    """Return fp64 [n, b, b], unit upper triangular: row i says how the columns after i move with its error."""
    level = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    damped = torch.where(level > 0, hessian / level.clamp(min=1e-300) + damping * identity, identity)
    # The Cholesky factor U of the inverse, M⁻¹ = UᵀU, without the inverse: backwards, M = LLᵀ, and U is L⁻¹ backwards.
    lower = torch.linalg.cholesky(damped.flip(1, 2))
    factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2)
    unit: Tensor = factor / factor.diagonal(dim1=1, dim2=2)[..., None]
    return unit.contiguous()  # LAPACK's are not, and the compiled loop runs along rows


def round_by_loops(w: Tensor, step: Tensor, zero: Tensor, factors: Tensor) -> Tensor:
    """Return codes [N, K], rounded block after block by compiled loops, in fp32 as in the kernel.

    fp32 is enough: an error is below a step, and a column takes up some hundreds of them. fp64 gives the same codes but
    for values within some 10⁻⁶ steps of a tie, and takes a quarter longer.

    Args:
        w: The rotated weight [N, K], floating, on the CPU.
        step: fp32 [N, groups], the scale of each group.
        zero: fp32 [N, groups], its zero-point, in steps.
        factors: fp64 [K/b, b, b], unit upper triangular: :attr:`ErrorFeedback.factors`.
    """
    from dvdquant.quantize.backends.numba_rows import for_row_parts

    size, group = factors.shape[1], w.shape[1] // step.shape[1]
    codes = torch.empty(w.shape, dtype=torch.int8)
    steps, zeros, target = step.numpy(), zero.numpy(), codes.numpy()
    for block, factor in enumerate(factors.float()):
        # Working copy [N, b] of a block's columns; every column moves with the errors of those before it.
        first = block * size
        left = w[:, first : first + size].to(torch.float32, copy=True)
        for start in range(0, size, _LAZY):
            columns = slice(start, min(start + _LAZY, size))
            after = columns.stop < size
            errors = torch.empty(len(w), columns.stop - start if after else 0)
            rounding = partial(
                _round_rows, left[:, columns].numpy(), steps, zeros, group, first + start,
                factor[columns, columns].numpy(), target[:, first + start : first + columns.stop], errors.numpy(),
            )  # fmt: skip
            for_row_parts(len(w), rounding)
            # The columns after these take all their errors at once.
            if after:
                left[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    return codes


def _round_rows(
    left: F32, step: F32, zero: F32, group: int, first: int, factor: F32, codes: I8, errors: F32, rows: slice
) -> None:
    from dvdquant.quantize.backends.numba_gptq import (
        round_columns,  # numba takes a second to import: only those who quantize pay for it
    )

    round_columns(left[rows], step[rows], zero[rows], group, first, factor, codes[rows], errors[rows])


def round_by_tensors(w: Tensor, step: Tensor, zero: Tensor, factors: Tensor) -> Tensor:
    """Return codes int8 [N, K], rounded by tensor operations for a GPU, in fp64.

    Column i of a block b: ``c_i = clamp(round(w_i / s_i + z_i), −8, 7)``, then ``w_j −= F_b[i, j] · (w_i − s_i (c_i − z_i))``
    for all j > i. It goes column by column for all rows and all blocks at once, as the start of a kernel takes as long as
    the arithmetic on a column.

    Args:
        w: The rotated weight [N, K], floating.
        step: fp32 [N, groups], the scale of each group.
        zero: fp32 [N, groups], its zero-point, in steps.
        factors: fp64 [K/b, b, b], unit upper triangular: :attr:`ErrorFeedback.factors`, on the device of ``w``.
    """
    (count, size, _), group = factors.shape, w.shape[1] // step.shape[1]
    step, zero = step.double(), zero.double()
    # Working copy [b, blocks, N], column i of every block in left[i]; codes have the same layout.
    left = w.double().view(len(w), count, size).permute(2, 1, 0).contiguous()
    codes = torch.empty(left.shape, dtype=torch.int8, device=w.device)
    firsts = torch.arange(count, device=w.device) * size
    for start in range(0, size, _LAZY_TENSORS):
        stop = min(start + _LAZY_TENSORS, size)
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            place = (firsts + i) // group
            scale, centre = step[:, place].T, zero[:, place].T
            code = torch.where(scale > 0, left[i] / scale.clamp(min=1e-300) + centre, centre).round().clamp(-8, 7)
            codes[i] = code
            errors[i - start] = left[i] - scale * (code - centre)
            left[i + 1 : stop] -= factors[:, i, i + 1 : stop].T[..., None] * errors[i - start]
        left[stop:] -= (factors[:, start:stop, stop:].mT @ errors.transpose(0, 1)).transpose(0, 1)
    return codes.permute(2, 1, 0).reshape(w.shape)


def output_energy(w: Tensor, hessian: Tensor) -> float:
    """Return ``tr(W M Wᵀ)``, the sum of squares of the outputs, computed in fp32.

    Args:
        w: [N, K], floating.
        hessian: M, [K, K] or blocks [K/b, b, b] along the diagonal.
    """
    blocks = (hessian if hessian.ndim == 3 else hessian[None]).to(w)
    parts = w.reshape(len(w), len(blocks), -1).transpose(0, 1)
    return float(((parts @ blocks) * parts).sum(dtype=torch.float64))
