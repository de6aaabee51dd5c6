"""TensorRT and TensorRT-RTX behind one name: the same Python API, different modules, imported only when asked for."""

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
        module: the Python module.
        version: its release; an engine loads in this release only.
    """

    name: BackendName
    module: Any
    version: str

    @property
    def takes_plugins(self) -> bool:
        """TensorRT-RTX aborts the process on any plugin."""
        return self.name == TENSORRT

    @property
    def builds_for_sms(self) -> bool:
        """TensorRT-RTX compiles for the SMs it is told, without a GPU; TensorRT for the GPU it runs on."""
        return self.name == RTX

    def compute_capability(self, sm: str) -> Any:
        """The library's own value for ``sm`` ("8.9"); UnsupportedError lists those it has."""
        members = self.module.ComputeCapability.__members__
        key = "SM" + sm.replace(".", "")
        if key not in members:
            known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
            raise UnsupportedError(
                f"{self.name} {self.version} has no SM {sm}", available=known, fix="pick one with --sm"
            )
        return members[key]


def backend_name(name: str) -> BackendName:
    """The module behind ``rtx``, ``tensorrt_rtx`` or ``tensorrt``; UnsupportedError for any other name."""
    if name not in _ALIASES:
        raise UnsupportedError(f"unknown engine backend {name!r}", available=["rtx", "tensorrt"])
    return _ALIASES[name]


def load_backend(name: str) -> Backend:
    """Import the builder library called ``rtx``, ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        UnsupportedError: no such backend.
        EngineError: it is not installed or its libraries do not load; says how to install it.
    """
    module_name = backend_name(name)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"{module_name} cannot be imported: {error}", fix=_INSTALL[module_name]) from error
    return Backend(module_name, module, str(module.__version__))
