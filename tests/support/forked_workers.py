"""Workers of a server with stubs, forked from one process that has imported what each of them would import anew.

The server starts ``python -S -E forked_worker.py SOCKET FD`` in the place of a worker. That asks this process for a fork,
hands it its streams and the server's channel, and ends as the fork ends; if it is killed, so is the fork.

    python -m tests.support.forked_workers SOCKET
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.rare_collections import collect_rarely

__all__ = ["ForkServer", "forked_workers", "serve"]

Work = Callable[[list[int], list[str]], int]
REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = (
    "onnxruntime", "dvdquant.deploy.generation.generate", "dvdquant.deploy.generation.video", "dvdquant.deploy.switching.factory",
    "dvdquant.deploy.sessions.onnxruntime", "dvdquant.deploy.sessions.pytorch", "diffusers.pipelines.wan.pipeline_wan",
)  # fmt: skip


class ForkServer:
    """A process that forks others, from start to :meth:`close`.

    Args:
        module: The module that it runs.
    """

    def __init__(self, module: str) -> None:
        path = Path(tempfile.mkdtemp(prefix="dvdq-workers-")) / "socket"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            stdin=subprocess.PIPE,  # it ends when this process does
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.asks = ("-S", "-E", str(Path(__file__).with_name("forked_worker.py")), str(path))
        """What an interpreter gets to ask for a fork, before the descriptor."""

    def close(self) -> None:
        """End it, and what it forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def forked_workers() -> dict[str, str]:
    """Start the process, once a test process, and return the variable for ``ServerProcess(stub=…)`` to use it."""
    server = ForkServer(__name__)
    atexit.register(server.close)
    return {"STUB_WORKER": json.dumps([sys.executable, *server.asks])}


def work(descriptors: list[int], _words: list[str]) -> int:
    """Be a worker with a stub's session; return its exit code.

    Args:
        descriptors: Its channel alone.
    """
    from benchmarks.serving.stub_worker import StubSession
    from dvdquant.deploy.serve.worker_process import main

    return main([str(descriptors[0])], StubSession)  # type: ignore[arg-type]


def fork(asked: dict[str, Any], descriptors: list[int], work: Work) -> int:
    """Fork a process that does ``work``; return its process id.

    Args:
        asked: The variables of the environment, the folder, and the arguments.
        descriptors: Its stdout, its stderr, and what else it was given.
        work: What it does with the other descriptors and the arguments; returns its exit code.
    """
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, descriptor in enumerate(descriptors[:2], 1):
            os.dup2(descriptor, number)
        code = work(descriptors[2:], asked["words"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def serve(path: str, modules: Sequence[str], work: Work) -> None:
    """Import modules, fork a process for every connection until stdin closes, and then kill them all.

    Args:
        path: The socket to listen at.
        modules: What the processes import.
        work: What they do (:func:`fork`).
    """
    collect_rarely()
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page of what was imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    workers: dict[int, tuple[int, socket.socket]] = {}  # its pidfd -> process id, who asked for it
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(0, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in ready.select():
                if key.fd == 0:
                    for pid, _ in workers.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    caller, _ = listener.accept()
                    message, descriptors, _, _ = socket.recv_fds(caller, 1 << 20, 3)
                    pid = fork(json.loads(message), descriptors, work)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    workers[watch := os.pidfd_open(pid)] = pid, caller
                    ready.register(watch, selectors.EVENT_READ)
                    ready.register(caller, selectors.EVENT_READ, watch)
                elif key.data is not None:  # who asked for it is gone
                    ready.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError, KeyError):
                        os.kill(workers[key.data][0], signal.SIGKILL)
                else:
                    pid, caller = workers.pop(key.fd)
                    _, status = os.waitpid(pid, 0)
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    with contextlib.suppress(OSError):
                        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                    with contextlib.suppress(KeyError):
                        ready.unregister(caller)
                    caller.close()


if __name__ == "__main__":
    serve(sys.argv[1], MODULES, work)
