"""What is done to the input of a layer before it is rotated: a predicted mean off, and channels scaled by powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_balance", "balance_input", "pack_balance"]


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
