"""The weight files of one transformer: hashed and mapped through one descriptor, and shared by everything that runs."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import OutputError
from dvdquant.files import FileEntry, open_regular
from dvdquant.safetensors_io import DTYPES, TensorInfo, read_header

__all__ = ["WeightFiles"]

# Files found intact in this process: (device, inode, size, mtime, ctime) -> SHA-256. Any write changes the last two.
_VERIFIED: dict[tuple[int, int, int, int, int], str] = {}


class WeightFiles:
    """Maps of a transformer's weight files.

    Every file is hashed through the descriptor that is then mapped, so a file put in its place in between is not read. The
    pages are the page cache's: several sessions, and several processes, hold them once.

    Args:
        artifact: the export. component: which transformer of it.

    Attributes:
        tensors: name -> (file relative to ``onnx/``, place) of what the safetensors files hold.

    Raises:
        OutputError: a file is missing, cut, changed, or reached through a link.
    """

    def __init__(self, artifact: Artifact, component: str) -> None:
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._arrays: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        for name in artifact.weight_files(component):
            location = name.rpartition("/")[2]
            mapped = _map_verified(artifact.root, name, artifact.manifest.files[name])
            if mapped is None:
                self._arrays[location] = np.empty(0, np.uint8)
                continue
            self._maps[location] = mapped
            self._arrays[location] = np.frombuffer(mapped, np.uint8)
            if name.endswith(".safetensors"):
                for key, info in _header_of(artifact.root / name, mapped).items():
                    self.tensors[key] = (location, info)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(array.nbytes for array in self._arrays.values())

    def region(self, location: str, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """``length`` bytes of one file, not copied; OutputError when a graph points outside of the files."""
        array = self._arrays.get(location)
        if array is None or offset < 0 or length < 0 or offset + length > array.nbytes:
            raise OutputError(
                f"a graph reads bytes {offset} to {offset + length} of {location!r:.200}",
                available=[f"{name}: {a.nbytes} bytes" for name, a in self._arrays.items()],
                fix="export again",
            )
        return array[offset : offset + length]

    def tensor(self, name: str) -> Tensor:
        """One stored tensor on the CPU, not copied. Do not write to it: what is written is seen by this process alone."""
        if name not in self.tensors:
            raise OutputError(f"the weight files have no tensor {name!r:.200}", available=list(self.tensors)[:8])
        location, info = self.tensors[name]
        raw = torch.from_numpy(self.region(location, info.offset, info.nbytes))
        return raw.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)

    def drop_pages(self) -> None:
        """Give the pages read so far back; what is read again comes from the page cache or the disk."""
        for mapped in self._maps.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the maps; they end with the last tensor that shows into them."""
        self._maps.clear()
        self._arrays.clear()
        self.tensors = {}


def _map_verified(root: Path, name: str, entry: FileEntry) -> mmap.mmap | None:
    """The map of a file whose hash is right; None for an empty one, which no system maps."""
    path = root / name
    try:
        if os.path.realpath(path) != os.path.join(os.path.realpath(root), name):
            raise ValueError("it is reached through a symbolic link")
        fd, size = open_regular(path)
        try:
            if size != entry["bytes"]:
                raise ValueError(f"it has {size} bytes instead of {entry['bytes']}")
            if _digest(fd, size) != entry["sha256"]:
                raise ValueError("it was changed (its SHA-256 differs)")
            # A private map: nothing is ever written, but ONNX Runtime and PyTorch ask for writable buffers.
            return mmap.mmap(fd, size, access=mmap.ACCESS_COPY) if size else None
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise OutputError(f"{path} does not match its manifest: {reason}", fix="export again") from error


def _digest(fd: int, size: int) -> str:
    """SHA-256 of an open file, read once per process as long as it stays as it is."""
    info = os.fstat(fd)
    key = (info.st_dev, info.st_ino, size, info.st_mtime_ns, info.st_ctime_ns)
    if key not in _VERIFIED:
        digest, offset, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 22))
        while count := os.preadv(fd, [block], offset):
            digest.update(block[:count])
            offset += count
        _VERIFIED[key] = digest.hexdigest()
    return _VERIFIED[key]


def _header_of(path: Path, mapped: mmap.mmap) -> dict[str, TensorInfo]:
    """The tensors of a mapped safetensors file. The header is parsed by path, then compared with the mapped one."""
    header = read_header(path)
    length = int.from_bytes(mapped[:8], "little")
    if header.file_size != len(mapped) or hashlib.sha256(mapped[8 : 8 + length]).hexdigest() != header.digest:
        raise OutputError(f"{path} was replaced while it was opened", fix="open the export again")
    return header.tensors
