"""A tensor of a checkpoint: where its bytes lie, and how they become the tensor where they are not the tensor itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dvdquant.checkpoint.formats.blocks import BLOCKS, dequantize
from dvdquant.system.safetensors_reader import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShardTensor", "Stored", "decode", "rows"]


@dataclass(frozen=True)
class Stored:
    """The form in which a tensor is stored: how its bytes become values.

    Args:
        dtype: What the bytes are, as a safetensors code; U8 for blocks.
        blocks: The GGUF type whose blocks the bytes are, "" for none.
        scale: The factor of all values, or one for each row; it is applied in fp32.
        swapped: Whether the first and the second half of the rows change places.
    """

    dtype: str
    blocks: str = ""
    scale: ShardTensor | None = None
    swapped: bool = False


@dataclass(frozen=True)
class ShardTensor(TensorInfo):
    """A tensor of a checkpoint and the place of its bytes.

    ``dtype`` and ``shape`` are those of the tensor that is read; ``name``, ``offset`` and ``nbytes`` those of its bytes in
    the file.

    Args:
        path: The real path of the file that holds it.
        shard: The name of that file in the folder.
        stored: How the bytes become the tensor; None where they are it.
    """

    path: Path = field(default=Path())
    shard: str = ""
    stored: Stored | None = None

    @property
    def raw(self) -> TensorInfo:
        """Return the place of the bytes as they lie in the file."""
        if self.stored is None:
            return self
        shape = (self.nbytes,) if self.stored.blocks else self.shape
        return TensorInfo(self.name, self.stored.dtype, shape, self.offset, self.nbytes)

    @property
    def parts(self) -> tuple[ShardTensor, ...]:
        """Return every piece of a file that the tensor is made of."""
        scale = None if self.stored is None else self.stored.scale
        return (self,) if scale is None else (self, scale)

    @property
    def reading_bytes(self) -> int:
        """Return the bytes of memory that it takes while it is read.

        fp8 lies beside its copy in bf16, what is decoded beside its fp32.
        """
        if self.stored is None:
            return self.nbytes * (3 if self.dtype.startswith("F8") else 1)
        values = math.prod(self.shape) * (4 if self.dtype == "F32" else 2)
        return self.nbytes + values * (2 if self.stored.swapped else 1)


def rows(info: ShardTensor, start: int, stop: int) -> ShardTensor:
    """Return rows ``start`` to ``stop`` of a tensor as a tensor of its own; they lie together in the file.

    Args:
        info: The place of the tensor in its file.
        start: The first row.
        stop: The row after the last one.

    Raises:
        ValueError: The rows are not there, or begin inside a block.
    """
    if not info.shape or not 0 <= start < stop <= info.shape[0]:
        raise ValueError(f"has no rows {start} to {stop}: its shape is {list(info.shape)}")
    row = math.prod(info.shape[1:])
    per_block, block_bytes = BLOCKS[info.stored.blocks] if info.stored and info.stored.blocks else (1, 0)
    if start * row % per_block or stop * row % per_block:
        raise ValueError(f"cannot be split at row {start}: its blocks of {per_block} values go across rows")
    block_bytes = block_bytes or info.nbytes // max(1, math.prod(info.shape))
    first, last = (edge * row // per_block * block_bytes for edge in (start, stop))
    stored = info.stored
    if stored is not None and stored.scale is not None and math.prod(stored.scale.shape) > 1:
        stored = replace(stored, scale=rows(stored.scale, start, stop))
    shape = (stop - start, *info.shape[1:])
    return replace(info, shape=shape, offset=info.offset + first, nbytes=last - first, stored=stored)


def decode(raw: Tensor, info: ShardTensor, scale: Tensor | None) -> Tensor:
    """Return the tensor that ``info`` describes, of the bytes that were read for it.

    Args:
        raw: The bytes as :attr:`ShardTensor.raw` describes them.
        info: The tensor, which is stored with a scale or in blocks.
        scale: The scale of ``info.stored``, of any floating dtype; None if it has none.
    """
    import torch

    stored = info.stored
    assert stored is not None
    value = raw
    if stored.blocks:
        value = dequantize(raw, stored.blocks)
    value = value.reshape(info.shape)
    if scale is not None:
        factor = scale.to(torch.float32)
        if factor.numel() > 1:
            factor = factor.reshape(-1, *[1] * (value.ndim - 1))
        else:
            factor = factor.reshape(())
        value = value.to(torch.float32).mul_(factor)
    if stored.swapped:
        first, second = value.chunk(2, dim=0)
        value = torch.cat([second, first], dim=0)
    return value
