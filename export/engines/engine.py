"""The build of an engine in a process of its own: a crash of the builder becomes an error, and its memory is freed."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil
from tqdm import tqdm

import dvdquant
from dvdquant import errors
from dvdquant.backends import backend_name
from dvdquant.errors import DvdquantError, EngineError, OutputError
from dvdquant.export.engines.report import MARK, BuildReport, BuildRequest, Shapes, memory_advice
from dvdquant.system.files import disk_error, strict_json
from dvdquant.system.out_of_memory import says_no_memory
from dvdquant.system.whole_file import atomic_path

__all__ = ["ProcessWatch", "build_engine"]

TAIL_LINES = 30
# A builder that works uses a processor, writes its log or reports a step. A builder that uses less than a second of a
# processor in this time, and says nothing, never ends.
SILENT_SECONDS = 900.0
BEAT_SECONDS = 5.0


def build_engine(
    model: Path | bytes,
    engine: Path,
    *,
    backend: str,
    sms: Sequence[str],
    profile: Shapes | None = None,
    plugins: Sequence[Path] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    data_roots: Sequence[Path] = (),
    log_file: Path | None = None,
    progress: bool = False,
    alive: Callable[[float, float], None] = lambda seconds, silent: None,
) -> BuildReport:
    """Build a graph into an engine file, which appears complete or not at all.

    Args:
        model: An ONNX file, or a serialized ModelProto. External data is mapped, not copied.
        engine: The engine file to write; its folder must exist.
        backend: ``rtx`` or ``tensorrt``.
        sms: The target compute capabilities, such as "8.9". TensorRT-RTX puts all of them in one engine; TensorRT
            builds for the GPU that is present.
        profile: Input name -> its (min, opt, max) shape, for every dynamic input; None if there is none.
        plugins: TensorRT plugin libraries, which the engine needs again when it is loaded; refused for TensorRT-RTX.
        workspace_bytes: The builder's workspace limit, which must exceed the weights; None means the library's default.
        timing_cache: A file to read and update; it has no effect in TensorRT-RTX.
        optimization_level: 0 to 5, or None for the library's default; it has no effect on TensorRT-RTX builds.
        version_compatible: Build an engine that TensorRT's lean runtime of the same release runs, too; refused for
            TensorRT-RTX. It holds no runtime of its own.
        data_roots: The folders that external data may lie in, besides the model's own. If ``model`` is bytes, locations
            are relative to the first one.
        log_file: A file that gets the builder's whole log; None keeps none.
        progress: Show a bar on stderr.
        alive: A function that is called every few seconds of a long step. It gets the seconds since the build began,
            and the seconds since the builder said something.

    Returns:
        A report for the manifest.

    Raises:
        EngineError: The backend is not installed, refuses the graph, fails, crashes or hangs. The error holds the tail
            of its log.
        UnsupportedError: The backend does not know a compute capability, or there is no such backend.
        OutputError: The folder of ``engine`` is missing or cannot be written.
        ResourceError: Disk or memory is full.
    """
    engine = engine.absolute()
    if not engine.parent.is_dir():
        raise OutputError(f"{engine.parent} is no folder", fix="create it first")
    try:
        return _build(
            model,
            engine,
            BuildRequest(
                backend=backend_name(backend),
                model="",
                engine="",
                sms=tuple(sms),
                data_dir="",
                data_roots=(),
                profile=None if profile is None else {k: [list(s) for s in v] for k, v in profile.items()},
                plugins=tuple(str(p.absolute()) for p in plugins),
                workspace_bytes=workspace_bytes,
                timing_cache=str(timing_cache.absolute()) if timing_cache else None,
                optimization_level=optimization_level,
                version_compatible=version_compatible,
            ),
            data_roots,
            log_file,
            progress,
            alive,
        )
    except OSError as error:
        raise disk_error(error, error.filename or engine) from error


def _build(
    model: Path | bytes,
    engine: Path,
    wanted: BuildRequest,
    data_roots: Sequence[Path],
    log_file: Path | None,
    progress: bool,
    alive: Callable[[float, float], None],
) -> BuildReport:
    """Build into an unfinished file beside the engine, which takes its place at the end.

    Args:
        model: An ONNX file, or a serialized ModelProto.
        engine: The absolute path of the engine file.
        wanted: The request without its paths, which are filled in here.
        data_roots: The folders that external data may lie in, besides the model's own.
        log_file: A file for the builder's log, or None.
        progress: Show a bar on stderr.
        alive: A function of seconds since the start and seconds of silence.

    Raises:
        EngineError: The process fails, or leaves no engine.
        DvdquantError: The process reported an error of this kind.
    """
    with (
        atomic_path(engine) as unfinished,
        tempfile.TemporaryDirectory(prefix=".dvdq-build-", dir=engine.parent) as scratch,
    ):
        folder = Path(scratch)
        path, roots = _model_file(model, folder, data_roots)
        request = replace(
            wanted,
            model=str(path),
            engine=str(unfinished),
            data_dir=str(roots[0].absolute()),
            data_roots=tuple(str(root.absolute()) for root in roots),
        )
        report = _run(request, engine.name, folder, log_file or folder / "log", progress, alive)
        if not unfinished.stat().st_size:
            raise EngineError(
                f"the {request.backend} builder process said that {engine.name} was built, and left no file",
                fix="check the free disk of the folder, and build it again with -v",
            )
    return report


def _model_file(model: Path | bytes, scratch: Path, data_roots: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Return the ONNX file, and the folders its data may lie in; locations are relative to the first one.

    Args:
        model: An ONNX file, or a serialized ModelProto, which is written into ``scratch``.
        scratch: The scratch folder of the build.
        data_roots: The folders that external data may lie in, besides the model's own.
    """
    if isinstance(model, Path):
        return model.absolute(), [model.absolute().parent, *data_roots]
    path = scratch / "model.onnx"
    path.write_bytes(model)
    return path, list(data_roots) or [scratch]


def _run(
    request: BuildRequest,
    title: str,
    folder: Path,
    log_file: Path,
    progress: bool,
    alive: Callable[[float, float], None],
) -> BuildReport:
    """Run the builder process, pass on what it says, and return its report.

    Args:
        request: The complete request.
        title: The name of the engine file, for bar and errors.
        folder: The scratch folder of the build.
        log_file: The file that gets the builder's log.
        progress: Show a bar on stderr.
        alive: A function of seconds since the start and seconds of silence.

    Raises:
        EngineError: The process cannot be started, crashes or hangs.
        DvdquantError: The process reported an error of this kind.
    """
    # 1. Write the request and start the process.
    spec = folder / "request.json"
    spec.write_text(request.to_json())
    environment = dict(os.environ)
    # The process must find this package the way this one did, installed or not.
    parent = str(Path(dvdquant.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (parent, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dvdquant.export.engines.worker", str(spec)]
    result: dict[str, Any] = {}
    with log_file.open("wb") as log, _Bar(title, progress) as bar:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, errors="replace"
            )
        except OSError as error:
            raise EngineError(
                f"the {request.backend} builder process of {title} cannot be started: {error.strerror}",
                fix="free memory, or end other processes, and run the same command with --resume",
            ) from error
        try:
            # 2. Read its output until the process closes it.
            watch = ProcessWatch(process, log)
            lines = _lines(process)
            while True:
                try:
                    line = lines.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    if process.poll() is not None:
                        break  # what it started may hold its end of the pipe
                    watch.look()
                    alive(watch.running, watch.silent)
                    bar.beat(watch)
                    if watch.hangs:
                        raise _hangs(request, title, watch, log_file) from None
                    continue
                if line is None:
                    break
                watch.heard()
                message = _message(line)
                if message is None:
                    log.write(line.encode())
                    log.flush()
                elif message["kind"] in ("report", "error"):
                    result = message
                else:
                    bar.update(message)
            code = _ended(process, watch)
            if code is None:
                raise _hangs(request, title, watch, log_file)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return _outcome(request, title, result, code, log_file)


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Read the lines of a process in a thread, so that nobody waits for ever; None marks the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        """Put every line into the queue, then None."""
        try:
            for line in process.stdout or ():
                lines.put(line)
        except (OSError, ValueError):  # closed on this side
            pass
        finally:
            lines.put(None)

    threading.Thread(target=read, daemon=True, name="dvdquant-builder-output").start()
    return lines


def _message(line: str) -> dict[str, Any] | None:
    """Return the message of the worker in a line, or None if the line belongs to the log, whatever it begins with."""
    if not line.startswith(MARK):
        return None
    try:
        message = strict_json(line[len(MARK) :].encode())
    except ValueError:
        return None
    return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None


def _ended(process: subprocess.Popen[str], watch: ProcessWatch) -> int | None:
    """Return the exit code of a process that has closed its output, or None if it hangs on its way out."""
    while True:
        try:
            return process.wait(timeout=BEAT_SECONDS)
        except subprocess.TimeoutExpired:
            watch.look()
            if watch.hangs:
                return None


class ProcessWatch:
    """The signs of life of a process: it writes, or uses a processor.

    Args:
        process: The process.
        log: The open file that its stderr goes to.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._pid, self._log = process.pid, log
        self._started = self._heard = self._active = time.monotonic()
        self._seen = self._state()

    @property
    def running(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    @property
    def silent(self) -> float:
        """Return the seconds since the process wrote a line."""
        return time.monotonic() - self._heard

    @property
    def hangs(self) -> bool:
        """Return whether the process has done nothing for too long."""
        return time.monotonic() - self._active > SILENT_SECONDS

    def heard(self) -> None:
        """Note that the process wrote a line."""
        self._heard = self._active = time.monotonic()

    def look(self) -> None:
        """Look at the processor time and the log of the process."""
        seconds, written = self._state()
        if written != self._seen[1]:
            self.heard()
        elif seconds < self._seen[0] + 1.0:
            return
        self._active = time.monotonic()
        self._seen = (seconds, written)

    def _state(self) -> tuple[float, int]:
        """Return (seconds of processor time, size of the log in bytes), or (0, -1) if the process has just ended."""
        try:
            times = psutil.Process(self._pid).cpu_times()
        except psutil.Error:  # it has just ended
            return 0.0, -1
        return times.user + times.system, os.fstat(self._log.fileno()).st_size


def _hangs(request: BuildRequest, title: str, watch: ProcessWatch, log_file: Path) -> EngineError:
    """Return the error for a process that hangs."""
    return EngineError(
        f"the {request.backend} builder process of {title} hangs: for {SILENT_SECONDS:.0f} s of {watch.running:.0f} s it "
        f"wrote nothing and used no processor\n  log:\n{_tail(log_file)}",
        fix="run the same command with --resume: weights and graphs are kept, and the engine is begun again",
    )


def _outcome(request: BuildRequest, title: str, result: dict[str, Any], code: int, log_file: Path) -> BuildReport:
    """Return the report of an ended process, or raise its error.

    Args:
        request: The request.
        title: The name of the engine file.
        result: The last report or error that the process sent, or an empty dict.
        code: Its exit code; negative means a signal.
        log_file: The file of its log, whose tail goes into the error.

    Raises:
        DvdquantError: The process reported an error, of the class that it named.
        EngineError: The process crashed.
    """
    if code == 0 and result.get("kind") == "report":
        return BuildReport.from_json(result["report"])
    tail = _tail(log_file)
    if result.get("kind") == "error":
        found = getattr(errors, str(result.get("type")), EngineError)
        kind = found if isinstance(found, type) and issubclass(found, DvdquantError) else EngineError
        what = str(result.get("what"))
        what = what if kind is EngineError else f"{title}: {what}"
        what += f"\n  log:\n{tail}" if result.get("log_says_why") else ""
        memory = result.get("out_of_memory") is True or (bool(result.get("log_says_why")) and says_no_memory(tail))
        raise kind(what, available=result.get("available"), fix=result.get("fix"), out_of_memory=memory)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    said = says_no_memory(tail)
    memory = said or code == -signal.SIGKILL
    fix = (
        memory_advice(request.backend)
        if memory
        else "run the same command with --resume, and report the log if it ends like this again"
    )
    raise EngineError(
        f"the {request.backend} builder process of {title} {how}\n  log:\n{tail}", fix=fix, out_of_memory=said
    )


def _tail(log_file: Path) -> str:
    """Return the last lines of a log, indented."""
    with log_file.open(errors="replace") as log:
        return "".join(f"    {line}" for line in deque(log, TAIL_LINES))


class _Bar:
    """One bar over the steps of all phases that the builder announces.

    Args:
        title: The name of the engine file.
        shown: Draw the bar.
    """

    def __init__(self, title: str, shown: bool) -> None:
        self._title = title
        self._bar: tqdm[Any] = tqdm(desc=title, total=0, disable=not shown, leave=False, unit="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def beat(self, watch: ProcessWatch) -> None:
        """Show that the builder is still there, and for how long it has said nothing.

        Args:
            watch: The signs of life of its process.
        """
        self._bar.set_description_str(f"{self._title} ({watch.running:.0f} s, silent for {watch.silent:.0f} s)")

    def update(self, message: dict[str, Any]) -> None:
        """Take one progress message of the worker.

        Args:
            message: A message of kind ``phase``, with its name and its number of steps, or ``step``. Others have no
                effect.
        """
        if message["kind"] == "phase":
            self._bar.total += message["steps"]
            self._bar.set_description_str(self._title, refresh=False)
            self._bar.set_postfix_str(message["name"])
        elif message["kind"] == "step":
            self._bar.update(1)
