"""Calls in a process of their own: a kernel or a library that crashes or hangs ends that process, and not the run.

What breaks a CUDA device's context breaks it for the rest of a process. So the process also ends behind a call that did.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

__all__ = ["Apart", "EndedError", "context_works"]

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


class EndedError(RuntimeError):
    """Error of a call whose process ended, or took too long and was ended."""


class Apart:
    """A process that makes calls for this one, one after the other. It starts at the first call, and again where it ended.

    Args:
        seconds: The longest time of a call, without the start of the process.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: Any = None
        self._link: Connection | None = None

    def __call__(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Return what a call returns.

        Args:
            call: A function of a module, which the process imports.
            arguments: Its arguments, such as can be pickled; so must be what it returns or raises.

        Raises:
            EndedError: The process ended, or the time was used up.
            Exception: What the call raises.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._link is not None
        try:
            self._link.send_bytes(pickle.dumps((call, arguments)))
            if not self._link.poll(self.seconds):
                self.close(wait=0.0)
                raise EndedError(f"it did not end within {self.seconds:.0f} s")
            returns, result, whole = pickle.loads(self._link.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise EndedError(self._end()) from error
        except KeyboardInterrupt:
            self.close(wait=0.0)
            raise
        if not whole:
            self.close()
        if returns:
            returned: Result = result
            return returned
        raise result

    def _start(self) -> None:
        """Start the process, and wait until it is there."""
        self.close()
        context = multiprocessing.get_context("spawn")
        self._link, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, os.getpid()), daemon=True)
        self._process.start()
        other.close()
        try:
            self._link.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise EndedError(self._end()) from error

    def _end(self) -> str:
        """Return in words how the process ended."""
        process = self._process
        process.join(10)
        code = process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with status {code}"

    def close(self, wait: float = 10.0) -> None:
        """End the process, if there is one.

        Args:
            wait: The seconds that it has to end by itself, when nobody calls any more.
        """
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.join(wait)
            self._process.kill()
            self._process.join()
        self._process = self._link = None


def _serve(link: Connection, parent: int) -> None:
    """Make calls as they come, until the other side is gone; say with each whether the device's context is still whole."""
    # Ctrl-C comes to all processes of a terminal, and the first one decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    link.send_bytes(b"")
    while True:
        try:
            call, arguments = pickle.loads(link.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            answer = (True, call(*arguments))
        except Exception as error:  # noqa: BLE001 - it is raised where the call came from
            answer = (False, _portable(error))
        link.send_bytes(pickle.dumps((*answer, context_works())))
        del call, arguments, answer


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an error's class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def context_works() -> bool:
    """Return whether the device's context is whole, where the calls have made one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
