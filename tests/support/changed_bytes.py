"""Changes of a file's bytes, for fuzzers; it imports nothing that takes time."""

from __future__ import annotations

import random
import struct

__all__ = ["NUMBERS", "mutated"]

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
