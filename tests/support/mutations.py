"""Mutations of a model's file, opened and read as the exporter would: each is refused in words, or every tensor is read."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from dvdquant.checkpoint.reader import open_checkpoint
from dvdquant.errors import DvdquantError
from tests.support.costs import Costs
from tests.support.helpers_checkpoint import memory_folder

__all__ = ["mutated", "open_mutations"]

NUMBERS = (0, 1, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1)


def mutated(data: bytes, head: int, rng: random.Random) -> bytes:
    """``data`` with some changes, most of them in its first ``head`` bytes."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(head, len(raw)) if rng.random() < 0.95 else len(raw))
        way = rng.randrange(7)
        if way == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            raw[at] = rng.choice((0, 1, ord("9"), 0x7F, 0x80, 0xFF))
        elif way == 2:
            raw[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif way == 3:
            del raw[at : at + rng.randrange(1, 40)]
        elif way == 4:
            raw[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif way == 5:
            other = rng.randrange(len(raw))
            raw[at : at + 24] = raw[other : other + 24]
        else:
            del raw[rng.randrange(len(raw)) :]
        raw = raw or bytearray(data[:4])
    return bytes(raw)


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
