"""What kind of disk a file lies on, by the kernel's list of mounts."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_in_memory", "mounts_of"]

MOUNTS = Path("/proc/self/mountinfo")
"""The table of mounts of this process."""
_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def mounts_of(device: int) -> list[tuple[str, str]]:
    """Return (kind, options) of every mount of a device; none where the list cannot be read.

    Args:
        device: The number of the device, ``st_dev`` of a file on it.
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    number = f"{os.major(device)}:{os.minor(device)}"
    return [_kind_and_options(line) for line in lines if line.split()[2:3] == [number]]


def is_in_memory(place: str | Path) -> bool:
    """Return whether the files of a folder lie in memory and not on a disk; what cannot be found out counts as a disk.

    Args:
        place: The folder.
    """
    try:
        device = os.stat(place).st_dev
    except OSError:
        return False
    return any(kind in _MEMORY for kind, _ in mounts_of(device))


def _kind_and_options(line: str) -> tuple[str, str]:
    """Return the type and the options of one line of mountinfo, which follow a lone hyphen."""
    kind, _, options = [*line.partition(" - ")[2].split(), "", "", ""][:3]
    return kind, options
