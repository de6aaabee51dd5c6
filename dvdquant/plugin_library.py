"""Whether a plugin library suits a library of engines, this machine and its GPU; and loading it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvdquant.backends import Backend
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.hardware.capabilities import sm_number
from dvdquant.hardware.make_lines import make_plugin
from dvdquant.ops.cuda.architectures import serves
from dvdquant.system.gpu import Gpu
from dvdquant.system.plugin_file import PluginFile, machine_name, read_plugin

__all__ = ["check_plugin", "load_plugin", "require_no_plugins"]


def require_no_plugins(library: Backend, plugins: Sequence[object]) -> None:
    """Refuse plugin libraries for a library of engines that has no plugins.

    Args:
        library: The library that builds or runs engines.
        plugins: The paths of the plugin libraries; none is no error.

    Raises:
        EngineError: There are some, and it has no plugins.
    """
    if plugins and not library.takes_plugins:
        raise EngineError(
            f"{library.name} has no plugins, got {[str(plugin) for plugin in plugins]}",
            fix="leave them out, or use the tensorrt backend",
        )


def check_plugin(plugin: PluginFile, library: Backend, gpu: Gpu | None) -> None:
    """Refuse a plugin library that this machine, its TensorRT or its GPU cannot use.

    Args:
        plugin: The plugin library.
        library: The TensorRT that is installed.
        gpu: The GPU of this machine, or None.

    Raises:
        UnsupportedError: It is for another processor or another GPU.
        EngineError: It is for another major version of TensorRT.
    """
    line = _make_line(gpu)
    if plugin.machine != machine_name():
        raise UnsupportedError(
            f"{plugin.path} is for {plugin.machine}, and this machine is {machine_name()}",
            fix=f"build it for this machine: {line}",
        )
    _check_major(plugin, library, line)
    if gpu is not None and plugin.architectures and not serves(plugin.architectures, sm_number(gpu.sm)):
        raise UnsupportedError(
            f"the kernels in {plugin.path} are for {', '.join(plugin.architectures)}, and this GPU has SM {gpu.sm}",
            fix=f"build them for it: {line}",
        )


def load_plugin(path: Path, library: Backend, registry: Any) -> None:
    """Register a plugin library. Its code runs: load only libraries that you built.

    Args:
        path: The plugin library.
        library: The library that builds or runs the engines.
        registry: Its plugin registry, or that of its builder.

    Raises:
        EngineError: There is no such file, it is for another major version, or it does not load.
    """
    path = path.resolve()  # a name alone would be searched for in the folders of the system
    if not path.is_file():
        raise EngineError(f"there is no plugin library {path}", fix=f"give the path of the built one: {_make_line()}")
    # Older versions built it without the marks: the registry says whether that loads.
    with contextlib.suppress(UnsupportedError):
        _check_major(read_plugin(path), library, _make_line())
    if registry.load_library(str(path)) is None:
        raise EngineError(
            f"plugin library {path} does not load in {library.name} {library.version}",
            fix=f"build it for this release of TensorRT: {_make_line()}",
        )


def _make_line(gpu: Gpu | None = None) -> str:
    """Return the line that builds the plugin library for this machine."""
    return make_plugin(machine_name(), [] if gpu is None else [gpu.sm], machine_name())


def _check_major(plugin: PluginFile, library: Backend, line: str) -> None:
    """Refuse a plugin library for another major version of TensorRT.

    The plugin looks for its own version in the process. It may find it where TensorRT and a lean runtime of different
    major versions are both loaded, and then the other one would call it.

    Raises:
        EngineError: It is for another major version.
    """
    major = library.version.partition(".")[0]
    if str(plugin.tensorrt_major) != major:
        raise EngineError(
            f"{plugin.path} is built for TensorRT {plugin.tensorrt_major}, and this machine has {library.name} "
            f"{library.version}",
            fix=f"build it with the headers of TensorRT {major}: {line}",
        )
