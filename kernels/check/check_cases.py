"""The cases of gpu_check: layers, packed weights and activations, made from a seed on the device that is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dvdquant.errors import DvdquantError
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.packed_layer import DTYPES, PackedLayer
from dvdquant.ops.repack import LayerShape

TOKENS = (1, 7, 33, 127, 129, 4095)
ROWS = (8, 136, 3080)
FEATURES = (256, 1024, 1536, 1920, 2048, 3072, 5120, 8192, 8960, 12288, 13824, 15360, 20480)
# The pairs (M, N) hold every M with some N and every N with some M, the largest of both together, and odd tails on both
# sides.
PAIRS = ((1, 8), (7, 136), (33, 3080), (127, 8), (129, 136), (4095, 8), (1, 3080), (4095, 3080))
ZEROS = ("midrise", "paper", "symmetric", "row-float", "free", "float")


@dataclass(frozen=True)
class Grid:
    """One combination of grids.

    The kinds of zero-points are: ``midrise`` −0.5, ``paper`` an integer per row, ``symmetric`` 0, ``row-float`` a byte
    per row, ``free`` any fp32 number per row (legal, though no solver makes it), ``float`` a byte per group.

    Args:
        act_bits: The bits of the activations, 4 or 8.
        act_group: The channels per activation scale; 0 means the whole token.
        weight_group: The channels per weight scale; 0 means the row.
        zero: The kind of the zero-points.
    """

    act_bits: int
    act_group: int
    weight_group: int
    zero: str

    def __str__(self) -> str:
        act = f"g{self.act_group}" if self.act_group else "token"
        weight = f"g{self.weight_group}" if self.weight_group else "row"
        return f"a{self.act_bits} {act}, w4 {weight} {self.zero}"


GRIDS = (
    Grid(8, 0, 0, "midrise"),
    Grid(8, 0, 0, "paper"),
    Grid(8, 0, 0, "free"),
    Grid(8, 0, 32, "float"),
    Grid(8, 0, 64, "midrise"),
    Grid(8, 0, 128, "midrise"),
    Grid(8, 128, 0, "midrise"),
    Grid(4, 0, 0, "midrise"),
    Grid(4, 0, 0, "paper"),
    Grid(4, 0, 0, "row-float"),
    Grid(4, 0, 16, "symmetric"),
    Grid(4, 128, 0, "midrise"),
    Grid(4, 128, 0, "paper"),
    Grid(4, 128, 0, "free"),
    Grid(4, 128, 128, "midrise"),
    Grid(4, 64, 0, "symmetric"),
    Grid(4, 64, 64, "midrise"),
    Grid(4, 128, 128, "float"),
    Grid(4, 128, 32, "float"),
)


def layers(features: int, rows: int = ROWS[-1]) -> Iterator[tuple[Grid, LayerShape]]:
    """Yield every grid with both dtypes on one K; the rotations take turns: automatic block, whole row, none.

    Args:
        features: K, the number of input channels.
        rows: N, the number of output channels.
    """
    for index, grid in enumerate(GRIDS):
        for turn, dtype in enumerate(DTYPES):
            rotation = _rotation(features, ("auto", "full", "auto", "none")[(index + 2 * turn) % 4])
            yield grid, layer_of(grid, features, rows, rotation, dtype)


def layer_of(grid: Grid, features: int, rows: int, rotation: Rotation, dtype: str) -> LayerShape:
    """Return the layer of a grid.

    Args:
        grid: The grid.
        features: K, the number of input channels.
        rows: N, the number of output channels.
        rotation: The rotation of the input.
        dtype: ``bf16`` or ``fp16``.
    """
    groups = features // grid.weight_group if grid.weight_group else 1
    float_zero = grid.zero in ("float", "row-float")
    return LayerShape(
        rows, features, groups, float_zero, rotation.inner, rotation.outer, grid.act_bits, grid.act_group, dtype
    )


def _rotation(features: int, spec: str) -> Rotation:
    """Return a rotation of K channels, the automatic one if there is none of this kind."""
    try:
        return Rotation.for_features(features, spec)
    except DvdquantError:
        return Rotation.for_features(features, "auto")


def make_weight(layer: LayerShape, zero: str, device: torch.device, seed: int) -> PackedLayer:
    """Make a packed weight with every code, steps spread over 2⁶, one row of zeros and one with the smallest step.

    y of unit activations is about 1, so that neither fp16 nor the float64 judge is at the end of its range.

    Args:
        layer: The layer.
        zero: The kind of the zero-points; see :class:`Grid`.
        device: The device of the tensors.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, k, groups = layer.n, layer.k, layer.weight_groups

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw integers of [low, high)."""
        return torch.randint(low, high, shape, generator=generator, device=device).to(dtype)

    weight = integers(-128, 128, (n, k // 2), torch.int8)
    spread = torch.rand(n, generator=generator, device=device) * 6 - 3
    scale = (2.0**spread / (5 * math.sqrt(k))).to(torch.float32)
    group_scale = torch.full((n, groups), 255, dtype=torch.uint8, device=device)
    if groups > 1:
        group_scale = integers(40, 256, (n, groups), torch.uint8)
    points = {
        "midrise": torch.full((n,), -0.5, device=device),
        "symmetric": torch.zeros(n, device=device),
        "paper": integers(-8, 8, (n,), torch.float32),
        "free": torch.randn(n, generator=generator, device=device),
    }
    point = points.get(zero, integers(0, 256, (n, groups), torch.uint8))
    bias = torch.randn(n, generator=generator, device=device)
    weight[n // 2] = 0
    point[n // 2] = 128 if layer.float_zero_point else 0
    scale[n // 3] = 2.0**-100
    hadamard, outer = Rotation(k, layer.block, layer.outer).matrices(device=device)
    return PackedLayer(weight, scale, group_scale, point, bias, hadamard, outer)


def first_rows(packed: PackedLayer, rows: int) -> PackedLayer:
    """Return the same layer with its first output features only, as tensors of their own.

    Args:
        packed: The layer.
        rows: The number of output features.
    """
    weight, scale, group_scale, zero, bias = (t[:rows].clone() for t in packed.stored())
    return replace(packed, weight=weight, scale=scale, group_scale=group_scale, zero=zero, bias=bias)


def make_tokens(layer: LayerShape, tokens: int, device: torch.device, seed: int) -> Tensor:
    """Make x [M, K]: Gaussian, a few channels 30 times as large, token magnitudes from 2⁻⁴ to 2⁴, one token of zeros.

    Args:
        layer: The layer, for K and the dtype.
        tokens: M, the number of tokens.
        device: The device of the tensor.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, layer.k, generator=generator, device=device)
    x[:, torch.randint(0, layer.k, (max(1, layer.k // 256),), generator=generator, device=device)] *= 30
    x *= 2.0 ** (torch.rand(tokens, 1, generator=generator, device=device) * 8 - 4)
    if tokens > 2:
        x[tokens // 2] = 0
    return x.to(DTYPES[layer.dtype])
