"""Calls into the system that fail at a chosen time, with the error of a faulty, full or read-only disk."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable
from typing import Any

import dvdquant.artifact.commit

__all__ = ["ERRORS", "FULL", "WRITES", "Faults"]

FULL = (errno.ENOSPC, errno.EDQUOT)
ERRORS = (errno.EIO, errno.EROFS, errno.EMFILE, *FULL, errno.EACCES)
_MAKE = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "fchmod", "chmod")
_FILL = ("fsync", "fdatasync", "pwrite", "write", "ftruncate", "posix_fallocate", "copy_file_range")
# Calls that change something; of the two that open a file, those for writing.
WRITES = (*_MAKE, *_FILL, "exchange", "open for writing")
_LOOKS = ("open", "close", "dup", "stat", "lstat", "fstat", "listdir", "scandir", "pread")
# All by which the exporter, or pathlib and shutil for it, reach files.
_CALLS: list[tuple[Any, str]] = [
    *((os, name) for name in (*_LOOKS, *_MAKE, *_FILL)),
    (io, "open"),
    (fcntl, "flock"),
    (dvdquant.artifact.commit, "exchange"),
]


class Faults:
    """Counts calls and makes one of them fail.

    Args:
        code: the errno. at: the number of the failing call. only: names of the calls that count, all if empty. lasting:
            whether all after it fail, too.

    Attributes:
        failed: the first call that failed.
    """

    def __init__(self, code: int, at: int, only: tuple[str, ...] = (), *, lasting: bool = False) -> None:
        self.code, self.at, self.only, self.lasting = code, at, only, lasting
        self.count = 0
        self.failed: str | None = None

    def install(self, replace: Callable[[Any, str, Any], None] = setattr) -> None:
        """Put the failing calls in place of the real ones, by ``monkeypatch.setattr`` where they are to go again."""
        for module, name in _CALLS:
            replace(module, name, self._wrapped(name, getattr(module, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            kind = "open for writing" if name == "open" and self.only and _writes(*arguments, **options) else name
            if self.only and kind not in self.only:
                return real(*arguments, **options)
            number, self.count = self.count, self.count + 1
            if number == self.at or (self.lasting and number > self.at):
                self.failed = self.failed or kind
                if name == "close":
                    real(*arguments, **options)  # the kernel lets go of the descriptor in any case
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call


def _writes(path: Any, how: Any = "r", *_: Any, **options: Any) -> bool:
    """Whether ``os.open`` or ``io.open`` is asked for more than reading, and of a path."""
    how = options.get("flags", options.get("mode", how))
    if isinstance(path, int):
        return False
    if isinstance(how, str):
        return any(letter in how for letter in "wax+")
    return bool(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
