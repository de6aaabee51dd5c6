"""The transformer as a skeleton (diffusers' own module tree with placeholder weights), and the plan of its layers.

Nothing here reads a weight. A skeleton of a 13-billion-parameter model occupies a few megabytes, can be traced by
torch.export, and tells which linear layers share their input.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.diffusers_hooks import fp32_modules, ignored_tensors
from dvdquant.model.families import Axis, Family, Sizes, get_family
from dvdquant.model.families.configs import FIX
from dvdquant.model.layers import LayerSpec, empty_tensor, install_quant_linears
from dvdquant.numerics.hadamard import Rotation
from dvdquant.recipe import ActivationSpec, Recipe
from dvdquant.system.torch_hooks import FAKE_TENSOR_LOG, FakeTensorMode

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
        model = _diffusers_model(get_family(config).config, config)
    return _with_placeholders(model, dtype)


def _outline(family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a skeleton with placeholders for the rotary tables too: it costs no memory, whatever the config says.

    Args:
        family: The model family, with its checked config.
        config: The config as given.
        dtype: The dtype of the parameters.
    """
    with torch.device("meta"):
        model = _diffusers_model(family.config, config)
    model = _with_placeholders(model, dtype)
    for name, buffer in list(model.named_buffers()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, empty_tensor(tuple(buffer.shape), buffer.dtype))
    return model


def _diffusers_model(checked: Mapping[str, Any], given: Mapping[str, Any]) -> nn.Module:
    """Build the model of a checked config.

    Args:
        checked: The fields that dvdquant knows. Only these reach diffusers.
        given: The config as given.

    Raises:
        CheckpointError: diffusers refuses the config.
        UnsupportedError: Only one of this diffusers and dvdquant knows a field.
    """
    name = checked["_class_name"]
    cls = getattr(importlib.import_module("diffusers"), name)
    fields = {key: value for key, value in checked.items() if not key.startswith("_")}
    known = {key: p for key, p in inspect.signature(cls.__init__).parameters.items() if key != "self"}
    other = [key for key in fields if key not in known]
    other += [key for key in known.keys() - fields.keys() if key in given and given[key] != known[key].default]
    if other:
        raise UnsupportedError(
            f"{other[0]} of {name} is known to only one of this diffusers and this dvdquant",
            fix="install the newest dvdquant and the diffusers release it asks for",
        )
    try:
        model: nn.Module = cls(**fields)
    except Exception as error:
        # diffusers and PyTorch raise exceptions of many classes on numbers that do not fit.
        raise CheckpointError(
            f"diffusers cannot build {name} from this config.json: {type(error).__name__}: {error!s:.500}", fix=FIX
        ) from error
    return model


def _with_placeholders(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put a placeholder for every tensor of its checkpoint into ``model``, in the dtype that it is stored in.

    Args:
        model: The diffusers transformer, which is changed in place and returned.
        dtype: The dtype of the parameters that diffusers does not keep in fp32.

    Raises:
        CheckpointError: A parameter has no element.
    """
    kept_in_fp32 = fp32_modules(model)
    for name, parameter in list(model.named_parameters()):
        if not parameter.numel():
            raise CheckpointError(f"with this config.json, {name} of {type(model).__name__} has no element", fix=FIX)
        stored = torch.float32 if kept_in_fp32 & set(name.split(".")) else dtype
        _set_parameter(model, name, empty_tensor(tuple(parameter.shape), stored))
    saved = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name in saved:  # it is in the checkpoint (learned position embeddings), so it is treated like a parameter
            parent, _, child = name.rpartition(".")
            delattr(model.get_submodule(parent), child)
            stored = dtype if buffer.is_floating_point() else buffer.dtype
            _set_parameter(model, name, empty_tensor(tuple(buffer.shape), stored))
    return model.eval().requires_grad_(False)


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


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` into the model as the parameter ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


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
    # 1. Build the outline, and compare it with the checkpoint.
    family = get_family(config)
    model = _outline(family, config, dtype)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ignored = ignored_tensors(model)
    if checkpoint is not None:
        checkpoint.check_shapes(shapes, set(_left_out(checkpoint.tensors, shapes, ignored)))
    # 2. Choose the linear layers, and group those that share their input.
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _check_globs(recipe, linears)
    modulation, steady = (_named(linears, globs) for globs in (family.modulation, family.steady))
    keep = family.keep if recipe.modulation != "keep" else (*family.keep, *family.modulation)
    chosen = {name for name in linears if not recipe.keeps(name, keep)}
    kept = {n: (p.dtype, tuple(p.shape)) for n, p in model.named_parameters()}
    try:
        groups = _shared_inputs(model, family, linears, chosen, dtype)
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
    kept = {name: value for name, value in kept.items() if name not in replaced}
    kept_linears = tuple(name for name in linears if name not in chosen)
    return ModelPlan(family, recipe, dtype, tuple(specs), kept, shapes, kept_linears, ignored)


def _named(names: Iterable[str], globs: tuple[str, ...]) -> set[str]:
    """Return the names that match one of the globs."""
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def _shared_inputs(
    model: nn.Module, family: Family, linears: Mapping[str, nn.Module], chosen: set[str], dtype: torch.dtype
) -> list[tuple[str, ...]]:
    """Group the chosen linears of one parent that get the very same tensor, by one forward on fake tensors.

    Blocks that are alike call their layers alike, so the first block of each kind runs for all. ``model`` loses the
    others.

    Args:
        model: The outline of the model.
        family: The model family.
        linears: Every linear layer by name.
        chosen: The names of the layers to quantize.
        dtype: The dtype of activations.

    Returns:
        The groups, each in the order of calls, sorted by module order.
    """
    seen: dict[tuple[str, int, int], list[str]] = {}
    alive: list[Tensor] = []  # keeps ids unique while the forward runs

    def note(name: str, x: Tensor) -> None:
        """Add the layer to the group of its parent, its input tensor and its number of input channels."""
        alive.append(x)
        members = seen.setdefault((name.rpartition(".")[0], id(x), linears[name].in_features), [])  # type: ignore[arg-type]
        if name not in members:
            members.append(name)

    repeated = _watch_inputs(model, family, linears, dtype, note)
    groups = []
    for members in seen.values():
        stack, _, rest = members[0].partition(".0.")
        groups += [
            tuple(group)
            for block in (range(repeated[stack]) if rest and stack in repeated else (0,))
            if (group := [n for m in members if (n := _in_block(m, stack, block)) in chosen])
        ]
    missing = chosen - {name for group in groups for name in group}
    # A linear that this forward does not reach (an unused branch) is quantized alone.
    order = {name: i for i, name in enumerate(linears)}
    return sorted([*groups, *((name,) for name in missing)], key=lambda g: order[g[0]])


def _in_block(name: str, stack: str, block: int) -> str:
    """Return the name of the same layer in another block.

    Args:
        name: The name of a layer. It is in block 0 of ``stack`` if ``block`` is not 0.
        stack: The name of the stack of blocks.
        block: The number of the block.
    """
    return f"{stack}.{block}.{name.removeprefix(f'{stack}.0.')}" if block else name


def _drop_repeated_blocks(model: nn.Module) -> dict[str, int]:
    """Keep only the first of every stack of blocks that are alike, and return their former numbers, by stack name."""
    dropped = {}
    for name, stack in list(model.named_children()):
        if not isinstance(stack, nn.ModuleList) or len(stack) < 2:
            continue
        kinds = [(type(m), [(n, p.shape) for n, p in m.named_parameters()]) for m in stack]
        if all(kind == kinds[0] for kind in kinds):
            dropped[name] = len(stack)
            setattr(model, name, nn.ModuleList([stack[0]]))
    return dropped


def _watch_inputs(
    model: nn.Module,
    family: Family,
    linears: Mapping[str, nn.Module],
    dtype: torch.dtype,
    note: Callable[[str, Tensor], None],
    sizes: Sizes | None = None,
) -> dict[str, int]:
    """Run a model as :func:`_fake_forward` does, one block of each stack of blocks that are alike, and show its inputs.

    Args:
        model: The outline of the model, which loses its other blocks.
        family: The model family.
        linears: Every linear layer by name.
        dtype: The dtype of activations.
        note: A function that gets the name and the input of each linear layer, in the order of calls.
        sizes: The sizes of the call; None takes small ones.

    Returns:
        The former numbers of blocks, by the name of their stack.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: note(name, args[0])

    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in linears.items()]
    repeated = _drop_repeated_blocks(model)
    log = logging.getLogger(FAKE_TENSOR_LOG)
    level = log.level
    log.setLevel(logging.CRITICAL)  # this logger prints tracebacks of errors that are reported in words elsewhere
    try:
        _fake_forward(model, family, dtype, sizes)
    finally:
        log.setLevel(level)
        for hook in hooks:
            hook.remove()
    return repeated


def _fake_forward(model: nn.Module, family: Family, dtype: torch.dtype, sizes: Sizes | None = None) -> None:
    """Run the model on fake tensors, which have shapes and no values, at these sizes or at small ones."""
    if sizes is None:
        frames, height, width = (Axis.fixed(size) for size in family.probe())
        text = family.config.get("max_text_seq_length") or family.default_text_tokens
        sizes = Sizes(frames, height, width, text_tokens=text)
    axes = family.axes(sizes)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = {s.name: torch.empty(s.sizes(axes), dtype=s.dtype or dtype) for s in family.inputs(sizes)}
        model(**family.forward_kwargs(fake), return_dict=False)


def layer_tokens(plan: ModelPlan, sizes: Sizes) -> dict[str, int]:
    """Return how many tokens each quantized layer sees in one call, by one forward on fake tensors.

    A layer that the forward does not reach sees none.

    Args:
        plan: The plan of the model.
        sizes: The sizes of the call, all of them fixed.
    """
    model = _outline(plan.family, plan.family.config, plan.dtype)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        """Note the tokens of the layer."""
        seen[name] = math.prod(x.shape[:-1])

    repeated = _watch_inputs(model, plan.family, linears, plan.dtype, note, sizes)
    found = {}
    for spec in plan.layers:
        stack, _, rest = spec.members[0].partition(".")
        block, _, inside = rest.partition(".")
        first = f"{stack}.0.{inside}" if stack in repeated and block.isdigit() else spec.members[0]
        found[spec.name] = seen.get(first, 0)
    return found


def _layer_spec(
    members: tuple[str, ...],
    linears: Mapping[str, nn.Module],
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
