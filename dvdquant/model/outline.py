"""What a config says of its transformer, whatever the recipe: names, shapes, and which linear layers get the same input.

Nothing here reads a weight: diffusers' own module tree has placeholders for weights, and runs on tensors without values.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.diffusers_hooks import fp32_modules, ignored_tensors
from dvdquant.model.families import Axis, Family, Sizes, get_family
from dvdquant.model.families.configs import FIX
from dvdquant.model.layers import empty_tensor
from dvdquant.system.torch_hooks import FAKE_TENSOR_LOG, FakeTensorMode

__all__ = [
    "LinearShape",
    "Outline",
    "diffusers_model",
    "drop_repeated_blocks",
    "forget_outlines",
    "outline_of",
    "with_placeholders",
]

_KEPT = 16  # outlines; one of a model with 2000 parameters takes about a megabyte


@dataclass(frozen=True)
class LinearShape:
    """The shape of a linear layer.

    Args:
        features: The number of input channels.
        outputs: The number of output channels.
        bias: Whether it adds a bias.
    """

    features: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Outline:
    """The parameters and linear layers of the transformer of a config.

    Args:
        family: The model family, with its checked config.
        config: The config as given.
        dtype: The dtype of the parameters that diffusers does not keep in fp32.
        parameters: Name -> (dtype, shape) of every parameter, as an export stores it.
        linears: The shape of every linear layer by name, in module order.
        ignored: Patterns of tensors that a checkpoint may hold and the class does not use.
        built: The model that all this was read off. The first forward takes it out, and changes it.
    """

    family: Family
    config: Mapping[str, Any]
    dtype: torch.dtype
    parameters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    linears: Mapping[str, LinearShape]
    ignored: tuple[str, ...]
    built: list[nn.Module] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Group the linears of one parent that get the very same tensor, by one forward on fake tensors.

        Blocks that are alike call their layers alike, so the first block of each kind runs for all. Each group is in the order of
        calls. A linear that the forward does not reach (an unused branch) is in no group.
        """
        seen: dict[tuple[str, int, int], list[str]] = {}
        alive: list[Tensor] = []  # keeps ids unique while the forward runs

        def note(name: str, x: Tensor) -> None:
            """Add the layer to the group of its parent, its input tensor and its number of input channels."""
            alive.append(x)
            members = seen.setdefault((name.rpartition(".")[0], id(x), self.linears[name].features), [])
            if name not in members:
                members.append(name)

        repeated = self._watch_inputs(note)
        groups: list[tuple[str, ...]] = []
        for members in seen.values():
            stack, _, rest = members[0].partition(".0.")
            blocks = range(repeated[stack]) if rest and stack in repeated else (0,)
            groups += [tuple(_in_block(member, stack, block) for member in members) for block in blocks]
        return tuple(groups)

    def tokens(self, sizes: Sizes) -> dict[str, int]:
        """Return how many tokens each linear layer sees in one call, by one forward on fake tensors.

        Layers that the forward does not reach are left out.

        Args:
            sizes: The sizes of the call, all of them fixed.
        """
        seen: dict[str, int] = {}

        def note(name: str, x: Tensor) -> None:
            """Note the tokens of the layer."""
            seen[name] = x.shape[:-1].numel()

        repeated = self._watch_inputs(note, sizes)
        for name, tokens in list(seen.items()):
            stack, _, rest = name.partition(".0.")
            if rest and stack in repeated:
                seen.update({_in_block(name, stack, block): tokens for block in range(repeated[stack])})
        return seen

    def _watch_inputs(self, note: Callable[[str, Tensor], None], sizes: Sizes | None = None) -> dict[str, int]:
        """Run the model on tensors without values, one block of each stack of blocks that are alike, and show its inputs.

        Args:
            note: A function that gets the name and the input of each linear layer, in the order of calls.
            sizes: The sizes of the call; None takes small ones.

        Returns:
            The former numbers of blocks, by the name of their stack.
        """
        try:
            model = self.built.pop()
        except IndexError:
            model = _build(self.family, self.config, self.dtype)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

        def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: note(name, args[0])

        for name, module in linears.items():
            module.register_forward_pre_hook(hook_of(name))
        repeated = drop_repeated_blocks(model)
        log = logging.getLogger(FAKE_TENSOR_LOG)
        level = log.level
        log.setLevel(logging.CRITICAL)  # this logger prints tracebacks of errors that are reported in words elsewhere
        try:
            _fake_forward(model, self.family, self.dtype, sizes)
        finally:
            log.setLevel(level)
        return repeated


_outlines: OrderedDict[str, Outline] = OrderedDict()
_lock = threading.Lock()


def outline_of(config: Mapping[str, Any], dtype: torch.dtype) -> Outline:
    """Return the outline of a config: a new one, or the one that this process made for the same config and dtype before.

    Args:
        config: The content of the transformer's ``config.json``.
        dtype: The dtype of activations and of tensors that are not quantized.

    Raises:
        UnsupportedError: The family is unknown, or only one of this diffusers and dvdquant knows a field.
        CheckpointError: No model of the class has such a field, or diffusers refuses the config.
    """
    key = repr((sorted(config.items(), key=lambda item: str(item[0])), dtype))
    with _lock:
        if key in _outlines:
            _outlines.move_to_end(key)
            return _outlines[key]
    family = get_family(config)
    model = _build(family, config, dtype)
    outline = Outline(
        family,
        dict(config),
        dtype,
        {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()},
        {
            name: LinearShape(module.in_features, module.out_features, module.bias is not None)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        },
        ignored_tensors(model),
        [model],
    )
    with _lock:
        _outlines[key] = outline
        while len(_outlines) > _KEPT:
            _outlines.popitem(last=False)
    return outline


def forget_outlines() -> None:
    """Forget the outlines that this process has made, so that the next ones are made anew."""
    with _lock:
        _outlines.clear()


def _build(family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a skeleton with placeholders for the rotary tables too: it costs no memory, whatever the config says.

    Args:
        family: The model family, with its checked config.
        config: The config as given.
        dtype: The dtype of the parameters.
    """
    with torch.device("meta"):
        model = diffusers_model(family.config, config)
    model = with_placeholders(model, dtype)
    for name, buffer in list(model.named_buffers()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, empty_tensor(tuple(buffer.shape), buffer.dtype))
    return model


def diffusers_model(checked: Mapping[str, Any], given: Mapping[str, Any]) -> nn.Module:
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


def with_placeholders(model: nn.Module, dtype: torch.dtype) -> nn.Module:
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


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` into the model as the parameter ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def _in_block(name: str, stack: str, block: int) -> str:
    """Return the name of the same layer in another block.

    Args:
        name: The name of a layer. It is in block 0 of ``stack`` if ``block`` is not 0.
        stack: The name of the stack of blocks.
        block: The number of the block.
    """
    return f"{stack}.{block}.{name.removeprefix(f'{stack}.0.')}" if block else name


def drop_repeated_blocks(model: nn.Module) -> dict[str, int]:
    """Keep only the first of every stack of blocks that are alike, and return their former numbers, by stack name.

    Args:
        model: The model; it is changed.
    """
    dropped = {}
    for name, stack in list(model.named_children()):
        if not isinstance(stack, nn.ModuleList) or len(stack) < 2:
            continue
        kinds = [(type(m), [(n, p.shape) for n, p in m.named_parameters()]) for m in stack]
        if all(kind == kinds[0] for kind in kinds):
            dropped[name] = len(stack)
            setattr(model, name, nn.ModuleList([stack[0]]))
    return dropped


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
