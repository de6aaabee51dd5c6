"""Workers that outlive their server, and the next server that goes on with them.

A server that is killed does not take its workers along: they finish what they draw, and wait for a while for the next server of
the same data folder. It finds them by two files each in ``DATA/workers``: a lock, which a worker holds as long as it lives, and
a socket, at which a worker without a server listens. So a restart of the server costs no job and no loading of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvdquant.deploy.serve.workers.channel import Channel

__all__ = ["Berth", "LeftWorker", "find_left", "is_held", "remove"]

_ANSWER_SECONDS = 5.0
_LOOK = 0.02


class Berth:
    """The place at which the next server finds this worker; made and held by the worker.

    Args:
        folder: The folder of the workers; it is made.
        name: The name of the worker.

    Raises:
        OSError: The folder refuses, or its disk has no sockets.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whoever sees the lock finds it held, with the number in it: one that nobody holds counts as a dead worker's.
        hidden = folder / f".{name}"
        self._lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        hidden.rename(folder / f"{name}.lock")
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            with _short(folder) as place:
                self._listener.bind(f"{place}/{name}.sock")
            self._listener.listen(1)
        except OSError:
            self.close()
            raise

    def wait(self, seconds: float) -> Channel | None:
        """Return the channel to the next server, or None if none came. Its log becomes that of this process.

        Args:
            seconds: The time to wait.
        """
        self._listener.settimeout(max(0.0, seconds))
        try:
            end, _ = self._listener.accept()
        except OSError:  # of the time as well
            return None
        end.settimeout(_ANSWER_SECONDS)
        try:
            _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
        except OSError:
            descriptors = []
        for descriptor in descriptors:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)
        end.settimeout(None)
        return Channel(end)

    def close(self) -> None:
        """Leave no file behind."""
        self._listener.close()
        remove(self._folder, self._name)
        with contextlib.suppress(OSError):
            os.close(self._lock)


class LeftWorker:
    """A worker without a server, as the next server sees it; in the place of a process that this one started.

    Args:
        folder: The folder of the workers.
        name: The name of the worker.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.channel: Channel | None = None
        text = ""
        with contextlib.suppress(OSError):  # it has ended in this moment
            text = (folder / f"{name}.lock").read_text(encoding="ascii", errors="replace").strip()
        self.pid = int(text) if text.isdecimal() else 0

    def ask(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """Send the first message of a new server, and return the answer; None if the worker gives none.

        Args:
            event: ``settings`` to go on with it, ``let_go`` to end it.
            fields: The values of the message.
        """
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(_ANSWER_SECONDS)
        try:
            with _short(self.folder) as place:
                end.connect(f"{place}/{self.name}.sock")
            socket.send_fds(end, [b"\n"], [2])
        except OSError:
            end.close()
            return None
        channel = Channel(end)
        channel.send(event, **fields)
        answer = next(iter(channel), None)
        if answer is None:
            channel.close()
            return None
        end.settimeout(None)
        self.channel = channel
        return answer

    def poll(self) -> int | None:
        """Return None while the process lives; then a number, because nobody knows its exit code."""
        return None if is_held(self.folder / f"{self.name}.lock") else -1

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            subprocess.TimeoutExpired: It goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.name, timeout or 0)
            time.sleep(_LOOK)
        return code

    def kill(self) -> None:
        """End the process at once. Its lock tells that the number is still its own."""
        if self.pid > 1 and self.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def find_left(folder: Path) -> list[LeftWorker]:
    """Return the workers that live; the files of others are deleted.

    Args:
        folder: The folder of the workers. No other server may use it.
    """
    found = []
    for lock in sorted(folder.glob("*.lock")):
        if is_held(lock):
            found.append(LeftWorker(folder, lock.stem))
        else:
            remove(folder, lock.stem)
    return found


def remove(folder: Path, name: str) -> None:
    """Delete the files of a worker that has ended.

    Args:
        folder: The folder of the workers.
        name: The name of the worker.
    """
    for suffix in ("sock", "lock"):
        with contextlib.suppress(OSError):
            (folder / f"{name}.{suffix}").unlink()


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock file: the worker that made it lives.

    Args:
        lock: The path of the lock file.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """Give a short name of a folder: the address of a socket has 107 bytes at most."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
