"""Read safetensors files: a strict header parser, and a reader of single tensors.

The stock library maps whole files and accepts duplicate keys. A checkpoint from elsewhere deserves more doubt, and a
model larger than memory needs one tensor at a time. Nothing here imports torch before a tensor is touched.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.errors import CheckpointError, ResourceError
from dvdquant.system.files import open_regular, strict_json
from dvdquant.system.recognize import BLOCK_SCALED, SNIFFED, Found, recognize_bytes
from dvdquant.text import amount

if TYPE_CHECKING:
    import torch

__all__ = [
    "CODES",
    "DTYPES",
    "MAX_HEADER",
    "Header",
    "TensorInfo",
    "read_header",
    "read_header_from",
    "read_tensor",
    "read_tensor_from",
    "stored_reader",
]

MAX_HEADER = 100_000_000
# safetensors code -> (bytes per element, torch name)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
CODES = {name: code for code, (_, name) in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a safetensors file.

    Args:
        name: The name of the tensor.
        dtype: The safetensors code of the dtype (``BF16``...).
        shape: The shape.
        offset: The position of the first byte, counted from the start of the file.
        nbytes: The size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header of a safetensors file.

    Args:
        tensors: The tensors by name, in file order.
        metadata: The string pairs of ``__metadata__``.
        file_size: The size of the file in bytes.
        digest: The SHA-256 of the header bytes, as hex digits.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    digest: str = field(repr=False, default="")


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file.

    The layout is u64 header length, JSON, data. Offsets must cover the data exactly, in order, without a hole or an
    overlap, and ``shape`` × dtype must give the size of every tensor.

    Args:
        path: The path of the file.

    Raises:
        CheckpointError: The file is not complete and consistent; the error names the file and the first tensor
            affected.
    """
    try:
        fd, _ = open_regular(Path(path))
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    try:
        return read_header_from(fd, path)
    finally:
        os.close(fd)


def read_header_from(fd: int, path: str | Path) -> Header:
    """Read and check the header of an open safetensors file, from its start.

    Args:
        fd: The descriptor, opened for reading.
        path: The name of the file in errors.

    Raises:
        CheckpointError: The file is not complete and consistent; the error names the file and the first tensor
            affected.
    """
    try:
        size = os.fstat(fd).st_size
        raw = _header_bytes(fd, size)
        entries = strict_json(raw, max_depth=4)
        if not raw.startswith(b"{") or not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is not a map of strings")
        infos = [_tensor_info(name, entry, 8 + len(raw)) for name, entry in entries.items()]
        tensors = _check_layout(infos, 8 + len(raw), size)
    except (OSError, ValueError) as error:
        found = None if isinstance(error, OSError) else recognize_bytes(_start_of(fd))
        raise _unusable(path, error, found) from error
    return Header(tensors, metadata, size, hashlib.sha256(raw).hexdigest())


def _unusable(path: str | Path, error: Exception, found: Found | None = None) -> CheckpointError:
    """Return the error for a file that is not a usable safetensors file.

    Args:
        path: The name of the file in errors.
        error: The reason.
        found: The format that the file has instead, or None if it is unknown.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if found is not None:
        return CheckpointError(f"{path} is not a usable safetensors file: it is {found.what} ({reason})", fix=found.fix)
    return CheckpointError(
        f"{path} is not a usable safetensors file: {reason}", fix="download or convert the file again"
    )


def _start_of(fd: int) -> bytes:
    """Return the first ``SNIFFED`` bytes of an open file, or none if it cannot be read."""
    try:
        return os.pread(fd, SNIFFED, 0)
    except OSError:
        return b""


def _header_bytes(fd: int, size: int) -> bytes:
    """Return the JSON of the header, still unchecked.

    Args:
        fd: The descriptor, opened for reading.
        size: The size of the file in bytes.

    Raises:
        ValueError: The file is cut short inside the header, or the header length is too large.
        OSError: The file cannot be read.
    """
    prefix = os.pread(fd, 8, 0)
    if len(prefix) < 8:
        raise ValueError(f"cut short: {size} bytes, not even a header length")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise ValueError(f"header length {length} exceeds {MAX_HEADER}: damaged, or another format")
    raw = bytearray()
    while len(raw) < length and (chunk := os.pread(fd, min(1 << 24, length - len(raw)), 8 + len(raw))):
        raw += chunk
    if len(raw) < length:
        first = re.search(rb'"((?:[^"\\]|\\.)+)"\s*:\s*\{\s*"', bytes(raw[: 1 << 20]))
        name = f", first tensor {first[1].decode('utf-8', 'replace')!r:.200}" if first else ""
        raise ValueError(f"cut short inside the header ({size} bytes of at least {8 + length}{name})")
    return bytes(raw)


def _is_size(value: Any) -> bool:
    """Return whether ``value`` is an integer from 0 to 2⁶² − 1, as a size or an offset is."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor_info(name: str, entry: Any, start: int) -> TensorInfo:
    """Return one checked entry of the header.

    Args:
        name: The name of the tensor.
        entry: The entry as parsed JSON.
        start: The position of the data section, in bytes.

    Raises:
        ValueError: The entry is out of form, or its size does not fit its shape and dtype.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.200} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in BLOCK_SCALED:
            raise ValueError(
                f"tensor {name!r:.200} is {dtype}, a part of {BLOCK_SCALED[dtype]}, which is not read here"
            )
        raise ValueError(f"tensor {name!r:.200} has the unknown dtype {dtype!r:.40} (known: {', '.join(DTYPES)})")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        raise ValueError(f"tensor {name!r:.200} has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"tensor {name!r:.200} has the data_offsets {offsets!r:.80}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][0]
    if end - begin != needed:
        raise ValueError(
            f"tensor {name!r:.200} of {dtype} {shape} needs {needed} bytes, data_offsets give {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), start + begin, needed)


def _check_layout(infos: list[TensorInfo], start: int, size: int) -> dict[str, TensorInfo]:
    """Return the tensors by name in file order, if they fill the data section exactly.

    Args:
        infos: All tensors of the file.
        start: The position of the data section, in bytes.
        size: The size of the file, in bytes.

    Raises:
        ValueError: There is a hole, an overlap, or data missing or left over at the end.
    """
    position, infos = start, sorted(infos, key=lambda info: (info.offset, info.nbytes))
    for info in infos:
        if info.offset != position:
            kind = "overlaps the one before it" if info.offset < position else "leaves a hole before it"
            raise ValueError(f"tensor {info.name!r:.200} {kind} (starts at byte {info.offset}, expected {position})")
        position += info.nbytes
        if position > size:
            raise ValueError(f"cut short at tensor {info.name!r:.200} ({size} bytes, the tensor ends at {position})")
    if position != size:
        raise ValueError(f"{size - position} bytes after the last tensor")
    return {info.name: info for info in infos}


def read_tensor(path: str | Path, info: TensorInfo) -> torch.Tensor:
    """Read one tensor into private memory: ``info.shape``, CPU, contiguous, dtype as stored.

    Nothing stays mapped, so resident memory falls back when the tensor is dropped.

    Args:
        path: The path of the file.
        info: The place of the tensor, from the header of the file.

    Raises:
        CheckpointError: The file ends inside the tensor or cannot be read, or a BOOL byte is neither 0 nor 1.
        ResourceError: There is not enough memory for the tensor.
    """
    try:
        fd, _ = open_regular(Path(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {info.name!r:.200} cannot be read: {error}",
            fix="check the disk and its connection, then download or copy that file again",
        ) from error
    try:
        return read_tensor_from(fd, info, path)
    finally:
        os.close(fd)


def read_tensor_from(fd: int, info: TensorInfo, path: str | Path) -> torch.Tensor:
    """Read one tensor of an open file into private memory, as :func:`read_tensor` does.

    Args:
        fd: The descriptor, opened for reading.
        info: The place of the tensor, from the header of the file.
        path: The name of the file in errors.

    Raises:
        CheckpointError: The file ends inside the tensor or cannot be read, or a BOOL byte is neither 0 nor 1.
        ResourceError: There is not enough memory for the tensor.
    """
    import torch

    try:
        # A sparse file may claim more bytes than there is memory.
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < info.nbytes:
            count = os.preadv(fd, [view[done : done + (1 << 30)]], info.offset + done)
            if not count:
                raise ValueError(f"the file ends {info.nbytes - done} bytes early")
            done += count
        if info.dtype == "BOOL" and info.nbytes and int(buffer.max()) > 1:
            raise ValueError("a BOOL value is neither 0 nor 1")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {info.name!r:.200} cannot be read: {error}",
            fix="check the disk and its connection, then download or copy that file again",
        ) from error
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        raise ResourceError(
            f"{path}: tensor {info.name!r:.200} takes {amount(info.nbytes)}, which is not free",
            fix="free memory, or use a larger machine",
        ) from error
    return buffer.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)


def stored_reader(root: Path, places: Mapping[str, tuple[str, TensorInfo]]) -> Callable[[str], torch.Tensor]:
    """Return a function that reads a tensor of several files by its name, as :func:`read_tensor` does.

    Args:
        root: The folder of the files.
        places: Name -> (file relative to the folder, place in it).
    """

    def read(name: str) -> torch.Tensor:
        relative, info = places[name]
        return read_tensor(root / relative, info)

    return read
