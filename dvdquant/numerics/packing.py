"""The canonical weight layout: two 4-bit codes per byte, low nibble = even k, signed; zero-points as fp32 or bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.errors import ShapeError

__all__ = ["expand_zero", "pack_int4", "unpack_int4"]


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes int8 [..., K] in −8..7 into uint8 [..., K/2]; byte j holds codes 2j (low nibble) and 2j+1 (high).

    Raises:
        ShapeError: K is odd, the dtype is not int8, or a code lies outside −8..7.
    """
    if codes.dtype != torch.int8:
        raise ShapeError(f"4-bit codes are int8 before packing, not {codes.dtype}")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ShapeError(
            f"an odd number of codes per row cannot be packed: shape {tuple(codes.shape)}",
            fix="keep layers with an odd number of input channels in 16 bit",
        )
    if codes.numel():
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < -8 or high > 7:
            raise ShapeError(f"4-bit codes lie in −8..7, these in {low}..{high}")
    # Same-size views keep the work in bytes: two's complement nibbles need no sign handling on the way in.
    pairs = codes.contiguous().view(torch.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_int4`: uint8 or int8 bytes [..., K/2] to codes int8 [..., K] in −8..7.

    Raises:
        ShapeError: the dtype is not a byte.
    """
    if packed.dtype not in (torch.uint8, torch.int8) or packed.ndim == 0:
        raise ShapeError(f"packed 4-bit codes are uint8 or int8 bytes, not {packed.dtype} of {packed.ndim} axes")
    signed = packed.contiguous().view(torch.int8)
    # The arithmetic right shift sign-extends the nibble that the left shift has moved to the top.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def expand_zero(zero: Tensor) -> Tensor:
    """The centred zero-points of a stored ``weight_zero``, one per row or per weight group.

    Args:
        zero: floating [N], one per row as it is; or uint8 [N, groups], a real zero-point in steps of 1/16:
            ``z = byte/16 − 8``, −8 … 7 15/16, exact in every floating dtype.

    Returns:
        [N, 1] or [N, groups], fp32 (fp64 where ``zero`` is).

    Raises:
        ShapeError: neither of the two.
    """
    if zero.is_floating_point() and zero.ndim == 1:
        return zero[:, None]
    if zero.dtype == torch.uint8 and zero.ndim == 2:
        return zero.to(torch.float32) / 16 - 8
    raise ShapeError(
        f"zero-points are {zero.dtype} of shape {tuple(zero.shape)}", available="floating [N], uint8 [N, groups]"
    )
