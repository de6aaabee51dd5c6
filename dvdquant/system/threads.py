"""The number of PyTorch's threads, which belongs to the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["one_thread"]

_CHANGING = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread of the CPU, within this context.

    Small models gain nothing from threads; where others use the cores too, threads that wait for each other at every
    layer take fifty times as long. One thread also gives the same bits everywhere.

    One caller at a time changes the number: a second one would put back the 1 of the first.
    """
    with _CHANGING:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
