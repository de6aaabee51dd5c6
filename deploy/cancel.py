"""Cancelling a clip: an event that is asked between stages, before every call of the transformer, and inside large modules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from dvdquant.errors import Cancelled

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CancelSignal", "cancel_inside", "check_cancelled", "take_turn"]

_PATIENCE = 0.05  # seconds between two looks at the event, while another request has the lock


class CancelSignal(Protocol):
    """A signal that tells if a request is cancelled, such as ``threading.Event``."""

    def is_set(self) -> bool:
        """Return whether the request is cancelled."""
        ...


class Turn(Protocol):
    """A lock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock.

        Args:
            blocking: Wait for it.
            timeout: The seconds to wait at most; a negative number waits for ever.
        """
        ...

    def release(self) -> None:
        """Give the lock back."""
        ...


def check_cancelled(cancel: CancelSignal | None, where: str) -> None:
    """Go on, unless the request is cancelled.

    Args:
        cancel: The request's event, or None if it cannot be cancelled.
        where: What would come next, for the message.

    Raises:
        Cancelled: The event is set.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"cancelled before {where}")


@contextlib.contextmanager
def cancel_inside(modules: Iterable[nn.Module | None], cancel: CancelSignal | None) -> Iterator[None]:
    """Ask the event before every submodule of ``modules`` that is called in the ``with`` block.

    A text encoder or a VAE so stops within one of its layers. Calls of other threads go on.

    Args:
        modules: The modules; None among them is passed over.
        cancel: The request's event, or None if it cannot be cancelled.

    Raises:
        Cancelled: In the block, once the event is set.
    """
    if cancel is None:
        yield
        return

    here = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        del args
        if threading.get_ident() == here:
            check_cancelled(cancel, f"a {type(module).__name__}")

    handles = []
    try:
        for module in modules:
            if module is not None:
                handles += [part.register_forward_pre_hook(before) for part in module.modules()]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def take_turn(lock: Turn, cancel: CancelSignal | None, what: str) -> Iterator[None]:
    """Hold a lock in the ``with`` block; a request that is cancelled while it waits does not wait for its turn.

    Args:
        lock: The lock.
        cancel: The request's event, or None if it cannot be cancelled.
        what: What the lock is for, for the message.

    Raises:
        Cancelled: The event was set before the lock was free.
    """
    if cancel is None:
        lock.acquire()
    else:
        check_cancelled(cancel, what)
        while not lock.acquire(timeout=_PATIENCE):
            check_cancelled(cancel, what)
    try:
        yield
    finally:
        lock.release()
