"""The choice of the engine that runs on a GPU, from the manifest alone, before any byte of an engine is read.

Deserializing an engine runs its code, and an engine fits one SM and one release of its library only. The library of a release
is TensorRT itself or, for version-compatible engines, its lean runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dvdquant.artifact.entries import EngineEntry
from dvdquant.backends import LEAN, TENSORRT, Backend, backend_name, lean_package, load_backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.model.families import Sizes
from dvdquant.system.devices import cuda_sm

__all__ = ["FoundEngines", "build_target", "device_sm", "find_engines", "select_engine"]


class FoundEngines(NamedTuple):
    """The engines of a session, and the library that runs them.

    Args:
        library: The backend with its installed library.
        entries: A mapping from activation bits to the manifest's entry of the engine.
    """

    library: Backend
    entries: dict[int, EngineEntry]


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
    return "{}.{}".format(*divmod(cuda_sm(device), 10))


def find_engines(
    artifact: Artifact, component: str, backend: str, bits: Sequence[int], device: torch.device
) -> FoundEngines:
    """Find the engine of each bit-width for a device, and the installed library that runs them.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        bits: Activation bits.
        device: The CUDA device that the engines run on.

    Raises:
        EngineError: The device is no CUDA device, no engine fits, see :func:`select_engine`, or version-compatible engines
            are of another release than what is installed.
    """
    sm = device_sm(device)
    library = _library(artifact, component, backend, bits, sm)
    return FoundEngines(library, {width: select_engine(artifact, component, library, width, sm) for width in bits})


def _library(artifact: Artifact, component: str, backend: str, bits: Sequence[int], sm: str) -> Backend:
    """Return the library that runs the engines of all bit-widths for an SM.

    That is the backend's own library. Where it is missing or of another release, it is TensorRT's lean runtime of the
    release that built them, if they are version-compatible. A lean runtime of another release will not do: the comment on
    ``IRuntime::loadRuntime`` in NVIDIA's header gives an engine without a runtime inside to the lean runtime of its own version.

    Raises:
        EngineError: The library is missing, or version-compatible engines are of another release than what is installed.
    """
    if backend_name(backend) != TENSORRT:
        return load_backend(backend)
    # 1. The releases that have an engine of every bit-width for this SM: of any kind, and version-compatible.
    entries = [[e for e in artifact.engines(component, TENSORRT, width) if sm in e["sm"]] for width in bits]
    releases = [{e["versions"].get(TENSORRT) for e in each} for each in entries]
    compatible = [{e["versions"].get(TENSORRT) for e in each if e.get("version_compatible")} for each in entries]
    lean_releases = sorted(filter(None, set.intersection(*compatible))) if compatible else []
    if not lean_releases:
        return load_backend(TENSORRT)
    # 2. TensorRT itself, as for all engines.
    found = []
    try:
        full = load_backend(TENSORRT)
    except EngineError as error:
        found.append(error.what)
    else:
        if all(full.version in each for each in releases):
            return full
        found.append(f"{full.name} {full.version}")
    # 3. The lean runtime.
    try:
        lean = load_backend(LEAN)
    except EngineError as error:
        found.append(error.what)
    else:
        if lean.version in lean_releases:
            return lean
        found.append(f"{lean.name} {lean.version}")
    package = lean_package(lean_releases[-1], torch.version.cuda)
    install = f"install its lean runtime by `pip install {package}`, or " if package else ""
    raise EngineError(
        f"the version-compatible engines of {component} were built by TensorRT {' or '.join(lean_releases)}, and run in that "
        "release or in its lean runtime",
        available=found,
        fix=f"{install}build them anew: {artifact.rebuild_command(sm=sm, target=TENSORRT)}",
    )


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
    entries = artifact.engines(component, library.builder, bits)
    if not entries:
        raise EngineError(
            f"the export has no {library.builder} engine of {component} a{bits}",
            available=[f"{e['path']} ({e['backend']})" for e in artifact.manifest.engines],
            fix=fix,
        )
    fitting = [entry for entry in entries if sm in entry["sm"]]
    if not fitting:
        raise EngineError(
            f"no {library.builder} engine of {component} a{bits} is for this GPU, which has SM {sm}",
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
    built = entry["versions"].get(library.builder)
    if built != library.version:
        return f"was built by {library.builder} {built or 'of an unknown release'}, and loads in that release only"
    if library.name == LEAN and not entry.get("version_compatible"):
        return "was not built as version-compatible, and the lean runtime runs no other engine"
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
