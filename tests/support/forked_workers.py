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
from pathlib import Path
from typing import Any

from tests.support.rare_collections import collect_rarely

__all__ = ["forked_workers"]

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = (
    "onnxruntime", "dvdquant.deploy.generation.generate", "dvdquant.deploy.generation.video", "dvdquant.deploy.switching.factory",
    "dvdquant.deploy.sessions.onnxruntime", "dvdquant.deploy.sessions.pytorch", "diffusers.pipelines.wan.pipeline_wan",
)  # fmt: skip


@functools.cache
def forked_workers() -> dict[str, str]:
    """Start the process, once a test process, and return the variable for ``ServerProcess(stub=…)`` to use it."""
    path = Path(tempfile.mkdtemp(prefix="dvdq-workers-")) / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(path)],
        stdin=subprocess.PIPE,  # it ends when this process does
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    asks = Path(__file__).with_name("forked_worker.py")
    return {"STUB_WORKER": json.dumps([sys.executable, "-S", "-E", str(asks), str(path)])}


def fork_worker(asked: dict[str, Any], descriptors: list[int]) -> int:
    """Fork a worker; return its process id.

    Args:
        asked: The variables of the environment, and the folder.
        descriptors: Its stdout, its stderr and its channel.
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
        from benchmarks.serving.stub_worker import StubSession
        from dvdquant.deploy.serve.worker_process import main

        code = main([str(descriptors[2])], StubSession)  # type: ignore[arg-type]
        sys.stderr.flush()
    finally:
        os._exit(code)


def serve(path: str) -> None:
    """Fork a worker for every connection until stdin closes; then kill them all.

    Args:
        path: The socket to listen at.
    """
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
                    pid = fork_worker(json.loads(message), descriptors)
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
    collect_rarely()
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page of what was imported
    serve(sys.argv[1])
