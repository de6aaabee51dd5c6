"""Entries of GGUF files with random blocks, and the values that they stand for."""

from __future__ import annotations

import numpy as np
import torch

from dvdquant.checkpoint.formats.blocks import BLOCKS, dequantize
from dvdquant.checkpoint.formats.gguf import TYPES
from tests.support import other_formats as formats

__all__ = ["ARCHITECTURE", "NUMBERS", "meant", "random_blocks", "stored"]

NUMBERS = {name: number for number, name in TYPES.items()}

ARCHITECTURE = {"general.architecture": "wan"}


def random_blocks(kind: str, count: int, seed: int = 0) -> bytes:
    """Blocks of any content whose scales are finite."""
    nbytes = BLOCKS[kind][1]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (count, nbytes), dtype=np.uint8)
    scales = (generator.random(count) * 0.01).astype(np.float16).view(np.uint8).reshape(count, 2)
    for start in {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(kind, (0, 2)):
        raw[:, start : start + 2] = scales
    return raw.tobytes()


def stored(tensors: formats.Tensors, kind: str) -> list[tuple[str, tuple[int, ...], int, bytes]]:
    """The tensors as a converter stores them: matrices of blocks in ``kind``, patches in F16, what is small in F32."""
    entries = []
    for index, (name, value) in enumerate(tensors.items()):
        shape = tuple(value.shape)
        if value.ndim == 2 and "blocks" in name and kind in BLOCKS and shape[1] % BLOCKS[kind][0] == 0:
            data = random_blocks(kind, value.numel() // BLOCKS[kind][0], index)
            entries.append((name, shape, NUMBERS[kind], data))
        elif value.ndim == 2 and kind in ("F16", "BF16"):
            dtype = torch.float16 if kind == "F16" else torch.bfloat16
            entries.append(
                (name, shape, NUMBERS[kind], value.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
            )
        elif value.ndim > 2:
            entries.append((name, shape, NUMBERS["F16"], value.half().contiguous().numpy().tobytes()))
        else:
            entries.append((name, shape, NUMBERS["F32"], value.float().contiguous().numpy().tobytes()))
    return entries


def meant(entries: list[tuple[str, tuple[int, ...], int, bytes]]) -> formats.Tensors:
    """What the entries of a file stand for."""
    result = {}
    for name, shape, number, data in entries:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        kind = TYPES[number]
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        result[name] = (raw.view(plain[kind]) if kind in plain else dequantize(raw, kind)).reshape(shape)
    return result
