"""Whether a lock on a file holds for one machine only, as on disks of a network that keep locks to the client."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["LIVE_SECONDS", "locks_stay_here"]

LIVE_SECONDS = 24 * 3600
"""How long what another machine wrote last counts as its living work, where no lock can tell."""
_MOUNTS = Path("/proc/self/mountinfo")
_NFS = ("nfs", "nfs4")
# Their locks are those of the client, or are so by a mount option that is not shown.
_ONE_HOST = ("cifs", "smb3", "9p", "lustre", "afs", "virtiofs", "vboxsf", "prl_fs", "fuse.sshfs")


def locks_stay_here(fd: int) -> bool:
    """Return whether ``flock`` on this open file is not seen by other machines that mount the same disk.

    NFS of today has its server hold the lock; the options ``nolock`` and ``local_lock`` keep it to the client. What cannot
    be found out counts as a disk of this machine.

    Args:
        fd: The descriptor of the open file.
    """
    try:
        info = os.fstat(fd)
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    device = f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}"
    return any(_stay_here(line) for line in lines if line.split()[2:3] == [device])


def _stay_here(line: str) -> bool:
    """Return the same of one line of mountinfo: the type and the options follow a lone hyphen."""
    kind, _, options = [*line.partition(" - ")[2].split(), "", "", ""][:3]
    if kind in _NFS:
        return re.search(r"(^|,)(nolock|local_lock=(all|flock))(,|$)", options) is not None
    return kind in _ONE_HOST
