"""The canonical weight layout: two signed 4-bit codes per byte (low nibble: even k), zero-points as fp32 or bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.errors import ShapeError

__all__ = ["expand_zero", "pack_int4", "unpack_int4"]


def pack_int4(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes, two per byte.

    Args:
        codes: The codes, int8 [..., K] in −8..7, with K even.

    Returns:
        uint8 [..., K/2]. Byte j holds code 2j in its low nibble and code 2j+1 in its high nibble.

    Raises:
        ShapeError: K is odd, the dtype is not int8, or a code lies outside −8..7.
    """
    if codes.dtype != torch.int8:
        raise ShapeError(
            f"4-bit codes are int8 before packing, not {codes.dtype}", fix="convert them with .to(torch.int8)"
        )
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ShapeError(
            f"an odd number of codes per row cannot be packed: shape {tuple(codes.shape)}",
            fix="keep layers with an odd number of input channels in 16 bit",
        )
    if codes.numel():
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < -8 or high > 7:
            raise ShapeError(
                f"4-bit codes lie in −8..7, these in {low}..{high}", fix="clamp them, or divide by a larger scale"
            )
    # pairs: uint8 [..., K/2, 2]. A two's complement nibble needs no sign handling when it is packed, so bytes suffice.
    pairs = codes.contiguous().view(torch.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack bytes into signed 4-bit codes, the inverse of :func:`pack_int4`.

    Args:
        packed: The bytes, uint8 or int8 [..., K/2].

    Returns:
        The codes, int8 [..., K] in −8..7.

    Raises:
        ShapeError: The dtype is neither uint8 nor int8, or the tensor has no axis.
    """
    if packed.dtype not in (torch.uint8, torch.int8) or packed.ndim == 0:
        raise ShapeError(
            f"packed 4-bit codes are uint8 or int8 bytes, not {packed.dtype} of {packed.ndim} axes",
            fix="give what pack_int4 returned, or view the bytes as torch.uint8",
        )
    signed = packed.contiguous().view(torch.int8)
    # The arithmetic right shift sign-extends the nibble that the left shift has moved to the top.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def expand_zero(zero: Tensor) -> Tensor:
    """Return the centred zero-points of a stored ``weight_zero``, one per row or per weight group.

    Args:
        zero: Floating point [N], one zero-point per row, stored as it is. Or uint8 [N, groups], a float zero-point in
            steps of 1/16: ``z = byte/16 − 8``, from −8 to 7 15/16, exact in every floating dtype.

    Returns:
        [N, 1] in the dtype of ``zero`` if it is floating point, else [N, groups] in fp32.

    Raises:
        ShapeError: ``zero`` has neither of the two forms.
    """
    if zero.is_floating_point() and zero.ndim == 1:
        return zero[:, None]
    if zero.dtype == torch.uint8 and zero.ndim == 2:
        return zero.to(torch.float32) / 16 - 8
    raise ShapeError(
        f"zero-points are {zero.dtype} of shape {tuple(zero.shape)}", available="floating [N], uint8 [N, groups]"
    )
