"""The transformer as a skeleton: diffusers' own module tree with placeholder weights, and the plan of its layers.

Nothing here reads a checkpoint. A skeleton of a 13-billion-parameter model occupies a few megabytes, can be traced by
torch.export, and tells which linear layers share their input.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import CheckpointError, UnsupportedError
from .families import Axis, Family, Sizes, get_family
from .hadamard import Rotation
from .layers import LayerSpec, empty_tensor, install_quant_linears
from .recipe import ActivationSpec, Recipe

__all__ = ["ModelPlan", "build_skeleton", "plan_model", "quantized_skeleton"]

# More than any model has: of blocks, and of whatever else a config.json counts.
MOST_LAYERS, MOST_OF_ANYTHING = 1000, 1_000_000


@dataclass(frozen=True)
class ModelPlan:
    """What will be quantized and what stays.

    Args:
        layers: the quantized layers, merged where they share their input, in module order.
        kept: every other parameter, name -> (dtype, shape) as it will be stored.
        shapes: name -> shape of every parameter a checkpoint must hold.
        kept_linears: names of the linear layers that stay in 16 bit.
    """

    family: Family
    recipe: Recipe
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    kept_linears: tuple[str, ...]

    @property
    def all_weights(self) -> int:
        """Parameters of the transformer."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def quantized_weights(self) -> int:
        """Weights that become 4-bit codes."""
        return sum(spec.out_features * spec.features for spec in self.layers)


def build_skeleton(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The diffusers transformer of ``config`` in eval mode, its parameters placeholders of one element each.

    Non-persistent buffers (rotary tables) hold their real values. Modules that diffusers keeps in fp32 stay fp32.

    Raises:
        UnsupportedError: unknown class. CheckpointError: diffusers refuses the config.
    """
    get_family(config)
    _check_counts(config)
    # Imported here: diffusers takes seconds to import, and --help must not.
    from accelerate import init_empty_weights

    cls = getattr(importlib.import_module("diffusers"), config["_class_name"])
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = cls.from_config(dict(config))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"diffusers cannot build {config['_class_name']} from this config.json: {error}",
            fix="compare config.json with the one the model was published with",
        ) from error
    fp32_modules = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in list(model.named_parameters()):
        if not parameter.numel():
            raise CheckpointError(
                f"with this config.json, {name} of {config['_class_name']} has no element",
                fix="compare config.json with the one the model was published with",
            )
        stored = torch.float32 if fp32_modules & set(name.split(".")) else dtype
        _set_parameter(model, name, empty_tensor(tuple(parameter.shape), stored))
    saved = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name in saved:  # part of the checkpoint (learned position embeddings), so treated like a parameter
            parent, _, child = name.rpartition(".")
            del model.get_submodule(parent)._buffers[child]
            stored = dtype if buffer.is_floating_point() else buffer.dtype
            _set_parameter(model, name, empty_tensor(tuple(buffer.shape), stored))
    return model.eval().requires_grad_(False)


def _check_counts(config: Mapping[str, Any]) -> None:
    """CheckpointError for numbers that no model has: building the modules, not their weights, would fill the memory."""
    for name, value in config.items():
        most = MOST_LAYERS if name.endswith("layers") else MOST_OF_ANYTHING
        sizes = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(size, int) and size > most for size in sizes):
            raise CheckpointError(
                f"config.json says {name} = {value!s:.100}",
                available=f"at most {most}",
                fix="compare config.json with the one the model was published with",
            )


def _check_globs(recipe: Recipe, linears: Iterable[str]) -> None:
    """UnsupportedError for a glob of the recipe that matches no linear layer, and for a layer that is kept and forced."""
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


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._parameters[child] = nn.Parameter(value, requires_grad=False)


def plan_model(config: Mapping[str, Any], recipe: Recipe, dtype: torch.dtype) -> ModelPlan:
    """Decide, layer by layer, what is quantized, merged and rotated.

    Raises:
        UnsupportedError: unknown family, a layer whose K has no Hadamard matrix of the recipe's kind, a glob of the recipe that
            matches nothing.
    """
    model = build_skeleton(config, dtype)
    # What config.json leaves out has a default in diffusers, which the family needs too.
    defaults = {name: value for name, value in model.config.items() if not name.startswith("_")}  # type: ignore[operator, union-attr]
    family = get_family({**defaults, **config})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _check_globs(recipe, linears)
    modulation, steady = (_named(linears, globs) for globs in (family.modulation, family.steady))
    keep = family.keep if recipe.modulation != "keep" else (*family.keep, *family.modulation)
    chosen = {name for name in linears if not recipe.keeps(name, keep)}
    try:
        groups = _shared_inputs(model, family, chosen, dtype)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the {config['_class_name']} of this config.json does not run: {type(error).__name__}: {error}",
            fix="compare config.json with the one the model was published with",
        ) from error
    floor = recipe.modulation_activation
    specs = [
        _layer_spec(group, linears, recipe, floor if group[0] in modulation else None, group[0] in steady)
        for group in groups
    ]
    replaced = {f"{member}.{kind}" for spec in specs for member in spec.members for kind in ("weight", "bias")}
    kept = {n: (p.dtype, tuple(p.shape)) for n, p in model.named_parameters() if n not in replaced}
    kept_linears = tuple(name for name in linears if name not in chosen)
    return ModelPlan(family, recipe, dtype, tuple(specs), kept, shapes, kept_linears)


def _named(names: Iterable[str], globs: tuple[str, ...]) -> set[str]:
    """Those that match one of the globs."""
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def _shared_inputs(model: nn.Module, family: Family, chosen: set[str], dtype: torch.dtype) -> list[tuple[str, ...]]:
    """Groups of chosen linears of one parent that get the very same tensor, found by one forward on fake tensors."""
    seen: dict[tuple[str, int, int], list[str]] = {}
    alive: list[Tensor] = []  # keeps ids unique while the forward runs
    modules = {name: model.get_submodule(name) for name in chosen}

    def record(name: str, features: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            members = seen.setdefault((name.rpartition(".")[0], id(args[0]), features), [])
            if name not in members:
                members.append(name)

        return hook

    hooks = [m.register_forward_pre_hook(record(n, m.in_features)) for n, m in modules.items()]  # type: ignore[arg-type]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints tracebacks of errors that are reported here in words
    try:
        _fake_forward(model, family, dtype)
    finally:
        log.setLevel(level)
        for hook in hooks:
            hook.remove()
    groups = [tuple(members) for members in seen.values()]
    missing = chosen - {name for group in groups for name in group}
    # A linear that this forward does not reach (an unused branch) is quantized alone.
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted([*groups, *((name,) for name in missing)], key=lambda g: order[g[0]])


def _fake_forward(model: nn.Module, family: Family, dtype: torch.dtype) -> None:
    frames, height, width = (Axis.fixed(size) for size in family.probe())
    text = family.config.get("max_text_seq_length") or family.default_text_tokens
    sizes = Sizes(frames, height, width, text_tokens=text)
    inputs = family.sample(sizes, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        model(**family.forward_kwargs(fake), return_dict=False)


def _layer_spec(
    members: tuple[str, ...],
    linears: Mapping[str, nn.Module],
    recipe: Recipe,
    floor: ActivationSpec | None,
    steady: bool,
) -> LayerSpec:
    first = linears[members[0]]
    features = int(first.in_features)  # type: ignore[arg-type]
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
        rows=tuple(int(linears[name].out_features) for name in members),  # type: ignore[arg-type]
        features=features,
        biases=tuple(linears[name].bias is not None for name in members),
        rotation=Rotation.for_features(features, recipe.rotation),
        groups=features // group,
        floor=floor,
        real_zero=recipe.weight.zero_point == "real",
        balanced=recipe.balance,
        signs=recipe.signs,
        shifted=recipe.shift and steady,
    )


def quantized_skeleton(plan: ModelPlan, bits: int) -> nn.Module:
    """The skeleton with every planned layer replaced by a QuantLinear of ``bits``-bit activations."""
    model = build_skeleton(plan.family.config, plan.dtype)
    install_quant_linears(model, plan.layers, plan.recipe.activation(bits))
    return model
