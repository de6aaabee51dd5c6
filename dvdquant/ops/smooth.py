"""Smoothing of a layer's input before its rotation: subtract a predicted mean, scale channels by powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_pre_quant", "smooth_input", "pack_pre_quant"]


def smooth_input(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return ``(x − shift) · scale`` as two pointwise operations, for compilers to fuse with the one before.

    Args:
        x: The input, [..., K], any floating dtype.
        scale: fp32 [K], ± powers of two, so that the product is exact in every dtype; None for no scaling.
        shift: fp32 [K], subtracted before the scaling; None for no shift.

    Returns:
        [..., K] of x's dtype.
    """
    if shift is not None:
        x = x - shift.to(x.dtype)
    if scale is not None:
        x = x * scale.to(x.dtype)
    return x


def pack_pre_quant(scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return pre-quant scales and offsets as a thread of the kernel reads them: [K/8, 2, 8] of ``dtype``.

    Index 0 of the middle axis holds the scale, index 1 the offset ``−shift · scale``. At least one of scale and shift
    must be given.

    Args:
        scale: fp32 [K], ± powers of two; None for ones.
        shift: fp32 [K]; None for zeros.
        dtype: Dtype of x and of the result.
    """
    scale = torch.ones_like(shift) if scale is None else scale  # type: ignore[arg-type]
    offset = torch.zeros_like(scale) if shift is None else -shift.to(dtype) * scale
    return torch.stack((scale.reshape(-1, 8), offset.reshape(-1, 8)), dim=1).to(dtype)


def apply_pre_quant(x: Tensor, pre_quant: Tensor) -> Tensor:
    """Compute ``x · scale + offset`` as the kernel does, rounded once to x's dtype.

    In bf16 the result equals :func:`smooth_input` bit by bit. In fp16 a small power of two may leave subnormal
    numbers, which differ by one unit in the last place.

    Args:
        x: The input, [..., K].
        pre_quant: [K/8, 2, 8] from :func:`pack_pre_quant`.
    """
    # Not addcmul in 16 bits: on a CPU it rounds products of subnormal fp16 numbers too.
    scale, offset = (pre_quant[:, i].reshape(-1).float() for i in (0, 1))
    return torch.addcmul(offset, x.float(), scale).to(x.dtype)
