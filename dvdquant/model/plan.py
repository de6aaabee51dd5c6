"""The transformer as a skeleton (diffusers' own module tree with placeholder weights), and the plan of its layers.

Nothing here reads a weight. A skeleton of a 13-billion-parameter model occupies a few megabytes and can be traced by
torch.export. Which linear layers share their input, :mod:`dvdquant.model.outline` finds.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.families import Family, Sizes, get_family
from dvdquant.model.families.configs import FIX
from dvdquant.model.layers import LayerSpec
from dvdquant.model.outline import LinearShape, Outline, diffusers_model, outline_of, with_placeholders
from dvdquant.model.quantized_model import install_quant_linears
from dvdquant.numerics.hadamard import Rotation
from dvdquant.recipe import ActivationSpec, Recipe

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["ModelPlan", "build_skeleton", "layer_tokens", "plan_model", "quantized_skeleton"]


@dataclass(frozen=True)
class ModelPlan:
    """The plan of a model: the layers that are quantized and the tensors that stay.

    Args:
        family: The model family.
        recipe: The recipe of the export.
        dtype: The dtype of activations and of tensors that are not quantized.
        layers: The quantized layers, merged if they share their input, in module order.
        kept: Every other parameter, name -> (dtype, shape) as it will be stored.
        shapes: Name -> shape of every parameter that a checkpoint must hold.
        kept_linears: The names of the linear layers that stay in 16 bit.
        ignored: Patterns of tensors that a checkpoint may hold and the class does not use (diffusers'
            ``_keys_to_ignore_on_load_unexpected``).
        lora_rank: The rank of the branch that graphs have beside every quantized layer for LoRAs
            (:mod:`dvdquant.model.lora_inputs`); 0 means that they have none.
    """

    family: Family
    recipe: Recipe
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    kept_linears: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    lora_rank: int = 0

    def left_out(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of a checkpoint that the class does not use, by diffusers' own list of such names.

        Args:
            names: The names of the checkpoint's tensors.
        """
        return _left_out(names, self.shapes, self.ignored)

    @property
    def all_weights(self) -> int:
        """Return the number of parameters of the transformer."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def quantized_weights(self) -> int:
        """Return the number of weights that become 4-bit codes."""
        return sum(spec.out_features * spec.features for spec in self.layers)

    def same_graph(self, other: ModelPlan) -> bool:
        """Return whether both models have the same graph: the transformers of one model mostly differ in weights alone.

        Args:
            other: The plan of another transformer of the same export.
        """
        mine, theirs = (
            (plan.family.config, plan.dtype, plan.layers, plan.kept, plan.lora_rank) for plan in (self, other)
        )
        return mine == theirs


def build_skeleton(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build the diffusers transformer of a config in eval mode, with placeholders instead of parameters.

    Every placeholder occupies one element. Non-persistent buffers (rotary tables) hold their real values. Modules that
    diffusers keeps in fp32 stay fp32.

    Args:
        config: The content of the transformer's ``config.json``.
        dtype: The dtype of all other parameters.

    Raises:
        UnsupportedError: The class is unknown, or only one of this diffusers and dvdquant knows a field.
        CheckpointError: No model of the class has such a field, or diffusers refuses the config.
    """
    # The import is here because diffusers takes seconds to import, and --help must be fast.
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = diffusers_model(get_family(config).config, config)
    return with_placeholders(model, dtype)


def _left_out(names: Iterable[str], shapes: Mapping[str, Any], ignored: tuple[str, ...]) -> list[str]:
    """Return the names that are not in ``shapes`` and match one of the patterns in ``ignored``."""
    return [name for name in names if name not in shapes and any(re.search(pattern, name) for pattern in ignored)]


def _check_globs(recipe: Recipe, linears: Iterable[str]) -> None:
    """Check the globs of a recipe against the linear layers of a model.

    Args:
        recipe: The recipe.
        linears: The names of the linear layers.

    Raises:
        UnsupportedError: A glob matches no linear layer, or a layer is both kept and forced.
    """
    names = list(linears)
    found: dict[str, set[str]] = {}
    for option, globs in (("keep", recipe.keep), ("force", recipe.force)):
        for glob in globs:
            matched = _named(names, (glob,))
            if not matched:
                raise UnsupportedError(
                    f"--{option} {glob!r:.200} matches no linear layer",
                    available=difflib.get_close_matches(glob, names, 5, 0.3) or names[:5],
                    fix="give a name, or a glob such as 'blocks.0.*', in quotes",
                )
            found.setdefault(option, set()).update(matched)
    if both := sorted(found.get("keep", set()) & found.get("force", set())):
        raise UnsupportedError(
            "layers are both in --keep and in --force", available=both[:5], fix="narrow one of the globs"
        )


def plan_model(
    config: Mapping[str, Any], recipe: Recipe, dtype: torch.dtype, checkpoint: Checkpoint | None = None
) -> ModelPlan:
    """Decide, layer by layer, which layers are quantized, merged and rotated.

    Args:
        config: The content of the transformer's ``config.json``.
        recipe: The recipe of the export.
        dtype: The dtype of activations and of tensors that are not quantized.
        checkpoint: The checkpoint that the config belongs to. Its names and shapes are compared before the model runs
            to show which layers share their input.

    Raises:
        UnsupportedError: The family is unknown, the K of a layer has no Hadamard matrix of the recipe's kind or is not
            divided by the weight groups, or a glob of the recipe matches nothing.
        ShapeError: The rotation block of the recipe does not divide the K of a layer.
        CheckpointError: No model has such a config, the model does not run, or the checkpoint is another one than the
            config says.
    """
    # 1. Compare the model with the checkpoint.
    outline = outline_of(config, dtype)
    family, linears = outline.family, outline.linears
    shapes = {name: shape for name, (_, shape) in outline.parameters.items()}
    if checkpoint is not None:
        checkpoint.check_shapes(shapes, set(_left_out(checkpoint.tensors, shapes, outline.ignored)))
    # 2. Choose the linear layers, and group those that share their input.
    _check_globs(recipe, linears)
    modulation, steady = (_named(linears, globs) for globs in (family.modulation, family.steady))
    keep = family.keep if recipe.modulation != "keep" else (*family.keep, *family.modulation)
    chosen = {name for name in linears if not recipe.keeps(name, keep)}
    try:
        groups = _chosen_groups(outline, chosen)
    except Exception as error:
        # PyTorch raises exceptions of many classes on shapes that do not fit each other.
        raise CheckpointError(
            f"the {config['_class_name']} of this config.json does not run: {type(error).__name__}: {error!s:.500}",
            fix=FIX,
        ) from error
    # 3. Describe the groups, and collect what stays.
    floor = recipe.modulation_activation
    specs = [
        _layer_spec(group, linears, recipe, floor if group[0] in modulation else None, group[0] in steady)
        for group in groups
    ]
    replaced = {f"{member}.{kind}" for spec in specs for member in spec.members for kind in ("weight", "bias")}
    kept = {name: value for name, value in outline.parameters.items() if name not in replaced}
    kept_linears = tuple(name for name in linears if name not in chosen)
    return ModelPlan(family, recipe, dtype, tuple(specs), kept, shapes, kept_linears, outline.ignored)


def _chosen_groups(outline: Outline, chosen: set[str]) -> list[tuple[str, ...]]:
    """Return the chosen linears in groups that share their input, each in the order of calls, sorted by module order.

    Args:
        outline: The outline of the model.
        chosen: The names of the layers to quantize.
    """
    groups = [group for shared in outline.shared_inputs if (group := tuple(name for name in shared if name in chosen))]
    missing = chosen - {name for group in groups for name in group}
    # A linear that the forward does not reach is quantized alone.
    order = {name: i for i, name in enumerate(outline.linears)}
    return sorted([*groups, *((name,) for name in missing)], key=lambda group: order[group[0]])


def _named(names: Iterable[str], globs: tuple[str, ...]) -> set[str]:
    """Return the names that match one of the globs."""
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def layer_tokens(plan: ModelPlan, sizes: Sizes) -> dict[str, int]:
    """Return how many tokens each quantized layer sees in one call, by one forward on fake tensors.

    A layer that the forward does not reach sees none.

    Args:
        plan: The plan of the model.
        sizes: The sizes of the call, all of them fixed.
    """
    tokens = outline_of(plan.family.config, plan.dtype).tokens(sizes)
    return {spec.name: tokens.get(spec.members[0], 0) for spec in plan.layers}


def _layer_spec(
    members: tuple[str, ...],
    linears: Mapping[str, LinearShape],
    recipe: Recipe,
    floor: ActivationSpec | None,
    steady: bool,
) -> LayerSpec:
    """Describe one quantized layer.

    Args:
        members: The names of the linears that it replaces.
        linears: Every linear layer by name.
        recipe: The recipe of the export.
        floor: The least activation grid of the layer, or None.
        steady: True if weights determine the mean of its input.

    Raises:
        UnsupportedError: The weight groups do not divide K, or K has no Hadamard matrix of the recipe's kind.
        ShapeError: The rotation block of the recipe does not divide K.
    """
    first = linears[members[0]]
    features = first.features
    parent, _, _ = members[0].rpartition(".")
    joined = "+".join(name.rpartition(".")[2] for name in members)
    group = recipe.weight.group_size or features
    if features % group or features % 2:
        raise UnsupportedError(
            f"layer {members[0]} has {features} input channels, which weight groups of {group} do not divide",
            available=[str(g) for g in (16, 32, 64, 128) if features % g == 0] or "none",
            fix="choose a recipe with another group size, or keep the layer in 16 bit with --keep",
        )
    return LayerSpec(
        name=f"{parent}.{joined}" if parent else joined,
        members=members,
        rows=tuple(linears[name].outputs for name in members),
        features=features,
        biases=tuple(linears[name].bias for name in members),
        rotation=Rotation.for_features(features, recipe.rotation),
        groups=features // group,
        floor=floor,
        float_zero_point=recipe.weight.zero_point == "float",
        smoothed=recipe.smooth or recipe.rotation == "regular",
        random_signs=recipe.random_signs,
        shifted=recipe.shift and steady,
        regular=recipe.rotation == "regular",
    )


def quantized_skeleton(plan: ModelPlan, bits: int) -> nn.Module:
    """Build the skeleton with every planned layer replaced by a QuantLinear.

    Args:
        plan: The plan of the model.
        bits: The bits of the activations, one of the recipe's.

    Raises:
        RecipeError: The recipe has no activations of so many bits.
    """
    model = build_skeleton(plan.family.config, plan.dtype)
    install_quant_linears(model, plan.layers, plan.recipe.activation(bits))
    return model
