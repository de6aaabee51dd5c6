"""The stored tensors of one quantized layer, and the layer that they describe to the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.ops.repack import LayerShape

__all__ = ["DTYPES", "DTYPE_NAMES", "PackedLayer", "check_channels", "layer_shape", "packed_shape"]

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PackedLayer:
    """The tensors of one quantized layer as the op gets them; shapes in ``ops/quant_linear.py``."""

    weight: Tensor
    scale: Tensor
    factor: Tensor
    zero: Tensor
    bias: Tensor
    hadamard: Tensor
    outer: Tensor

    def stored(self) -> tuple[Tensor, ...]:
        """What a prepared weight is made of."""
        return (self.weight, self.scale, self.factor, self.zero, self.bias)


def layer_shape(x: Tensor, packed: PackedLayer, act_bits: int, act_group: int) -> LayerShape:
    """The layer that the tensors describe.

    Raises:
        ShapeError: x has another number of channels, or the tensors are on several devices.
        UnsupportedError: a dtype the kernels have none for.
    """
    check_channels(x, 2 * packed.weight.shape[1])
    devices = {t.device for t in (x, *packed.stored(), packed.hadamard, packed.outer)}
    if len(devices) > 1:
        raise ShapeError(
            f"x and the layer are on different devices: {', '.join(sorted(map(str, devices)))}",
            fix="move the model with .to(device)",
        )
    return packed_shape(packed, x.dtype, act_bits, act_group)


def check_channels(x: Tensor, channels: int) -> None:
    """ShapeError unless x is [..., channels]."""
    if x.ndim == 0 or x.shape[-1] != channels:
        raise ShapeError(f"a layer of {channels} channels got a tensor of shape {tuple(x.shape)}")


def packed_shape(packed: PackedLayer, dtype: torch.dtype, act_bits: int, act_group: int) -> LayerShape:
    """The layer that the stored tensors and rotation factors describe, for activations of ``dtype``.

    Raises:
        UnsupportedError: a dtype the kernels have none for.
    """
    if dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"the kernels have no {dtype} activations", available=DTYPE_NAMES.values())
    rows, half = packed.weight.shape
    real = not packed.zero.is_floating_point()
    block, outer = packed.hadamard.shape[0], packed.outer.shape[0]
    name = DTYPE_NAMES[dtype]
    return LayerShape(rows, 2 * half, packed.factor.shape[1], real, block, outer, act_bits, act_group, name)
