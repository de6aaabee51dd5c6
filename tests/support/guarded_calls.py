"""Calls of the emulated kernels on buffers between guards, and the layers they are called for."""

from __future__ import annotations

import numpy as np
import torch

from dvdquant.numerics.hadamard import Rotation
from dvdquant.numerics.packing import pack_int4
from dvdquant.ops.cuda.arguments import WeightPointers
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.repack import LayerShape

__all__ = [
    "AMPERE",
    "BLACKWELL",
    "Buffer",
    "GUARD",
    "HOPPER",
    "LAYER_CASES",
    "PREPARE_CASES",
    "filled",
    "layer_dtype",
    "layer_rotation",
    "outer_matrix",
    "prepare",
    "stored_weight",
    "token_rows",
]

GUARD = 512

AMPERE, HOPPER, BLACKWELL = 89, 90, 120


class Buffer:
    """Bytes at a multiple of 256 between guards, filled with 0xAB before anything is written."""

    def __init__(self, size: int, content: bytes | None = None) -> None:
        self._memory = np.full(size + 2 * GUARD + 256, 0xAB, np.uint8)
        self._start = GUARD + (-(self._memory.ctypes.data + GUARD)) % 256
        self.bytes = self._memory[self._start : self._start + size]
        if content is not None:
            self.bytes[:] = np.frombuffer(content, np.uint8)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def check_guards(self) -> None:
        assert (self._memory[: self._start] == 0xAB).all(), "written before the buffer"
        assert (self._memory[self._start + self.bytes.size :] == 0xAB).all(), "written past the buffer"


def filled(values: torch.Tensor) -> Buffer:
    """A buffer that holds the values' bytes."""
    contents = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Buffer(len(contents), contents)


def token_rows(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Signed, with outlier channels."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, 3::37] *= 30
    return x.to(dtype)


def layer_dtype(layer: LayerShape) -> torch.dtype:
    return torch.bfloat16 if layer.dtype == "bf16" else torch.float16


def layer_rotation(layer: LayerShape) -> Rotation:
    return Rotation(layer.k, layer.block, layer.outer)


def outer_matrix(layer: LayerShape) -> Buffer | None:
    """The outer matrix of the layer's rotation; None if it has none."""
    return filled(layer_rotation(layer).matrices()[1]) if layer.outer > 1 else None


def stored_weight(layer: LayerShape, zeros: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Packed codes, scale, group scale, zero-point, bias."""
    rng = torch.Generator().manual_seed(seed)
    n, k, groups = layer.n, layer.k, layer.weight_groups
    packed = pack_int4(torch.randint(-8, 8, (n, k), generator=rng, dtype=torch.int8))
    scale = torch.rand(n, generator=rng) + 0.01
    group_scale = torch.full((n, groups), 255, dtype=torch.uint8)
    if groups > 1:
        group_scale = torch.randint(1, 256, (n, groups), generator=rng, dtype=torch.uint8)
    zero = torch.full((n,), -0.5)
    if zeros == "mixed":
        zero = torch.tensor([-0.5, 0.0, 3.0, -7.5, 0.3, -119.0, 200.0, 63.5])[torch.arange(n) % 8]
    if layer.float_zero_point:
        zero = torch.randint(0, 256, (n, groups), generator=rng, dtype=torch.uint8)
    return packed, scale, group_scale, zero, torch.randn(n, generator=rng)


def prepare(library: KernelLibrary, layer: LayerShape, sm: int, weight: tuple[torch.Tensor, ...], bias: bool) -> Buffer:
    """What the library prepares of a weight, with all guards checked."""
    plan = library.plan_layer(layer, sm)
    buffers = [filled(part) for part in weight]
    pointers = WeightPointers(*(b.address for b in buffers[:4]), bias=buffers[4].address if bias else 0)
    prepared = Buffer(plan.prepared_bytes)
    library.prepare_weight(layer, sm, pointers, prepared.address, plan.prepared_bytes, 0)
    for buffer in (*buffers, prepared):
        buffer.check_guards()
    return prepared


PREPARE_CASES = [
    # n, k, weight_groups, float_zero_point, act_bits, act_group, sm, zeros, path
    (9, 96, 1, False, 4, 0, AMPERE, "mixed", "s4_token"),
    (9, 256, 1, True, 4, 64, AMPERE, "", "s4_group"),
    (5, 512, 4, True, 4, 128, AMPERE, "", "s4_group"),
    (5, 512, 4, False, 4, 128, AMPERE, "mixed", "s4_group"),
    (17, 160, 1, False, 8, 0, AMPERE, "mixed", "s8_token"),
    (17, 160, 1, False, 8, 0, HOPPER, "mixed", "s8_wgmma"),
    (11, 160, 10, True, 8, 0, HOPPER, "", "s8_wgmma"),
    (11, 1152, 12, False, 8, 64, BLACKWELL, "mixed", "s8_group"),
    (33, 128, 1, True, 8, 128, HOPPER, "", "s8_group"),
    (16, 256, 1, False, 4, 128, HOPPER, "mixed", "e4m3_group"),
    (16, 256, 1, True, 4, 128, HOPPER, "", "e4m3_group"),
]

LAYER_CASES = [
    # n, k, weight_groups, float_zero_point, block, outer, act_bits, act_group, sm, tokens
    (24, 512, 1, False, 256, 1, 4, 0, AMPERE, 33),
    (24, 512, 4, True, 256, 1, 4, 0, AMPERE, 3),
    (13, 512, 1, False, 256, 1, 4, 128, AMPERE, 5),
    (13, 512, 4, True, 64, 1, 4, 128, AMPERE, 5),
    (24, 512, 32, False, 64, 1, 4, 64, AMPERE, 5),
    (24, 512, 1, False, 256, 1, 4, 128, HOPPER, 3),
    (9, 512, 1, False, 256, 1, 4, 128, HOPPER, 3),
    (24, 768, 1, False, 64, 12, 8, 0, HOPPER, 3),
    (24, 512, 1, False, 256, 1, 8, 64, BLACKWELL, 3),
]
