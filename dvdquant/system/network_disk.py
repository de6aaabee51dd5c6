"""Whether a lock on a file holds for one machine only, as on disks of a network that keep locks to the client."""

from __future__ import annotations

import contextlib
import os
import re
import threading

from dvdquant.system.mounts import mounts_of

__all__ = ["LIVE_SECONDS", "RENEW_SECONDS", "Heartbeat", "locks_stay_here"]

LIVE_SECONDS = 24 * 3600
"""How long what another machine wrote last counts as its living work, where no lock can tell."""
RENEW_SECONDS = 600
"""How often living work renews the time of its file: a step of it may take more than ``LIVE_SECONDS``."""
_NFS = ("nfs", "nfs4")
# Their locks are those of the client, or are so by a mount option that is not shown.
_ONE_HOST = ("cifs", "smb3", "9p", "lustre", "afs", "virtiofs", "vboxsf", "prl_fs", "fuse.sshfs")


class Heartbeat:
    """A thread that renews the time of an open file, so that other machines see that its holder lives.

    It runs only where a lock is not seen by them. A killed process takes it along, and a step that takes days does not stop it.

    Args:
        fd: The descriptor of the file, which stays open until :meth:`stop` has returned.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if locks_stay_here(fd):
            thread = threading.Thread(target=self._run, name="dvdquant-heartbeat", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread is left: a day must do
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        """Renew the time until the holder stops."""
        while not self._stopped.wait(RENEW_SECONDS):
            self.renew()

    def renew(self) -> None:
        """Renew the time now; a disk that is away for a while is no reason to stop."""
        with contextlib.suppress(OSError):
            os.utime(self._fd)

    def stop(self) -> None:
        """End the thread; the descriptor may be closed after it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()


def locks_stay_here(fd: int) -> bool:
    """Return whether ``flock`` on this open file is not seen by other machines that mount the same disk.

    NFS of today has its server hold the lock; the options ``nolock`` and ``local_lock`` keep it to the client. What cannot
    be found out counts as a disk of this machine.

    Args:
        fd: The descriptor of the open file.
    """
    try:
        device = os.fstat(fd).st_dev
    except OSError:
        return False
    return any(_stay_here(*mount) for mount in mounts_of(device))


def _stay_here(kind: str, options: str) -> bool:
    """Return the same of one mount."""
    if kind in _NFS:
        return re.search(r"(^|,)(nolock|local_lock=(all|flock))(,|$)", options) is not None
    return kind in _ONE_HOST
