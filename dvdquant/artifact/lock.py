"""The lock of an output folder: one export writes at a time, and a killed one locks nothing."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
import time
from pathlib import Path

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import LOCK
from dvdquant.errors import OutputError
from dvdquant.system.files import write_all
from dvdquant.system.network_disk import LIVE_SECONDS, Heartbeat, locks_stay_here

__all__ = ["FolderLock"]

_LOOKS, _LOOK_SECONDS = 100, 0.01  # waits for readers that only look at the lock, and seconds per wait

logger = logging.getLogger(__name__)


class FolderLock:
    """An exclusive lock on a folder, held by ``flock`` on its ``.lock`` and gone with the process.

    Args:
        path: The folder.

    Attributes:
        folder: The locked folder, open until the release.

    Raises:
        OutputError: Another process holds the lock (the error names its pid), or ``.lock`` is no file of dvdquant.
        FileNotFoundError: The folder vanished.
    """

    def __init__(self, path: Path) -> None:
        looks = _LOOKS
        while True:
            self.folder = Folder.open(path)
            self._fd = -1
            self._heartbeat: Heartbeat | None = None
            try:
                self._fd = self._open()
                if self._try_lock(looks) and self._is_current() and os.path.samestat(os.lstat(path), self.folder.own()):
                    if os.fstat(self._fd).st_nlink == 1:
                        self._refuse_other_host()
                        self._sign()
                        self._heartbeat = Heartbeat(self._fd)
                        return
                    # The file system counts names in its own way, or somebody links the file again and again.
                    if looks < -_LOOKS:
                        raise OutputError(
                            f"cannot write {path / LOCK}: it has other names", fix="delete it or pick another -o"
                        )
                    # The file has a second name, perhaps elsewhere, so it must not be written. Take it out of the way.
                    self.folder.unlink(LOCK)
            except FileNotFoundError:
                if looks < -_LOOKS or not os.path.lexists(path):
                    self._close()
                    raise
            except BaseException:
                self._close()
                raise
            # A reader held the lock, or the last holder removed or replaced this file: lock the file that is there now.
            self._close()
            looks -= 1

    def _open(self) -> int:
        """Open the lock file, or make it.

        Raises:
            OutputError: Something else than a file has its name.
            OSError: It cannot be opened.
        """
        info, place = self.folder.info(LOCK), self.folder.path / LOCK
        if info is not None and not stat.S_ISREG(info.st_mode):
            raise OutputError(f"cannot write {place}: it is no file of dvdquant", fix="delete it or pick another -o")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(LOCK, flags, 0o644, dir_fd=self.folder.fd)
        except OSError as error:
            error.filename = str(place)
            raise

    def _try_lock(self, looks: int) -> bool:
        """Lock the file and return True, or return False if only readers were in the way.

        Args:
            looks: The number of waits that are left for readers; below 1, the function does not wait for them.

        Raises:
            OutputError: Another export holds the lock, or readers are still in the way after the last wait.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if looks > 0:
                    time.sleep(_LOOK_SECONDS)
                    return False
            holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise OutputError(
                f"{self.folder.path} is being written by another export ({holder!r:.200})",
                fix="wait for it to end or pick another -o",
            ) from None
        return True

    def _is_current(self) -> bool:
        """Return whether the open lock file is still the one in the folder."""
        there = self.folder.info(LOCK)
        return there is not None and os.path.samestat(there, os.fstat(self._fd))

    def _refuse_other_host(self) -> None:
        """Refuse a lock that an export on another machine signed lately, where the disk keeps locks to one machine.

        Raises:
            OutputError: It is signed by another machine, less than a day ago.
        """
        if not locks_stay_here(self._fd):
            return
        holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip()
        host = holder.partition(" on ")[2]
        age = time.time() - os.fstat(self._fd).st_mtime
        if host and host != socket.gethostname() and age < LIVE_SECONDS:
            raise OutputError(
                f"{self.folder.path} is perhaps being written by an export on another machine ({holder!r:.200}): "
                "this disk keeps locks to one machine",
                fix=f"wait for it to end or pick another -o; if nothing runs there any more, delete {self.folder.path / LOCK}",
            )

    def touch(self) -> None:
        """Renew the time of the lock file at once, which tells other machines that its holder lives."""
        if self._heartbeat is not None:
            self._heartbeat.renew()

    def _sign(self) -> None:
        """Write the pid and the host into the lock file, for the error of another export."""
        try:
            os.ftruncate(self._fd, 0)
            write_all(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Remove the lock file, then let go: a process that opened it meanwhile notices and opens a new one.

        A file that cannot be removed is left with a warning: it locks nothing once the process has ended.
        """
        if self._fd < 0:
            return
        try:
            if self._is_current():
                self.folder.unlink(LOCK)
        except OSError as error:
            place = self.folder.path / LOCK
            logger.warning("%s could not be removed (%s); it locks nothing and may be deleted", place, error.strerror)
        finally:
            self._close()

    def _close(self) -> None:
        """Close the lock file and the folder."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # an earlier write may be reported here, but the lock file holds no data
            if fd >= 0:
                os.close(fd)
        self.folder.close()
