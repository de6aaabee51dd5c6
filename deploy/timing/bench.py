"""The time of one call of each engine of an export, and of the original model: warmed up, in turns, with its spread."""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from dvdquant import __version__
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.run_report import machine
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.base import ENGINES, EngineSession
from dvdquant.deploy.sessions.options_text import attention_json
from dvdquant.deploy.timing.original import OriginalModel
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.system.devices import wait_for
from dvdquant.system.plugin_file import Plugins, plugin_paths
from dvdquant.system.progress import Progress
from dvdquant.text import shown

__all__ = ["BenchResult", "Timing", "bench", "executed_text"]

Which = Literal["min", "opt", "max"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """The times of one transformer at one bit-width, or of the model that it was made of.

    Args:
        component: The transformer.
        bits: The activation bits; 16 for the original model.
        executes: What ran, in words.
        seconds: The time of every call in seconds, in order, without those of the warm-up.
        first: The time of the first call, with what is compiled and loaded in it.
        name: What tables call it: ``a8``, or dtype and way of the original.
    """

    component: str
    bits: int
    executes: str
    seconds: tuple[float, ...]
    first: float
    name: str

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the times that a quarter of the calls is below and above, in seconds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Return the timing as a plain dict, times in milliseconds."""
        low, high = self.quartiles
        summary = {"median": self.median, "quartile_1": low, "quartile_3": high}
        summary |= {"min": min(self.seconds), "first": self.first}
        return {
            "component": self.component,
            "name": self.name,
            "act_bits": self.bits,
            "executes": self.executes,
            "calls": len(self.seconds),
            "milliseconds": {name: round(1000 * value, 4) for name, value in summary.items()},
            "samples_ms": [round(1000 * value, 4) for value in self.seconds],
        }


@dataclass(frozen=True)
class BenchResult:
    """The timings of an export on a machine.

    Args:
        timings: A timing for each transformer and bit-width, then those of the original.
        backend: The backend that ran.
        device: The device that it ran on.
        machine: The processor and the GPU.
        sizes: The shapes of the inputs by name.
        resident_bytes: What each session holds between calls, by transformer.
        weights: How the sessions hold quantized weights: ``packed``, ``expanded`` or ``as built``.
        attention: What each session's attention was, by transformer: ``16``, ``as built`` of engines, or what was wanted and
            the library that ran.
        fused: Whether each session had what comes before quantized layers in their kernels, by transformer.
        cuda_graphs: Whether each session repeated steps as CUDA graphs, by transformer.
        not_timed: Why an original could not be timed, by transformer and name.
    """

    timings: tuple[Timing, ...]
    backend: str
    device: str
    machine: str
    sizes: dict[str, list[int]]
    resident_bytes: dict[str, dict[str, int]]
    weights: str = ""
    attention: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, bool] = field(default_factory=dict)
    cuda_graphs: dict[str, bool] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)

    def baseline(self, component: str) -> Timing:
        """Return what the times of a transformer are held against: the faster original, or else the widest width.

        Args:
            component: The transformer.
        """
        same = [each for each in self.timings if each.component == component]
        widest = max(each.bits for each in same)
        return min((each for each in same if each.bits == widest), key=lambda each: each.median)

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain dict."""
        data = asdict(self) | {"timings": [each.to_json() for each in self.timings]}
        return {"dvdquant": __version__, "torch": torch.__version__, "python": platform.python_version(), **data}


def bench(
    artifact: Artifact,
    *,
    backend: str = "auto",
    device: str = "auto",
    components: Sequence[str] = (),
    bits: Sequence[int] | None = None,
    which: Which = "opt",
    warm_up: int = 2,
    repeats: int = 20,
    seconds: float = 60.0,
    compile: bool = False,
    attention: str | None = None,
    attention_backend: str | None = None,
    weights: WeightPolicy = "auto",
    fuse: bool | None = None,
    cuda_graphs: bool = False,
    plugins: Plugins = (),
    original: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Time one call of every bit-width, on random inputs of one size of the export.

    The widths take turns, so that a machine that gets warmer or busier does so for all of them alike.

    Args:
        artifact: The export.
        backend: The backend, as of :func:`dvdquant.deploy.sessions.open_session`.
        device: The device, in the same way.
        components: The transformers; none means all.
        bits: The activation bits; None means all.
        which: The size: the least, the one that engines are tuned for, or the greatest.
        warm_up: The number of calls of each width that are not counted.
        repeats: The greatest number of calls of each width that are counted.
        seconds: The time for the counted calls of one transformer, after which no further turn begins.
        compile: Compile the blocks, in PyTorch sessions.
        attention: ``16``, ``int8`` or ``fp8``, in PyTorch sessions.
        attention_backend: The library that computes it, or ``reference``; it makes the sessions those of PyTorch.
        weights: ``auto``, ``packed`` or ``expanded``.
        fuse: Take what comes before quantized layers into their kernels, in PyTorch sessions; None where ``compile`` is on.
        cuda_graphs: Repeat steps as CUDA graphs.
        plugins: TensorRT plugin libraries that engines need, one path or several.
        original: Time the original model on the same device, too (:class:`.OriginalModel`), eager and compiled. One that
            cannot be timed there does not end the others.
        progress: The receiver of the progress.

    Raises:
        UnsupportedError: The export has no such transformer, a plugin library is not there, or the library of attention is
            not possible here.
        EngineError: No engine fits, or a call fails.
    """
    if unknown := sorted(set(components) - set(artifact.components)):
        raise UnsupportedError(
            f"the export has no transformer {unknown[0]!r:.80}", available=artifact.components, fix="pick one of these"
        )
    libraries = plugin_paths(plugins)
    timings: list[Timing] = []
    resident, attentions, fused, graphs = {}, {}, {}, {}
    not_timed: dict[str, str] = {}
    backend_name = device_name = form = ""
    shapes: dict[str, list[int]] = {}
    for component in components or artifact.components:
        with open_session(
            artifact,
            component,
            backend=backend,
            device=device,
            bits=bits,
            compile=compile,
            attention=attention,
            attention_backend=attention_backend,
            weights=weights,
            fuse=fuse,
            cuda_graphs=cuda_graphs,
            plugins=libraries,
        ) as session:
            # 1. Inputs on the device, and what is timed with them.
            inputs = session.family.sample(artifact.sizes, session.dtype, 0, which)
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            inputs = {name: value.to(session.device) for name, value in inputs.items()}
            cases = [
                _Case(f"a{width}", width, executed_text(session, width), partial(session.run, inputs, width))
                for width in session.bits
            ]
            if original:
                cases += _originals(session, inputs)
            # 2. First calls, which may fail; then the others in turns.
            with (progress or Progress()).stage("time", (1 + warm_up + repeats) * len(cases), "call") as stage:
                measure = _Measure(session.device, stage.update)
                failed = measure.first_calls(cases)
                not_timed |= {f"{component}, {name}": reason for name, reason in failed.items()}
                measure.repeat(warm_up, repeats, seconds)
            for case, times in measure.taken.items():
                timings.append(
                    Timing(component, case.bits, case.executes, tuple(times), measure.first[case], case.name)
                )
            # 3. What ran, and what it holds.
            resident[component], attentions[component] = session.resident_bytes(), attention_json(session)
            fused[component], graphs[component] = session.fused, session.repeats_steps
            backend_name, device_name, form = session.backend, str(session.device), session.weights
    return BenchResult(
        tuple(timings),
        backend=backend_name,
        device=device_name,
        machine=machine(),
        sizes=shapes,
        resident_bytes=resident,
        weights=form,
        attention=attentions,
        fused=fused,
        cuda_graphs=graphs,
        not_timed=not_timed,
    )


@dataclass(frozen=True)
class _Case:
    """Something to time."""

    name: str
    bits: int
    executes: str
    run: Callable[[], object]


def _originals(session: EngineSession, inputs: dict[str, torch.Tensor]) -> list[_Case]:
    """Return the original model of a session, eager and compiled. Each is made at its first call.

    It computes in the dtype of the session, and on a CPU, where 16 bits are slow, in fp32.
    """
    dtype = torch.float32 if session.device.type == "cpu" else session.dtype
    cast = {name: value.to(dtype) if value.dtype == session.dtype else value for name, value in inputs.items()}

    def case(way: str, compiled: bool) -> _Case:
        made: list[OriginalModel] = []

        def run() -> object:
            if not made:
                cut = session.device.type == "cuda"
                made.append(OriginalModel(session.family, dtype, session.device, compiled, cut))
            try:
                return made[0](cast)
            except Exception:
                made.clear()  # one that failed holds no memory
                raise

        name = str(dtype).removeprefix("torch.")
        return _Case(f"{name} {way}", 16, f"the original model in {way} PyTorch, random weights", run)

    return [case("eager", False), case("compiled", True)]


class _Measure:
    """Times cases in turns.

    Args:
        device: Where they run.
        done: Hears of every call.

    Attributes:
        first: The time of the first call of each case.
        taken: Its counted times.
    """

    def __init__(self, device: torch.device, done: Callable[[int], None]) -> None:
        self._device, self._done = device, done
        self.first: dict[_Case, float] = {}
        self.taken: dict[_Case, list[float]] = {}

    def first_calls(self, cases: Sequence[_Case]) -> dict[str, str]:
        """Call each case once; leave out originals that fail, and return why.

        Whatever a compiler or want of memory does to an original, the times of the export are wanted.

        Args:
            cases: All that is to be timed.
        """
        failed = {}
        for case in cases:
            try:
                self.first[case] = self._seconds(case)
            except Exception as error:
                if case.bits != 16:
                    raise
                failed[case.name] = shown(" ".join(f"{type(error).__name__}: {error}".split()))
                log.debug("%s is not timed", case.name, exc_info=True)
        return failed

    def repeat(self, warm_up: int, repeats: int, seconds: float) -> None:
        """Take turns: some that do not count, then those that do.

        Args:
            warm_up: The number of turns that are not counted.
            repeats: The greatest number of those that are.
            seconds: The time after which no turn begins.
        """
        self.taken = {case: [] for case in self.first}
        for _ in range(warm_up):
            for case in self.taken:
                self._seconds(case)
        end = time.monotonic() + seconds
        for _ in range(repeats):
            for case, times in self.taken.items():
                times.append(self._seconds(case))
            if time.monotonic() >= end:
                break

    def _seconds(self, case: _Case) -> float:
        """Return the time of one call, with all that a GPU still has to do in it."""
        wait_for(self._device)
        begun = time.perf_counter()
        case.run()
        wait_for(self._device)
        taken = time.perf_counter() - begun
        self._done(1)
        return taken


def executed_text(session: EngineSession, bits: int) -> str:
    """Return what ran: of an engine what its builder said, else the session's own means.

    Args:
        session: The session.
        bits: The activation bits of the call.
    """
    if session.backend in ENGINES:
        entries = session.artifact.engines(session.component, session.backend, bits)
        return "; ".join(dict.fromkeys(entry["executes"] for entry in entries))
    if session.backend == "onnxruntime":
        return "ONNX Runtime: the functions of the graph, in floating point"
    if session.device.type != "cuda":
        return "PyTorch on the CPU, without kernels"
    from dvdquant.ops.cuda_linear import usable_kernels

    # A library that is built for other GPUs is there, and runs nothing here.
    return "PyTorch with the CUDA kernels" if usable_kernels(session.device) is not None else "PyTorch without kernels"
