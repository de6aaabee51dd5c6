"""Engine sessions: one transformer of an export, ready to run at any of its bit-widths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.base import ENGINES, EngineSession, chosen_bits
from dvdquant.deploy.sessions.options_text import built_text
from dvdquant.deploy.sessions.other_process import PROCESS, ProcessSession
from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.hardware.weights import WeightPolicy, check_policy
from dvdquant.ops.attention.libraries import check_library, refuse_library_in_16_bit
from dvdquant.ops.cuda.errors import BUILD
from dvdquant.ops.cuda_linear import kernels_for
from dvdquant.recipe import ATTENTION
from dvdquant.system.devices import resolve_device
from dvdquant.system.plugin_file import Plugins, plugin_paths

if TYPE_CHECKING:
    import torch

    from dvdquant.deploy.sessions.engines import TensorRTSession

__all__ = ["BACKENDS", "EngineSession", "best_backend", "check_options", "full_name", "open_session"]

BACKENDS = ("auto", "tensorrt_rtx", "tensorrt", "onnxruntime", "pytorch")
_ALIASES = {"rtx": "tensorrt_rtx", "ort": "onnxruntime", "torch": "pytorch"}
log = logging.getLogger(__name__)


def open_session(
    artifact: Artifact,
    component: str = "transformer",
    *,
    backend: str = "auto",
    device: str = "auto",
    bits: Sequence[int] | None = None,
    plugins: Plugins = (),
    compile: bool = False,
    attention: str | None = None,
    attention_backend: str | None = None,
    weights: WeightPolicy = "auto",
    fuse: bool | None = None,
    cuda_graphs: bool = False,
) -> EngineSession:
    """Open a session for one transformer of an export.

    ``auto`` takes an engine if there is a CUDA device and an engine that fits it. Otherwise it takes PyTorch with the
    CUDA kernels if they are built, and otherwise ONNX Runtime if it runs on the device. If nothing else is left on a
    CUDA device, it takes PyTorch without the kernels. The log (INFO) says what was taken and why.

    Args:
        artifact: The export.
        component: ``transformer`` or ``transformer_2``.
        backend: One of :data:`BACKENDS`, or ``rtx``, ``ort`` or ``torch`` for short.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. With ``process:`` before it, the engines are in a process of their
            own, see :class:`.other_process.ProcessSession`.
        bits: The activation bits to load. The default is all.
        plugins: TensorRT plugin libraries to load before the engines that need them, one path or several. Their code runs.
        compile: Run in PyTorch with the transformer's blocks compiled (:class:`.pytorch.PyTorchSession`).
        attention: ``16``, ``int8`` or ``fp8`` for self-attention of long sequences in PyTorch sessions. The default is the
            recipe's. ONNX Runtime computes in 16 bit, and engines have what they were built with; a session of these that
            was asked for something else says so in a warning.
        attention_backend: The library that computes it, or ``reference``. It makes the session one of PyTorch.
        weights: ``packed`` holds the quantized weights once, with 4 bits; ``expanded`` holds what is multiplied, which
            takes more memory and less time; ``auto`` decides by the count of :mod:`dvdquant.model.held_weights`, and takes
            what ONNX Runtime takes least memory for. TensorRT-RTX engines hold weights as they were built.
        fuse: True runs in PyTorch with what comes before quantized layers in their kernels, False leaves it apart. The
            default is to do so where the session compiles (:class:`.pytorch.PyTorchSession`).
        cuda_graphs: Repeat steps as CUDA graphs, where launches count: in PyTorch sessions of static sizes of up to 4000
            tokens, and in engines. ONNX Runtime has none.

    Raises:
        UnsupportedError: The backend, the device, the attention or the policy is unknown; a policy is given with a backend
            that has none, or ``compile``, ``fuse`` or ``attention_backend`` with one that is not PyTorch, or ``plugins``
            with one that is not TensorRT; a plugin library is not there, no library of attention has the name, or one was asked
            for and attention is in 16 bit.
        OutputError: A file differs from the manifest.
        EngineError: No engine fits, or the backend refuses the export.
    """
    # 1. What the options tell, alone and with the recipe.
    libraries = plugin_paths(plugins)
    name = check_options(backend, libraries, compile, attention, attention_backend, weights, fuse)
    refuse_library_in_16_bit(attention or artifact.recipe.attention, attention_backend)
    # 2. A session in another process resolves the rest there.
    if device.startswith(PROCESS):
        return ProcessSession(
            artifact,
            component,
            bits,
            resolve_device(device.removeprefix(PROCESS)),
            backend=backend,
            plugins=libraries,
            compile=compile,
            attention=attention,
            attention_backend=attention_backend,
            weights=weights,
            fuse=fuse,
            cuda_graphs=cuda_graphs,
        )
    # 3. The device and the bits.
    place = resolve_device(device)
    chosen_bits(artifact, component, bits)
    # 4. Open it.
    if name == "pytorch" or asks_for_pytorch(compile, fuse, attention_backend):
        from dvdquant.deploy.sessions.pytorch import PyTorchSession

        return PyTorchSession(
            artifact, component, bits, place, compile, attention, attention_backend, weights, fuse, cuda_graphs
        )
    session = (
        _open_best(artifact, component, bits, place, libraries, attention, weights, cuda_graphs)
        if name == "auto"
        else _open(name, artifact, component, bits, place, libraries, weights, cuda_graphs=cuda_graphs)
    )
    # 5. Say what the chosen backend leaves out.
    if cuda_graphs and session.backend == "onnxruntime":
        log.warning("%s: ONNX Runtime repeats no steps as CUDA graphs", component)
    _say_attention(session, attention)
    return session


def check_options(
    backend: str,
    plugins: Sequence[Path] = (),
    compile: bool = False,
    attention: str | None = None,
    attention_backend: str | None = None,
    weights: WeightPolicy = "auto",
    fuse: bool | None = None,
) -> str:
    """Refuse options of a session that do not go together or name nothing, before an export is opened.

    Args:
        backend: One of :data:`BACKENDS`, or ``rtx``, ``ort`` or ``torch`` for short.
        plugins: The paths of the TensorRT plugin libraries.
        compile: Whether the transformer's blocks are compiled.
        attention: ``16``, ``int8`` or ``fp8``, or None for the recipe's.
        attention_backend: The library of 8-bit attention that is asked for, or None.
        weights: ``auto``, ``packed`` or ``expanded``.
        fuse: Whether layers take what comes before them into their kernels; None leaves it to ``compile``.

    Returns:
        The full name of the backend.

    Raises:
        UnsupportedError: See :func:`open_session`.
    """
    name = full_name(backend)
    if name not in BACKENDS:
        raise UnsupportedError(f"unknown backend {backend!r:.100}", available=BACKENDS, fix="pick one of these")
    check_policy(weights)
    if plugins and name not in ("auto", "tensorrt"):
        raise UnsupportedError(
            f"plugins are for TensorRT engines, and backend is {backend}",
            available=["auto", "tensorrt"],
            fix="leave one out",
        )
    if weights != "auto" and name == "tensorrt_rtx":
        raise UnsupportedError(
            f"TensorRT-RTX engines hold their weights as they were built, not {weights}",
            available="the backends pytorch, tensorrt and onnxruntime",
            fix="leave the policy out, or choose one of these backends",
        )
    if attention is not None and attention not in ATTENTION:
        raise UnsupportedError(f"unknown attention {attention!r:.100}", available=ATTENTION, fix="pick one of these")
    if name not in ("auto", "pytorch"):
        _refuse_options_of_pytorch(name, compile, fuse, attention_backend)
    if attention_backend is not None:
        check_library(attention_backend)
    return name


def _say_attention(session: EngineSession, asked: str | None) -> None:
    """Say that a session's attention is not what was asked for; None says it of the recipe's, which nobody asked for now."""
    wanted = asked or session.artifact.recipe.attention
    if session.backend == "onnxruntime" and wanted != "16":
        log.log(
            logging.WARNING if asked else logging.INFO,
            "%s: attention is in 16 bit: only PyTorch sessions have %s, not %s",
            session.component,
            wanted,
            session.backend,
        )
    if asked is None or session.backend not in ENGINES:  # engines say in the manifest what they have
        return
    from dvdquant.deploy.sessions.engines import TensorRTSession

    assert isinstance(session, TensorRTSession)
    if any(_attention_built(session, width) != asked for width in session.bits):
        log.warning(
            "%s: engines have the attention that they were built with, %s is for PyTorch sessions: %s",
            session.component,
            asked,
            built_text([session.entries[width] for width in session.bits]),
        )


def _attention_built(session: TensorRTSession, width: int) -> str | None:
    """Return the attention of an engine, ``16`` or ``fp8``; None where its builder listed no kernels of attention."""
    if session.artifact.recipe.attention == "16":
        return "16"
    kernels = session.entries[width].get("attention")
    return ("fp8" if "FP8" in kernels else "16") if kernels else None


def _refuse_options_of_pytorch(name: str, compile: bool, fuse: bool | None, attention_backend: str | None) -> None:
    """Refuse options that PyTorch sessions alone have, of another backend."""
    for option, given, refusal, instead in (
        ("the library", attention_backend is not None, "takes no library for attention", "compute it themselves"),
        ("compile", compile, "does not take compile", "are compiled already"),
        ("fuse", fuse, "does not take fuse", "are fused when they are built"),
    ):  # fmt: skip
        if given:
            raise UnsupportedError(
                f"{name} {refusal}: its engines and graphs {instead}",
                available="pytorch",
                fix=f"leave {option} out, or choose the backend pytorch",
            )


def full_name(backend: str) -> str:
    """Return the full name of a backend.

    Args:
        backend: One of :data:`BACKENDS`, or ``rtx``, ``ort`` or ``torch`` for short.
    """
    return _ALIASES.get(backend, backend)


def asks_for_pytorch(compile: bool, fuse: bool | None, attention_backend: str | None) -> bool:
    """Return whether options of a session make it one of PyTorch, whatever backend fits best.

    Args:
        compile: Whether the transformer's blocks are compiled.
        fuse: Whether layers take what comes before them into their kernels, or None.
        attention_backend: The library of 8-bit attention that is asked for, or None.
    """
    return compile or bool(fuse) or attention_backend is not None


def _open(
    name: str,
    artifact: Artifact,
    component: str,
    bits: Sequence[int] | None,
    device: torch.device,
    plugins: Sequence[Path],
    weights: WeightPolicy,
    attention: str | None = None,
    cuda_graphs: bool = False,
) -> EngineSession:
    # The backends are imported here, because each needs a library of its own.
    if name == "pytorch":
        from dvdquant.deploy.sessions.pytorch import PyTorchSession

        return PyTorchSession(
            artifact, component, bits, device, attention=attention, weights=weights, cuda_graphs=cuda_graphs
        )
    if name == "onnxruntime":
        from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(
            artifact, component, bits, device, weights="expanded" if weights == "expanded" else "packed"
        )
    from dvdquant.deploy.sessions.engines import TensorRTSession

    return TensorRTSession(
        artifact,
        component,
        bits,
        device,
        backend=name,
        plugins=plugins if name == "tensorrt" else (),
        weights=weights if name == "tensorrt" else "auto",
        cuda_graphs=cuda_graphs,
    )


def _open_best(
    artifact: Artifact,
    component: str,
    bits: Sequence[int] | None,
    device: torch.device,
    plugins: Sequence[Path],
    attention: str | None,
    weights: WeightPolicy,
    cuda_graphs: bool,
) -> EngineSession:
    name, reasons = best_backend(artifact, component, bits, device)
    log.info("%s on %s: %s (%s)", component, device, name, "; ".join(reasons))
    engines = name in ENGINES
    if weights != "auto" and name == "tensorrt_rtx":
        log.warning("%s: weights are as the engine was built with, not %s", component, weights)
    if engines:
        return _open(name, artifact, component, bits, device, plugins, weights, cuda_graphs=cuda_graphs)
    return _open(name, artifact, component, bits, device, (), weights, attention, cuda_graphs)


def best_backend(
    artifact: Artifact, component: str, bits: Sequence[int] | None, device: torch.device
) -> tuple[str, list[str]]:
    """Return the backend that ``auto`` takes, and the reasons in words. Nothing is loaded.

    Args:
        artifact: The export.
        component: ``transformer`` or ``transformer_2``.
        bits: The activation bits to load; None means all.
        device: The device that the session will run on.
    """
    reasons = []
    if device.type == "cuda":
        from dvdquant.deploy.sessions.engines import find_engines

        for name in ENGINES:
            try:
                find_engines(artifact, component, name, chosen_bits(artifact, component, bits), device)
            except DvdquantError as error:
                reasons.append(f"{name}: {error.what}")
                continue
            return name, ["the manifest has an engine for this GPU"]
    else:
        reasons.append("no CUDA device")
    name, reason = without_engine(device)
    return name, [*reasons, *reason]


def without_engine(device: torch.device) -> tuple[str, list[str]]:
    """Return the backend for a device that no engine fits, and the reasons for it.

    Args:
        device: The device that the session will run on.

    Returns:
        The name of the backend, and zero or more reasons in words.
    """
    if device.type != "cuda":
        return "onnxruntime", []
    kernels = kernels_for(device)
    if kernels is not None and kernels.library.serves(kernels.sm):
        return "pytorch", ["the CUDA kernels are built"]
    reason = (
        f"the CUDA kernels are not built; {BUILD}" if kernels is None else "the CUDA kernels are built for other GPUs"
    )
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except ImportError:
        providers = []
    if "CUDAExecutionProvider" in providers:
        return "onnxruntime", [reason]
    return "pytorch", [f"ONNX Runtime has no CUDA provider, and {reason}"]
