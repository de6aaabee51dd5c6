"""A lock that tells when a thread stands before it, so that a test need not hope that one does."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any


class WatchedLock:
    """A lock in the place of another one, with an event for the first thread that has to wait.

    Args:
        inner: The lock, which may be held.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.awaited = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, and say so before if somebody else has it."""
        if self.inner.acquire(blocking=False):
            return True
        self.awaited.set()
        return bool(blocking and self.inner.acquire(True, timeout))

    def release(self) -> None:
        """Let the lock go."""
        self.inner.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()
