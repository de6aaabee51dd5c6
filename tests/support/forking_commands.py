"""A process that forks one command for every line it reads; itself a fork of one that has imported everything.

Protocol, JSON lines. In: ``{"words": ["run", "out", …], …}`` with the options of :func:`child`. Out: ``{"code": …, "out": …,
"err": …, "seconds": …}``; ``code`` is what a shell would see, both streams as Latin-1, a character for every byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import torch

from dvdquant.model.outline import outline_of
from tests.support.exporting import TINY_WAN
from tests.support.traces import share_traces

NAMES = ("export", "inspect", "plan", "run", "build", "bundle", "push", "bench", "doctor")
COMMANDS = {name: importlib.import_module(f"dvdquant.cli.{name}").main for name in NAMES}
MODULES = (
    "export.pipeline", "export.options", "deploy.report.page", "deploy.artifact", "deploy.generation.generate",
    "deploy.planning.planner", "deploy.planning.plot", "deploy.generation.run_report", "deploy.generation.video",
    "deploy.sessions", "deploy.generation.original", "checkpoint.prompt_table", "export.engines.polygraphy_tools",
    "system.progress", "quantize.layer_inputs", "hub.push", "export.on_device", "artifact.bundle",
)  # fmt: skip


def drop_root() -> None:
    """Take from this process what lets root pass over permissions; else a test of them sees nothing when run by root."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)(*([0] * 6)))


def child(request: dict[str, Any], streams: list[int]) -> None:
    """One command in this (forked) process; never returns.

    ``words``: command and arguments. ``cwd``; ``gone``: it is deleted first. ``closed``: descriptors closed as by ``>&-``.
    ``limits``: (name, value) of setrlimit; ``memory``: address space beyond what is mapped now. ``plain``: without root's
    rights. ``environment``: variables set. ``fault``: (module, function, message) that raises RuntimeError instead.
    """
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for name, value in request.get("environment", {}).items():
            os.environ[name] = value
        os.chdir(request["cwd"])
        if request.get("gone"):
            os.mkdir("gone")
            os.chdir("gone")
            os.rmdir(os.getcwd())
        sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))  # noqa: SIM115
        if "signal_said" in request:
            sys.stderr.reconfigure(line_buffering=True)  # as that of an interpreter is
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        for number in request.get("closed", []):
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        for name, value in request.get("limits", []):
            resource.setrlimit(getattr(resource, name), (value, value))
        if "memory" in request:
            with open("/proc/self/statm") as file:
                mapped = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + request["memory"],) * 2)
        if "fault" in request:
            module, function, message = request["fault"]

            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError(message)

            setattr(importlib.import_module(module), function, fail)
        if request.get("plain"):
            drop_root()
        name, *words = request["words"]
        try:
            COMMANDS[name].main(words, prog_name=f"dvdq-{name}")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:  # noqa: BLE001  a traceback is what the tests look for
        code = 1
        with contextlib.suppress(BaseException):
            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command and collect what it said; what runs longer than ``limit`` seconds is killed.

    ``signal_after``: (signal, seconds). ``signal_when``: (signal, pattern of a file). ``signal_said``: (signal, text).
    """
    with contextlib.ExitStack() as stack:
        files = []
        for number in range(3):
            given = request.get("streams", {}).get(str(number))
            if given == "broken":
                reader, writer = os.pipe()
                os.close(reader)
                stack.callback(os.close, writer)
                files.append(writer)
            elif given is not None:
                files.append(stack.enter_context(open(given, "r+b" if number else "rb", buffering=0)).fileno())
            else:
                files.append(stack.enter_context(tempfile.TemporaryFile(buffering=0)).fileno())
        started = time.monotonic()
        if (pid := os.fork()) == 0:
            child(request, files)
        watch = os.pidfd_open(pid)
        stack.callback(os.close, watch)
        for name in {"signal_when", "signal_said"} & request.keys():
            number, text = request[name]
            deadline = started + request.get("limit", 60)
            while not _is_there(name, text, request["cwd"], files[2]) and time.monotonic() < deadline:
                if select.select([watch], [], [], 0.02)[0]:
                    break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        pause = request.get("signal_after")
        if pause is not None and not select.select([watch], [], [], pause[1])[0]:
            os.kill(pid, pause[0])
        if not select.select([watch], [], [], request.get("limit", 60))[0]:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        said = []
        for number in (1, 2):
            taken = str(number) in request.get("streams", {})
            size = 0 if taken else os.fstat(files[number]).st_size
            said.append("" if taken else os.pread(files[number], size, 0).decode("latin-1"))
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code if code >= 0 else 128 - code,
        "out": said[0],
        "err": said[1],
        "seconds": time.monotonic() - started,
    }


def _is_there(name: str, text: str, folder: str, errors: int) -> bool:
    """Whether a file of that pattern is there (``signal_when``), or standard error holds that text (``signal_said``)."""
    if name == "signal_when":
        return bool(glob.glob(os.path.join(folder, text)))
    return text.encode() in os.pread(errors, os.fstat(errors).st_size, 0)


def import_all() -> None:
    """Import what the commands need, and plan the models that they read, so that no child does it once more."""
    for name in MODULES:
        importlib.import_module(f"dvdquant.{name}")
    import diffusers
    import matplotlib.pyplot
    import onnx
    import onnxruntime

    for name in ("WanTransformer3DModel", "FlowMatchEulerDiscreteScheduler"):
        getattr(diffusers, name)
    assert all((onnx, onnxruntime, matplotlib.pyplot))
    config = json.loads((TINY_WAN / "transformer" / "config.json").read_text())
    for blocks in (config["num_layers"], 1):
        assert outline_of({**config, "num_layers": blocks}, torch.bfloat16).shared_inputs


def main() -> None:
    """Serve until stdin closes."""
    # A run in the background, or under nohup, hands down that these are ignored; the commands are asked as from a terminal.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # no pool of OpenMP threads, which a fork would not inherit
    share_traces()
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)
    for line in requests:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
