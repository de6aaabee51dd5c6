"""Build an engine in a process of its own: a crash of the builder becomes an error, and its memory comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

import dvdquant
from dvdquant import errors
from dvdquant.errors import EngineError, OutputError

from .backend import backend_name
from .report import BUILD_MEMORY_FACTOR, MARK, BuildReport, BuildRequest, Shapes

__all__ = ["build_engine"]

TAIL_LINES = 30


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
    data_roots: Sequence[Path] = (),
    log_file: Path | None = None,
    progress: bool = False,
) -> BuildReport:
    """Build ``model`` into the file ``engine``, which appears complete or not at all.

    Args:
        model: an ONNX file, or a serialized ModelProto. External data is mapped, not copied.
        backend: ``rtx`` or ``tensorrt``.
        sms: targets such as "8.9". TensorRT-RTX puts all of them in one engine; TensorRT builds for the GPU present.
        profile: (min, opt, max) shape of every dynamic input.
        plugins: TensorRT plugin libraries, which the engine needs again when it is loaded; refused for TensorRT-RTX.
        workspace_bytes: the builder's workspace limit; must exceed the weights. Default: the library's.
        timing_cache: file to read and update; a no-op in TensorRT-RTX.
        optimization_level: 0 to 5; no effect on TensorRT-RTX builds.
        data_roots: folders external data may lie in, besides the model's own; with ``bytes`` the first is the one that
            locations are relative to.
        log_file: gets the builder's whole log.
        progress: show a bar on stderr.

    Raises:
        EngineError: the backend is not installed, refuses the graph, fails, or crashes (with the tail of its log).
        UnsupportedError: an SM the backend does not know.
        OutputError: the folder of ``engine`` is missing, or the disk is full.
    """
    engine = engine.absolute()
    if not engine.parent.is_dir():
        raise OutputError(f"{engine.parent} is no folder", fix="create it first")
    with tempfile.TemporaryDirectory(prefix=".dvdq-build-", dir=engine.parent) as scratch:
        folder = Path(scratch)
        path, roots = _model_file(model, folder, data_roots)
        request = BuildRequest(
            backend=backend_name(backend),
            model=str(path),
            engine=str(folder / "engine"),
            sms=tuple(sms),
            data_dir=str(roots[0].absolute()),
            data_roots=tuple(str(root.absolute()) for root in roots),
            profile=None if profile is None else {k: [list(s) for s in v] for k, v in profile.items()},
            plugins=tuple(str(p.absolute()) for p in plugins),
            workspace_bytes=workspace_bytes,
            timing_cache=str(timing_cache.absolute()) if timing_cache else None,
            optimization_level=optimization_level,
        )
        report = _run(request, folder, log_file or folder / "log", progress)
        os.replace(request.engine, engine)
    _sync_folder(engine.parent)
    return report


def _model_file(model: Path | bytes, scratch: Path, data_roots: Sequence[Path]) -> tuple[Path, list[Path]]:
    """(the ONNX file, the folders its data may lie in, the one locations are relative to first)."""
    if isinstance(model, Path):
        return model.absolute(), [model.absolute().parent, *data_roots]
    path = scratch / "model.onnx"
    path.write_bytes(model)
    return path, list(data_roots) or [scratch]


def _run(request: BuildRequest, folder: Path, log_file: Path, progress: bool) -> BuildReport:
    spec = folder / "request.json"
    spec.write_text(request.to_json())
    environment = dict(os.environ)
    # The process must find this package the way this one did, installed or not.
    parent = str(Path(dvdquant.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (parent, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "dvdquant.export.builders.worker", str(spec)]
    result: dict[str, Any] = {}
    with log_file.open("wb") as log, _Bar(Path(request.engine).name, progress) as bar:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, errors="replace"
        )
        try:
            for line in process.stdout or ():
                if not line.startswith(MARK):
                    log.write(line.encode())
                    continue
                message = json.loads(line[len(MARK) :])
                if message["kind"] in ("report", "error"):
                    result = message
                else:
                    bar.update(message)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return _outcome(request, result, code, log_file)


def _outcome(request: BuildRequest, result: dict[str, Any], code: int, log_file: Path) -> BuildReport:
    if code == 0 and result.get("kind") == "report":
        return BuildReport.from_json(result["report"])
    tail = _tail(log_file)
    if result.get("kind") == "error":
        kind = getattr(errors, result["type"], EngineError)
        what = result["what"] + (f"\n  log:\n{tail}" if "could not build" in result["what"] else "")
        raise kind(what, available=result["available"], fix=result["fix"])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    fix = (
        f"free memory: a build takes up to {BUILD_MEMORY_FACTOR} times the bytes of the weights"
        if code == -signal.SIGKILL
        else None
    )
    raise EngineError(f"the {request.backend} builder process {how}\n  log:\n{tail}", fix=fix)


def _tail(log_file: Path) -> str:
    with log_file.open(errors="replace") as log:
        return "".join(f"    {line}" for line in deque(log, TAIL_LINES))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Bar:
    """One bar over the steps of all phases the builder announces."""

    def __init__(self, title: str, shown: bool) -> None:
        self._bar: tqdm[Any] = tqdm(desc=title, total=0, disable=not shown, leave=False, unit="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def update(self, message: dict[str, Any]) -> None:
        """Take one progress message of the worker."""
        if message["kind"] == "phase":
            self._bar.total += message["steps"]
            self._bar.set_postfix_str(message["name"])
        elif message["kind"] == "step":
            self._bar.update(1)
