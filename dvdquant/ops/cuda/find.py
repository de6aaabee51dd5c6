"""Find the kernel library of this installation, and open it once.

The library is looked for, in this order:

1. the file that the environment variable ``DVDQUANT_KERNELS`` names (an error if it is not there),
2. ``build/kernels/libdvdquant_kernels.so`` of a checkout, which ``make kernels`` writes,
3. ``_native/libdvdquant_kernels.so`` inside the installed package.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from dvdquant.ops.cuda.errors import BUILD, KernelError
from dvdquant.ops.cuda.library import KernelLibrary

__all__ = ["find_library", "load_library"]

ENVIRONMENT = "DVDQUANT_KERNELS"
LIBRARY = "libdvdquant_kernels.so"


def find_library() -> Path | None:
    """Return the path of this installation's kernel library, or None if it was not built.

    Raises:
        KernelError: ``DVDQUANT_KERNELS`` names a file that is not there.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise KernelError(f"{ENVIRONMENT}={named}: there is no such file", fix=BUILD)
        return Path(named)
    package = Path(__file__).resolve().parents[2]
    candidates = (package.parent / "build" / "kernels" / LIBRARY, package / "_native" / LIBRARY)
    return next((path for path in candidates if path.is_file()), None)


def load_library() -> KernelLibrary:
    """Return the library of this installation, opened once per file.

    Raises:
        KernelError: The library was not built, or it cannot be used.
    """
    path = find_library()
    if path is None:
        raise KernelError("the CUDA kernel library is not built", fix=BUILD)
    return _opened(path.resolve())


@functools.lru_cache(maxsize=8)
def _opened(path: Path) -> KernelLibrary:
    return KernelLibrary(path)
