"""safetensors files: a strict header parser, a reader of single tensors and a streaming writer.

The stock library maps whole files and accepts duplicate keys. A checkpoint from elsewhere deserves more doubt, and a
model larger than memory needs one tensor at a time. Nothing here imports torch before a tensor is touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dvdquant.errors import CheckpointError, OutputError, ResourceError
from dvdquant.system.files import FileEntry, disk_error, hash_file, open_regular, strict_json, write_all
from dvdquant.system.recognize import BLOCK_SCALED, SNIFFED, Found, recognize_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIGNMENT",
    "Header",
    "StreamingWriter",
    "TensorInfo",
    "read_header",
    "read_header_from",
    "read_tensor",
    "read_tensor_from",
]

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes of the file, so that ONNX external data can be mapped."""
MAX_HEADER = 100_000_000
PAD = "__pad."

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
_CODES = {name: code for code, (_, name) in DTYPES.items()}


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


# ------------------------------------------------------------------------------------------------------------ reading


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
            f"{path}: tensor {info.name!r:.200} takes {info.nbytes / 1e9:.2f} GB, which is not free",
            fix="free memory, or use a larger machine",
        ) from error
    return buffer.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)


# ------------------------------------------------------------------------------------------------------------ writing


def _code(dtype: torch.dtype | str) -> str:
    """Return the safetensors code of a dtype of torch, or the code itself.

    Raises:
        ValueError: The dtype has no code here.
    """
    code = dtype if isinstance(dtype, str) else _CODES.get(str(dtype).removeprefix("torch."), str(dtype))
    if code not in DTYPES:
        raise ValueError(f"dtype {dtype} has no safetensors code here (known: {', '.join(DTYPES)})")
    return code


def _layout(
    plan: Sequence[tuple[str, torch.dtype | str, Sequence[int]]],
    metadata: Mapping[str, str],
    alignment: int = ALIGNMENT,
) -> tuple[dict[str, TensorInfo], bytes, int]:
    """Lay out the tensors of a file and build its header.

    safetensors allows no hole between tensors. So if a tensor does not end at a multiple of ``alignment`` bytes, a ``__pad.N``
    tensor of zero bytes fills up to the next one. Spaces after the JSON align the data section itself.

    Args:
        plan: (name, dtype, shape) of every tensor. dtype is torch's or a safetensors code.
        metadata: The string pairs of the header.
        alignment: Where tensors may begin, in bytes.

    Returns:
        The tensors by name in plan order, the header bytes with their length prefix, and the file size in bytes.

    Raises:
        ValueError: A name is taken twice or reserved, a dtype has no code, or the header is too long.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: list[TensorInfo] = []
    position, pads = 0, 0
    for name, dtype, shape in plan:
        if name in entries or name == "__metadata__" or name.startswith(PAD):
            raise ValueError(f"tensor name {name!r:.200} is taken twice or reserved")
        if gap := -position % alignment:
            pad = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
            entries[f"{PAD}{pads}"], position, pads = pad, position + gap, pads + 1
        code, shape = _code(dtype), tuple(int(n) for n in shape)
        nbytes = math.prod(shape) * DTYPES[code][0]
        relative.append(TensorInfo(name, code, shape, position, nbytes))
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header of {len(relative)} tensors takes {len(text)} bytes, more than {MAX_HEADER}")
    start = 8 + len(text)
    tensors = {t.name: TensorInfo(t.name, t.dtype, t.shape, start + t.offset, t.nbytes) for t in relative}
    return tensors, struct.pack("<Q", len(text)) + text, start + position


def _reserve(fd: int, nbytes: int) -> None:
    """Reserve ``nbytes`` on the disk for an open file, or only set its size if the file system has no reservations."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, nbytes)  # without reservations, a full disk shows only at the write


class StreamingWriter:
    """A writer of a safetensors file that writes tensor by tensor, in any order, and holds none of them.

    Args:
        path: The file, created or truncated. Its whole size is reserved at once, so a full disk shows before any work.
        plan: (name, dtype, shape) of every tensor; the file keeps this order. dtype is torch's or a safetensors code.
        metadata: The string pairs of the header.
        alignment: Where tensors may begin, in bytes; 1 leaves no padding between them, for readers that know each name.

    Attributes:
        tensors: The final :class:`TensorInfo` of each name, valid from the start (ONNX external data uses offset and
            nbytes).
        nbytes: The size of the whole file in bytes.
        written: The names of the tensors written so far.

    Raises:
        ResourceError: The disk or a quota is full.
        OutputError: Another write failed.
        ValueError: A name of the plan is taken twice or reserved, a dtype has no code, or the header is too long.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Sequence[tuple[str, torch.dtype | str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        alignment: int = ALIGNMENT,
        _resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.tensors, self._header, self.nbytes = _layout(plan, metadata or {}, alignment)
        self.written: set[str] = set()
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if _resume else os.O_CREAT | os.O_TRUNC)
        try:
            self._fd = os.open(self.path, flags, 0o644)
            if _resume:
                self._check_existing()
                return
            try:
                _reserve(self._fd, self.nbytes)
                write_all(self._fd, self._header, 0)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise disk_error(error, self.path) from error

    @classmethod
    def resume(
        cls,
        path: str | Path,
        plan: Sequence[tuple[str, torch.dtype | str, Sequence[int]]],
        done: Iterable[str] | Mapping[str, int],
        metadata: Mapping[str, str] | None = None,
    ) -> StreamingWriter:
        """Go on with a file of the same plan, in which some tensors are already written.

        Args:
            path: The file that was begun.
            plan: (name, dtype, shape) of every tensor, as the file was begun.
            done: The names of the tensors that are written. Or a mapping from name to the CRC-32 that :meth:`write`
                returned: then the file is checked, and a tensor that did not reach the disk before a power cut counts
                as unwritten.
            metadata: The string pairs of the header, as the file was begun.

        Raises:
            OutputError: The file is missing, or was begun with another plan, or has no tensor of a name in ``done``.
            ResourceError: The disk, a quota or the number of open files is at its limit.
        """
        writer = cls(path, plan, metadata, _resume=True)
        try:
            checks = dict(done) if isinstance(done, Mapping) else dict.fromkeys(done)
            if unknown := checks.keys() - writer.tensors.keys():
                raise OutputError(f"{path} has no tensor {min(unknown)!r}", fix="start again without --resume")
            writer.written = {name for name, crc in checks.items() if crc is None or writer._crc(name) == crc}
        except BaseException:
            writer.close()
            raise
        return writer

    def _check_existing(self) -> None:
        """Check that the file has the size and the header of this plan.

        Raises:
            OutputError: It was begun with another plan.
        """
        if os.fstat(self._fd).st_size != self.nbytes or os.pread(self._fd, len(self._header), 0) != self._header:
            self.close()
            raise OutputError(f"{self.path} was begun with another plan", fix="start again without --resume")

    def _crc(self, name: str) -> int:
        """Return the CRC-32 of a tensor's bytes in the file, or −1 if the file ends before."""
        info, crc, done = self.tensors[name], 0, 0
        while done < info.nbytes:
            block = os.pread(self._fd, min(1 << 24, info.nbytes - done), info.offset + done)
            if not block:
                return -1
            crc, done = zlib.crc32(block, crc), done + len(block)
        return crc

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor and return the CRC-32 of its bytes.

        Args:
            name: The name of the tensor in the plan.
            tensor: The tensor of the planned dtype and shape, on any device, with any strides.

        Raises:
            ValueError: The name is not in the plan or written already, or dtype or shape is another.
            ResourceError: The disk or a quota is full.
            OutputError: The write failed in another way.
        """
        import torch

        info = self.tensors.get(name)
        if info is None or name in self.written:
            raise ValueError(f"tensor {name!r:.200} is {'written already' if info else 'not in the plan'}")
        if _code(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
            have = f"{_code(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"tensor {name!r:.200} is {have}, planned {info.dtype} {list(info.shape)}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        try:
            write_all(self._fd, data, info.offset)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.written.add(name)
        return zlib.crc32(data)

    def sync(self) -> None:
        """Force the written tensors to the disk; call it before a journal says that a tensor is done.

        Raises:
            ResourceError: The disk or a quota is full.
            OutputError: The file cannot be made durable.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def finish(self) -> FileEntry:
        """Check that every tensor was written, make the file durable and readable (0644), and return its hash and size.

        Raises:
            OutputError: Tensors of the plan were never written, or the file cannot be made durable or read.
            ResourceError: The disk or a quota is full.
        """
        if missing := [name for name in self.tensors if name not in self.written]:
            raise OutputError(
                f"{self.path} lacks {len(missing)} of {len(self.tensors)} tensors", available=sorted(self.written)[:5]
            )
        try:
            os.fchmod(self._fd, 0o644)
            os.fsync(self._fd)
            self.close()
        except OSError as error:
            raise disk_error(error, self.path) from error
        return hash_file(self.path)

    def close(self) -> None:
        """Close the file as it is, finished or not."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> StreamingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
