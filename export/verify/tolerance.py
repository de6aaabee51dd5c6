"""One quantized layer in float64, and how far an executor that computes it rightly can be from that.

A 4-bit-activation network is chaotic at rounding ties: one flipped code moves every later layer. So executors are compared
layer by layer on the very input the executor saw, with a bound that follows from the number formats:

    |y − y₆₄| ≤ Σ_{k near a tie} s[m,k]·|W[n,k]|  +  rounding of sums  +  rounding of y

where y₆₄ is the op in float64 and a code is near a tie if the error of x̃ can carry it over the tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvdquant.model.layers import TENSORS, QuantLinear
from dvdquant.numerics.activation_grid import QMAX
from dvdquant.ops.reference import dequantize_weight, rotate_by_matrices

__all__ = ["UNIT", "Judged", "OpInputs", "judge"]

# Largest relative error of one rounding.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A sum of n independent rounding errors of at most u stays below λ·√n·u except with probability 2·exp(−λ²/2), which
# is 5e-11 for 7 (Hoeffding).
LAMBDA = 7.0
CHUNK = 1 << 23  # weights held in float64 at a time, in several forms


@dataclass
class OpInputs:
    """The tensors and attributes of one ``dvdquant::QuantLinear``.

    Args:
        tensors: weight int8 [N, K/2], weight_scale fp32 [N], weight_group_scale uint8 [N, groups], weight_zero fp32 [N] or
            uint8 [N, groups], bias fp32 [N], hadamard fp32 [b, b], outer fp32 [p, p]; in the order of the op.
        act_bits, act_group: as the op's attributes.
    """

    tensors: dict[str, Tensor]
    act_bits: int
    act_group: int

    @classmethod
    def of(cls, layer: QuantLinear) -> OpInputs:
        """Those of a loaded layer at its present activation grid."""
        hadamard, outer = layer._table[0].matrices(layer.spec.rotation)
        tensors = {name: getattr(layer, name) for name in TENSORS} | {"hadamard": hadamard, "outer": outer}
        return cls(tensors, layer.act_bits, layer.act_group)

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """In the order of the op."""
        return (x, *self.tensors.values(), self.act_bits, self.act_group)

    def rows(self, part: slice) -> dict[str, Tensor]:
        """Return the weight tensors of some output rows; floating ones in fp64."""
        cut = {name: self.tensors[name][part] for name in TENSORS}
        return {name: value.double() if value.is_floating_point() else value for name, value in cut.items()}


@dataclass
class Judged:
    """The op in float64 on one input, and how far an executor may be from it.

    Args:
        y: [..., N] fp64. bound: the same shape. codes: fp64 [..., K]. near: bool [..., K], codes at a tie.
    """

    y: Tensor
    bound: Tensor
    codes: Tensor
    near: Tensor

    def worst(self, got: Tensor) -> tuple[float, float, float]:
        """(|got − y| / bound, |got − y|, bound) where the first is largest: at most 1 where the executor is right,
        infinite for a NaN out of nothing and for another shape.
        """
        if got.shape != self.y.shape:
            return float("inf"), float("nan"), float("nan")
        if not self.y.numel():
            return 0.0, 0.0, 0.0
        distance = (got.double() - self.y).abs()
        share = (distance / self.bound).nan_to_num(nan=float("inf")).flatten()
        index = int(share.argmax())
        return float(share[index]), float(distance.flatten()[index]), float(self.bound.flatten()[index])

    def excess(self, got: Tensor) -> float:
        """Return the first of :meth:`worst`."""
        return self.worst(got)[0]


@dataclass
class _Activations:
    """What the bound needs to know of x̃, each fp64 [..., K]: values, steps of the codes near a tie, errors of the scale."""

    values: Tensor
    flips: Tensor
    scale_errors: Tensor
    codes: Tensor
    near: Tensor


def judge(
    op: OpInputs, x: Tensor, rotated_in: torch.dtype = torch.float32, rounded: torch.dtype | None = None
) -> Judged:
    """What float64 says of ``op`` on ``x``, and the bound of an executor.

    Args:
        x: [..., K] of any floating dtype.
        rotated_in: dtype the executor rounds x̃ (and the product) to; fp32 where all of the op runs in fp32.
        rounded: dtype of y, that of x by default.
    """
    act = _activations(op, x, UNIT[rotated_in])
    rows, step = len(op.tensors["bias"]), max(1, CHUNK // x.shape[-1])
    parts = [
        _rows(act, op.rows(slice(start, start + step)), UNIT[rotated_in], rounded or x.dtype)
        for start in range(0, rows, step)
    ]
    y, bound = (torch.cat(column, dim=-1) for column in zip(*parts))
    return Judged(y, bound, act.codes, act.near)


def _activations(op: OpInputs, x: Tensor, unit: float) -> _Activations:
    wide = x.double()
    hadamard, outer = op.tensors["hadamard"], op.tensors["outer"]
    rotated = rotate_by_matrices(wide, hadamard.double(), outer.double())
    group, qmax = op.act_group or x.shape[-1], QMAX[op.act_bits]
    grouped = rotated.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    grid = grouped * (qmax / amax)
    codes = grid.round().clamp(-qmax, qmax)
    # The error of x̃: of the rotation's sums in fp32, then of its rounding; amax carries the same error.
    fine = UNIT[torch.float32]
    block = hadamard.shape[0] * outer.shape[0]
    blocks = wide.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    size = blocks.norm(dim=-1, keepdim=True).expand(blocks.shape)
    sums = (LAMBDA * fine * 2 * size.reshape(grouped.shape)) if block > 1 else torch.zeros_like(grouped)
    error = (sums + 2 * unit * grouped.abs()) * (qmax / amax) + grid.abs() * (2 * unit + 4 * fine)
    near = ((grid - grid.floor() - 0.5).abs() <= error) & (grid.abs() < qmax + 0.5)
    step = (amax / qmax).expand(grouped.shape)
    # The scale of each group carries the error of its amax.
    scale_error = (sums.amax(-1, keepdim=True) / amax + 4 * max(unit, fine)).expand(grouped.shape)
    values = codes * step
    flat = [t.reshape(x.shape) for t in (values, near * step, values * scale_error, codes, near)]
    return _Activations(*flat)


def _rows(act: _Activations, t: dict[str, Tensor], unit: float, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, bound), fp64 [..., rows], of the output rows whose weight tensors are ``t``."""
    fine, coarse = UNIT[torch.float32], max(unit, UNIT[torch.float32])
    packed = (t["weight"], t["weight_scale"], t["weight_group_scale"])
    weight = dequantize_weight(*packed, t["weight_zero"], torch.float64)
    # float64 holds the sums below (K < 2¹⁶ terms) to 37 bits, and Σ c·z is bounded apart from Σ c·w.
    uncentred = dequantize_weight(*packed, torch.zeros(len(t["weight_zero"])), torch.float64)
    product = act.values @ weight.T
    y = product + t["bias"]
    squares = weight.square().T
    spread = torch.minimum(act.flips @ weight.abs().T, LAMBDA * (act.flips.square() @ squares).sqrt())
    # ‖terms‖₂ of every sum. A sum of K terms in fp32 has K rounding errors of about that size.
    terms = LAMBDA * (act.values.square() @ squares).sqrt()
    bound = spread + terms * (act.values.shape[-1] ** 0.5 * fine + (2 * unit if unit > fine else 0.0))
    bound = bound + LAMBDA * (act.scale_errors.square() @ squares).sqrt()
    # The sum before the zero-point's share is taken off has a rounding of its own.
    zero_share = (product - act.values @ uncentred.T).abs()
    bound = bound + 4 * coarse * (y.abs() + t["bias"].abs() + zero_share)
    bound = bound + UNIT[rounded] * (y.abs() + bound) + 1e-30
    if rounded == torch.float16:
        bound = bound + 2.0**-24  # fp16 is subnormal below 6e-5
    return y, bound
