"""The builder process: ``python -m dvdquant.export.engines.worker REQUEST.json`` builds one engine.

It runs apart from the exporter because the builder may abort the process it runs in, and holds three times the weights
in memory. Lines starting with ``@dvdq`` on stdout are JSON for the exporter: progress, the report, or an error.
Everything else is the builder's log.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvdquant.backends import TENSORRT, Backend, load_backend
from dvdquant.errors import DvdquantError, EngineError, ResourceError
from dvdquant.export.engines.network import WeightMaps, check_custom_ops, parse_network, read_model
from dvdquant.export.engines.report import (
    MARK,
    BuildReport,
    BuildRequest,
    attention_summary,
    layer_summary,
    materialized_scores,
    memory_advice,
)
from dvdquant.plugin_library import load_plugin
from dvdquant.system.files import disk_error, hash_file, read_limited
from dvdquant.system.gpu import read_gpu
from dvdquant.system.out_of_memory import is_out_of_memory
from dvdquant.system.whole_file import write_whole

__all__ = ["build", "check_device", "check_operators", "main"]

_LOCK = threading.Lock()
_LARGEST_CACHE = 1 << 31  # bytes of a timing cache
# The importer says this for every use of a function body after the first one; the engine is the same.
_INLINED_AGAIN = "the output tensors of this new instance will not be queryable"


class NotBuiltError(EngineError):
    """The library built no engine of a network that it parsed; its log says why."""


def send(kind: str, **fields: Any) -> None:
    """Send one message to the exporter; this is safe from the builder's own threads.

    Args:
        kind: ``report``, ``error``, ``phase``, ``step`` or ``finish``.
        **fields: Values that JSON can hold.
    """
    with _LOCK:
        sys.stdout.write(MARK + json.dumps({"kind": kind, **fields}) + "\n")
        sys.stdout.flush()


def _logger(trt: Any, listing: list[str], warnings: list[str]) -> Any:
    """Return a logger for the builder.

    Args:
        trt: The builder's Python module.
        listing: Gets the lines of the verbose layer listing.
        warnings: Gets every warning once.
    """

    class Logger(trt.ILogger):
        """A logger that writes errors, warnings and info to stderr, and the verbose layer listing into ``listing``."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Take one message of the builder."""
            if _INLINED_AGAIN in message:
                return
            if severity <= trt.ILogger.Severity.INFO:
                print(f"[{str(severity).rsplit('.', 1)[-1]}] {message}", file=sys.stderr, flush=True)
            if severity == trt.ILogger.Severity.WARNING and message not in warnings:
                warnings.append(message)
            if "LayerType: " in message:
                listing.extend(message.splitlines())

    return Logger()


def _monitor(trt: Any, each_phase: Callable[[], None]) -> Any:
    """Return a progress monitor for the builder.

    Args:
        trt: The builder's Python module.
        each_phase: A function that is called at the start and the end of each phase.
    """

    class Monitor(trt.IProgressMonitor):
        """A monitor that sends phases and steps as messages; the builder calls it from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            """Send the start of a phase with its number of steps."""
            each_phase()
            send("phase", name=phase, parent=parent, steps=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            """Send the end of a step; True lets the build go on."""
            send("step", name=phase, step=step)
            return True

        def phase_finish(self, phase: str) -> None:
            """Send the end of a phase."""
            each_phase()
            send("finish", name=phase)

    return Monitor()


def _configure(backend: Backend, builder: Any, request: BuildRequest) -> Any:
    """Return the builder's configuration for a request."""
    trt = backend.module
    config = builder.create_builder_config()
    # Only at this verbosity does the builder list the types its products run in; it adds nothing to the engine's size.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # A runtime inside the engine would be host code out of a file, which no session of dvdquant allows.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if backend.builds_for_sms:
        config.num_compute_capabilities = len(request.sms)
        for index, sm in enumerate(request.sms):
            config.set_compute_capability(backend.compute_capability(sm), index)
    if request.profile is not None:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in request.profile.items():
            profile.set_shape(name, tuple(low), tuple(best), tuple(high))
        config.add_optimization_profile(profile)
    return config


def check_operators(backend: Backend, parser: Any) -> None:
    """Refuse a version-compatible engine of a graph that needs operators from TensorRT's own plugin libraries.

    A session loads the plugin libraries that it is told, so such an engine would be built here and fail there.

    Args:
        backend: The builder library.
        parser: The parser, after it has parsed the graph.

    Raises:
        EngineError: The graph has such operators.
    """
    libraries = [Path(library).name for library in parser.get_used_vc_plugin_libraries()]
    if libraries:
        raise EngineError(
            f"the graph has operators that a version-compatible engine of {backend.name} {backend.version} takes from "
            f"{', '.join(libraries)}, which no session loads",
            fix="build it without --version-compatible",
        )


def _check_profile(network: Any, request: BuildRequest) -> None:
    """Check that every dynamic input has a range, and that every range fits an input.

    Args:
        network: The parsed network.
        request: The request with the profile.

    Raises:
        EngineError: An input lacks a range, or a range names no input or does not fit its shape.
    """
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    profile = request.profile or {}
    unknown = [name for name in profile if name not in inputs]
    missing = [name for name, shape in inputs.items() if -1 in shape and name not in profile]
    if unknown or missing:
        raise EngineError(
            f"the optimization profile names unknown inputs {unknown} and lacks dynamic inputs {missing}",
            available=[f"{name} {list(shape)}" for name, shape in inputs.items()],
        )
    for name, shapes in profile.items():
        for shape in shapes:
            if len(shape) != len(inputs[name]) or any(d not in (-1, s) for d, s in zip(inputs[name], shape)):
                raise EngineError(
                    f"profile shape {shape} does not fit input {name} {list(inputs[name])}",
                    fix="give sizes whose frames, height and width are those of the graph, or export again",
                )


def _timing_cache(config: Any, path: Path | None) -> None:
    """Load the timing cache, or an empty one if the file does not exist; None means no cache."""
    if path is not None:
        try:
            stored = read_limited(path, _LARGEST_CACHE) if path.exists() else b""
        except ValueError as error:  # a pipe, a device
            raise EngineError(f"the timing cache {path} cannot be read: {error}", fix="give another file") from error
        config.set_timing_cache(config.create_timing_cache(stored), False)


def _save_timing_cache(config: Any, path: Path | None) -> None:
    """Write the timing cache back; None means no cache."""
    if path is None:
        return
    cache = config.get_timing_cache()
    if cache is not None:
        write_whole(path, bytes(cache.serialize()))


def _write(path: Path, data: Any) -> None:
    """Write the engine, and make it durable.

    Args:
        path: The file to write.
        data: The bytes of the engine.

    Raises:
        ResourceError: The disk is full.
        OutputError: The file cannot be written for another reason.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path) from error


def _peak_rss() -> int:
    """Return the peak resident memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_device(backend: Backend, sms: tuple[str, ...]) -> None:
    """Check that the GPU a TensorRT engine is for is present; TensorRT-RTX builds without a GPU.

    Args:
        backend: The builder library.
        sms: The target compute capabilities.

    Raises:
        EngineError: There is no GPU, or it is another one.
    """
    if backend.builds_for_sms:
        return
    gpu = read_gpu()
    if gpu is None:
        raise EngineError(
            f"{backend.name} builds an engine on the GPU it is for, and this machine has none",
            fix="leave it to dvdq-build on the target machine (dvdq-export --build device), or use the rtx target, which "
            "builds without a GPU",
        )
    if sms != (gpu.sm,):
        raise EngineError(f"{backend.name} cannot build for SM {', '.join(sms)} here", available=f"SM {gpu.sm}")


def build(request: BuildRequest) -> BuildReport:
    """Parse, build and write one engine in this process; the file is complete or the call raises.

    Args:
        request: The request.

    Raises:
        EngineError: The backend is missing, refuses the graph, the build fails, or the engine would write the scores of
            an attention to memory.
        UnsupportedError: The backend does not know a compute capability.
        OutputError: The engine cannot be written.
        ResourceError: The disk is full.
    """
    start = time.monotonic()
    # 1. Read the graph, and refuse what the builder would abort on.
    backend = load_backend(request.backend)
    path = Path(request.model)
    model = read_model(path)
    check_custom_ops(model, backend, [Path(p) for p in request.plugins])
    if request.version_compatible and backend.name != TENSORRT:
        raise EngineError(
            f"{backend.name} builds no version-compatible engines",
            available="tensorrt",
            fix="build it without --version-compatible, or with the tensorrt backend",
        )
    check_device(backend, request.sms)
    # 2. Set the builder up.
    listing: list[str] = []
    warnings: list[str] = []
    logger = _logger(backend.module, listing, warnings)
    builder = backend.module.Builder(logger)
    config = _configure(backend, builder, request)
    # Plugins stay outside the engine. A library inside each engine is loaded once per engine, and the engines of one
    # process would each prepare their own copy of the packed weights.
    for plugin in request.plugins:
        load_plugin(Path(plugin), backend, builder.get_plugin_registry())
    # 3. Parse the graph, with the weights mapped from their files.
    maps = WeightMaps(Path(request.data_dir), [Path(root) for root in request.data_roots])
    network, parser = parse_network(backend, builder, logger, model, maps)
    del model
    if request.version_compatible:
        check_operators(backend, parser)
    _check_profile(network, request)
    # 4. Build and write the engine.
    size = _build_plan(backend, builder, network, config, request, maps)
    _refuse_scores(backend, listing)
    products, constants = layer_summary(listing)
    return BuildReport(
        backend=backend.name,
        version=backend.version,
        sms=tuple(request.sms),
        seconds=round(time.monotonic() - start, 3),
        bytes=size,
        peak_rss_bytes=_peak_rss(),
        onnx_sha256=hash_file(path)["sha256"],
        products=products,
        constant_bytes=constants,
        attention=attention_summary(listing),
        warnings=tuple(warnings),
    )


def _refuse_scores(backend: Backend, listing: list[str]) -> None:
    """Refuse an engine whose attention fell apart.

    It needs memory with the square of the tokens, gigabytes for each head of a video, and most of a step's time.

    Raises:
        EngineError: A layer of the listing has the scores of all tokens.
    """
    layers = materialized_scores(listing)
    if layers:
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        raise EngineError(
            f"{backend.name} {backend.version} did not fuse the attention: {len(layers)} layers write the scores of all pairs of "
            f"tokens to memory ({shown})",
            available="attention in 16 bit, and FP8 with Q/DQ on q, k, v and the softmax, are one kernel",
            fix="use a recipe with attention 16 (--attention 16)",
        )


def _build_plan(
    backend: Backend, builder: Any, network: Any, config: Any, request: BuildRequest, maps: WeightMaps
) -> int:
    """Build and write the engine with progress and timing cache, and return its size in bytes.

    Args:
        backend: The builder library.
        builder: The builder.
        network: The parsed network.
        config: The builder's configuration.
        request: The request.
        maps: The maps of the weight files, whose pages are given back after each phase.

    Raises:
        NotBuiltError: The build fails.
        OutputError: The engine cannot be written.
        ResourceError: The disk is full.
    """
    cache = Path(request.timing_cache) if request.timing_cache else None
    _timing_cache(config, cache)
    # The builder keeps no reference to its monitor.
    config.progress_monitor = monitor = _monitor(backend.module, maps.drop_pages)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise NotBuiltError(
            f"{backend.name} {backend.version} could not build the engine for SM {', '.join(request.sms)}",
            fix=None if request.workspace_bytes is None else "raise the workspace limit: it must exceed the weights",
        )
    _write(Path(request.engine), plan)
    _save_timing_cache(config, cache)
    return int(plan.nbytes)


def main(arguments: list[str]) -> int:
    """Build the request in the named JSON file; send a report and return 0, or send an error and return 3.

    Args:
        arguments: The command line; the first argument is the path of the JSON file.
    """
    request = BuildRequest.from_json(Path(arguments[0]).read_text())
    try:
        send("report", report=build(request).to_json())
    except (DvdquantError, MemoryError, OSError) as caught:
        error = _as_error(caught, request)
        fields = {"what": error.what, "available": error.available, "fix": error.fix}
        refused = isinstance(error, NotBuiltError)
        kind = EngineError if refused else type(error)
        memory = is_out_of_memory(error)
        send("error", type=kind.__name__, log_says_why=refused, out_of_memory=memory, **fields)
        return 3
    return 0


def _as_error(error: DvdquantError | MemoryError | OSError, request: BuildRequest) -> DvdquantError:
    """Return the error that the exporter is told; the log keeps the place where it happened."""
    if isinstance(error, DvdquantError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, MemoryError):
        return ResourceError(
            f"the {request.backend} builder process has no memory left",
            fix=memory_advice(request.backend),
            out_of_memory=True,
        )
    return disk_error(error, error.filename or request.engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
