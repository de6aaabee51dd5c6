"""TensorRT and TensorRT-RTX behind one name: the same Python API in different modules, imported only when needed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from dvdquant.errors import EngineError, UnsupportedError

__all__ = ["RTX", "TENSORRT", "Backend", "BackendName", "backend_name", "load_backend"]

BackendName = Literal["tensorrt_rtx", "tensorrt"]
RTX: BackendName = "tensorrt_rtx"
TENSORRT: BackendName = "tensorrt"

_ALIASES: dict[str, BackendName] = {"rtx": RTX, "tensorrt_rtx": RTX, "tensorrt": TENSORRT}
_INSTALL = {
    RTX: "pip install tensorrt-rtx",
    TENSORRT: (
        "pip install 'dvdquant[tensorrt]' (the wheel fetches its libraries from NVIDIA's own index, so that host must "
        "be reachable), or use an NVIDIA TensorRT container; the rtx target needs neither"
    ),
}


@dataclass(frozen=True)
class Backend:
    """An imported builder library.

    Args:
        name: ``tensorrt_rtx`` or ``tensorrt``.
        module: The Python module.
        version: Its release; an engine loads in this release only.
    """

    name: BackendName
    module: Any
    version: str

    @property
    def takes_plugins(self) -> bool:
        """Return whether graphs may contain plugins; TensorRT-RTX aborts the process on any plugin."""
        return self.name == TENSORRT

    @property
    def builds_for_sms(self) -> bool:
        """Return whether the library compiles for the SMs that it is told.

        TensorRT-RTX does, and needs no GPU. TensorRT compiles for the GPU that it runs on.
        """
        return self.name == RTX

    def compute_capability(self, sm: str) -> Any:
        """Return the library's own value for a compute capability.

        Args:
            sm: The compute capability, such as "8.9".

        Raises:
            UnsupportedError: The library does not have it; the error lists those that it has.
        """
        members = self.module.ComputeCapability.__members__
        key = "SM" + sm.replace(".", "")
        if key not in members:
            known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
            raise UnsupportedError(
                f"{self.name} {self.version} has no SM {sm}", available=known, fix="pick one with --sm"
            )
        return members[key]


def backend_name(name: str) -> BackendName:
    """Return the name of the Python module for a backend.

    Args:
        name: ``rtx``, ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        UnsupportedError: There is no such backend.
    """
    if name not in _ALIASES:
        raise UnsupportedError(f"unknown engine backend {name!r}", available=["rtx", "tensorrt"])
    return _ALIASES[name]


def load_backend(name: str) -> Backend:
    """Import the builder library of a backend.

    Args:
        name: ``rtx``, ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        UnsupportedError: There is no such backend.
        EngineError: The library is not installed or does not load; the error says how to install it.
    """
    module_name = backend_name(name)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"{module_name} cannot be imported: {error}", fix=_INSTALL[module_name]) from error
    return Backend(module_name, module, str(module.__version__))
