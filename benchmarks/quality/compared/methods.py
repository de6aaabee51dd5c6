"""Quantization methods as functions of a layer: ours, the published one, and what it is compared with.

A method gets a :class:`~simulate.Layer` and the bits of the activations, and returns what the layer becomes. Weights have
4 bits throughout. The methods that exist as packages are in ``peers.py``; those here are short enough to state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.quality.simulation.grid import Grid
from benchmarks.quality.simulation.nvfp4 import Nvfp4Linear
from benchmarks.quality.simulation.simulate import Layer, Simulated
from dvdquant.deploy.switching.gbs import Weighting
from dvdquant.numerics.activation_grid import fake_quantize_activation
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.layer_inputs import LayerInputs, layer_inputs
from dvdquant.recipe import RECIPES, Recipe, WeightSpec

__all__ = ["METHODS", "Method", "activation_grid", "from_recipe", "grid_method"]

LayerMethod = Callable[[Layer, int], Simulated]


@dataclass(frozen=True)
class Method:
    """Describes one row of the table.

    Args:
        name: The name of the method.
        layer: What it makes of a layer.
        widths: Activation bits that it is measured at.
        switched: Whether its W4A6 is δ-GBS between 4 and 8 bits, at 6 on average.
        last_high: Last steps of that switching on 8 bits, as dvdq-run has them or as published.
        weighting: How that switching weighs a change.
    """

    name: str
    layer: LayerMethod
    widths: tuple[int, ...] = (8, 6, 4)
    switched: bool = False
    last_high: int = 0
    weighting: Weighting = "none"


def activation_grid(bits: int, group: int | Literal["channel"] = 0) -> Callable[[Tensor], Tensor]:
    """Return the fake quantization of activations [B, T, K].

    Args:
        bits: Bits of the activations.
        group: Channels that share a scale of a token, 0 for all of them; ``channel`` is a scale per channel over the tokens of
            a clip.
    """
    if group == "channel":
        return lambda x: _per_channel(x, bits)
    return Grid(bits, group)


def _per_channel(x: Tensor, bits: int) -> Tensor:
    """Quantize [..., T, K] with a scale per channel over the tokens of a clip."""
    clips = x.reshape(-1, *x.shape[-2:])
    return fake_quantize_activation(clips.transpose(1, 2), bits).transpose(1, 2).reshape(x.shape)


def grid_method(
    layer: Layer,
    bits: int,
    *,
    weight: WeightSpec,
    rotation: str | int = "none",
    act_group: int | Literal["channel"] = 0,
    smooth: float | None = None,
) -> Simulated:
    """Divide, rotate and quantize both sides: the family that most methods belong to.

    Args:
        layer: The layer.
        bits: Bits of the activations.
        weight: How the weight is quantized.
        rotation: The block of the rotation, as in a recipe. A block that does not divide K is taken as ``full``.
        act_group: Channels that share an activation scale, as of :func:`activation_grid`.
        smooth: α of a static balance ``divide = amax(x)^α / amax(w)^(1−α)``, calibrated on ``layer.inputs``; None for none.
    """
    w, divide = layer.weight, None
    if smooth is not None:
        divide = static_pre_quant(layer, smooth)
        w = w * divide
    block = rotation
    if isinstance(rotation, int) and layer.spec.features % rotation:
        block = "full"
    chosen = Rotation.for_features(layer.spec.features, block)
    stored = quantize_weight(rotate(w, chosen), weight).dequantize()
    return Simulated(stored, activation_grid(bits, act_group), divide, None if chosen.identity else chosen)


def static_pre_quant(layer: Layer, alpha: float) -> Tensor:
    """Return SmoothQuant's balance, fp32 [K], normalized to a geometric mean of 1.

    Args:
        layer: The layer, with the inputs that it had.
        alpha: The share of the inputs in it, from 0 to 1.
    """
    x = layer.inputs.abs().amax(0).clamp(min=1e-5)
    w = layer.weight.abs().amax(0).clamp(min=1e-5)
    divide = x.pow(alpha) / w.pow(1 - alpha)
    return divide / divide.log().mean().exp()


def from_recipe(recipe: Recipe) -> LayerMethod:
    """Return a recipe of the exporter as a method, by the exporter's own quantizer.

    Args:
        recipe: The recipe.
    """

    def method(layer: Layer, bits: int) -> Simulated:
        group = next((a.group_size for a in recipe.activations if a.bits == bits), recipe.activations[0].group_size)
        if recipe.inputs == "ignored":
            return grid_method(layer, bits, weight=recipe.weight, rotation=recipe.rotation, act_group=group)
        known, chosen = known_inputs(layer, recipe)
        w = rotate(layer.weight * known.smooth_scale, chosen)
        stored = known.gptq.round(w, quantize_weight(w, recipe.weight))
        divide = known.smooth_scale if recipe.smooth else None
        rotation = None if chosen.identity else chosen
        return Simulated(stored.dequantize(), activation_grid(bits, group), divide, rotation, shift=known.shift)

    return method


def known_inputs(layer: Layer, recipe: Recipe) -> tuple[LayerInputs, Rotation]:
    """Return what an export by a recipe knows of a layer's inputs without data, and how it rotates them.

    Args:
        layer: The layer, with the second moments that an export predicts.
        recipe: The recipe.
    """
    assert layer.hessian is not None
    chosen = Rotation.for_features(layer.spec.features, recipe.rotation)
    spec = replace(
        layer.spec,
        rotation=chosen,
        smoothed=recipe.smooth,
        random_signs=recipe.random_signs,
        shifted=recipe.shift and layer.spec.shifted,
    )
    return layer_inputs(layer.hessian, spec), chosen


def nvfp4_engine(layer: Layer, bits: int, recipe: Recipe = RECIPES["w4a4"]) -> Simulated:
    """Compute what the a4 engine of SM 12.0 computes: balance, signs, shift and rotation of a recipe, then NVFP4 on both sides.

    Its weights are quantized from the original ones, so what else the recipe says of grids plays no part.

    Args:
        layer: The layer, with the second moments that an export predicts.
        bits: Bits of the activations: 4.
        recipe: The recipe.
    """
    assert bits == 4
    known, chosen = known_inputs(layer, recipe)
    bias = torch.zeros(len(layer.weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    shift = None if known.shift is None else known.shift.to(torch.bfloat16).float()
    if shift is not None:
        bias = bias + layer.weight.double() @ shift.double()
    rotated = rotate(layer.weight * known.smooth_scale, chosen)
    product = Nvfp4Linear(rotated, bias.float(), chosen, 1 / known.smooth_scale, shift)
    return Simulated(product.weight, whole=product, biased=True)


_RTN = WeightSpec(zero_point="paper", solver="minmax")

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("RTN", partial(grid_method, weight=_RTN)),
        Method("QuaRot-style", partial(grid_method, weight=_RTN, rotation="full")),
        Method("ViDiT-Q-style", partial(grid_method, weight=_RTN, rotation="full", smooth=0.5)),
        Method("DVD-Quant as published", from_recipe(RECIPES["paper"]), switched=True),
        Method(
            "dvdquant weights-only", from_recipe(RECIPES["weights-only"]), switched=True, last_high=2, weighting="step"
        ),
        Method("dvdquant w4a4", from_recipe(RECIPES["w4a4"]), switched=True, last_high=2, weighting="step"),
        Method("dvdquant w4a4-g64", from_recipe(RECIPES["w4a4-g64"]), switched=True, last_high=2, weighting="step"),
        Method("dvdquant w4a8", from_recipe(RECIPES["w4a8"]), (8,)),
        Method("dvdquant nvfp4", nvfp4_engine, (4,)),
    )
}
