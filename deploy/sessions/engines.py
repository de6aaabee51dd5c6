"""The TensorRT-RTX and TensorRT backend: verified engines with shared scratch and weights, on torch's streams.

Version-compatible engines may run in TensorRT's lean runtime, which is one more module of the same interface.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvdquant.artifact.entries import EngineEntry
from dvdquant.backends import LEAN, Backend
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.engine_binding import (
    BoundEngine,
    EngineLog,
    Lane,
    Scratch,
    make_logger,
)
from dvdquant.deploy.sessions.engine_choice import build_target, device_sm, find_engines, select_engine
from dvdquant.deploy.sessions.lora_inputs import LoraInputs
from dvdquant.deploy.sessions.replay import failure_text
from dvdquant.deploy.sessions.weight_form import choose_form, claim
from dvdquant.deploy.sessions.weights import WeightFiles
from dvdquant.errors import EngineError, OutputError, UnsupportedError
from dvdquant.hardware.capabilities import sm_number
from dvdquant.hardware.weights import WeightPolicy, check_policy
from dvdquant.plugin_library import load_plugin, require_no_plugins
from dvdquant.system.capture import capture_step
from dvdquant.system.devices import current_device

__all__ = ["TensorRTSession", "deserialize", "device_sm", "find_engines", "load_plugins", "select_engine"]

module_log = logging.getLogger(__name__)
_PLUGINS: set[tuple[str, Path]] = set()
# What the plugin reads when a context is made: packed or expanded.
FORM_VARIABLE = "DVDQUANT_WEIGHTS"
# Before the names of the layers to expand, with commas between them.
MIXED = "mixed:"
_form_lock = threading.Lock()


@dataclass
class _Capture:
    """A CUDA graph of one bit-width, with the memory that it reads and writes.

    Args:
        replay: Repeats the pass.
        inputs: The tensors that the graph reads, by name.
        output: The tensor that the graph writes.
        generation: The generation of the scratch memory at the capture.
    """

    replay: Callable[[], Any]
    inputs: dict[str, Tensor]
    output: Tensor
    generation: int

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the input shapes of the capture. An engine's graph holds only for the shapes that its context had."""
        return {name: tensor.shape for name, tensor in self.inputs.items()}


class TensorRTSession(EngineSession):
    """The engines of an export for the GPU of this machine.

    An engine is deserialized only after two checks. The manifest says that it is for this SM, this release of the
    library and this graph. The bytes that were read have the manifest's SHA-256.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        bits: The activation bits to make available. The default is all.
        device: A CUDA device. The default is ``cuda``.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        plugins: Plugin libraries, loaded once per process before the engines that need them. If all engines use one
            library, their contexts share what the plugin prepares from a weight. The copy inside an engine shares
            nothing.
        cuda_graphs: True replays passes of the same shapes as a CUDA graph, which saves kernel launches. Where a pass cannot
            be captured, the log says why, and passes run as usual.
        weights: ``auto``, ``packed`` or ``expanded``: how the plugin holds weights. ``auto`` follows ``DVDQUANT_WEIGHTS``
            where it is set (there ``mixed:`` and the names of layers, too), and else the count of :class:`.HeldWeights`.

    Attributes:
        entries: The manifest's entry of each bit-width's engine.
        weights: ``packed``, ``expanded``, or ``as built`` for engines that hold their weights themselves.

    Raises:
        UnsupportedError: A policy for engines that hold their weights themselves.
        EngineError: No engine fits (the error gives the command that builds it), or the library refuses the engine.
    """

    _lora_inputs: LoraInputs

    def __init__(
        self,
        artifact: Artifact,
        component: str = "transformer",
        bits: Sequence[int] | None = None,
        device: torch.device | None = None,
        *,
        backend: str = "tensorrt_rtx",
        plugins: Sequence[Path] = (),
        cuda_graphs: bool = False,
        weights: WeightPolicy = "auto",
    ) -> None:
        self.backend = backend
        super().__init__(artifact, component, bits, device or torch.device("cuda"))
        self._library, entries = find_engines(artifact, component, backend, self.bits, self.device)
        self.entries = entries
        self.library = f"{self._library.name} {self._library.version}"
        module_log.info("%s: %s runs the engines", component, self.library)
        self._plugin_bytes = 0
        self.weights, expanded = self._form(check_policy(weights), entries)
        self._scratch = Scratch(self.device)
        self._files: WeightFiles | None = None
        self._on_device: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}
        self._lora_inputs = LoraInputs(artifact, component)
        self._engine_bytes = 0
        self._cuda_graphs = cuda_graphs
        self._captures: dict[int, _Capture] = {}
        self._log = EngineLog()
        self._engines: dict[int, BoundEngine] = {}
        with current_device(self.device):
            self._lane = Lane(self.device)
            load_plugins(self._library, plugins)
            self._runtime = make_runtime(self._library, self._log)
            # The plugin reads the form when a context is made.
            with plugin_form(self.weights, expanded):
                for width, entry in entries.items():
                    self._engines[width] = self._load(entry)
                    self._lora_inputs.require(self._on_device, f"the engine {entry['path']}")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # weights were copied on this thread's stream; passes may use others
        self._drop_files()
        self._ran: set[int] = set()
        claim(self, self._plugin_bytes)

    def _form(self, policy: WeightPolicy, entries: Mapping[int, EngineEntry]) -> tuple[str, frozenset[str]]:
        """Return how weights are held and which layers are expanded, and count what the plugin holds beside its inputs."""
        if not any(entry["precision"] == "plugin" for entry in entries.values()):
            if policy != "auto":
                raise UnsupportedError(
                    f"these engines hold their weights as they were built, not {policy}",
                    available="engines with the plugin, and the backends pytorch and onnxruntime",
                    fix="leave the policy out",
                )
            return super().weights, frozenset()
        named = None
        if policy == "auto" and (word := os.environ.get(FORM_VARIABLE)):
            if word.startswith(MIXED):
                named = frozenset(name for name in word.removeprefix(MIXED).split(",") if name)
            else:
                policy = check_policy(word)
        shared = [entry.get("kept_inputs", 0) for entry in entries.values()]
        choice = choose_form(self, sm_number(device_sm(self.device)), policy, shared=shared, named=named)
        self._plugin_bytes = choice.beside
        return choice.form, choice.expanded

    def _load(self, entry: EngineEntry) -> BoundEngine:
        engine = deserialize(self.artifact, entry, self._library, self._runtime, self._log)
        self._engine_bytes += self.artifact.manifest.files[entry["path"]]["bytes"]
        names = frozenset(spec.name for spec in self.family.inputs(self.sizes))
        return BoundEngine(
            self._library, engine, self._log, self._scratch, self._weight, names, library_graphs=self._cuda_graphs
        )

    def _weight(self, name: str) -> Tensor:
        """Return a weight on the device, or zeros for an input of LoRAs. Every bit-width gets the same memory."""
        if name in self._on_device:
            return self._on_device[name]
        reserved = self._lora_inputs.shapes
        if name in reserved:
            self._on_device[name] = torch.zeros(reserved[name], dtype=self.dtype, device=self.device)
            return self._on_device[name]
        if self._files is None:
            self._files = WeightFiles(self.artifact, self.component, self.device)
        # A LoRA is written over what the engine reads, so that must not be the private copy that all sessions share.
        self._on_device[name] = self._files.tensor(name).to(self.device, copy=bool(reserved))
        return self._on_device[name]

    def _kept(self, name: str) -> Tensor:
        if name not in self._on_device:
            raise UnsupportedError(
                f"the LoRA changes {name}, which is a constant of the engines",
                available="linear layers, biases, norms and tables",
                fix="run it with the pytorch backend (--backend pytorch), or fuse it: dvdq-export --lora",
            )
        return self._originals.get(name, self._on_device[name])

    def _put(self, values: Mapping[str, Tensor | None]) -> None:
        """See :class:`EngineSession`. The memory stays where it is, so contexts and CUDA graphs go on with it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a pass on any stream may still read the old values
        for name, value in values.items():
            held = self._on_device[name]
            if name not in self._lora_inputs.shapes:
                self._originals.setdefault(name, held.to("cpu", copy=True))
                value = self._originals.pop(name) if value is None else value
            held.zero_() if value is None else held.copy_(value.to(held.dtype))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def repeats_steps(self) -> bool:
        """Return whether passes of the same shapes are repeated as CUDA graphs, by the library or here."""
        return self._cuda_graphs

    def _drop_files(self) -> None:
        """Drop the private copy of the weights when they are on the device."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def _run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        engine = self._engines[bits]
        self._log.lines.clear()  # an error quotes the log, which must not hold the reason of an earlier one
        with current_device(self.device), self._lane.stream() as stream:
            # TensorRT-RTX captures CUDA graphs by itself. For TensorRT this session captures them.
            if self._cuda_graphs and self._library.takes_plugins:
                output = self._replay(engine, inputs, bits, stream)
            else:
                output = engine.enqueue(inputs, self.device, 0 if stream is None else stream.cuda_stream)
        if bits not in self._ran:
            self._ran.add(bits)
            if self._ran.issuperset(self.bits):
                claim(self, 0)  # the plugin has made what it holds
        # The cast runs after the pass: it is queued on torch's current stream, which waits for the pass from here on.
        return output.to(self.dtype)

    def _replay(self, engine: BoundEngine, inputs: dict[str, Tensor], bits: int, stream: Any) -> Tensor:
        """Replay the CUDA graph on ``stream``, after a new capture if shapes or scratch memory have changed.

        A pass that cannot be captured runs as usual, and so do all from then on.
        """
        engine.prepare(inputs)
        capture = self._captures.get(bits)
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        if capture is None or capture.generation != self._scratch.generation or capture.shapes != shapes:
            self._captures.pop(bits, None)
            try:
                capture = self._captures[bits] = self._capture(engine, inputs)
            except Exception as error:  # noqa: BLE001 - an error of the engine comes again when it runs as usual
                capture = None
                module_log.warning("%s: steps are not captured as CUDA graphs: %s", self.component, failure_text(error))
            if capture is None:
                self._cuda_graphs = False
                self._captures.clear()
                torch.cuda.empty_cache()  # what the captures held, which PyTorch would keep
                return engine.enqueue(inputs, self.device, stream.cuda_stream)
        # The output is allocated on torch's current stream, where the caller may free it. The pass's stream fills it.
        output = torch.empty_like(capture.output)
        with torch.cuda.stream(stream):
            for name, tensor in inputs.items():
                capture.inputs[name].copy_(tensor)
            capture.replay()
            output.copy_(capture.output)
        return output

    def _capture(self, engine: BoundEngine, inputs: dict[str, Tensor]) -> _Capture:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        torch.cuda.synchronize(self.device)
        # Libraries do their lazy set-up in the first pass, so the first pass must not be captured.
        stream = self._lane.own
        engine.enqueue(held, self.device, stream.cuda_stream)
        torch.cuda.synchronize(self.device)
        output, replay = capture_step(
            lambda given: engine.enqueue(given, self.device, stream.cuda_stream), held, self.device, stream
        )
        return _Capture(replay, held, output, self._scratch.generation)

    def _resident_bytes(self) -> dict[str, int]:
        """Return the bytes that are held between calls.

        ``engines`` is the size of the engine files. They hold the weights if the weights are not inputs of the engine.
        ``weights`` are those inputs, and what the plugin makes of them in the first passes.
        """
        weights = sum(tensor.nbytes for tensor in self._on_device.values()) + self._plugin_bytes
        return {"weights": weights, "engines": self._engine_bytes, "workspace": self._scratch.nbytes}

    def _close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._captures.clear()
        self._engines.clear()
        self._on_device.clear()
        self._originals.clear()
        self._scratch.free()
        self._engine_bytes = self._plugin_bytes = 0


@contextlib.contextmanager
def plugin_form(form: str, expanded: Collection[str] = ()) -> Iterator[None]:
    """Let contexts that are made in this block hold weights in a form.

    Args:
        form: ``packed``, ``expanded`` or ``mixed``; another word leaves the environment as it is.
        expanded: The names of the layers that are expanded where the form is mixed.
    """
    if form not in ("packed", "expanded", "mixed"):
        yield
        return
    with _form_lock:
        before = os.environ.get(FORM_VARIABLE)
        os.environ[FORM_VARIABLE] = form if form != "mixed" else MIXED + ",".join(sorted(expanded))
        try:
            yield
        finally:
            if before is None:
                del os.environ[FORM_VARIABLE]
            else:
                os.environ[FORM_VARIABLE] = before


def load_plugins(library: Backend, plugins: Sequence[Path]) -> None:
    """Register plugin libraries, each once per process. Their code runs: load only libraries that you built.

    Args:
        library: The backend that takes the plugins.
        plugins: The paths of the libraries.

    Raises:
        EngineError: The backend has no plugins, or a library is not there, is for another major version or does not load.
    """
    require_no_plugins(library, plugins)
    for path in (plugin.resolve() for plugin in plugins):
        if (library.name, path) not in _PLUGINS:
            load_plugin(path, library, library.module.get_plugin_registry())
            _PLUGINS.add((library.name, path))


def make_runtime(library: Backend, log: EngineLog) -> Any:
    """Make the library's ``Runtime``.

    Its ``engine_host_code_allowed`` stays False: a version-compatible engine with an embedded runtime, or with plugins inside,
    is a shared library that would be loaded into this process out of a file that a stranger may have written.

    Args:
        library: The backend with its installed library.
        log: The place where the library's messages are kept.

    Raises:
        EngineError: The runtime cannot start. The error gives the library's messages.
    """
    try:
        runtime = library.module.Runtime(make_logger(library.module, log))
    except (RuntimeError, TypeError) as error:
        raise EngineError(
            f"{library.name} {library.version} cannot start: {error}; {log.tail()}",
            fix="update the driver (dvdq doctor says which), or take --backend pytorch",
            out_of_memory=log.out_of_memory,
        ) from error
    return runtime


def deserialize(artifact: Artifact, entry: EngineEntry, library: Backend, runtime: Any, log: EngineLog) -> Any:
    """Read and hash one engine, and only then deserialize it.

    Args:
        artifact: The export.
        entry: The manifest's entry of the engine.
        library: The backend with its installed library.
        runtime: The library's ``Runtime``.
        log: The messages of the library.

    Returns:
        The engine as the library gives it.

    Raises:
        EngineError: The file differs from the manifest, the library finds the header unfit, or deserializing failed.
    """
    sm = entry["sm"][0] if entry["sm"] else None
    fix = f"build it again: {artifact.rebuild_command(sm=sm, target=build_target(library))}"
    try:
        raw = artifact.read(entry["path"])
    except OutputError as error:
        raise EngineError(error.what, available=error.available, fix=fix) from error
    _check_header(raw, entry, library, runtime, log, fix)
    engine = runtime.deserialize_cuda_engine(raw)
    if engine is None:
        claim = ""
        if library.name == LEAN:
            claim = "; the manifest calls it version-compatible, and the lean runtime runs no other engine"
        raise EngineError(
            f"{library.name} {library.version} could not deserialize {entry['path']}: {log.tail()}{claim}",
            fix=fix,
            out_of_memory=log.out_of_memory,
        )
    return engine


def _check_header(raw: bytes, entry: EngineEntry, library: Backend, runtime: Any, log: EngineLog, fix: str) -> None:
    """Check the engine's header with the library, if the library can, before an unfit engine is deserialized."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, found = runtime.get_engine_validity(raw[: runtime.engine_header_size])
    if validity != library.module.EngineValidity.INVALID:
        return
    kinds = library.module.EngineInvalidityDiagnostics.__members__
    reasons = [name for name, kind in kinds.items() if int(found) & int(kind.value)]
    if not {"MALFORMED_ENGINE", "UNSUPPORTED_CC", "VERSION_MISMATCH"} & set(reasons):
        fix = "install or update the GPU's driver; nvidia-smi shows the one in use"
    if "INSUFFICIENT_GPU_MEMORY" in reasons:
        fix = "free GPU memory, or export for a smaller size"
    raise EngineError(
        f"{library.name} {library.version} says {entry['path']} cannot run here: {', '.join(reasons) or log.tail()}",
        fix=fix,
        out_of_memory=log.out_of_memory,
    )
