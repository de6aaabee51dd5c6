"""The block formats of GGUF that keep 4 bits or more of a weight, and their values in fp32.

Each block has its own scale in fp16. The order of the products is that of the format's own code, so the values are the same
to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["BLOCKS", "FEW_BITS", "dequantize"]

FEW_BITS: dict[str, tuple[int, int]] = {
    "Q5_K": (256, 176), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_K": (256, 144), "Q4_1": (32, 20), "Q4_0": (32, 18),
}  # fmt: skip
"""The types of 4 and 5 bits: an export takes them on request only."""
BLOCKS: dict[str, tuple[int, int]] = {"Q8_0": (32, 34), "Q6_K": (256, 210), **FEW_BITS}
"""Type -> (values in a block, bytes of a block)."""
CHUNK = 1 << 14
"""Blocks decoded at once: what lies beside the result stays some megabytes."""


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Return the values of blocks: U8 [bytes] -> fp32 [values].

    Args:
        raw: The blocks as stored, uint8 [bytes].
        kind: The name of the block format.
    """
    import torch

    values, nbytes = BLOCKS[kind]
    decode = _DECODERS[kind]
    source = raw.reshape(-1, nbytes)
    result = torch.empty(len(source), values, dtype=torch.float32)
    for start in range(0, len(source), CHUNK):
        result[start : start + CHUNK] = decode(source[start : start + CHUNK])
    return result.reshape(-1)


def _fp16(part: Tensor) -> Tensor:
    """U8 [blocks, 2·n] -> fp32 [blocks, n]."""
    import torch

    return part.contiguous().view(torch.float16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    """One scale, 32 signed bytes: w = d·q."""
    import torch

    return _fp16(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q6_k(blocks: Tensor) -> Tensor:
    """Low 4 bits [128 B], high 2 bits [64 B], 16 signed scales of 16 values each, one scale: w = d·s·(q − 32)."""
    import torch

    count = len(blocks)
    low, high, scales = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208].contiguous().view(torch.int8)
    # Each half of the block: 64 bytes of low bits give 128 values, and 32 bytes of high bits their upper two.
    shifts = torch.tensor([0, 4], dtype=torch.uint8).reshape(1, 1, 2, 1)
    nibbles = ((low.reshape(count, 2, 1, 64) >> shifts) & 15).reshape(count, -1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(1, 1, 4, 1)
    upper = ((high.reshape(count, 2, 1, 32) >> shifts) & 3).reshape(count, -1, 32)
    codes = (nibbles | (upper << 4)).to(torch.int8) - 32
    factors = (_fp16(blocks[:, 208:210]) * scales.float()).reshape(count, 16, 1)
    return (factors * codes.reshape(count, 16, 16).float()).reshape(count, 256)


def _nibbles(part: Tensor, run: int) -> Tensor:
    """U8 [blocks, n] -> U8 [blocks, 2·n]: of every ``run`` bytes first the low halves, then the high ones."""
    import torch

    shifts = torch.tensor([0, 4], dtype=torch.uint8).reshape(1, 1, 2, 1)
    return ((part.reshape(len(part), -1, 1, run) >> shifts) & 15).reshape(len(part), -1)


def _fifth_bits(part: Tensor) -> Tensor:
    """U8 [blocks, 4] -> U8 [blocks, 32]: bit i of the little-endian number belongs to value i."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 8)
    return ((part.reshape(len(part), 4, 1) >> shifts) & 1).reshape(len(part), 32)


def _q4_0(blocks: Tensor) -> Tensor:
    """Decode one scale, 32 codes of 4 bits: w = d·(q − 8)."""
    import torch

    return _fp16(blocks[:, :2]) * (_nibbles(blocks[:, 2:], 16).to(torch.int8) - 8).float()


def _q4_1(blocks: Tensor) -> Tensor:
    """Decode a scale, a minimum, 32 codes of 4 bits: w = d·q + m."""
    return _fp16(blocks[:, :2]) * _nibbles(blocks[:, 4:], 16).float() + _fp16(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    """Decode one scale, the fifth bits [4 B], 32 codes of 4 bits: w = d·(q − 16)."""
    import torch

    codes = _nibbles(blocks[:, 6:], 16) | (_fifth_bits(blocks[:, 2:6]) << 4)
    return _fp16(blocks[:, :2]) * (codes.to(torch.int8) - 16).float()


def _q5_1(blocks: Tensor) -> Tensor:
    """Decode a scale, a minimum, the fifth bits [4 B], 32 codes of 4 bits: w = d·q + m."""
    codes = _nibbles(blocks[:, 8:], 16) | (_fifth_bits(blocks[:, 4:8]) << 4)
    return _fp16(blocks[:, :2]) * codes.float() + _fp16(blocks[:, 2:4])


def _sub_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scales, minima) fp32 [blocks, 8, 1] of a K type: two of fp16, times 6 bits each, packed into 12 bytes."""
    import torch

    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1)
    return (_fp16(blocks[:, :2]) * scales.float())[..., None], (_fp16(blocks[:, 2:4]) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    """Decode eight scales and minima, 256 codes of 4 bits: w = d·q − m."""
    scales, minima = _sub_scales(blocks)
    codes = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32)
    return (scales * codes.float() - minima).reshape(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    """Decode eight scales and minima, the fifth bits [32 B], 256 codes of 4 bits: w = d·q − m."""
    import torch

    scales, minima = _sub_scales(blocks)
    shifts = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1)
    fifth = (blocks[:, 16:48].reshape(-1, 1, 32) >> shifts) & 1
    codes = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | (fifth << 4)
    return (scales * codes.float() - minima).reshape(-1, 256)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q6_K": _q6_k, "Q5_K": _q5_k, "Q5_1": _q5_1, "Q5_0": _q5_0, "Q4_K": _q4_k, "Q4_1": _q4_1, "Q4_0": _q4_0,
}  # fmt: skip
