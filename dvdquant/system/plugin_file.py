"""What a plugin library is for, read from its bytes: nothing of it is loaded, so it may be for another machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dvdquant.errors import UnsupportedError
from dvdquant.system.files import open_regular
from dvdquant.system.records import brief
from dvdquant.system.several import one_or_several

__all__ = ["MAX_PLUGIN", "PluginFile", "Plugins", "machine_name", "parse_plugin", "plugin_paths", "read_plugin"]

MAX_PLUGIN = 256 << 20
"""The most bytes of a plugin library; with the kernels for all GPUs it has a tenth of them."""
Plugins = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""Plugin libraries as somebody names them: one path, or several."""
_FIX = "give libdvdquant_plugins.so as make plugin builds it"
# The head of an ELF file: 64 bit, little-endian; then e_type, which is 3 for a shared library, and e_machine.
_ELF = b"\x7fELF\x02\x01"
_SHARED = 3
_MACHINES = {62: "x86_64", 183: "aarch64"}
_TENSORRT = re.compile(rb"@dvdquant-plugin tensorrt=(\d{1,2})\0")
_KERNELS = re.compile(rb"@dvdquant-kernels=([0-9a-z_;]{1,200})\0")


@dataclass(frozen=True)
class PluginFile:
    """A plugin library.

    Args:
        path: The file.
        machine: The processor that it runs on, as ``uname -m`` says it.
        tensorrt_major: The major version of TensorRT that it is built for.
        architectures: The GPU architectures of the kernels inside, such as ``("87", "110")``; empty if it loads them
            from another file.
    """

    path: Path
    machine: str
    tensorrt_major: int
    architectures: tuple[str, ...]


def machine_name() -> str:
    """Return the processor of this machine as ``uname -m`` says it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def plugin_paths(plugins: Plugins) -> tuple[Path, ...]:
    """Return the absolute paths of the plugin libraries that somebody named. Nothing of them is read.

    Args:
        plugins: One path, or several.

    Raises:
        UnsupportedError: One is no path, or no file is there.
    """
    paths = []
    for plugin in one_or_several(plugins):
        if not isinstance(plugin, (str, os.PathLike)) or not os.fspath(plugin):
            raise UnsupportedError(
                f"plugins holds {brief(plugin)}", available="a path, or several", fix="give the path of the library"
            )
        path = Path(plugin).absolute()
        if not path.is_file():
            raise UnsupportedError(f"the plugin library {path} is not there", fix=_FIX)
        paths.append(path)
    return tuple(paths)


def read_plugin(path: Path) -> PluginFile:
    """Return what a plugin library is for.

    Args:
        path: The file.

    Raises:
        UnsupportedError: It cannot be read, or is no plugin library of dvdquant.
    """
    try:
        descriptor, size = open_regular(path)
        with os.fdopen(descriptor, "rb") as file:
            if not size:
                raise ValueError("it is empty")
            if size > MAX_PLUGIN:
                raise ValueError(f"it has more than {MAX_PLUGIN >> 20} MiB")
            # Read, not mapped: a mapped file that another program cuts off ends this process.
            data = file.read(size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnsupportedError(f"the plugin library {path} cannot be read: {reason}", fix=_FIX) from error
    return parse_plugin(path, data)


def parse_plugin(path: Path, data: bytes) -> PluginFile:
    """Return what a plugin library is for.

    Args:
        path: The file that holds it, for the error.
        data: Its bytes.

    Raises:
        UnsupportedError: It is no plugin library of dvdquant for a processor that engines run on.
    """
    kind, machine = int.from_bytes(data[16:18], "little"), _MACHINES.get(int.from_bytes(data[18:20], "little"))
    if data[: len(_ELF)] != _ELF or kind != _SHARED or machine is None:
        raise UnsupportedError(
            f"{path} is no plugin library for Linux on {' or '.join(_MACHINES.values())}",
            fix=_FIX,
        )
    major, kernels = _TENSORRT.search(data), _KERNELS.search(data)
    if major is None:
        what = "holds dvdquant's kernels without the plugin" if kernels else "is another library or program"
        raise UnsupportedError(
            f"{path} is no plugin library of dvdquant: it {what}, for {machine}",
            fix=f"{_FIX}; one of an older version has to be built again",
        )
    return PluginFile(
        path,
        machine,
        int(major[1]),
        () if kernels is None else tuple(kernels[1].decode().split(";")),
    )
