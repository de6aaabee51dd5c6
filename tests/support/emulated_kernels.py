"""The kernels' own source, compiled for the CPU, behind the binding of the kernel library."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dvdquant.ops.cuda.library import KernelLibrary
from tests.support.scripts import load_script

__all__ = ["KERNELS", "library", "one_thread"]

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture(scope="module")
def library() -> Iterator[KernelLibrary]:
    """Compile the library or take it from the build folder; at the end its threads run in their usual order again.

    A module that imports this fixture opens it once.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the emulated kernels")
    # Not `import build`: a package of that name is installed beside the tests.
    opened = KernelLibrary(load_script(KERNELS / "build.py").build_emulated())
    yield opened
    opened.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run thousands of tiny products on one thread: handing them to threads costs more than they do.

    A module that imports this fixture has it for all of its tests.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
