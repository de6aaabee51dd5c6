"""ARQ: dynamic, symmetric quantization of rotated activations, with one scale per (token, group of channels).

This module defines the rounding once. The kernels, the plugin and the ONNX body repeat it bit by bit:
``amax = max(max|x̃|, 2⁻¹⁰⁰)``, ``s = amax / qmax``, ``code = clamp(round_half_even(x̃ · (qmax / amax)), −qmax, qmax)``,
all in fp32. Only float64 input is computed in float64: it is the reference that fp32 is judged by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError

__all__ = [
    "AMAX_FLOOR",
    "QMAX",
    "dequantize_activation",
    "fake_quantize_activation",
    "fake_quantize_per_channel",
    "quantize_activation",
]

# The largest code by bit-width. The grid is symmetric, so −2^(bits−1) is not used.
QMAX = {4: 7, 6: 31, 8: 127}
# The floor keeps qmax / amax finite for a group of zeros, and amax / qmax a normal number.
AMAX_FLOOR = 2.0**-100


def quantize_activation(x: Tensor, bits: int, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of rotated activations.

    Args:
        x: x̃ [..., K], floating point. It is taken as fp32; fp64 stays fp64, also in the scale.
        bits: The bit-width of the codes: 4, 6 or 8.
        group_size: The number of channels that share a scale. It divides K; 0 means the whole token.

    Returns:
        ``(codes, scale)``: codes int8 [..., K] in −qmax..qmax, and scale [..., groups] in fp32 (fp64 for fp64 input). A
        group with a NaN has a NaN scale, and a group with an Inf has an infinite scale, so neither disappears in
        :func:`dequantize_activation`. A group of zeros has codes 0 and scale 2⁻¹⁰⁰ / qmax.

    Raises:
        ShapeError: group_size does not divide K.
        UnsupportedError: bits is not 4, 6 or 8.
    """
    grid, scale = _to_grid(x, bits, group_size)
    # The integer that a NaN becomes depends on the machine, so codes are 0 there. The scale already is NaN.
    codes = torch.where(torch.isnan(grid), 0.0, grid).to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize_activation(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale · codes`` for every group, as fp32 [..., K].

    Args:
        codes: The codes, int8 [..., K].
        scale: The scales, fp32 [..., groups].

    Raises:
        ShapeError: The number of groups does not divide K.
    """
    groups = scale.shape[-1]
    if codes.shape[-1] % groups:
        raise ShapeError(
            f"{groups} scales do not divide {codes.shape[-1]} codes per token",
            fix="give the scales that these codes were made with",
        )
    return (_grouped(codes, groups).to(torch.float32) * scale.unsqueeze(-1)).flatten(-2)


def fake_quantize_activation(x: Tensor, bits: int, group_size: int = 0) -> Tensor:
    """Return ``dequantize(quantize(x))`` without the integer step, as fp32 [..., K] (fp64 for fp64 input).

    On finite input, the result equals :func:`dequantize_activation` of :func:`quantize_activation` bit by bit. A NaN or
    an Inf makes its group NaN in part or in whole; the value at its own place is never finite.

    Args:
        x: x̃ [..., K], floating point.
        bits: The bit-width of the codes: 4, 6 or 8.
        group_size: The number of channels that share a scale. It divides K; 0 means the whole token.

    Raises:
        ShapeError: group_size does not divide K.
        UnsupportedError: bits is not 4, 6 or 8.
    """
    grid, scale = _to_grid(x, bits, group_size)
    return (grid * scale).flatten(-2)


def fake_quantize_per_channel(x: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize with the paper's Λ, one scale per channel over all tokens: ``s_j = ‖x̃_j‖_∞``.

    This is for comparison only: the scale is inside the sum over channels, so no integer GEMM can run it.

    Args:
        x: x̃ [..., K], floating point. The maximum runs over all leading axes.
        bits: The bit-width of the codes: 4, 6 or 8.

    Returns:
        The rounded activations [..., K] in fp32 (fp64 for fp64 input).

    Raises:
        UnsupportedError: bits is not 4, 6 or 8.
    """
    columns = x.reshape(-1, x.shape[-1]).T
    return fake_quantize_activation(columns, bits).T.reshape(x.shape)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return a view of x [..., K] as [..., groups, K/groups]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _to_grid(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes as floating numbers [..., groups, G] and the scales [..., groups, 1].

    Both are fp32, or fp64 for fp64 input. G is the number of channels in a group.

    Args:
        x: x̃ [..., K], floating point.
        bits: The bit-width of the codes: 4, 6 or 8.
        group_size: The number of channels that share a scale; 0 means the whole token.

    Raises:
        ShapeError: group_size does not divide K.
        UnsupportedError: bits is not 4, 6 or 8.
    """
    if bits not in QMAX:
        raise UnsupportedError(f"{bits}-bit activations are not supported", available=[str(b) for b in QMAX])
    features = x.shape[-1] if x.ndim else 0
    group = group_size or features
    if group < 1 or features % group:
        raise ShapeError(
            f"activation groups of {group_size} do not divide {features} channels", fix="use a divisor, or 0"
        )
    qmax = float(QMAX[bits])
    blocks = _grouped(x if x.dtype == torch.float64 else x.to(torch.float32), features // group)
    # blocks: [..., groups, G]. amax and clamp both propagate NaN.
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=AMAX_FLOOR)
    grid = torch.round(blocks * (qmax / amax)).clamp(-qmax, qmax)
    return grid, amax / qmax
