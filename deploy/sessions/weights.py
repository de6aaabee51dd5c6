"""The weight files of one transformer: private copies, hashed once, that everything that runs in the process shares."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.private_copy import PrivateCopy, fits_in_memory, private_copy
from dvdquant.errors import OutputError
from dvdquant.system.safetensors_io import DTYPES, TensorInfo, read_header

__all__ = ["WeightFiles"]


class WeightFiles:
    """Maps of private copies of a transformer's weight files.

    Every file is copied, and the copy is hashed and mapped (:mod:`.private_copy`): nothing that happens to the files later
    changes what runs, and a file that is cut short later ends nothing. The sessions of a process hold a copy once; a process
    that is forked has it too, another process makes its own. Copies are sealed memory; where they would fill more than half
    of the memory that is free, they are unnamed files of TMPDIR or /var/tmp, whose pages the system drops and reads again.

    Args:
        artifact: the export. component: which transformer of it.

    Attributes:
        tensors: name -> (file relative to ``onnx/``, place) of what the safetensors files hold.

    Raises:
        OutputError: a file is missing, cut, changed, or reached through a link.
        ResourceError: there is no room for the copies.
    """

    def __init__(self, artifact: Artifact, component: str) -> None:
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        self._copies: list[PrivateCopy] = []
        self._maps: dict[str, mmap.mmap] = {}
        self._arrays: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        names = artifact.weight_files(component)
        entries = {name: artifact.manifest.files[name] for name in names}
        in_memory = fits_in_memory(sum(entry["bytes"] for entry in entries.values()))
        for name, entry in entries.items():
            location = name.rpartition("/")[2]
            if not entry["bytes"]:
                artifact.read(name)  # no system maps nothing, but it must be there and be empty
                if name.endswith(".safetensors"):
                    read_header(artifact.root / name)  # which says what such a file lacks
                self._arrays[location] = np.empty(0, np.uint8)
                continue
            copy = private_copy(artifact.root, name, entry, in_memory)
            self._copies.append(copy)
            mapped = self._maps[location] = copy.map()
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
        """Give the pages read so far back, as far as they are copies on a disk; what is in memory stays there."""
        for mapped in self._maps.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the copies; each ends with the last session that holds it and the last tensor that shows into it."""
        self._maps.clear()
        self._arrays.clear()
        self._copies.clear()
        self.tensors = {}


def _header_of(path: Path, mapped: mmap.mmap) -> dict[str, TensorInfo]:
    """The tensors of a mapped safetensors file. The header is parsed by path, then compared with the mapped one."""
    header = read_header(path)
    length = int.from_bytes(mapped[:8], "little")
    if header.file_size != len(mapped) or hashlib.sha256(mapped[8 : 8 + length]).hexdigest() != header.digest:
        raise OutputError(f"{path} was replaced while it was opened", fix="open the export again")
    return header.tensors
