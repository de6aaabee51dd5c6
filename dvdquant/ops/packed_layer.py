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
    """The tensors of one quantized layer as the op gets them.

    Args:
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        scale: fp32 [N], the step of each row.
        group_scale: uint8 [N, groups], 255 = 1.0.
        zero: fp32 [N], or uint8 [N, groups] with float zero-points.
        bias: fp32 [N].
        hadamard: The inner rotation factor, fp32 [b, b].
        outer: The outer rotation factor, fp32 [p, p].
    """

    weight: Tensor
    scale: Tensor
    group_scale: Tensor
    zero: Tensor
    bias: Tensor
    hadamard: Tensor
    outer: Tensor

    def stored(self) -> tuple[Tensor, ...]:
        """Return the five tensors that a prepared weight is made of: (weight, scale, group_scale, zero, bias)."""
        return (self.weight, self.scale, self.group_scale, self.zero, self.bias)


def layer_shape(x: Tensor, packed: PackedLayer, act_bits: int, act_group: int) -> LayerShape:
    """Return the layer that the tensors describe, for one input.

    Args:
        x: bf16 or fp16 [..., K].
        packed: The tensors of the layer, on x's device.
        act_bits: Bits of the activation codes.
        act_group: Channels per activation scale; 0 for the whole token.

    Raises:
        ShapeError: x has another number of channels, or the tensors are on several devices.
        UnsupportedError: The kernels have no such dtype.
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
    """Refuse an x that is not [..., channels].

    Args:
        x: The input.
        channels: Input features K of the layer.

    Raises:
        ShapeError: x has another number of channels, or no axis.
    """
    if x.ndim == 0 or x.shape[-1] != channels:
        raise ShapeError(
            f"a layer of {channels} channels got a tensor of shape {tuple(x.shape)}",
            fix=f"give it a tensor whose last axis has {channels} channels",
        )


def packed_shape(packed: PackedLayer, dtype: torch.dtype, act_bits: int, act_group: int) -> LayerShape:
    """Return the layer that the stored tensors and rotation factors describe, for activations of ``dtype``.

    Args:
        packed: The tensors of the layer.
        dtype: bf16 or fp16, the dtype of x and y.
        act_bits: Bits of the activation codes.
        act_group: Channels per activation scale; 0 for the whole token.

    Raises:
        UnsupportedError: The kernels have no such dtype.
    """
    if dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"the kernels have no {dtype} activations", available=DTYPE_NAMES.values())
    rows, half = packed.weight.shape
    float_zero_point = not packed.zero.is_floating_point()
    block, outer = packed.hadamard.shape[0], packed.outer.shape[0]
    name = DTYPE_NAMES[dtype]
    return LayerShape(
        rows, 2 * half, packed.group_scale.shape[1], float_zero_point, block, outer, act_bits, act_group, name
    )
