"""Mutations of a model's file, opened and read as the exporter would: each is refused in words, or every tensor is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import DvdquantError
from tests.support.costs import Costs
from tests.support.folders import memory_folder

__all__ = ["open_mutations"]


def open_mutations(parser: str, name: str, count: int, seed: int, change: Callable[[random.Random], bytes]) -> int:
    """Open mutations of a file, and read every tensor of those that open; how many did. Any other error gets through.

    Args:
        parser: what reads it, for the figures. name: of the file. change: makes the bytes of one mutation.
    """
    rng, good = random.Random(seed), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    messages: list[str] = []
    try:
        with memory_folder() as place, Costs(parser) as costs:
            path = Path(place) / name
            for _ in range(count):
                path.write_bytes(change(rng))
                try:
                    with costs.case():
                        checkpoint = open_checkpoint(path)
                        for tensor in checkpoint.tensors:
                            checkpoint.read(tensor)
                        checkpoint.fingerprint()
                    good += 1
                except DvdquantError as error:
                    messages.append(str(error))
    finally:
        torch.set_num_threads(threads)
    assert max(map(len, messages), default=0) < 8000
    assert not any("\x1b" in message for message in messages)
    return good
