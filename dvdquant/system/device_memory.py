"""The memory of a device: what is free of it for this process, and what of it is never there for a run.

Nothing here imports torch before a device is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from dvdquant.system.memory import memory_limit

if TYPE_CHECKING:
    import torch

__all__ = ["KEPT_BACK", "device_memory", "shares_memory", "usable_bytes"]

GIB = 1 << 30
KEPT_BACK = {False: GIB, True: 2 * GIB}
"""What is not there for a run, by whether the device shares the host's memory: CUDA, its libraries and a screen; and the
system where it shares the memory. Assumed, not measured."""


def usable_bytes(total: int, shared: bool) -> int:
    """Return the bytes of a device that a run may take.

    Args:
        total: The memory that the driver or the system says that it has.
        shared: Whether that is the host's memory.
    """
    return max(0, total - KEPT_BACK[shared])


def shares_memory(device: torch.device) -> bool:
    """Return whether a device has no memory but the host's: a CPU, a Jetson, a GB10.

    Args:
        device: The CPU or a CUDA device.
    """
    if device.type != "cuda":
        return True
    import torch

    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return (bytes that are free for this process, bytes in all) of a device.

    Memory that PyTorch holds and does not use counts as free. Where the device shares the host's memory, that is free which
    the system says it can give (``MemAvailable``, and what control groups leave). CUDA counts only what nothing is in there,
    so that the cache of files, weights that were just read, would look used. Swap does not count.

    Args:
        device: The CPU or a CUDA device.
    """
    if device.type != "cuda":
        return memory_limit(), int(psutil.virtual_memory().total)
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if shares_memory(device):
        free = memory_limit()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free + unused, total), total
