"""``dvdquant::quant_linear``: rotate, scale and quantize x online, multiply with 4-bit weights, correct (ARQ and BGR).

One definition for every executor: the PyTorch reference (``ops/reference.py``), the ONNX function body
(``export/graph/functions.py``), the CUDA launcher and the TensorRT plugin, all in fp32. On a CUDA device the op runs on the
kernel library where that is built and has a path for the layer (``ops/cuda_linear.py``). There, weights with several scales
per row are rounded once more, to 8 bits per row (``repack.py`` states by how much).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dvdquant.ops.cuda_linear import quant_linear_cuda
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.reference import quant_linear_reference
from dvdquant.ops.smooth import smooth_input

__all__ = ["smooth_quant_linear", "quant_linear"]


@torch.library.custom_op("dvdquant::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """Compute one quantized linear layer.

    Args:
        x: [..., K] float32, float16 or bfloat16; float64 is computed in float64 throughout.
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        weight_scale: fp32 [N], the step of each row.
        weight_group_scale: uint8 [N, groups], 255 = 1.0.
        weight_zero: fp32 [N], or uint8 [N, groups] with float zero-points.
        bias: fp32 [N].
        hadamard: The inner rotation factor, fp32 [b, b].
        outer: The outer rotation factor, fp32 [p, p].
        act_bits: Bits of the activation codes: 4, 6 or 8.
        act_group: Channels per activation scale; 0 for the whole token.

    Returns:
        [..., N] of x's dtype.
    """
    packed = (weight, weight_scale, weight_group_scale, weight_zero, bias, hadamard, outer)
    return _reference(x, None, None, *packed, act_bits, act_group)


@quant_linear.register_fake
def _quant_linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _output_of(x, weight)


@torch.library.custom_op("dvdquant::smooth_quant_linear", mutates_args=())
def smooth_quant_linear(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_group_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """Compute :func:`quant_linear` of :func:`smooth_input`, for eager PyTorch on a GPU.

    The kernel that quantizes x also smooths it. Graphs and compilers get the two operations apart.

    Args:
        x: [..., K] float32, float16 or bfloat16.
        scale: fp32 [K], ± powers of two, or None.
        shift: fp32 [K], subtracted from x, or None.
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        weight_scale: fp32 [N], the step of each row.
        weight_group_scale: uint8 [N, groups], 255 = 1.0.
        weight_zero: fp32 [N], or uint8 [N, groups] with float zero-points.
        bias: fp32 [N].
        hadamard: The inner rotation factor, fp32 [b, b].
        outer: The outer rotation factor, fp32 [p, p].
        act_bits: Bits of the activation codes: 4, 6 or 8.
        act_group: Channels per activation scale; 0 for the whole token.

    Returns:
        [..., N] of x's dtype.
    """
    packed = (weight, weight_scale, weight_group_scale, weight_zero, bias, hadamard, outer)
    return _reference(x, scale, shift, *packed, act_bits, act_group)


@smooth_quant_linear.register_fake
def _smooth_quant_linear_fake(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, *rest: Any
) -> Tensor:
    return _output_of(x, weight)


def _output_of(x: Tensor, weight: Tensor) -> Tensor:
    torch._check(x.shape[-1] == 2 * weight.shape[1])  # type: ignore[no-untyped-call]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@quant_linear.register_kernel("cuda")
def _quant_linear_cuda(x: Tensor, *rest: Any) -> Tensor:
    return _on_cuda(x, None, None, *rest)


@smooth_quant_linear.register_kernel("cuda")
def _smooth_quant_linear_cuda(x: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    return _on_cuda(x, scale, shift, *rest)


def _on_cuda(x: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    *tensors, act_bits, act_group = rest
    y = quant_linear_cuda(x, PackedLayer(*tensors), act_bits, act_group, scale, shift)
    return _reference(x, scale, shift, *rest) if y is None else y


def _reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    # float64 in, float64 throughout: the judge of every other executor.
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return quant_linear_reference(smooth_input(x, scale, shift), *rest, compute)  # type: ignore[call-arg]
