"""Codes that pass their rounding error on: each column's error is made up for by the columns that are rounded after it.

A grid of least squared weight error treats all inputs alike. With the second moments of the inputs, ``M = E[xᵀx]``, the
error of the output is ``(w − ŵ) M (w − ŵ)ᵀ`` for every row, and rounding one column after the other while moving the rest
of the row along the inverse of M lowers it (optimal brain quantization with a fixed order, as GPTQ does it). The scales
and zero-points stay those of BGR: only codes change, so every kernel, graph and engine runs the result as it is.

M may be predicted without data; see :mod:`dvdquant.moments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bgr import QuantizedWeight
from .errors import ShapeError
from .packing import expand_zero

__all__ = ["output_error", "round_with_feedback"]

# Columns rounded before the rest of the row is brought up to date by one matrix product.
_LAZY = 64


def round_with_feedback(w: Tensor, grid: QuantizedWeight, moments: Tensor, damping: float = 0.05) -> QuantizedWeight:
    """New codes on the same grid.

    Args:
        w: the rotated weight [N, K], floating.
        grid: its BGR grid; scales, factors and zero-points are kept.
        moments: second moments of the rotated inputs, [K, K], or [K/b, b, b] for blocks along the diagonal, between which
            nothing is passed on. Any scale; positive semidefinite.
        damping: λ, added to the diagonal as λ·mean(diag M): how far the moments are trusted.

    Returns:
        The grid with new codes.

    Raises:
        ShapeError: the moments do not fit K.
    """
    rows, features = w.shape
    blocks = moments if moments.ndim == 3 else moments[None]
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or len(blocks) * blocks.shape[1] != features:
        raise ShapeError(
            f"second moments {list(moments.shape)} for {features} inputs",
            available=f"[{features}, {features}], or blocks",
        )
    groups = grid.factor.shape[1]
    step = (grid.scale[:, None] * (grid.factor.float() / 255)).double()
    zero = expand_zero(grid.zero).double().expand(rows, groups)
    size, codes = blocks.shape[1], torch.empty_like(grid.codes)
    for index, block in enumerate(blocks):
        columns = slice(index * size, (index + 1) * size)
        of_column = torch.arange(columns.start, columns.stop, device=w.device) // (features // groups)
        codes[:, columns] = _round_block(w[:, columns].double(), step[:, of_column], zero[:, of_column], block, damping)
    return QuantizedWeight(codes, grid.scale, grid.factor, grid.zero)


def _round_block(w: Tensor, step: Tensor, zero: Tensor, moments: Tensor, damping: float) -> Tensor:
    """int8 codes of w [N, b] for moments [b, b]."""
    size = w.shape[1]
    m = moments.double()
    level = float(m.diagonal().mean())
    if level <= 0.0:
        m, level = torch.eye(size, dtype=torch.float64, device=w.device), 1.0
    damped = m + damping * level * torch.eye(size, dtype=torch.float64, device=w.device)
    # Row i of this factor of the inverse says how the columns after i move with the error of column i.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = w.clone(), torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for first in range(0, size, _LAZY):
        last = min(first + _LAZY, size)
        errors = torch.empty(len(w), last - first, dtype=torch.float64, device=w.device)
        for i in range(first, last):
            column, scale = left[:, i], step[:, i]
            code = (
                torch.where(scale > 0, column / scale.clamp(min=1e-300) + zero[:, i], zero[:, i]).round().clamp(-8, 7)
            )
            codes[:, i] = code.to(torch.int8)
            error = (column - scale * (code - zero[:, i])) / factor[i, i]
            left[:, i:last] -= error[:, None] * factor[i, i:last]
            errors[:, i - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes


def output_error(w: Tensor, quantized: Tensor, moments: Tensor) -> float:
    """``tr((W − Ŵ) M (W − Ŵ)ᵀ) / tr(W M Wᵀ)`` in fp64: relative squared error of the outputs. w, quantized [N, K]; M [K, K]."""
    d, m = (w - quantized).double(), moments.double()
    exact = w.double()
    return float(((d @ m) * d).sum() / ((exact @ m) * exact).sum())
