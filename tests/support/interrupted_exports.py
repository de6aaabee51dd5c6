"""Exports that are killed, run out of space or race with others, in forks of a small process."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dvdquant.artifact.commit
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import OutputError
from tests.support.children import in_child
from tests.support.folders import memory_folder
from tests.support.written_exports import KEY, export, export_resumable, six_steps


def at_operation(count: int, action: Callable[[], None], out: Path) -> None:
    """From now on, run ``action`` before the ``count``-th operation on names below or beside ``out``. For a child: an
    audit hook stays for good."""
    names = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    left = count

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in names:
            path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else None
            # What is reached by the descriptor of its folder has a name alone.
            within = path is None or not os.path.isabs(path) or str(out.parent) in path
            counted = within and (event != "open" or (path is not None and bool(args[2] & writing)))
        else:
            counted = event == "ctypes.dlsym"
        if counted:
            left -= 1
            if left == -1:
                action()

    sys.addaudithook(hook)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_exchange(*names: object) -> None:
    """In place of ``dvdquant.artifact.commit.exchange``: a file system without renameat2."""
    raise OSError(errno.EINVAL, "Invalid argument")


def disturbed(work: str, out: str, count: int, action: str, way: str) -> None:
    """Run ``export_2``, ``resumable`` or ``abandoned``, with ``action`` before the ``count``-th operation on names."""
    if way == "roll-forward":
        dvdquant.artifact.commit.exchange = no_exchange
    at_operation(count, {"kill": kill_self, "no space": no_space}[action], Path(out))
    if work == "abandoned":
        export(Path(out), 2, finish=False)
    elif work == "resumable":
        export_resumable(Path(out))
    else:
        export(Path(out), 2)


def in_child_disturbed(*arguments: Any) -> int:
    """As :func:`in_child` of :func:`disturbed`."""
    return in_child(lambda: disturbed(*arguments))


def in_child_abandoned(*arguments: Any) -> int:
    """As :func:`in_child` of :func:`abandoned_work`."""
    return in_child(lambda: abandoned_work(*arguments))


def abandoned_work(out: str, steps: int, key: Any = KEY, killed: bool = True) -> None:
    """Be killed, or fail, after some finished steps of an export."""
    with ExportTransaction(Path(out), key=key, keep_for_resume=True) as transaction:
        six_steps(transaction, steps)
        if killed:
            kill_self()
        raise ValueError("broken")


def raced(out: str, first: int, rivals: int) -> list[int]:
    """Export in as many processes at the same moment; the status of each: 0, 5 where another one exports, 8 or 9."""
    children, gate = [], os.pipe()
    for rival in range(rivals):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                os.close(gate[1])
                os.read(gate[0], 1)  # all start together, when the parent closes the gate
                export(Path(out), first + rival)
                code = 0
            except OutputError as error:
                code = 5 if "is being written by another export" in error.what else 8
            finally:
                os._exit(code)
        children.append(pid)
    os.close(gate[0])
    os.close(gate[1])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def killed_at_random(out: str, seconds: float) -> int:
    """Export version after version, killed so many seconds after the first begins; returns how many began."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for version in itertools.count(1):
                os.write(writes, b".")
                export(Path(out), version)
        finally:
            os._exit(1)
    os.close(writes)
    with open(reads, "rb", buffering=0) as began:
        count = len(began.read(1))
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        while part := began.read(1000):
            count += len(part)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return count


def make_ready_to_fork() -> None:
    """Do what else every forked export would do anew: imports at the first export, and looking for garbage."""
    with memory_folder() as folder:
        for version in (1, 2):
            export(Path(folder) / "out", version)
    gc.collect()
    gc.freeze()
    gc.disable()


class CleanChildren:
    """Runs exports in forks of a small process: forking one that holds torch takes ten times as long."""

    def __init__(self) -> None:
        code = (
            "import json, sys; from tests.support import interrupted_exports as h\n"
            "h.make_ready_to_fork()\n"
            "for line in sys.stdin:\n"
            "    name, *arguments = json.loads(line)\n"
            "    print(json.dumps(getattr(h, name)(*arguments)), flush=True)"
        )
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, work: str, out: Path, count: int, action: str, way: str = "exchange") -> int:
        """Run :func:`disturbed`; the exit status, as of :func:`in_child`."""
        return int(self._call("in_child_disturbed", work, str(out), count, action, way))

    def abandon(self, out: Path, steps: int) -> None:
        """Leave an export of so many finished steps behind, whose process was killed."""
        assert self._call("in_child_abandoned", str(out), steps) == -signal.SIGKILL

    def race(self, out: Path, first: int, rivals: int) -> list[int]:
        """As :func:`raced`."""
        return list(self._call("raced", str(out), first, rivals))

    def kill_at_random(self, out: Path, seconds: float) -> int:
        """As :func:`killed_at_random`."""
        return int(self._call("killed_at_random", str(out), seconds))

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, *arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()
