"""How loops are compiled: numba, machine code kept on disk where possible, no threads of its own."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

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
    else:
        _compile_one_at_a_time(compiled)
    return cast(Callable[P, R], compiled)


def _compile_one_at_a_time(compiled: Any) -> None:
    """Let one process compile while others wait and then load what it wrote.

    A function linked with callees from the cache may sum in another order than one compiled together with them: two
    processes that race on a cold cache would then give codes that differ at rounding ties.
    """
    compile_for = compiled._compile_for_args

    def alone(*args: Any, **kwargs: Any) -> Any:
        with _locked(Path(compiled.stats.cache_path)):
            return compile_for(*args, **kwargs)

    compiled._compile_for_args = alone


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".dvdquant.lock").open("w")
    except OSError:  # a cache that can be read and not written: nobody compiles into it
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
