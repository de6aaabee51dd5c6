"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["memory_limit"]


def memory_limit() -> int:
    """Bytes this process and its children may still take: available memory, or what its control group has left."""
    limit = int(psutil.virtual_memory().available)
    for maximum, current in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(maximum).read_text().strip()
            used = int(Path(current).read_text())
        except (OSError, ValueError):
            continue
        if text.isdigit():
            limit = min(limit, int(text) - used)
    return max(limit, 0)
