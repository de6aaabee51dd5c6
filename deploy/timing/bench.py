"""The time of one call of each engine of an export, on this machine: warmed up, in turns, with its spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from dvdquant import __version__
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.run_report import machine
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.base import ENGINES, EngineSession
from dvdquant.deploy.sessions.options_text import attention_json
from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WeightPolicy
from dvdquant.system.plugin_file import Plugins, plugin_paths
from dvdquant.system.progress import Progress

__all__ = ["BenchResult", "Timing", "bench", "executed_text"]

Which = Literal["min", "opt", "max"]


@dataclass(frozen=True)
class Timing:
    """The times of one transformer at one bit-width.

    Args:
        component: The transformer.
        bits: The activation bits.
        executes: What ran, in words.
        seconds: The time of every call in seconds, in order, without those of the warm-up.
        first: The time of the first call, with what is compiled and loaded in it.
    """

    component: str
    bits: int
    executes: str
    seconds: tuple[float, ...]
    first: float

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
        timings: A timing for each transformer and bit-width.
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
            inputs = session.family.sample(artifact.sizes, session.dtype, 0, which)
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            inputs = {name: value.to(session.device) for name, value in inputs.items()}
            calls = {width: _call(session, inputs, width) for width in session.bits}
            with (progress or Progress()).stage("time", (1 + warm_up + repeats) * len(calls), "call") as stage:
                first, taken = _measure(calls, warm_up, repeats, seconds, stage.update)
            for width, times in taken.items():
                timings.append(Timing(component, width, executed_text(session, width), tuple(times), first[width]))
            resident[component], attentions[component] = session.resident_bytes(), attention_json(session)
            fused[component], graphs[component] = session.fused, session.repeats_steps
            backend_name, device_name, form = session.backend, str(session.device), session.weights
    return BenchResult(
        tuple(timings), backend_name, device_name, machine(), shapes, resident, form, attentions, fused, graphs
    )


def _call(session: EngineSession, inputs: dict[str, torch.Tensor], bits: int) -> Callable[[], float]:
    """Return a function that runs one call and returns its seconds, with all that a GPU still has to do in them."""

    def wait() -> None:
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)

    def run() -> float:
        wait()
        begun = time.perf_counter()
        session.run(inputs, bits)
        wait()
        return time.perf_counter() - begun

    return run


def _measure(
    calls: dict[int, Callable[[], float]], warm_up: int, repeats: int, seconds: float, done: Callable[[int], None]
) -> tuple[dict[int, float], dict[int, list[float]]]:
    """Return the first time and the counted times of every width."""

    def turn() -> dict[int, float]:
        times = {}
        for width, call in calls.items():
            times[width] = call()
            done(1)
        return times

    first = turn()
    for _ in range(warm_up):
        turn()
    taken: dict[int, list[float]] = {width: [] for width in calls}
    end = time.monotonic() + seconds
    for _ in range(repeats):
        for width, value in turn().items():
            taken[width].append(value)
        if time.monotonic() >= end:
            break
    return first, taken


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
