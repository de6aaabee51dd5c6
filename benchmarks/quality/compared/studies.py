"""What is varied one at a time, on the error of the transformer's output: entries of each study as layer methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.quality.compared.methods import LayerMethod, activation_grid, from_recipe, grid_method
from benchmarks.quality.simulation.simulate import Layer, Simulated
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.gptq import gptq_round
from dvdquant.recipe import RECIPES, Recipe, WeightSpec

__all__ = ["STUDIES"]

MINMAX = WeightSpec(zero_point="paper", solver="minmax")
PAPER = WeightSpec(zero_point="paper", solver="paper")
SEARCH = WeightSpec()
UNFITTED = replace(RECIPES["w4a4"], random_signs=False, shift=False)


def clipped(
    layer: Layer, bits: int, *, keep: float = 1.0, rms: float | None = None, recipe: Recipe = RECIPES["weights-only"]
) -> Simulated:
    """Quantize a layer by a recipe, with activations that are clipped.

    The activation scale is ``keep`` times what the largest value of a token asks for, and at most what ``rms`` root mean
    squares ask for. Values beyond it are clipped.

    Args:
        layer: The layer.
        bits: Bits of the activations.
        keep: Share of the largest value that the scale covers, in (0, 1].
        rms: Root mean squares that it covers at most; None for no such bound.
        recipe: How weights are quantized and how inputs are rotated.
    """
    result = from_recipe(recipe)(layer, bits)
    qmax = (1 << bits - 1) - 1
    group = recipe.activation(bits).group_size or layer.spec.features

    def grid(x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], -1, group)
        largest = keep * parts.abs().amax(-1, keepdim=True)
        if rms is not None:
            largest = torch.minimum(largest, rms * parts.square().mean(-1, keepdim=True).sqrt())
        scale = largest.clamp(min=1e-30) / qmax
        return ((parts / scale).round().clamp(-qmax, qmax) * scale).flatten(-2)

    result.activation = grid
    return result


def sixteen_levels(layer: Layer, bits: int, *, rotation: str | int = "auto", weight: WeightSpec = SEARCH) -> Simulated:
    """Quantize activations to all 2^bits codes, which stand for odd multiples of half a step.

    That is one level more than the symmetric grid has.

    Args:
        layer: The layer.
        bits: Bits of the activations.
        rotation: The block of the rotation, as in a recipe.
        weight: How the weight is quantized.
    """
    result = grid_method(layer, bits, weight=weight, rotation=rotation)
    half = 1 << bits - 1

    def grid(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
        return ((x / scale).floor().clamp(-half, half - 1) + 0.5) * scale

    result.activation = grid
    return result


def with_hessian(
    layer: Layer,
    bits: int,
    *,
    source: Literal["data", "modulation", "noise run", "smooth run", "own run"],
    gptq: bool = True,
    smooth: bool = False,
    rounding: Literal["round", "trunc", "none"] = "trunc",
    block: int = 0,
    damping: float = 0.05,
    weight: WeightSpec = SEARCH,
    rotation: str | int = "auto",
    act_group: int = 0,
) -> Simulated:
    """Quantize a layer with second moments of its inputs.

    Measured inputs (``data``) are here for comparison only: no export has them.

    Args:
        layer: The layer.
        bits: Bits of the activations.
        source: Which inputs the moments are of: measured ones, or the name of a prediction.
        gptq: Whether the codes are rounded with error feedback.
        smooth: Whether every channel is divided by the root of (its root mean square over that of its weights).
        rounding: How divisors become powers of two, so that dividing is exact in 16 bit: to the nearest, or towards 1, which
            leaves channels alone that differ by less than a factor of four; ``none`` keeps them.
        block: Channels of a block of moments along the diagonal; 0 is the whole row.
        damping: What is added to the diagonal of the moments, as a share of its mean.
        weight: How the weight is quantized.
        rotation: The block of the rotation, as in a recipe.
        act_group: Channels that share an activation scale; 0 is the whole token.
    """
    inputs = layer.inputs if source == "data" else layer.predicted[source]
    w, divide = layer.weight, None
    if smooth and len(inputs):
        divide = pre_quant_of(inputs.square().mean(0), w.square().mean(0), rounding)
        w, inputs = w * divide, inputs / divide
    chosen = Rotation.for_features(layer.spec.features, rotation)
    w, x = rotate(w, chosen), rotate(inputs, chosen)
    grid = quantize_weight(w, weight)
    if len(x) and gptq:
        size = block or layer.spec.features
        parts = x.view(len(x), -1, size).transpose(0, 1)
        grid = gptq_round(w, grid, parts.transpose(1, 2) @ parts / len(x), damping)
    return Simulated(grid.dequantize(), activation_grid(bits, act_group), divide, None if chosen.identity else chosen)


def pre_quant_of(x: Tensor, w: Tensor, rounding: str) -> Tensor:
    """Return divisors, fp32 [K], that give both sides the same root mean square per channel.

    Args:
        x: Mean squares of the inputs, fp32 [K].
        w: Mean squares of the weights, fp32 [K].
        rounding: How divisors become powers of two: ``round``, ``trunc`` (towards 1), or ``none``.
    """
    exponent = 0.25 * (x.clamp(min=1e-12).log2() - w.clamp(min=1e-12).log2())
    exponent -= exponent.mean()
    if rounding != "none":
        exponent = exponent.round() if rounding == "round" else exponent.trunc()
    return torch.exp2(exponent)


def _grid(**fields: object) -> LayerMethod:
    """Return :func:`grid_method` with some of its arguments."""
    return partial(grid_method, **fields)  # type: ignore[arg-type]


def _groups(group: int, zero: str = "midrise") -> WeightSpec:
    """Return the weights' quantization in groups of channels along the input."""
    return WeightSpec(group_size=group, zero_point=zero)  # type: ignore[arg-type]


STUDIES: dict[str, dict[str, Callable[[Layer, int], Simulated]]] = {
    "ablation": {
        "neither": _grid(weight=MINMAX),
        "BGR": _grid(weight=PAPER),
        "ARQ": _grid(weight=MINMAX, rotation="full"),
        "BGR + ARQ": _grid(weight=PAPER, rotation="full"),
    },
    "granularity": {
        "token": _grid(weight=SEARCH, rotation="auto"),
        "128 channels": _grid(weight=SEARCH, rotation="auto", act_group=128),
        "64 channels": _grid(weight=SEARCH, rotation="auto", act_group=64),
        "channel (Λ of the paper, no integer GEMM)": _grid(weight=SEARCH, rotation="auto", act_group="channel"),
    },
    "weight-groups": {
        "row": _grid(weight=SEARCH, rotation="auto"),
        **{f"{g}": _grid(weight=_groups(g), rotation="auto") for g in (128, 64, 32, 16)},
        "64, activations too": _grid(weight=_groups(64), rotation="auto", act_group=64),
        "64, float zero-points": _grid(weight=_groups(64, "float"), rotation="auto"),
        "32, float zero-points": _grid(weight=_groups(32, "float"), rotation="auto"),
    },
    "rotation": {
        "none": _grid(weight=SEARCH),
        **{f"{b}": _grid(weight=SEARCH, rotation=b) for b in (64, 128, 256)},
        "full": _grid(weight=SEARCH, rotation="full"),
        **{
            f"{b}, GPTQ, smoothing, random signs, shift": from_recipe(replace(RECIPES["w4a4"], rotation=b))
            for b in (64, 128, 256)
        },
    },
    "zero-point": {
        "paper, as published": _grid(weight=PAPER, rotation="auto"),
        **{
            f"{zero}, search": _grid(weight=_groups(0, zero), rotation="auto")
            for zero in ("paper", "midrise", "symmetric", "float")
        },
    },
    "improvements": {
        "BGR and rotation (recipe weights-only)": from_recipe(RECIPES["weights-only"]),
        "full rotation": _grid(weight=SEARCH, rotation="full"),
        "activations clipped at 0.9": partial(clipped, keep=0.9),
        "activations clipped at 0.8": partial(clipped, keep=0.8),
        "activations on 16 levels": sixteen_levels,
        "GPTQ": partial(with_hessian, source="smooth run"),
        "smoothing": partial(with_hessian, source="smooth run", gptq=False, smooth=True),
        "smoothing to the nearest power of two": partial(
            with_hessian, source="smooth run", gptq=False, smooth=True, rounding="round"
        ),
        "GPTQ and smoothing": from_recipe(UNFITTED),
        "GPTQ, smoothing, random signs": from_recipe(replace(UNFITTED, random_signs=True)),
        "GPTQ, smoothing, shift": from_recipe(replace(UNFITTED, shift=True)),
        "GPTQ, smoothing, random signs, shift (recipe w4a4)": from_recipe(RECIPES["w4a4"]),
        "recipe w4a4, activations clipped at 0.9": partial(clipped, keep=0.9, recipe=RECIPES["w4a4"]),
        "recipe w4a4, activations clipped at 0.8": partial(clipped, keep=0.8, recipe=RECIPES["w4a4"]),
        "recipe w4a4, activations clipped at 2.5 root mean squares": partial(clipped, rms=2.5, recipe=RECIPES["w4a4"]),
        "GPTQ and smoothing, unrotated": partial(with_hessian, source="smooth run", smooth=True, rotation="none"),
        "GPTQ and smoothing, whole rows": partial(with_hessian, source="smooth run", smooth=True),
        "GPTQ and smoothing, moments of the modulation alone": partial(
            with_hessian, source="modulation", smooth=True, block=256
        ),
        "GPTQ and smoothing, moments of pure noise": partial(with_hessian, source="noise run", smooth=True, block=256),
        "GPTQ and smoothing, moments of the model's own clips of random words": partial(
            with_hessian, source="own run", smooth=True, block=256
        ),
        "GPTQ and smoothing, measured moments (needs data)": partial(
            with_hessian, source="data", smooth=True, block=256
        ),
        "groups of 64 on both sides": _grid(weight=_groups(64), rotation="auto", act_group=64),
        "groups of 64, GPTQ and smoothing": partial(
            with_hessian, source="smooth run", smooth=True, block=256, weight=_groups(64), act_group=64
        ),
        "groups of 64, GPTQ, smoothing, float zero-points": from_recipe(
            replace(RECIPES["w4a4-g64"], random_signs=False, shift=False)
        ),
        "groups of 64, GPTQ, smoothing, random signs, shift, float zero-points (recipe w4a4-g64)": from_recipe(
            RECIPES["w4a4-g64"]
        ),
        "recipe w4a4-g64, activations clipped at 0.9": partial(clipped, keep=0.9, recipe=RECIPES["w4a4-g64"]),
        "groups of 32, float zero-points": _grid(weight=_groups(32, "float"), rotation="auto"),
        "groups of 32, GPTQ and smoothing (recipe w4a8)": from_recipe(RECIPES["w4a8"]),
        "groups of 32, GPTQ, smoothing, random signs, shift": from_recipe(
            replace(RECIPES["w4a8"], random_signs=True, shift=True)
        ),
        "groups of 16, GPTQ and smoothing": partial(
            with_hessian, source="smooth run", smooth=True, block=256, weight=_groups(16, "float")
        ),
    },
}
