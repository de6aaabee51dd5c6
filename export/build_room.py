"""Whether a machine has the memory to build the engines of an export, and its GPU the memory to use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dvdquant.artifact.entries import BuildEntry
from dvdquant.artifact.layout import is_weight_path
from dvdquant.artifact.manifest import Manifest
from dvdquant.errors import ResourceError
from dvdquant.system.device_memory import KEPT_BACK, usable_bytes
from dvdquant.system.gpu import Gpu
from dvdquant.system.memory import memory_limit
from dvdquant.text import amount, count_in_words

__all__ = ["check_builds"]


@dataclass(frozen=True)
class _Width:
    """The engines of one activation width, one a transformer, and the memory that they take; all of it is estimated.

    Args:
        bits: The activation bits.
        engines: Their paths.
        backend: The library that builds them.
        build: The memory that the largest build takes, in bytes.
        held: The device memory of their weights, in bytes; 0 where this GPU runs none of them.
        work: The device memory that a call works in, in bytes; 0 where this GPU runs none of them, or where it is not known.
    """

    bits: int
    engines: tuple[str, ...]
    backend: str
    build: int
    held: int
    work: int

    @property
    def use(self) -> int:
        """Return the device memory that a run of them takes, in bytes."""
        return self.held + self.work

    def __str__(self) -> str:
        used = f", {amount(self.use)} to use" if self.use else ""
        return f"a{self.bits} ({amount(self.build)} to build{used})"


def check_builds(builds: Sequence[BuildEntry], manifest: Manifest, gpu: Gpu | None) -> None:
    """Refuse engines that this machine's memory is too small to build, or to use on its GPU.

    A build is held against the memory that is free now. Where the GPU shares it, CUDA and its libraries take of it, too. What
    a run takes is held against the GPU's memory without what is kept back of it, because what is free now says little of later.
    A pipeline holds all of its transformers, and can do with one width.

    Args:
        builds: The engines to build.
        manifest: The manifest of their export.
        gpu: The GPU of this machine, or None.

    Raises:
        ResourceError: The memory is too small for one of them; the error says what fits.
    """
    limit = memory_limit()
    kept = KEPT_BACK[gpu is not None and gpu.shared_memory]
    room = None if gpu is None else usable_bytes(gpu.memory_bytes, gpu.shared_memory)
    widths = [_width(bits, builds, gpu) for bits in sorted({entry["act_bits"] for entry in builds})]
    small = [each for each in widths if each.build > limit or (room is not None and each.use > room)]
    if not small:
        return
    first, fitting = small[0], [each for each in widths if each not in small]
    fits = f"fits: {', '.join(map(str, fitting))}" if fitting else "nothing of this export fits"
    alone = f"build what fits: dvdq-build … {' '.join(f'--bits {each.bits}' for each in fitting)}" if fitting else None
    names = ", ".join(first.engines)
    if gpu is not None and room is not None and first.use > room:
        work = f" and {amount(first.work)} to work in" if first.work else ""
        raise ResourceError(
            f"{names}: a run is estimated to take {amount(first.use)} of device memory, {amount(first.held)} for weights{work}",
            available=f"{amount(room)} on {gpu.name}, where {amount(kept)} of {amount(gpu.memory_bytes)} are kept back for CUDA"
            f"{' and the system' if gpu.shared_memory else ''}; {fits}",
            fix=alone or _smaller_export(min(widths, key=lambda each: each.use), manifest, gpu, room),
        )
    shared = gpu is not None and gpu.shared_memory and first.backend == "tensorrt"
    raise ResourceError(
        f"{names}: the builder is estimated to take {amount(first.build)} of memory"
        + (f", {amount(KEPT_BACK[False])} of it for CUDA, which shares it here" if shared else ""),
        available=f"{amount(limit)}; {fits}",
        fix=alone or _other_build(first, manifest, room),
    )


def _width(bits: int, builds: Sequence[BuildEntry], gpu: Gpu | None) -> _Width:
    """Return what the engines of one width take."""
    ours = [entry for entry in builds if entry["act_bits"] == bits]
    # TensorRT-RTX builds for GPUs that are elsewhere, too, and on the CPU.
    used = [entry for entry in ours if gpu is not None and gpu.sm in entry["sm"]]
    shared = gpu is not None and gpu.shared_memory
    return _Width(
        bits,
        tuple(entry["engine"] for entry in ours),
        ours[0]["backend"],
        max(e["builder_bytes"] + (KEPT_BACK[False] if shared and e["backend"] == "tensorrt" else 0) for e in ours),
        sum(entry["held_bytes"] for entry in used),
        max((entry.get("working_bytes", 0) for entry in used), default=0),
    )


def _packed_bytes(manifest: Manifest) -> int:
    """Return the bytes of the packed weights of all transformers, which is what a PyTorch session holds at least."""
    components = {entry["component"] for entry in manifest.builds}
    return sum(
        file["bytes"] for name, file in manifest.files.items() if any(is_weight_path(name, each) for each in components)
    )


def _smaller_export(least: _Width, manifest: Manifest, gpu: Gpu, room: int) -> str:
    """Return how to come to something that a GPU has the memory to use.

    Args:
        least: The width that takes least of it.
        manifest: The manifest.
        gpu: The GPU.
        room: The memory that a run may take, in bytes.
    """
    packed = _packed_bytes(manifest)
    # Engines with the plugin hold the same packed weights, and little besides: nothing is gained without them.
    if packed <= 0.9 * least.held and packed + least.work <= room:
        return f"draw without engines: dvdq-run … --backend pytorch holds the weights packed, {amount(packed)}"
    target = f"--target {'tensorrt' if least.backend == 'tensorrt' else 'rtx'} --sm {gpu.sm} --dry-run"
    share = int(100 * (room - least.held) / least.work) if least.work else 0
    if share > 0:
        size = " × ".join(str(manifest.shapes[axis][1]) for axis in ("frames", "height", "width"))
        return (
            f"export for smaller clips, of at most {share} % of the {size} latents (--latent, or --num-frames, --height and "
            f"--width); dvdq-export … {target} counts them first"
        )
    weights = sum(entry["features_in"] * entry["features_out"] for entry in manifest.layers)
    most = max(0, room - least.work) * weights / least.held if least.held else 0
    limit = (
        f" of at most {count_in_words(most)} weights (this one has {count_in_words(weights)})" if most >= 1e6 else ""
    )
    clips = " or for much smaller clips" if least.held <= room else ""
    return f"export a smaller model{limit}{clips}; dvdq-export … {target} counts it first"


def _other_build(width: _Width, manifest: Manifest, room: int | None) -> str:
    """Return what to do where the memory is too small for the builder alone.

    Args:
        width: The engines.
        manifest: The manifest.
        room: The device memory that a run may take, in bytes; None without a GPU.
    """
    if width.backend == "tensorrt_rtx":
        return "end other programs, or build on a machine with more memory: TensorRT-RTX needs no GPU to build"
    packed = _packed_bytes(manifest)
    if room is not None and packed + width.work <= room:
        return f"end other programs, or draw without engines: dvdq-run … --backend pytorch holds {amount(packed)} of weights"
    return "end other programs, or export a smaller model"
