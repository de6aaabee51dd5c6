"""What a plugin library is for, read from its bytes: nothing of it is loaded, so it may be for another machine."""

from __future__ import annotations

import mmap
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from dvdquant.errors import UnsupportedError
from dvdquant.system.files import open_regular

__all__ = ["PluginFile", "machine_name", "parse_plugin", "read_plugin"]

# e_machine of an ELF header.
_MACHINES = {62: "x86_64", 183: "aarch64"}
_TENSORRT = re.compile(rb"@dvdquant-plugin tensorrt=(\d{1,2})\0")
_KERNELS = re.compile(rb"@dvdquant-kernels=([0-9a-z_;]{1,200})\0")


@dataclass(frozen=True)
class PluginFile:
    """A plugin library.

    Args:
        path: The file.
        machine: The processor that it runs on, as ``uname -m`` says it.
        tensorrt_major: The major version of TensorRT that it is built for; None if it does not say.
        architectures: The GPU architectures of the kernels inside, such as ``("87", "110")``; empty if it loads them
            from another file.
    """

    path: Path
    machine: str
    tensorrt_major: int | None
    architectures: tuple[str, ...]


def machine_name() -> str:
    """Return the processor of this machine as ``uname -m`` says it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def read_plugin(path: Path) -> PluginFile:
    """Return what a plugin library is for.

    Args:
        path: The file.

    Raises:
        UnsupportedError: It cannot be read, or is no library of a processor that engines run on.
    """
    try:
        descriptor, size = open_regular(path)
        with os.fdopen(descriptor, "rb") as file:
            if not size:
                raise ValueError("it is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with data:
            return parse_plugin(path, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnsupportedError(
            f"the plugin library {path} cannot be read: {reason}", fix="give another file"
        ) from error


def parse_plugin(path: Path, data: bytes | mmap.mmap | memoryview) -> PluginFile:
    """Return what a plugin library is for.

    Args:
        path: The file that holds it, for the error.
        data: Its bytes.

    Raises:
        UnsupportedError: It is no library of a processor that engines run on.
    """
    head = bytes(data[:20])
    if head[:5] != b"\x7fELF\x02" or int.from_bytes(head[18:20], "little") not in _MACHINES:
        raise UnsupportedError(
            f"{path} is no plugin library for Linux on {' or '.join(_MACHINES.values())}",
            fix="give libdvdquant_plugins.so as make plugin builds it",
        )
    major, kernels = _TENSORRT.search(data), _KERNELS.search(data)
    return PluginFile(
        path,
        _MACHINES[int.from_bytes(head[18:20], "little")],
        None if major is None else int(major[1]),
        () if kernels is None else tuple(kernels[1].decode().split(";")),
    )
