"""Processes forked from one that has imported what each of them would import anew: PyTorch, diffusers, the whole package.

Workers of a server with stubs, sessions for another process, builders of engines, the commands of ``forking_commands.py``,
the exports of ``forking_exporter.py`` and, with ``pytest --forked-workers``, the test processes. In the place of such a process
``python -S -E forked_process.py SOCKET KIND …`` is started. It asks ``forking_process.py`` for a fork, hands over its streams
and the channel, and ends as the fork ends; if it is killed, so is the fork. The test processes of a run share one process that
forks, which ends with the last of them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.folders import STORE, shared_folder

__all__ = ["LEASE", "forked_process", "forked_workers", "start_with_tests"]

REPOSITORY = Path(__file__).resolve().parents[2]
# The variable that names the socket of a process that the first process of a run has started.
SOCKET = "DVDQUANT_TEST_FORKS"
LEASE = b"lease"  # what a test process says to keep the process alive until it ends itself


def forked_workers() -> dict[str, str]:
    """Return the variable for ``ServerProcess(stub=…)`` with which its workers are forks."""
    return {"STUB_WORKER": json.dumps(forked_process("worker"))}


def forked_process(kind: str) -> list[str]:
    """Return the command of a process that is a fork; the number of its channel, or its arguments, come last.

    Args:
        kind: ``worker`` or ``session``; or ``builder``, ``commands``, ``exporter`` or ``tests``, which have no channel.
    """
    asks = Path(__file__).with_name("forked_process.py")
    return [sys.executable, "-S", "-E", str(asks), str(_socket()), kind]


def start_with_tests(tests: list[str]) -> str:
    """Start the process of a run, which collects tests before anything is forked from it.

    Args:
        tests: Their folders, files or names.

    Returns:
        The command line of a test process, for execnet in the place of its Python.
    """
    folder = Path(tempfile.mkdtemp(dir=os.environ[STORE]))
    _start(folder, *tests)
    os.environ[SOCKET] = str(folder / "socket")
    return shlex.join(forked_process("tests"))


@functools.cache
def _socket() -> Path:
    """Return where the process of this run listens; start it if there is none."""
    if SOCKET in os.environ and _hold(path := Path(os.environ[SOCKET])):
        return path
    path = shared_folder("forked-processes", _start) / "socket"
    if not _hold(path):  # the test processes that used it have ended meanwhile, and it with them
        folder = Path(tempfile.mkdtemp(prefix="dvdq-forks-"))
        _start(folder)
        path = folder / "socket"
        assert _hold(path)
    return path


def _start(folder: Path, *tests: str) -> None:
    """Start the process; wait for it when this process ends, so that its processor seconds are counted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forking_process", str(folder / "socket"), *tests],
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
