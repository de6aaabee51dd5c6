"""A folder for what a test process makes once; it goes when the process ends."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

__all__ = ["process_folder"]


@functools.cache
def process_folder(name: str) -> Path:
    """Return the folder called ``name``, made at the first call and deleted at the end of the process."""
    folder = tempfile.mkdtemp(prefix=f"dvdq-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
