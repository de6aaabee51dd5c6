"""How loops are compiled: numba, machine code kept on disk where possible, no threads of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

__all__ = ["jit"]

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles ``function`` on its first call, without the GIL and with sums reordered into SIMD lanes.

    Only for loops that never see NaN or Inf. numba notices a change of the file a function is in, but not of a function
    it calls from another file: compiled functions that call each other stay in one file.
    """
    options = {"nogil": True, "fastmath": True}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:
        # numba's "no locator available": neither the package folder nor the user's cache folder is writable. Compiling
        # in every process takes seconds; a shared temporary folder would let others plant machine code.
        compiled = njit(**options)(function)
    return cast(Callable[P, R], compiled)
