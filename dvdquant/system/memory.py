"""The memory that a process may still take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from dvdquant.errors import ShapeError
from dvdquant.text import shown

__all__ = ["memory_limit", "parse_amount"]


_AMOUNT = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([KMGT])(i?)B?", re.ASCII | re.IGNORECASE)


def parse_amount(text: str, option: str) -> int:
    """Return a number of bytes that was written with a unit.

    Args:
        text: ``16GiB``, ``16G`` (the same), ``16384MiB``; ``16GB`` is 16 · 10⁹.
        option: The option that it was given with, for the error.

    Raises:
        ShapeError: It is none.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ShapeError(f"{option} is {shown(text, 80)}", available="a size such as 16GiB or 7500MiB")
    decimal = text.strip().upper().endswith("B") and not match[3]
    return int(float(match[1]) * (1000 if decimal else 1024) ** ("KMGT".index(match[2].upper()) + 1))


@dataclass(frozen=True)
class _Names:
    """The files of one version of control groups.

    ``reclaimable`` names the same memory that ``MemAvailable`` of the whole machine counts: pages of files, recently
    used or not, and slab memory. Files in memory (tmpfs, shared memory) and locked pages are in none of these fields.
    Pages that are not yet written count: the kernel writes them and then takes them back.

    Args:
        mount: The folder where the groups are mounted, below the root.
        limits: The files that hold a limit in bytes.
        used: The file that holds the bytes in use.
        reclaimable: The fields of ``memory.stat`` that the kernel can take back.
    """

    mount: str
    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]


_V2 = _Names(
    mount="sys/fs/cgroup",
    # Above "high" nothing is killed, but the kernel slows the group down until it is below again.
    limits=("memory.max", "memory.high"),
    used="memory.current",
    reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
)
_V1 = _Names(
    mount="sys/fs/cgroup/memory",
    limits=("memory.limit_in_bytes",),
    used="memory.usage_in_bytes",
    # The usage includes the groups below, so the totals belong to it. Version 1 does not count slab memory here.
    reclaimable=("total_inactive_file", "total_active_file"),
)


def memory_limit(root: Path = Path("/")) -> int:
    """Return the bytes that this process and its children may still take: the least of machine and control groups.

    A control group has left its limit less its use. Memory that the kernel can take back (the page cache of a
    checkpoint that was just downloaded) does not count as in use. Every group from the process's own to the root is
    asked.

    Args:
        root: The folder where ``proc`` and ``sys`` are.
    """
    left = int(psutil.virtual_memory().available)
    for names, folder in _groups(root):
        left = min(left, _left_in_group(names, folder, left))
    return max(left, 0)


def _groups(root: Path) -> Iterator[tuple[_Names, Path]]:
    """Yield the folders of the process's control groups and of all above them; some may not exist."""
    paths = {_V2: PurePosixPath("/"), _V1: PurePosixPath("/")}
    for line in _read(root / "proc/self/cgroup").splitlines():
        # hierarchy:controllers:path; version 2 has hierarchy 0 and no controllers.
        hierarchy, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths[_V2] = PurePosixPath(own)
        elif "memory" in controllers.split(","):
            paths[_V1] = PurePosixPath(own)
    for names, path in paths.items():
        mount = root / names.mount
        # The mount itself is always asked: in a container it is the container's group, whatever path the host gave it.
        yield names, mount
        if ".." in path.parts:  # the group lies outside of what this namespace can see
            continue
        for group in (path, *path.parents):
            inside = str(group).lstrip("/")
            if inside:
                yield names, mount / inside


def _left_in_group(names: _Names, folder: Path, otherwise: int) -> int:
    """Return the bytes that one control group has left, or ``otherwise`` if it has no limit.

    Args:
        names: The names of its files.
        folder: The folder of the group, which may not exist.
        otherwise: The result for a group without a known limit, in bytes.
    """
    limits = [_number(_read(folder / name)) for name in names.limits]
    known = [limit for limit in limits if limit is not None]
    if not known:  # there is no such group, it has no limit ("max"), or it cannot be read
        return otherwise
    used = _number(_read(folder / names.used)) or 0
    reclaimable = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in names.reclaimable:
            reclaimable += _number(value) or 0
    return min(known) - max(used - reclaimable, 0)


def _number(text: str) -> int | None:
    """Return the number that the text of a file holds, or None if it is no number ("max")."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _read(path: Path) -> str:
    """Return the text of a file, or an empty text if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
