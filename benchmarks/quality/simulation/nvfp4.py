"""A layer as TensorRT-RTX engines of SM 12.0 compute it: the export's NVFP4 graph, operation by operation.

``dvdquant.export.passes.lowering.nvfp4`` writes that graph. Here are the same operations with the same roundings: what
balances the channels, the rotation and both operands are rounded to the graph's dtype, token and weight magnitudes are
applied in fp32. The test holds a layer against the lowered graph of a real export.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.simulation.grid import rotated_to_nvfp4
from dvdquant.export.passes.lowering.common import split_rotation
from dvdquant.export.passes.lowering.nvfp4 import E2M1_MAX, NVFP4_BLOCK, nvfp4_weight
from dvdquant.numerics.activation_grid import AMAX_FLOOR
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.smooth import smooth_input

__all__ = ["Nvfp4Linear", "nvfp4_blocks"]

_UNIT = float(np.float32(1 / (E2M1_MAX * E4M3_MAX)))  # a constant of the graph, in fp32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4_blocks(unit: Tensor) -> Tensor:
    """Round to e2m1 codes with one e4m3 scale per 16 values, relative to a global scale of 1/2688.

    In float64: values of bf16 lie in the middle of two codes often, and fp32 would turn those one way or the other.

    Args:
        unit: fp32 [..., K], 16 divides K; at most 1 in magnitude.

    Returns:
        What the codes stand for, fp32 [..., K].
    """
    blocks = unit.reshape(*unit.shape[:-1], -1, NVFP4_BLOCK).double()
    top = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / _UNIT
    scale = top.float().to(torch.float8_e4m3fn).float()
    codes = blocks / (scale.double() * _UNIT).clamp(min=2.0**-30)  # a block whose scale is 0 stands for zeros
    # Steps of e2m1: 1/2 below 2, 1 below 4, 2 up to 6. Each rounds ties to the even mantissa.
    size = codes.abs()
    half, whole, double = size.mul(2).round_().mul_(0.5), size.round(), size.mul(0.5).round_().mul_(2)
    rounded = torch.where(size < 2, half, torch.where(size < 4, whole, double)).clamp_(max=E2M1_MAX)
    return (rounded.copysign_(codes).float() * (scale * _UNIT)).flatten(-2)


class Nvfp4Linear:
    """One layer: x [..., K] to y [..., N] with its bias.

    Args:
        weight: The rotated weight, fp32 [N, K], columns multiplied by what the input is divided by.
        bias: fp32 [N], with the product of weight and shift.
        rotation: The rotation of the input.
        scale: fp32 [K], ± powers of two that the input is multiplied by, or None.
        shift: fp32 [K], subtracted from the input before, or None.
        dtype: The dtype of the graph.

    Attributes:
        weight: What the weight's codes stand for, fp32 [N, K].
        power: The size of every entry of the rotation's first factor, a power of two.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, rotation: Rotation, scale: Tensor | None, shift: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        packed, scales, amax = nvfp4_weight(weight)
        codes = torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=-1).reshape(weight.shape).astype(np.int64))
        steps = torch.from_numpy(scales.astype(np.float32)) * _UNIT
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes]
        unit = (values.reshape(len(values), -1, NVFP4_BLOCK) * steps[..., None]).flatten(-2)
        self.weight = unit * amax
        self._operand, self._bias, self._dtype = unit.to(dtype), bias.float(), dtype
        self._rotation, self._scale, self._shift = rotation, scale, shift
        self._factors, residual = [], 1.0
        for matrix in rotation.matrices(torch.float32):
            exact, more = split_rotation(matrix.numpy())
            residual *= more
            self._factors.append(torch.from_numpy(exact))
        self.power = float(self._factors[0].abs().flatten()[0])
        self._row = torch.tensor(amax * residual)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: [..., K], floating point.
        """
        compiled = None
        if self._dtype == torch.bfloat16:
            compiled = rotated_to_nvfp4(x, self._shift, self._scale, self._rotation, self.power)
        act, amax = compiled or self.operand(x)
        product = torch.nn.functional.linear(act, self._operand).float()
        return product.mul_(amax).mul_(self._row).add_(self._bias).to(self._dtype)

    def operand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what goes into the product, [..., K] in the graph's dtype, and the tokens' largest values, fp32 [..., 1].

        Args:
            x: [..., K], floating point.
        """
        smoothed = smooth_input(x.to(self._dtype), self._scale, self._shift)
        rotated = self._rotated(smoothed).float()
        amax = rotated.abs().amax(-1, keepdim=True).clamp_(min=AMAX_FLOOR)
        return nvfp4_blocks((rotated / amax).to(self._dtype).float()).to(self._dtype), amax

    def _rotated(self, x: Tensor) -> Tensor:
        """Return x̃ / residual, rounded after each factor; the factors are exact in the graph's dtype."""
        inner, outer = self._factors
        if inner.shape[0] == 1 and outer.shape[0] == 1:
            return x
        mixed = (x.float().reshape(-1, outer.shape[0], inner.shape[0]) @ inner).to(self._dtype)
        if outer.shape[0] > 1:
            mixed = (outer.T @ mixed.float()).to(self._dtype)
        return mixed.reshape(x.shape)
