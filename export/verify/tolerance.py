"""One quantized layer in float64, and the distance from it that rounding allows an executor.

A 4-bit-activation network is chaotic at rounding ties: one flipped code moves every later layer. So executors are
compared layer by layer on the very input the executor saw, with a bound that follows from the number formats:

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
        tensors: Weight int8 [N, K/2], weight_scale fp32 [N], weight_group_scale uint8 [N, groups], weight_zero fp32 [N]
            or uint8 [N, groups], bias fp32 [N], hadamard fp32 [b, b], outer fp32 [p, p]; by name, in the order of the
            op.
        act_bits: The bits of the activation codes.
        act_group: The number of channels that share an activation scale; 0 means the whole token.
    """

    tensors: dict[str, Tensor]
    act_bits: int
    act_group: int

    @classmethod
    def of(cls, layer: QuantLinear) -> OpInputs:
        """Return the tensors and attributes of a loaded layer at its present activation grid.

        Args:
            layer: The layer.
        """
        hadamard, outer = layer.rotation_matrices()
        tensors = {name: getattr(layer, name) for name in TENSORS} | {"hadamard": hadamard, "outer": outer}
        return cls(tensors, layer.act_bits, layer.act_group)

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """Return the arguments of the op, in its order.

        Args:
            x: The input [..., K].
        """
        return (x, *self.tensors.values(), self.act_bits, self.act_group)

    def rows(self, part: slice) -> dict[str, Tensor]:
        """Return the weight tensors and the bias of some output rows; floating ones are in fp64.

        Args:
            part: The rows.
        """
        cut = {name: self.tensors[name][part] for name in TENSORS}
        return {name: value.double() if value.is_floating_point() else value for name, value in cut.items()}


@dataclass
class Judged:
    """The op in float64 on one input, and the bound of an executor's distance from it.

    Args:
        y: The output [..., N], fp64.
        bound: The bound of every element of y [..., N], fp64.
        codes: The activation codes [..., K], fp64.
        near: True for the codes at a tie, bool [..., K].
    """

    y: Tensor
    bound: Tensor
    codes: Tensor
    near: Tensor

    def worst(self, got: Tensor) -> tuple[float, float, float]:
        """Return (|got − y| / bound, |got − y|, bound) of the element where the first number is largest.

        The first number is at most 1 if the executor is right. It is infinite for NaN and for another shape.

        Args:
            got: The output of the executor [..., N].
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
        """Return the first number of :meth:`worst`.

        Args:
            got: The output of the executor [..., N].
        """
        return self.worst(got)[0]


@dataclass
class _Activations:
    """The facts about x̃ that the bound needs, each fp64 [..., K] unless it says otherwise.

    Args:
        values: The dequantized activation.
        flips: The step of the codes near a tie, 0 for the others.
        scale_errors: The error of each value that comes from the error of its scale.
        codes: The codes.
        near: True for the codes near a tie, bool.
    """

    values: Tensor
    flips: Tensor
    scale_errors: Tensor
    codes: Tensor
    near: Tensor


def judge(
    op: OpInputs, x: Tensor, rotated_in: torch.dtype = torch.float32, rounded: torch.dtype | None = None
) -> Judged:
    """Compute the op in float64, and the bound of an executor's distance from it.

    Args:
        op: The tensors and attributes of the layer.
        x: The input [..., K], of any floating dtype.
        rotated_in: The dtype that the executor rounds x̃ (and the product) to; fp32 if all of the op runs in fp32.
        rounded: The dtype of y; None means that of x.
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
    """Return the facts about x̃.

    Args:
        op: The tensors and attributes of the layer.
        x: The input [..., K], of any floating dtype.
        unit: The largest relative error of the rounding of x̃.
    """
    # 1. Rotate and quantize: [..., K] -> [..., K/G, G], with G channels per scale.
    wide = x.double()
    hadamard, outer = op.tensors["hadamard"], op.tensors["outer"]
    rotated = rotate_by_matrices(wide, hadamard.double(), outer.double())
    group, qmax = op.act_group or x.shape[-1], QMAX[op.act_bits]
    grouped = rotated.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    grid = grouped * (qmax / amax)
    codes = grid.round().clamp(-qmax, qmax)
    # 2. The error of x̃ comes from the rotation's sums in fp32 and from its rounding; amax carries the same error.
    fine = UNIT[torch.float32]
    block = hadamard.shape[0] * outer.shape[0]
    blocks = wide.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    size = blocks.norm(dim=-1, keepdim=True).expand(blocks.shape)
    sums = (LAMBDA * fine * 2 * size.reshape(grouped.shape)) if block > 1 else torch.zeros_like(grouped)
    error = (sums + 2 * unit * grouped.abs()) * (qmax / amax) + grid.abs() * (2 * unit + 4 * fine)
    near = ((grid - grid.floor() - 0.5).abs() <= error) & (grid.abs() < qmax + 0.5)
    # 3. The size of a flip, and the errors of the values.
    step = (amax / qmax).expand(grouped.shape)
    # The scale of each group carries the error of its amax.
    scale_error = (sums.amax(-1, keepdim=True) / amax + 4 * max(unit, fine)).expand(grouped.shape)
    values = codes * step
    flat = [t.reshape(x.shape) for t in (values, near * step, values * scale_error, codes, near)]
    return _Activations(*flat)


def _rows(act: _Activations, t: dict[str, Tensor], unit: float, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (y, bound), fp64 [..., rows], of some output rows.

    Args:
        act: The facts about x̃.
        t: The weight tensors of the rows, floating ones in fp64.
        unit: The largest relative error of the rounding of x̃ and of the product.
        rounded: The dtype of y.
    """
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
