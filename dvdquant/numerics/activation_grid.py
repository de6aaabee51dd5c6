"""ARQ: dynamic, symmetric quantization of rotated activations, one scale per (token, group of channels).

The rounding is defined here once; the kernels, the plugin and the ONNX body repeat it bit by bit:
``amax = max(max|x̃|, 2⁻¹⁰⁰)``, ``s = amax / qmax``, ``code = clamp(round_half_even(x̃ · (qmax / amax)), −qmax, qmax)``,
all in fp32. Only float64 input is computed in float64, as the reference that fp32 is judged by.
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

# Largest code by bit-width. The grid is symmetric, so −2^(bits−1) is not used.
QMAX = {4: 7, 6: 31, 8: 127}
# Keeps qmax / amax finite for a group of zeros, and amax / qmax a normal number.
AMAX_FLOOR = 2.0**-100


def quantize_activation(x: Tensor, bits: int, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of rotated activations.

    Args:
        x: x̃ [..., K], floating; taken as fp32 (fp64 stays fp64, also in the scale).
        bits: 4, 6 or 8.
        group_size: channels that share a scale, dividing K; 0 is the whole token.

    Returns:
        ``(codes int8 [..., K] in −qmax..qmax, scale fp32 [..., groups])``. A group with a NaN has a NaN scale, one with
        an Inf an infinite scale, so that neither disappears in :func:`dequantize_activation`; a group of zeros has
        codes 0 and scale 2⁻¹⁰⁰ / qmax.

    Raises:
        ShapeError: group_size does not divide K.
        UnsupportedError: bits is not 4, 6 or 8.
    """
    grid, scale = _to_grid(x, bits, group_size)
    # What a NaN becomes as an integer is up to the machine; its scale already carries it.
    codes = torch.where(torch.isnan(grid), 0.0, grid).to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize_activation(codes: Tensor, scale: Tensor) -> Tensor:
    """``scale · codes`` per group: codes int8 [..., K], scale fp32 [..., groups] to fp32 [..., K].

    Raises:
        ShapeError: the number of groups does not divide K.
    """
    groups = scale.shape[-1]
    if codes.shape[-1] % groups:
        raise ShapeError(f"{groups} scales do not divide {codes.shape[-1]} codes per token")
    return (_grouped(codes, groups).to(torch.float32) * scale.unsqueeze(-1)).flatten(-2)


def fake_quantize_activation(x: Tensor, bits: int, group_size: int = 0) -> Tensor:
    """``dequantize(quantize(x))`` without the integer step: x̃ [..., K] to fp32 [..., K].

    Equal bit by bit to :func:`dequantize_activation` of :func:`quantize_activation` on finite input. A NaN or an Inf
    makes its group NaN in part or in whole, never finite where it stood. Same errors.
    """
    grid, scale = _to_grid(x, bits, group_size)
    return (grid * scale).flatten(-2)


def fake_quantize_per_channel(x: Tensor, bits: int) -> Tensor:
    """The paper's Λ, one scale per channel over all tokens: ``s_j = ‖x̃_j‖_∞``. For comparison only.

    The scale sits inside the sum over channels, so no integer GEMM can run it.

    Args:
        x: x̃ [..., K], floating; the maximum runs over all leading axes.
        bits: 4, 6 or 8.

    Returns:
        fp32 [..., K].
    """
    columns = x.reshape(-1, x.shape[-1]).T
    return fake_quantize_activation(columns, bits).T.reshape(x.shape)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[..., K] as [..., groups, K/groups]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _to_grid(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes as fp32 [..., groups, G] and scales fp32 [..., groups, 1]."""
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
    # amax and clamp both propagate NaN.
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=AMAX_FLOOR)
    grid = torch.round(blocks * (qmax / amax)).clamp(-qmax, qmax)
    return grid, amax / qmax
