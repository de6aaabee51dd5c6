"""The quantized linear layer in plain PyTorch: the definition that every other executor is judged by.

    x̃ = rotate(x)                                          (block Hadamard, inner and outer factor)
    s[m, g] = max_{k∈g} |x̃[m, k]| / qmax                    (per token m and group g of channels)
    c[m, k] = clamp(round(x̃[m, k] · qmax / max|x̃|), ±qmax)
    y[m, n] = Σ_g s[m, g] Σ_{k∈g} c[m, k] · Δ[n] · f[n, k//G]/255 · (w[n, k] − z) + bias[n],  z = z[n] or z[n, k//G]

with everything in ``compute`` and y rounded once to x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.numerics.activation_grid import fake_quantize_activation
from dvdquant.numerics.packing import expand_zero, unpack_int4

__all__ = ["dequantize_weight", "quant_linear_reference", "rotate_by_matrices"]


def rotate_by_matrices(x: Tensor, hadamard: Tensor, outer: Tensor) -> Tensor:
    """Rotate the last axis block by block with explicit matrices: ``outerᵀ @ (x.view(…, q, p, b) @ hadamard)``.

    Args:
        x: [..., K], K = q · p · b.
        hadamard: [b, b], orthonormal, of x's dtype.
        outer: [p, p], orthonormal, of x's dtype; [[1]] where the block is a power of two.
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
    weight: Tensor, scale: Tensor, group_scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the rotated weight that the packed codes stand for, [N, K] of ``dtype``.

    Args:
        weight: int8 or uint8 [N, K/2], low nibble = even k, signed codes −8..7.
        scale: fp32 [N].
        group_scale: uint8 [N, groups], 255 = 1.0.
        zero: fp32 [N], centred, or uint8 [N, groups] (see :func:`dvdquant.numerics.packing.expand_zero`).
        dtype: Dtype of the arithmetic and of the result.
    """
    codes = unpack_int4(weight).to(dtype)
    rows, features = codes.shape
    steps = scale.to(dtype)[:, None] * (group_scale.to(dtype) / 255)
    centred = codes.reshape(rows, group_scale.shape[1], -1) - expand_zero(zero).to(dtype)[:, :, None]
    return (centred * steps[:, :, None]).reshape(rows, features)


def quant_linear_reference(
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
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the op in plain PyTorch, in ``compute``, and round to x's dtype.

    With ``compute=torch.float64`` the codes are those of an exact rotation: the reference for tolerances.

    Args:
        x: [..., K], floating.
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        weight_scale: fp32 [N], the step of each row.
        weight_group_scale: uint8 [N, groups], 255 = 1.0.
        weight_zero: fp32 [N], or uint8 [N, groups] with float zero-points.
        bias: fp32 [N].
        hadamard: The inner rotation factor, fp32 [b, b].
        outer: The outer rotation factor, fp32 [p, p].
        act_bits: Bits of the activation codes: 4, 6 or 8.
        act_group: Channels per activation scale; 0 for the whole token.
        compute: Dtype of the arithmetic.

    Returns:
        [..., N] of x's dtype.
    """
    rotated = rotate_by_matrices(x.to(compute), hadamard.to(compute), outer.to(compute))
    quantized = fake_quantize_activation(rotated, act_bits, act_group)
    dequantized = dequantize_weight(weight, weight_scale, weight_group_scale, weight_zero, compute)
    return torch.nn.functional.linear(quantized, dequantized, bias.to(compute)).to(x.dtype)
