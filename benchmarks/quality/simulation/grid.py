"""The activation grid of a simulated layer as one call, compiled where there is a compiler: shift, divide, rotate, round."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvdquant.numerics.activation_grid import QMAX, fake_quantize_activation
from dvdquant.numerics.hadamard import Rotation
from dvdquant.system.whole_file import write_whole

__all__ = ["Grid", "rotated_to_grid", "rotated_to_nvfp4"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_FOLDER = _SOURCE.parents[3] / "build" / "quality"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@dataclass(frozen=True)
class Grid:
    """Rounds x [..., K] to symmetric codes with one scale per token, or per group of its channels.

    Args:
        bits: Bits of a code.
        group: Channels that share a scale; 0 is the whole token.
    """

    bits: int
    group: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the codes of ``x`` stand for.

        Args:
            x: [..., K], floating point.
        """
        return fake_quantize_activation(x, self.bits, self.group)


def rotated_to_grid(
    x: Tensor, shift: Tensor | None, divide: Tensor | None, rotation: Rotation | None, grid: Grid
) -> Tensor | None:
    """Return ``grid(rotate((x - shift) / divide))`` in bf16, or None where that has no compiled form.

    Args:
        x: [..., K] fp32 or bf16 on the CPU.
        shift: fp32 [K], or None.
        divide: fp32 [K], or None.
        rotation: The rotation, or None.
        grid: The grid.
    """
    features, block = x.shape[-1], 1 if rotation is None else rotation.block
    group = grid.group or features
    if not (_fits(x, rotation) and group % 16 == 0) or (library := _library()) is None:
        return None
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    library.quality_grid(
        x.data_ptr(), x.dtype == torch.bfloat16, None if shift is None else shift.data_ptr(),
        None if divide is None else divide.data_ptr(), x.numel() // features, features, block, group, QMAX[grid.bits],
        out.data_ptr(),
    )  # fmt: skip
    return out


def rotated_to_nvfp4(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, rotation: Rotation, power: float
) -> tuple[Tensor, Tensor] | None:
    """Return what NVFP4 engines multiply, bf16 [..., K], and the largest value of every token; None without a compiled form.

    Args:
        x: [..., K] fp32 or bf16 on the CPU.
        shift: fp32 [K] of ``(x - shift) * scale``, or None.
        scale: fp32 [K] of the same, or None.
        rotation: The rotation.
        power: The magnitude that the rotation's entries have in the graph, a power of two.
    """
    if not _fits(x, rotation) or (library := _library()) is None:
        return None
    x = x.contiguous()
    out, amax = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(*x.shape[:-1], 1)
    library.quality_nvfp4(
        x.data_ptr(), x.dtype == torch.bfloat16, None if shift is None else shift.data_ptr(),
        None if scale is None else scale.data_ptr(), amax.numel(), x.shape[-1], rotation.block, power, out.data_ptr(),
        amax.data_ptr(),
    )  # fmt: skip
    return out, amax


def _fits(x: Tensor, rotation: Rotation | None) -> bool:
    """Return whether the compiled forms have this input and rotation."""
    block = 1 if rotation is None else rotation.block
    sylvester = rotation is None or rotation.outer == 1
    whole = x.shape[-1] % 64 == 0 and (block == 1 or block % 16 == 0)
    return sylvester and whole and x.dtype in (torch.float32, torch.bfloat16)


@lru_cache
def _library() -> Any:
    """Return ``grid.cpp`` compiled for this machine, named after its content; None where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    machine = next((l for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("flags")), "")
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{compiler} {_FLAGS} {machine}".encode()).hexdigest()[:16]
    path = _FOLDER / f"grid-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / path.name
            subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], check=True)
            write_whole(path, built.read_bytes())
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.quality_grid.argtypes = [
        pointer, integer, pointer, pointer, ctypes.c_int64, integer, integer, integer, ctypes.c_float, pointer,
    ]  # fmt: skip
    library.quality_grid.restype = None
    library.quality_nvfp4.argtypes = [
        pointer, integer, pointer, pointer, ctypes.c_int64, integer, integer, ctypes.c_float, pointer, pointer,
    ]  # fmt: skip
    library.quality_nvfp4.restype = None
    return library
