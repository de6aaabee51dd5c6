"""The processor of this machine, by the name that Linux gives it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["processor_name"]


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
