"""The weight files of one transformer: private copies, hashed once and shared by all sessions of the process."""

from __future__ import annotations

import hashlib
import logging
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.private_copy import PrivateCopy, fits_in_memory, private_copy
from dvdquant.errors import OutputError
from dvdquant.system.device_memory import shares_memory
from dvdquant.system.safetensors_reader import DTYPES, TensorInfo, read_header
from dvdquant.text import amount

__all__ = ["WeightFiles"]

log = logging.getLogger(__name__)


class WeightFiles:
    """Maps of private copies of a transformer's weight files.

    Every file is copied, and the copy is hashed and mapped (:mod:`.private_copy`). Later changes to the files do not
    change what runs, and a file that is cut short later ends no process. All sessions of a process share one copy. A
    forked process has it too; another process makes its own. Copies are sealed memory. If they would fill more than
    half of the free memory, they are unnamed files of TMPDIR or /var/tmp, whose pages the system drops and reads again.
    So they are, too, for a GPU that shares the host's memory (Jetson, GB10): sealed memory would hold the weights twice.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        device: The device that the session copies the weights to, or the CPU, where the copies are the weights.

    Attributes:
        tensors: A mapping from the name of each tensor in the safetensors files to its file (relative to ``onnx/``) and
            its place in the file.
        copies: The copies of the files that are not empty.

    Raises:
        OutputError: A file is missing, cut, changed, or reached through a link.
        ResourceError: There is no room for the copies.
    """

    def __init__(self, artifact: Artifact, component: str, device: torch.device | None = None) -> None:
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        self.copies: list[PrivateCopy] = []
        self._maps: dict[str, mmap.mmap] = {}
        self._arrays: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        names = artifact.weight_files(component)
        entries = {name: artifact.manifest.files[name] for name in names}
        self._shared = device is not None and device.type != "cpu" and shares_memory(device)
        nbytes = sum(entry["bytes"] for entry in entries.values())
        in_memory = fits_in_memory(nbytes, self._shared)
        if self._shared and in_memory:
            log.warning(
                "%s: the disk of temporary files has no room, so a copy of the weights takes %s of the memory that %s shares, "
                "until they are loaded; set TMPDIR to a folder on a disk",
                component,
                amount(nbytes),
                device,
            )
        for name, entry in entries.items():
            location = name.rpartition("/")[2]
            if not entry["bytes"]:
                artifact.read(name)  # an empty file cannot be mapped, but it must exist and be empty
                if name.endswith(".safetensors"):
                    read_header(artifact.root / name)  # raises an error that says what an empty file lacks
                self._arrays[location] = np.empty(0, np.uint8)
                continue
            copy = private_copy(artifact.root, name, entry, in_memory)
            self.copies.append(copy)
            mapped = self._maps[location] = copy.map()
            self._arrays[location] = np.frombuffer(mapped, np.uint8)
            if name.endswith(".safetensors"):
                for key, info in _header_of(artifact.root / name, mapped).items():
                    self.tensors[key] = (location, info)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all files."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def beside(self) -> int:
        """Return the bytes of copies in memory that the session's device shares, where it holds the weights, too."""
        return sum(copy.size for copy in self.copies if copy.in_memory) if self._shared else 0

    def region(self, location: str, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a range of bytes of one file as uint8, without a copy.

        Args:
            location: The file, relative to ``onnx/``.
            offset: The first byte.
            length: The number of bytes.

        Raises:
            OutputError: The range is outside of the files. A graph that points there is damaged.
        """
        array = self._arrays.get(location)
        if array is None or offset < 0 or length < 0 or offset + length > array.nbytes:
            raise OutputError(
                f"a graph reads bytes {offset} to {offset + length} of {location!r:.200}",
                available=[f"{name}: {a.nbytes} bytes" for name, a in self._arrays.items()],
                fix="export again",
            )
        return array[offset : offset + length]

    def tensor(self, name: str) -> Tensor:
        """Return one stored tensor on the CPU, without a copy.

        Do not write to it: only this process sees what is written.

        Args:
            name: The name of the tensor in the safetensors files.

        Raises:
            OutputError: The files have no such tensor.
        """
        if name not in self.tensors:
            raise OutputError(f"the weight files have no tensor {name!r:.200}", available=list(self.tensors)[:8])
        location, info = self.tensors[name]
        raw = torch.from_numpy(self.region(location, info.offset, info.nbytes))
        return raw.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)

    def drop_pages(self) -> None:
        """Give back the pages that were read so far.

        This frees pages of copies on a disk. Copies in memory stay in memory.
        """
        for mapped in self._maps.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the copies.

        Each copy ends with the last session that holds it and the last tensor that points into it.
        """
        self._maps.clear()
        self._arrays.clear()
        self.copies.clear()
        self.tensors = {}


def _header_of(path: Path, mapped: mmap.mmap) -> dict[str, TensorInfo]:
    """Return the tensors of a mapped safetensors file, by name.

    The header is parsed by path and then compared with the mapped header.

    Raises:
        OutputError: The file was replaced while it was opened.
    """
    header = read_header(path)
    length = int.from_bytes(mapped[:8], "little")
    if header.file_size != len(mapped) or hashlib.sha256(mapped[8 : 8 + length]).hexdigest() != header.digest:
        raise OutputError(f"{path} was replaced while it was opened", fix="open the export again")
    return header.tensors
