"""Folders for what tests make once: in a test process, or in a whole run of several processes."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["STORE", "memory_folder", "process_folder", "shared_folder"]

# The variable that names the store of a test run; conftest.py makes it before test processes start.
STORE = "DVDQUANT_TEST_STORE"


@functools.cache
def process_folder(name: str) -> Path:
    """Return the folder called ``name``, made at the first call and deleted at the end of the process."""
    folder = tempfile.mkdtemp(prefix=f"dvdq-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def shared_folder(name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` fills once in a test run; test processes that ask meanwhile wait.

    Nothing may be changed in it: other test processes read it at the same time. A test that damages it takes a copy.
    """
    store = Path(os.environ[STORE]) if STORE in os.environ else process_folder("store")
    folder, done = store / name, store / f"{name}.done"
    with (store / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one: thousands of small files in a row spend their time waiting for a disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
