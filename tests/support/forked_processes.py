"""Processes forked from one that has imported what each of them would import anew: PyTorch, diffusers, the whole package.

Workers of a server with stubs, sessions for another process, builders of engines, the commands of ``forking_commands.py``,
and the exports of ``forking_exporter.py``. In the place of such a process ``python -S -E forked_process.py SOCKET KIND …`` is
started. It asks for a fork, hands over its streams and the channel, and ends as the fork ends; if it is killed, so is the
fork. The test processes of a run share one such process, which ends with the last of them.

    python -m tests.support.forked_processes SOCKET
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.support.folders import shared_folder
from tests.support.rare_collections import collect_rarely

__all__ = ["forked_process", "forked_workers"]

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = (
    "onnxruntime", "dvdquant.deploy.generation.generate", "dvdquant.deploy.generation.video", "dvdquant.deploy.switching.factory",
    "dvdquant.deploy.sessions.onnxruntime", "dvdquant.deploy.sessions.pytorch", "diffusers.pipelines.wan.pipeline_wan",
    "dvdquant.deploy.sessions.engine_process", "dvdquant.deploy.serve.worker_process",
    "dvdquant.export.engines.worker",
)  # fmt: skip
LEASE = b"lease"  # what a test process says to keep the process alive until it ends itself


def forked_workers() -> dict[str, str]:
    """Return the variable for ``ServerProcess(stub=…)`` with which its workers are forks."""
    return {"STUB_WORKER": json.dumps(forked_process("worker"))}


def forked_process(kind: str) -> list[str]:
    """Return the command of a process that is a fork; the number of its channel, or its arguments, come last.

    Args:
        kind: ``worker`` or ``session``; or ``builder``, ``commands`` or ``exporter``, which have no channel.
    """
    asks = Path(__file__).with_name("forked_process.py")
    return [sys.executable, "-S", "-E", str(asks), str(_socket()), kind]


@functools.cache
def _socket() -> Path:
    """Return where the process of this run listens; start it if there is none."""
    path = shared_folder("forked-processes", _start) / "socket"
    if not _hold(path):  # the test processes that used it have ended meanwhile, and it with them
        folder = Path(tempfile.mkdtemp(prefix="dvdq-forks-"))
        _start(folder)
        path = folder / "socket"
        assert _hold(path)
    return path


def _start(folder: Path) -> None:
    """Start the process; wait for it when this process ends, so that its processor seconds are counted."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder / "socket")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.wait)
    assert _hold(folder / "socket")


def _hold(path: Path) -> bool:
    """Keep the process at a socket alive until this process ends; return whether it is there."""
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(str(path))
        end.sendall(LEASE)
        held = end.recv(16) == LEASE
    except OSError:
        held = False
    if held:
        atexit.register(end.close)
    return held


def fork(asked: dict[str, Any], descriptors: list[int]) -> int:
    """Fork a process; return its process id.

    Args:
        asked: Its kind, its arguments, the variables of its environment, and its folder.
        descriptors: Its stdin, its stdout, its stderr and, if it has one, its channel.
    """
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        # Its own lies in shared memory: a fork that is killed with it held would stop all others, and their forks.
        tqdm.set_lock(threading.RLock())
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *descriptors[3:]}:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(descriptor)
        words = [str(number) for number in descriptors[3:]]
        if asked["kind"] == "worker":
            from benchmarks.serving.stub_worker import StubSession
            from dvdquant.deploy.serve import worker_process

            code = worker_process.main(words, StubSession)  # type: ignore[arg-type]
        elif asked["kind"] == "session":
            from dvdquant.deploy.sessions import engine_process

            code = engine_process.main(words)
        elif asked["kind"] == "builder":
            from dvdquant.export.engines import worker

            code = worker.main(asked["words"])
        elif asked["kind"] == "exporter":
            from tests.support import forking_exporter

            forking_exporter.main()
            code = 0
        else:
            from tests.support import forking_commands

            forking_commands.main()
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def serve(path: str) -> None:
    """Fork a process for every connection until the last lease has ended; then kill them all.

    Args:
        path: The socket to listen at.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    forks: dict[int, tuple[int, socket.socket]] = {}  # its pidfd -> process id, who asked for it
    leases: set[socket.socket] = set()
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in ready.select():
                if key.fileobj is listener:
                    caller, _ = listener.accept()
                    message, descriptors, _, _ = socket.recv_fds(caller, 1 << 20, 4)
                    if message == LEASE:
                        leases.add(caller)
                        ready.register(caller, selectors.EVENT_READ)
                        caller.sendall(LEASE)
                        continue
                    pid = fork(json.loads(message), descriptors)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    forks[watch := os.pidfd_open(pid)] = pid, caller
                    ready.register(watch, selectors.EVENT_READ)
                    ready.register(caller, selectors.EVENT_READ, watch)
                elif key.fileobj in leases:  # a test process has ended
                    ready.unregister(key.fileobj)
                    leases.discard(key.fileobj)  # type: ignore[arg-type]
                    key.fileobj.close()  # type: ignore[union-attr]
                    if not leases:
                        for pid, _ in forks.values():
                            os.kill(pid, signal.SIGKILL)
                        for pid, _ in forks.values():
                            os.waitpid(pid, 0)
                        return
                elif key.data is not None:  # who asked for it is gone
                    with contextlib.suppress(
                        ProcessLookupError, KeyError, ValueError
                    ):  # it may have ended by itself, too
                        ready.unregister(key.fileobj)
                        os.kill(forks[key.data][0], signal.SIGKILL)
                else:
                    pid, caller = forks.pop(key.fd)
                    _, status = os.waitpid(pid, 0)
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    with contextlib.suppress(OSError):
                        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                    with contextlib.suppress(KeyError):
                        ready.unregister(caller)
                    caller.close()


def main() -> None:
    """Import what the forks need, and serve."""
    collect_rarely()
    for name in MODULES:
        importlib.import_module(name)
    if importlib.util.find_spec("tensorrt_rtx"):
        importlib.import_module("tensorrt_rtx")
    from tests.support import forking_commands

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no pool of OpenMP threads, which a fork would not inherit
    forking_commands.import_all()
    torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page of what was imported
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
