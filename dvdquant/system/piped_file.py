"""A file of the user that may be a pipe: it is waited for, with a message, and not for ever."""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import time
from pathlib import Path

from dvdquant.text import shown

__all__ = ["read_piped"]

log = logging.getLogger(__name__)
# Seconds for somebody to open a named pipe for writing, between two pieces of what a writer sends, and until we say so.
NO_WRITER, SILENT, SAY_AFTER = 20.0, 600.0, 2.0
_PIECE = 1 << 16


def read_piped(path: Path, limit: int) -> tuple[bytes, int]:
    """Return what a file or a pipe holds, up to one byte more than ``limit``, and the file's size.

    ``<(command)`` gives a pipe. Opening a named pipe that nobody writes to would wait for ever.

    Args:
        path: The path; links are followed.
        limit: The number of bytes after which reading ends.

    Raises:
        OSError: It cannot be read.
        ValueError: It is a pipe, and nobody writes to it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        waits = _Wait(path, descriptor, stat.S_ISFIFO(status.st_mode))
        raw = bytearray()
        while len(raw) <= limit and (piece := waits.read(min(_PIECE, limit + 1 - len(raw)))):
            raw += piece
        return bytes(raw), status.st_size
    finally:
        os.close(descriptor)


class _Wait:
    """Reads of a descriptor that does not block, until there is something or patience ends.

    Args:
        path: What is read, for the messages.
        descriptor: The descriptor, opened without blocking.
        named: It is a pipe, which ends only after a writer has come.
    """

    def __init__(self, path: Path, descriptor: int, named: bool) -> None:
        self._path, self._descriptor = path, descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._came, self._said = not named, False

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at the end.

        Raises:
            OSError: It cannot be read.
            ValueError: Nobody writes.
        """
        started = time.monotonic()
        while True:
            try:
                piece = os.read(self._descriptor, size)
            except BlockingIOError:  # a writer is there, and silent
                piece, self._came, ended = b"", True, False
            else:
                ended = True
            if piece or (ended and self._came):
                self._came = True
                return piece
            waited = time.monotonic() - started
            if waited > (SILENT if self._came else NO_WRITER):
                what = (
                    f"nothing came from it for {SILENT:.0f} s" if self._came else "it is a pipe that nobody writes to"
                )
                raise ValueError(what)
            if waited > SAY_AFTER and not self._said:
                self._said = True
                log.warning("waiting for what is written to %s", shown(self._path, 200))
            for _, events in self._poll.poll(200):
                if events & (select.POLLHUP | select.POLLIN):  # a writer came, if only to go
                    self._came = True
                if events & select.POLLNVAL:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
