"""GGUF files: a strict parser of their header. Weights stay on disk until they are read.

A header is counts, then keys with values, then names with shapes, types and offsets, then the data, aligned. Everything is
bounded before it is believed: what a count promises must fit in what is left of the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.formats.blocks import BLOCKS
from dvdquant.checkpoint.formats.stored import ShardTensor, Stored
from dvdquant.errors import CheckpointError
from dvdquant.text import shown

__all__ = ["MAGIC", "GgufHeader", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 64 << 20
MAX_TENSORS = 200_000
MAX_VALUES = 100_000
MAX_KEY, MAX_TEXT = 65_535, 1 << 20
MAX_AXES = 8
MAX_ALIGNMENT = 1 << 16
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
FIX = "download the file again"
_16_BIT = "use a file with Q6_K, Q8_0, F16 or BF16, or the model's 16-bit checkpoint"

# Number of a type in the file -> its name.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
# Number of a type of value -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Args:
        tensors: Where each tensor lies, by name.
        types: The format of each tensor, such as ``Q8_0``, by name.
        architecture: The architecture as the file names it, an empty text where it does not.
        digest: SHA-256 of the header.
    """

    tensors: dict[str, ShardTensor]
    types: dict[str, str]
    architecture: str
    digest: str


class _Cursor:
    """Reads a header forward in pieces, and hashes it."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self.size = fd, size
        self.position = 0
        self._buffer = b""
        self._start = 0
        self.digest = hashlib.sha256()

    @property
    def left(self) -> int:
        """Return the bytes of the file after this place."""
        return self.size - self.position

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.left:
            raise ValueError(f"cut short: {count} bytes wanted at byte {self.position} of {self.size}")
        if self.position + count > MAX_HEADER:
            raise ValueError(f"the header is longer than {MAX_HEADER} bytes")
        begin = self.position - self._start
        if begin + count > len(self._buffer):
            self._buffer = os.pread(self._fd, max(count, 1 << 16), self.position)
            self._start, begin = self.position, 0
            if len(self._buffer) < count:
                raise ValueError(f"cut short at byte {self.position}")
        data = self._buffer[begin : begin + count]
        self.position += count
        self.digest.update(data)
        return data

    def number(self, kind: str) -> Any:
        """Return one little-endian value of a struct format."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self, limit: int) -> str:
        """Return a string: a length in 64 bits, then UTF-8."""
        length = self.number("Q")
        if length > min(limit, self.left):
            raise ValueError(f"a text of {length} bytes at byte {self.position}, more than {min(limit, self.left)}")
        return self.take(length).decode("utf-8")

    def value(self, kind: int, budget: list[int], depth: int = 0) -> Any:
        """Return a value of a type; ``budget`` is how many values there may still be."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(MAX_TEXT)
        if kind != _ARRAY or depth >= 2:
            raise ValueError(f"a value of the unknown type {kind}" if kind != _ARRAY else "arrays within arrays")
        inner, count = self.number("I"), self.number("Q")
        budget[0] -= count
        if budget[0] < 0:
            raise ValueError(f"an array of {count} values, more than are left of {MAX_VALUES}")
        return [self.value(inner, budget, depth + 1) for _ in range(count)]


def read_gguf(fd: int, path: Path, shard: str) -> GgufHeader:
    """Read and check the header of the open file ``fd``.

    Args:
        fd: The descriptor.
        path: The path of the file, for its tensors.
        shard: The name of the file in its folder.

    Raises:
        CheckpointError: The file is damaged, of another version, a part of a model, or has weights of fewer than 4 bits.
    """
    try:
        return _read(_Cursor(fd, os.fstat(fd).st_size), path, shard)
    except (OSError, ValueError, struct.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(f"{path} is not a usable GGUF file: {shown(reason, 400)}", fix=FIX) from error


def _read(cursor: _Cursor, path: Path, shard: str) -> GgufHeader:
    # 1. Magic and counts.
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, count, values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version:#x}, known are {VERSIONS} in little-endian order")
    if count > MAX_TENSORS or values > MAX_VALUES:
        raise ValueError(f"{count} tensors and {values} values, more than {MAX_TENSORS} and {MAX_VALUES}")
    # 2. Keys and values.
    known = _values(cursor, values)
    alignment = known.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.80}, no power of two from 8 to {MAX_ALIGNMENT}")
    if known.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path} is one part of a model in {known['split.count']!r:.20} files",
            fix="join them with gguf-split --merge",
        )
    # 3. Tensors: all of them before the first offset is believed.
    entries = [_entry(cursor) for _ in range(count)]
    names = [name for name, *_ in entries]
    if len(set(names)) != len(names):
        raise ValueError("a tensor appears twice")
    _refuse_types(path, {name: kind for name, _, kind, _ in entries})
    # 4. Where they lie.
    position = start = cursor.position + -cursor.position % alignment
    tensors = {}
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        if start + offset != position:
            what = "overlaps the one before it" if start + offset < position else "leaves a hole before it"
            raise ValueError(f"tensor {shown(name)!r} {what} (starts at byte {start + offset}, expected {position})")
        info = _tensor(name, shape, kind, position, known.get(ORIGINAL_SHAPE + name))
        if position + info.nbytes > cursor.size:
            raise ValueError(
                f"cut short at tensor {shown(name)!r}: it ends at {position + info.nbytes} of {cursor.size}"
            )
        tensors[name] = ShardTensor(**{**vars(info), "path": path, "shard": shard})
        position += info.nbytes
        position += -position % alignment
    if cursor.size > position:
        raise ValueError(f"{cursor.size - position} bytes after the last tensor")
    architecture = known.get("general.architecture", "")
    return GgufHeader(
        tensors,
        {name: kind for name, _, kind, _ in entries},
        architecture if isinstance(architecture, str) else "",
        cursor.digest.hexdigest(),
    )


def _values(cursor: _Cursor, count: int) -> dict[str, Any]:
    known: dict[str, Any] = {}
    budget = [MAX_VALUES]
    for _ in range(count):
        key = cursor.text(MAX_KEY)
        if key in known:
            raise ValueError(f"the key {shown(key)!r} appears twice")
        known[key] = cursor.value(cursor.number("I"), budget)
    return known


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    """(name, shape in the order of PyTorch, type, offset in the data)."""
    name, axes = cursor.text(MAX_KEY), cursor.number("I")
    if not 0 <= axes <= MAX_AXES:
        raise ValueError(f"tensor {shown(name)!r} has {axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        raise ValueError(f"tensor {shown(name)!r} has the unknown type {number}")
    if not all(1 <= size < 1 << 40 for size in shape) or math.prod(shape) >= 1 << 48:
        raise ValueError(f"tensor {shown(name)!r} has the shape {list(shape)!r:.80}")
    return name, shape, TYPES[number], offset


def _refuse_types(path: Path, types: dict[str, str]) -> None:
    refused: dict[str, list[str]] = {}
    for name, kind in types.items():
        if kind not in PLAIN and kind not in BLOCKS:
            refused.setdefault(kind, []).append(name)
    if not refused:
        return
    count = sum(map(len, refused.values()))
    kinds = ", ".join(sorted(refused))
    first = next(iter(refused.values()))[0]
    raise CheckpointError(
        f"{path} is a GGUF file that holds {count} of its {len(types)} tensors as {kinds}, such as {shown(first)!r}: too few "
        "bits are left of these weights to be quantized again",
        available=", ".join((*BLOCKS, *PLAIN)),
        fix=_16_BIT,
    )


def _tensor(name: str, shape: tuple[int, ...], kind: str, offset: int, reshaped: Any) -> ShardTensor:
    """Return a tensor of a type that is read here.

    Args:
        name: Its name.
        shape: Its shape.
        kind: Its type, a key of ``PLAIN`` or ``BLOCKS``.
        offset: The position of its first byte in the file.
        reshaped: The shape that it had before the file's writer made rows of whole blocks of it, None where it has its own.
    """
    count = math.prod(shape)
    if kind in PLAIN:
        nbytes, dtype, stored = count * PLAIN[kind], kind, None
    else:
        per_block, size = BLOCKS[kind]
        if not shape or shape[-1] % per_block:
            raise ValueError(f"tensor {shown(name)!r} of {kind} has the shape {list(shape)!r:.80}, no whole blocks")
        nbytes, dtype, stored = count // per_block * size, "F32", Stored("U8", blocks=kind)
    if reshaped is not None:
        good = isinstance(reshaped, list) and 0 < len(reshaped) <= MAX_AXES
        if not good or not all(type(n) is int and 0 < n < 1 << 40 for n in reshaped) or math.prod(reshaped) != count:
            raise ValueError(
                f"tensor {shown(name)!r} of {list(shape)!r:.80} was {reshaped!r:.80} before, which is not it"
            )
        shape = tuple(reshaped)
    return ShardTensor(name, dtype, shape, offset, nbytes, stored=stored)
