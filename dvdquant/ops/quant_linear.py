"""``dvdquant::quant_linear``: rotate, scale and quantize x online, multiply with 4-bit weights, correct (METHOD: ARQ + BGR).

One definition for every executor. The PyTorch reference below, the ONNX function body in ``export/functions.py``, the
CUDA launcher and the TensorRT plugin all compute

    x̃ = rotate(x)                                          (block Hadamard, inner and outer factor)
    s[m, g] = max_{k∈g} |x̃[m, k]| / qmax                    (per token m and group g of channels)
    c[m, k] = clamp(round(x̃[m, k] · qmax / max|x̃|), ±qmax)
    y[m, n] = Σ_g s[m, g] Σ_{k∈g} c[m, k] · Δ[n] · f[n, k//G]/255 · (w[n, k] − z) + bias[n],  z = z[n] or z[n, k//G]

with everything in fp32 and y rounded once to x's dtype. On a CUDA device the op runs on the kernel library where that is
built and has a path for the layer (``ops/cuda_linear.py``); there weights with several scales per row are rounded once
more, to 8 bits per row (``repack.py`` states by how much).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arq import fake_quantize_activation
from ..packing import expand_zero, unpack_int4

__all__ = [
    "apply_balance",
    "balance_input",
    "balanced_quant_linear",
    "dequantize_weight",
    "pack_balance",
    "quant_linear",
    "quant_linear_reference",
    "rotate_by_matrices",
]


def balance_input(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``(x − shift) · scale`` as two pointwise operations, for engines and compilers to fuse with the one before them.

    Args:
        x: [..., K]. scale: fp32 [K], ± powers of two, which is exact in every dtype. shift: fp32 [K].
    """
    if shift is not None:
        x = x - shift.to(x.dtype)
    if scale is not None:
        x = x * scale.to(x.dtype)
    return x


def pack_balance(scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same as scales and offsets of ``dtype``, [K/8, 2, 8], as a thread of the kernel reads them."""
    scale = torch.ones_like(shift) if scale is None else scale  # type: ignore[arg-type]
    offset = torch.zeros_like(scale) if shift is None else -shift.to(dtype) * scale
    return torch.stack((scale.reshape(-1, 8), offset.reshape(-1, 8)), dim=1).to(dtype)


def apply_balance(x: Tensor, balance: Tensor) -> Tensor:
    """What the kernel makes of :func:`pack_balance`: ``x · scale + offset``, rounded once to x's dtype.

    It is :func:`balance_input` bit by bit in bf16. In fp16 a small power of two may leave subnormal numbers, which differ by
    one unit in the last place.
    """
    # Not addcmul in 16 bits: on a CPU it rounds products of subnormal fp16 numbers too.
    scale, offset = (balance[:, i].reshape(-1).float() for i in (0, 1))
    return torch.addcmul(offset, x.float(), scale).to(x.dtype)


def rotate_by_matrices(x: Tensor, hadamard: Tensor, outer: Tensor) -> Tensor:
    """Block rotation of the last axis by explicit matrices: ``outerᵀ @ (x.view(…, q, p, b) @ hadamard)``.

    Args:
        x: [..., K], K = q · p · b.
        hadamard: [b, b], orthonormal.
        outer: [p, p], orthonormal; [[1]] where the block is a power of two.
    """
    inner, cores = hadamard.shape[0], outer.shape[0]
    if inner == 1 and cores == 1:
        return x
    # Not −1 for the number of blocks: it is ambiguous when there are no tokens.
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // (cores * inner), cores, inner) @ hadamard
    if cores > 1:
        blocks = outer.transpose(0, 1) @ blocks
    return blocks.reshape(x.shape)


def dequantize_weight(
    weight: Tensor, scale: Tensor, factor: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The rotated weight the packed codes stand for, [N, K].

    Args:
        weight: int8 or uint8 [N, K/2], low nibble = even k, signed codes −8..7.
        scale: fp32 [N]. factor: uint8 [N, groups], 255 = 1.0. zero: fp32 [N], centred, or uint8 [N, groups] (see
            :func:`dvdquant.packing.expand_zero`).
    """
    codes = unpack_int4(weight).to(dtype)
    rows, features = codes.shape
    steps = scale.to(dtype)[:, None] * (factor.to(dtype) / 255)
    centred = codes.reshape(rows, factor.shape[1], -1) - expand_zero(zero).to(dtype)[:, :, None]
    return (centred * steps[:, :, None]).reshape(rows, features)


def quant_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_factor: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The op in plain PyTorch, computed in ``compute`` and rounded to x's dtype; shapes as in :func:`quant_linear`.

    With ``compute=torch.float64`` the codes are those of an exact rotation: the reference for tolerances.
    """
    rotated = rotate_by_matrices(x.to(compute), hadamard.to(compute), outer.to(compute))
    quantized = fake_quantize_activation(rotated, act_bits, act_group)
    dequantized = dequantize_weight(weight, weight_scale, weight_factor, weight_zero, compute)
    return torch.nn.functional.linear(quantized, dequantized, bias.to(compute)).to(x.dtype)


@torch.library.custom_op("dvdquant::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_factor: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """One quantized linear layer.

    Args:
        x: [..., K] float32, float16 or bfloat16.
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        weight_scale: fp32 [N]. weight_factor: uint8 [N, groups]. weight_zero: fp32 [N] or uint8 [N, groups].
        bias: fp32 [N].
        hadamard: fp32 [b, b]. outer: fp32 [p, p].
        act_bits: 4, 6 or 8. act_group: channels per activation scale, 0 for the whole token.

    Returns:
        [..., N] of x's dtype.
    """
    # float64 in, float64 throughout: the judge of every other executor.
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return quant_linear_reference(
        x, weight, weight_scale, weight_factor, weight_zero, bias, hadamard, outer, act_bits, act_group, compute
    )


@quant_linear.register_fake
def _quant_linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_factor: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
) -> Tensor:
    torch._check(x.shape[-1] == 2 * weight.shape[1])  # type: ignore[no-untyped-call]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("dvdquant::balanced_quant_linear", mutates_args=())
def balanced_quant_linear(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_factor: Tensor,
    weight_zero: Tensor,
    bias: Tensor,
    hadamard: Tensor,
    outer: Tensor,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """:func:`quant_linear` of :func:`balance_input`, for eager PyTorch on a GPU: the kernel that quantizes x balances it.

    Graphs and compilers get the two apart.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = balance_input(x, scale, shift)
    return quant_linear_reference(
        x, weight, weight_scale, weight_factor, weight_zero, bias, hadamard, outer, act_bits, act_group, compute
    )


@balanced_quant_linear.register_fake
def _balanced_quant_linear_fake(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, *rest: Any
) -> Tensor:
    torch._check(x.shape[-1] == 2 * weight.shape[1])  # type: ignore[no-untyped-call]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@quant_linear.register_kernel("cuda")
def _quant_linear_cuda(x: Tensor, *rest: Any) -> Tensor:
    return _on_cuda(x, None, None, *rest)


@balanced_quant_linear.register_kernel("cuda")
def _balanced_quant_linear_cuda(x: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    return _on_cuda(x, scale, shift, *rest)


def _on_cuda(x: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    from .cuda_linear import PackedLayer, quant_linear_cuda

    *tensors, act_bits, act_group = rest
    y = quant_linear_cuda(x, PackedLayer(*tensors), act_bits, act_group, scale, shift)
    if y is not None:
        return y
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = balance_input(x, scale, shift)
    return quant_linear_reference(x, *tensors, act_bits, act_group, compute)  # type: ignore[call-arg]
