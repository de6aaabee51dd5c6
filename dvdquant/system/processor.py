"""The processor of this machine, by the name that Linux gives it, and how many of its cores are ours."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

__all__ = ["processor_name", "usable_cores"]


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the first processor, such as "AMD EPYC 9B14"; its architecture where there is none.

    Args:
        info: The file in which Linux lists them.
    """
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may run on: a container or ``taskset`` may leave it a part of them."""
    return len(os.sched_getaffinity(0))
