"""The choice of the engine that runs on a GPU, from the manifest alone, before any byte of an engine is read.

Deserializing an engine runs its code, and an engine fits one SM and one release of its library only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dvdquant.artifact.entries import EngineEntry
from dvdquant.backends import Backend, load_backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.model.families import Sizes

__all__ = ["build_target", "device_sm", "find_engines", "select_engine"]


def device_sm(device: torch.device) -> str:
    """Return the compute capability of a CUDA device, such as "8.9".

    Args:
        device: The device to ask.

    Raises:
        EngineError: The device is no CUDA device, or CUDA is not available.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EngineError(
            f"engines run on CUDA devices, not on {device}",
            available="the onnxruntime and pytorch backends run on the CPU",
            fix="use --backend onnxruntime, or a machine with a GPU",
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def find_engines(
    artifact: Artifact, component: str, backend: str, bits: Sequence[int], device: torch.device
) -> dict[int, EngineEntry]:
    """Find the engine of each bit-width for a device and the installed library.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        bits: Activation bits.
        device: The CUDA device that the engines run on.

    Returns:
        A mapping from bits to the manifest's entry of the engine.

    Raises:
        EngineError: The device is no CUDA device, or no engine fits, see :func:`select_engine`.
    """
    sm = device_sm(device)
    library = load_backend(backend)
    return {width: select_engine(artifact, component, library, width, sm) for width in bits}


def build_target(library: Backend) -> str:
    """Return the name of a library as an argument of ``dvdq-export --target``.

    Args:
        library: The backend of the engines.
    """
    return "tensorrt" if library.takes_plugins else "rtx"


def _how_to_build(artifact: Artifact, library: Backend, sm: str) -> str:
    """Return the command that builds engines for ``sm``, or name other backends if the library cannot."""
    if library.builds_for_sms:
        try:
            library.compute_capability(sm)
        except UnsupportedError as error:
            return f"{error.what} ({error.available}): use the tensorrt, pytorch or onnxruntime backend"
    return f"build it: {artifact.rebuild_command(sm=sm, target=build_target(library))}"


def select_engine(artifact: Artifact, component: str, library: Backend, bits: int, sm: str) -> EngineEntry:
    """Return the manifest's engine for one bit-width.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        library: The backend with its installed library.
        bits: Activation bits.
        sm: The compute capability of the GPU, such as "8.9".

    Raises:
        EngineError: No engine is for this backend or this SM, or it was built by another release, from another graph or
            for other sizes. The error gives the command that builds it.
    """
    fix = _how_to_build(artifact, library, sm)
    entries = artifact.engines(component, library.name, bits)
    if not entries:
        raise EngineError(
            f"the export has no {library.name} engine of {component} a{bits}",
            available=[f"{e['path']} ({e['backend']})" for e in artifact.manifest.engines],
            fix=fix,
        )
    fitting = [entry for entry in entries if sm in entry["sm"]]
    if not fitting:
        raise EngineError(
            f"no {library.name} engine of {component} a{bits} is for this GPU, which has SM {sm}",
            available=[f"{e['path']} for SM {', '.join(e['sm'])}" for e in entries],
            fix=fix,
        )
    problems = [_problem(artifact, component, library, entry) for entry in fitting]
    for entry, problem in zip(fitting, problems):
        if problem is None:
            return entry
    raise EngineError(
        f"{fitting[0]['path']} {problems[0]}", available=f"{library.name} {library.version} on SM {sm}", fix=fix
    )


def _problem(artifact: Artifact, component: str, library: Backend, entry: EngineEntry) -> str | None:
    """Return in words why an engine for the right SM must not be loaded, or None if it may."""
    built = entry["versions"].get(library.name)
    if built != library.version:
        return f"was built by {library.name} {built or 'of an unknown release'}, and loads in that release only"
    if entry["precision"] == "plugin" and not library.takes_plugins:
        return f"needs a plugin, and {library.name} has none"
    graph = artifact.graph(component, entry["act_bits"])
    if entry["onnx_sha256"] != artifact.manifest.files[graph]["sha256"]:
        return f"was built from another graph than {graph}"
    if not _same_sizes(entry, artifact.sizes):
        return "was built for other sizes than the export's graphs"
    return None


def _same_sizes(entry: EngineEntry, sizes: Sizes) -> bool:
    try:
        return Sizes.from_json(entry["shapes"]) == sizes
    except (KeyError, TypeError, ValueError):
        return False
