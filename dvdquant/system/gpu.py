"""The GPU of this machine as its driver describes it, without PyTorch and without a context on the GPU.

The devices that engines are built on often have a PyTorch without CUDA, or none that sees the GPU.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

__all__ = ["Gpu", "read_gpu"]

# Members of the driver's CUdevice_attribute.
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: Its name.
        sm: Its compute capability, such as "8.7".
        memory_bytes: Its memory.
        shared_memory: True if that is the memory of the machine, as on a Jetson.
    """

    name: str
    sm: str
    memory_bytes: int
    shared_memory: bool


def read_gpu(index: int = 0) -> Gpu | None:
    """Return a GPU of this machine, or None if there is no driver or no such GPU.

    Args:
        index: The number of the GPU, as the driver counts.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    try:
        # Each call needs the one before; any of them answers 0, or the number of an error.
        if (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), index)
            or driver.cuDeviceGetName(name, len(name), device)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        ):
            return None
        values = [_attribute(driver, attribute, device) for attribute in (_MAJOR, _MINOR, _INTEGRATED)]
    except AttributeError:  # a library of that name without the driver's calls
        return None
    if None in values[:2]:
        return None
    return Gpu(name.value.decode(errors="replace"), f"{values[0]}.{values[1]}", memory.value, bool(values[2]))


def _attribute(driver: ctypes.CDLL, attribute: int, device: ctypes.c_int) -> int | None:
    """Return an attribute of the GPU, or None if the driver does not say it."""
    value = ctypes.c_int()
    return None if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) else value.value
