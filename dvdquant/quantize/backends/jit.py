"""How loops are compiled: numba, machine code kept on disk where possible, no threads of its own."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba import njit

from dvdquant.errors import ResourceError
from dvdquant.text import shown

__all__ = ["jit", "jit_part", "missing_hooks"]

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

# Another process compiles one function at a time, a few seconds each on an idle machine.
SAY_AFTER_SECONDS = 2.0
WAIT_SECONDS = 300.0
_POLL_SECONDS = 0.05
# What of numba's cache is used here, none of it public: `_compile_in_turn` says for what.
_HOOKS = ("load_overload", "save_overload", "flush", "cache_path")
_TESTED = "0.68"


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` on its first call, without the GIL and with sums reordered into SIMD lanes.

    Only for loops that never see NaN or Inf. numba notices a change of the file a function is in, but not of a function
    it calls from another file: compiled functions that call each other stay in one file, and those that are called are
    made by :func:`jit_part`.

    Args:
        function: A function of numbers and numpy arrays that numba can compile.

    Returns:
        The compiled function, with the same arguments.
    """
    return _compiled(function, forceinline=False)


def jit_part(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that only compiled functions call, into the code of each that calls it.

    A caller compiled here would else run this function's own machine code, and a caller loaded from the cache the copy
    that was optimized once more with it. Their sums go in another order, and at ties the codes of weights differ between
    the process that compiled and all that come later.

    Args:
        function: As for :func:`jit`.

    Returns:
        The compiled function, with the same arguments.
    """
    return _compiled(function, forceinline=True)


def _compiled(function: Callable[P, R], *, forceinline: bool) -> Callable[P, R]:
    # Nobody calls through a pointer of C, and nobody calls a part from Python, so their wrappers are not compiled.
    wrappers = {"no_cfunc_wrapper": True, "no_cpython_wrapper": forceinline}
    options = {"nogil": True, "fastmath": True, "forceinline": forceinline, **wrappers}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:
        # numba's "no locator available": neither the package folder nor the user's cache folder is writable. Compiling
        # in every process takes seconds; a shared temporary folder would let others plant machine code.
        compiled = njit(**options)(function)
    else:
        missing = missing_hooks(compiled)
        if missing:
            _say_no_cache(missing)
            compiled = njit(**options)(function)
        else:
            _compile_in_turn(compiled)
    return cast(Callable[P, R], compiled)


def missing_hooks(compiled: Any) -> str:
    """Return the name of what keeping compiled code between processes needs and this numba lacks; empty where it has all.

    Args:
        compiled: A function that numba compiles, with a cache.
    """
    if not callable(getattr(compiled, "compile", None)):
        return "Dispatcher.compile"
    store = getattr(compiled, "_cache", None)
    return next((f"Dispatcher._cache.{name}" for name in _HOOKS if not hasattr(store, name)), "")


@cache
def _say_no_cache(missing: str) -> None:
    log.warning(
        "numba %s has no %s, by which compiled code is kept between processes: every process compiles its loops anew, which "
        "takes seconds; install one that has it: pip install 'numba~=%s.0'",
        numba.__version__, missing, _TESTED,
    )  # fmt: skip


class _Turn(threading.local):
    """State of this thread's outermost compilation: its depth, and the lock it holds.

    numba compiles one function at a time, with its callees inside.
    """

    depth = 0
    asked = False
    lock: int | None = None

    def end(self) -> None:
        """Let the next process compile."""
        if self.lock is not None:
            # A process forked meanwhile has the descriptor too: closing ours alone would not let go.
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            os.close(self.lock)
        self.asked = False
        self.lock = None


_turn = _Turn()


def _compile_in_turn(compiled: Any) -> None:
    """Let one process compile the functions of a file while others wait and then load what it wrote.

    Processes that start together on a cold cache would else all spend the seconds of compiling, and slow each other down.

    What the cache has is loaded without asking for the turn: nobody can stop a process whose cache is warm. The turn is
    taken at the first function the cache lacks and held until the outermost function is compiled and stored. Who does
    not get it (no lock file can be made) compiles for itself and stores nothing.
    """
    store = compiled._cache
    compile_function = compiled.compile
    load_stored = store.load_overload
    save = store.save_overload
    folder = Path(store.cache_path)
    # Compiled functions of two files do not call each other (`jit`), so who needs those of another file does not wait.
    lock = folder / f".{Path(compiled.py_func.__code__.co_filename).stem}.lock"

    def load(signature: Any, context: Any) -> Any:
        try:
            return load_stored(signature, context)
        except Exception as error:  # noqa: BLE001 - a damaged file fails anywhere in pickle or LLVM
            log.warning(
                "compiled code in %s cannot be loaded and is made anew (%s: %s)",
                shown(folder), type(error).__name__, shown(error),
            )  # fmt: skip
            if _turn.lock is not None:
                with suppress(OSError):
                    store.flush()
            return None

    def load_or_take_turn(signature: Any, context: Any) -> Any:
        found = load(signature, context)
        if found is not None or _turn.depth == 0 or _turn.asked:
            return found
        _turn.asked = True
        _turn.lock = _locked(lock)
        return load(signature, context) if _turn.lock is not None else None

    def save_in_turn(signature: Any, result: Any) -> None:
        if _turn.lock is None:
            return
        try:
            save(signature, result)
        except OSError as error:
            log.warning("compiled code cannot be kept in %s: %s", shown(folder), shown(error.strerror or error))

    def compile_in_turn(signature: Any) -> Any:
        _turn.depth += 1
        try:
            return compile_function(signature)
        finally:
            _turn.depth -= 1
            if _turn.depth == 0:
                _turn.end()

    store.load_overload = load_or_take_turn
    store.save_overload = save_in_turn
    compiled.compile = compile_in_turn


def _locked(path: Path) -> int | None:
    """Return the descriptor of a lock file, held; None where there is none to hold.

    Raises:
        ResourceError: Another process held it for `WAIT_SECONDS`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nothing is ever written to it, and a link is not followed: a file that somebody put there stays as it is.
        lock = _open_lock(path)
    except OSError as error:
        log.warning("loops are compiled for this process alone: %s: %s", shown(path), shown(error.strerror or error))
        return None
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            log.warning("loops are compiled for this process alone: %s is not a file; remove it", shown(path))
            os.close(lock)
            return None
        _wait_for(lock, path)
    except OSError as error:  # a file system without locks
        log.warning("loops are compiled for this process alone: %s: %s", shown(path), shown(error.strerror or error))
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _open_lock(path: Path) -> int:
    """Open the lock file, for writing where that is allowed: NFS gives an exclusive lock to such a descriptor only."""
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags, 0o644)
    except PermissionError:  # the file is of somebody else
        return os.open(path, os.O_RDONLY | flags, 0o644)


def _wait_for(lock: int, path: Path) -> None:
    start = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - start
        if waited > WAIT_SECONDS:
            holder = _holder(lock)
            raise ResourceError(
                f"another process compiles the quantizer's loops and has not finished in {WAIT_SECONDS:g} seconds",
                available=f"{path}, locked by {holder}",
                fix="end that process if it hangs, then run again; or set NUMBA_CACHE_DIR to an empty folder of your own",
            )
        if waited > SAY_AFTER_SECONDS and not said:
            said = True
            log.warning(
                "waiting for %s, which compiles the quantizer's loops (lock %s), at most %g seconds",
                _holder(lock), shown(path), WAIT_SECONDS,
            )  # fmt: skip
        time.sleep(_POLL_SECONDS)


def _holder(lock: int) -> str:
    """Return the process that holds a lock, as text. The kernel says it, so no file need hold its number."""
    inode = str(os.fstat(lock).st_ino)
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(errors="replace").splitlines():
            # 1: FLOCK ADVISORY WRITE 4321 08:01:131 0 EOF; those who wait have "->" as their second field.
            fields = line.split()
            if (
                len(fields) > 5
                and fields[1] == "FLOCK"
                and fields[5].rpartition(":")[2] == inode
                and fields[4].isdigit()
            ):
                with suppress(OSError):
                    command = (
                        Path("/proc", fields[4], "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
                    return f"process {fields[4]} ({shown(command.strip(), 100)})"
                return f"process {fields[4]}"
    return "another process"
