"""The block formats of GGUF that keep 6 bits or more of a weight, and their values in fp32.

Each block has its own scale in fp16. The order of the products is that of the format's own code, so the values are the same
to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["BLOCKS", "dequantize"]

BLOCKS: dict[str, tuple[int, int]] = {"Q8_0": (32, 34), "Q6_K": (256, 210)}
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


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q6_K": _q6_k}
