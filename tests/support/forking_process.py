"""The process that the processes of ``forked_processes.py`` are forked from, when they are asked for.

    python -m tests.support.forking_process SOCKET [TESTS…]

With the names of tests it first collects them, so that their files are imported, too, and compiles the quantizer's loops.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import io
import json
import os
import selectors
import signal
import socket
import sys
import threading
import types
from typing import Any

import pytest
import torch
from tqdm import tqdm

from tests.support.forked_processes import LEASE
from tests.support.rare_collections import collect_rarely
from tests.support.warm_up import compile_in_two_processes

__all__ = ["fork", "serve"]

MODULES = (
    "onnxruntime", "dvdquant.deploy.generation.generate", "dvdquant.deploy.generation.video", "dvdquant.deploy.switching.factory",
    "dvdquant.deploy.sessions.onnxruntime", "dvdquant.deploy.sessions.pytorch", "diffusers.pipelines.wan.pipeline_wan",
    "dvdquant.deploy.sessions.engine_process", "dvdquant.deploy.serve.workers.worker_process",
    "dvdquant.export.engines.worker",
)  # fmt: skip


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
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
            from dvdquant.deploy.serve.workers import worker_process

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
        elif asked["kind"] == "tests":
            code = _be_a_test_process(asked["words"][-1])
        else:
            from tests.support import forking_commands

            forking_commands.main()
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _be_a_test_process(line: str) -> int:
    """Run the line that execnet gives ``python -c``, which runs what comes on stdin; return the exit code."""
    gc.enable()
    # A process that this one spawns imports the main module of this one: there is none, as with `python -c`.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(line, main.__dict__)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        atexit._run_exitfuncs()
    return 0


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
    path, *tests = sys.argv[1:]
    compiling = compile_in_two_processes() if tests else []
    forking_commands.import_all()
    if tests:
        _import_tests(tests)
    for process in compiling:
        process.join()
    torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in a fork would copy every page of what was imported
    _join_pages()
    # Ctrl-C is for the first process of the run, with which this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(path)


def _join_pages() -> None:
    """Let the kernel put what this process holds on large pages: a fork copies the table of pages, which is short then.

    A kernel before Linux 6.1 refuses, and then forks take their time.
    """
    collapse, large = 25, 2 << 20  # MADV_COLLAPSE, bytes of a large page
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as file:
        for line in file.read().splitlines():
            addresses, rights, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            first, length = -(-start // large) * large, end // large * large - -(-start // large) * large
            if rights == "rw-p" and inode == "0" and length > 0:
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), collapse)


def _import_tests(tests: list[str]) -> None:
    """Collect tests, for the imports of their files. What fails here fails again in the test processes, and is said there."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["--collect-only", "-qq", "-p", "no:xdist", "-p", "no:cacheprovider", *tests])


if __name__ == "__main__":
    main()
