"""What a run takes: the parts of the model, the bytes of their weights, and when each is in memory. Nothing is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.untrusted import UntrustedFolder
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import PipelineChecker, RequestChecker
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.system.safetensors_io import TensorInfo, read_header, read_header_from

__all__ = ["Part", "parts_of_run", "peak_bytes"]

_ENGINES = ("rtx", "tensorrt", "tensorrt_rtx")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Args:
        name: The part, such as ``vae``.
        stored: Bytes of its weights on the disk.
        loaded: Bytes of its weights in memory.
        resident: When they are on the device, in words.
        stays: Whether they stay there.
    """

    name: str
    stored: int
    loaded: int
    resident: str
    stays: bool

    def to_json(self) -> dict[str, Any]:
        """Return the part for JSON."""
        return asdict(self)


def parts_of_run(
    checker: RequestChecker, requests: Sequence[GenerateRequest], backend: str, *, offload: bool
) -> list[Part]:
    """Return the parts that a run of checked requests loads, in the order in which they are used.

    Args:
        checker: What the export and its model can make.
        requests: The requests of one prompt.
        backend: ``auto``, ``onnxruntime``, ``pytorch``, ``rtx`` or ``tensorrt``.
        offload: Whether the pipeline's other parts are on the device only while they are used.
    """
    found = []
    images = any(r.image is not None or r.last_image is not None for r in requests)
    # 1. The pipeline's own parts.
    if isinstance(checker, PipelineChecker):
        without = checker.folder.text_parts if checker.text is not None else ()
        names = [name for name in checker.folder.parts if name not in without]
        for name in sorted(names, key=lambda part: (part == "vae", not part.startswith("text"), part)):
            tensors = list(_part_tensors(UntrustedFolder.at(checker.folder.root), name))
            if not tensors or (name == "image_encoder" and not images):
                continue
            width = 4 if name == "vae" and checker.family.name == "wan" else 2  # this VAE stays in fp32
            loaded = sum(math.prod(t.shape) * width if t.dtype in _FLOATS else t.nbytes for t in tensors)
            when = {"vae": "the frames are decoded", "image_encoder": "the image is encoded"}.get(
                name, "text is encoded"
            )
            when += " and the image is encoded" if name == "vae" and images else ""
            resident = f"while {when}" if offload else "all the time"
            found.append(Part(name, sum(t.nbytes for t in tensors), loaded, resident, not offload))
    # 2. The transformers: packed weights or engines, and the original beside them.
    for component in checker.artifact.components:
        if any(request.mode != "16" for request in requests):
            what, nbytes = _executed(checker.artifact, component, backend)
            found.append(Part(f"{component} ({what})", nbytes, nbytes, "all the time", stays=True))
        if any(request.mode == "16" for request in requests):
            original = 2 * _parameters(checker.artifact, component)
            found.append(Part(f"{component} (16 bit)", original, original, "all the time", stays=True))
    return found


def peak_bytes(parts: Sequence[Part]) -> int:
    """Return the most bytes of weights on the device at once: all that stay, and the largest of those that come and go."""
    return sum(p.loaded for p in parts if p.stays) + max((p.loaded for p in parts if not p.stays), default=0)


def _part_tensors(folder: UntrustedFolder, name: str) -> Iterator[TensorInfo]:
    """Yield the tensors of a part's weights; the folder was checked when it was opened."""
    if not folder.has_folder(name):
        return
    place = folder.sub(name)
    for file in place.names():
        if file.endswith(".safetensors"):
            fd = place.open(file)
            try:
                yield from read_header_from(fd, place.root / file).tensors.values()
            finally:
                os.close(fd)


def _executed(artifact: Artifact, component: str, backend: str) -> tuple[str, int]:
    """Return what runs of one transformer, in words, and its bytes."""
    files = artifact.manifest.files
    if backend in _ENGINES:
        paths = [e["path"] for e in artifact.manifest.engines if Path(e["path"]).stem.startswith(f"{component}_a")]
        by_place: dict[Path, int] = {}  # one folder an SM
        for path in paths:
            by_place[Path(path).parent] = by_place.get(Path(path).parent, 0) + files[path]["bytes"]
        return "engines", max(by_place.values(), default=0)
    return "packed weights", sum(files[name]["bytes"] for name in artifact.weight_files(component))


def _parameters(artifact: Artifact, component: str) -> int:
    """Return the number of parameters of the original transformer."""
    layers = {entry["name"]: entry["features_in"] * entry["features_out"] for entry in artifact.manifest.layers}
    seen, others = set(), 0
    for name in artifact.weight_files(component):
        if not name.endswith(".safetensors"):
            continue
        for tensor, info in read_header(artifact.root / name).tensors.items():
            layer, _, kind = tensor.rpartition(".")
            if layer in layers:
                seen.add(layer)
            if layer not in layers or kind == "bias":
                others += math.prod(info.shape)
    return sum(layers[layer] for layer in seen) + others
