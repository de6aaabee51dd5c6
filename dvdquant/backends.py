"""TensorRT, its lean runtime, and TensorRT-RTX: the same Python API in different modules, imported only when needed."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from dvdquant.errors import EngineError, UnsupportedError

__all__ = ["LEAN", "RTX", "TENSORRT", "Backend", "BackendName", "backend_name", "lean_package", "load_backend"]

BackendName = Literal["tensorrt_rtx", "tensorrt", "tensorrt_lean"]
RTX: BackendName = "tensorrt_rtx"
TENSORRT: BackendName = "tensorrt"
# TensorRT's runtime without its builder. It runs version-compatible engines alone, and only those of its own release.
LEAN: BackendName = "tensorrt_lean"

_ALIASES: dict[str, BackendName] = {"rtx": RTX, "tensorrt_rtx": RTX, "tensorrt": TENSORRT}
_INSTALL = {
    RTX: "pip install tensorrt-rtx",
    TENSORRT: (
        "pip install 'dvdquant[tensorrt]' (the wheel fetches its libraries from NVIDIA's own index, so that host must "
        "be reachable), or use an NVIDIA TensorRT container; the rtx target needs neither"
    ),
    LEAN: (
        "pip install tensorrt-lean-cu13==RELEASE (cu12 for CUDA 12), where RELEASE is the TensorRT that built the engines; "
        "only version-compatible engines need it"
    ),
}


@dataclass(frozen=True)
class Backend:
    """An imported library that builds engines, or runs them.

    Args:
        name: ``tensorrt_rtx``, ``tensorrt`` or ``tensorrt_lean``.
        module: The Python module.
        version: Its release; an engine loads in this release only.
    """

    name: BackendName
    module: Any
    version: str

    @property
    def takes_plugins(self) -> bool:
        """Return whether graphs may contain plugins; TensorRT-RTX aborts the process on any plugin."""
        return self.name != RTX

    @property
    def builder(self) -> BackendName:
        """Return the name of the library that builds the engines which this one runs, as manifests have it."""
        return TENSORRT if self.name == LEAN else self.name

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
    """Return the name of the Python module that builds the engines of a backend.

    Args:
        name: ``rtx``, ``tensorrt_rtx`` or ``tensorrt``.

    Raises:
        UnsupportedError: There is no such backend.
    """
    if name not in _ALIASES:
        raise UnsupportedError(f"unknown engine backend {name!r}", available=["rtx", "tensorrt"])
    return _ALIASES[name]


def lean_package(release: str, cuda: str | None) -> str | None:
    """Return the package of a lean runtime as an argument of ``pip install``, or None if the release is no version.

    Args:
        release: The release of TensorRT, as a manifest from a stranger may have it.
        cuda: The release of CUDA that PyTorch was built with, such as "13.0"; None without CUDA.
    """
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9}){1,3}", release):
        return None
    return f"tensorrt-lean-cu{12 if (cuda or '').startswith('12.') else 13}=={release}"


def load_backend(name: str) -> Backend:
    """Import the library of a backend.

    Args:
        name: ``rtx``, ``tensorrt_rtx`` or ``tensorrt``; or ``tensorrt_lean``, which builds nothing.

    Raises:
        UnsupportedError: There is no such backend.
        EngineError: The library is not installed or does not load; the error says how to install it.
    """
    module_name = LEAN if name == LEAN else backend_name(name)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"{module_name} cannot be imported: {error}", fix=_INSTALL[module_name]) from error
    return Backend(module_name, module, str(module.__version__))
