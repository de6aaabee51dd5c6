"""Write a safetensors file tensor by tensor at places that are known beforehand, so that a killed run goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dvdquant.errors import OutputError
from dvdquant.system.files import FileEntry, disk_error, hash_file, write_all
from dvdquant.system.safetensors_reader import CODES, DTYPES, MAX_HEADER, TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["ALIGNMENT", "PAD", "StreamingWriter"]

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes of the file, so that ONNX external data can be mapped."""
PAD = "__pad."


def _code(dtype: torch.dtype | str) -> str:
    """Return the safetensors code of a dtype of torch, or the code itself.

    Raises:
        ValueError: The dtype has no code here.
    """
    code = dtype if isinstance(dtype, str) else CODES.get(str(dtype).removeprefix("torch."), str(dtype))
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
