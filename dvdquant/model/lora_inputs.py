"""Reserved inputs for LoRAs: every quantized layer gets a low-rank branch whose matrices are inputs of the graph.

The branch is y + up·(down·x) + bias in the graph's dtype, with x as the layer gets it. Of zeros it adds exactly nothing.
Merged layers share ``x``, so one product with the stacked ``down`` serves all members, each with its own ``rank`` rows of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvdquant.model.families import Axis, Sizes
from dvdquant.model.layers import LayerSpec, QuantLinear, empty_tensor
from dvdquant.model.plan import ModelPlan, layer_tokens
from dvdquant.model.quantized_model import quant_linears

__all__ = [
    "BIAS",
    "DOWN",
    "UP",
    "install_lora_inputs",
    "is_lora_input",
    "lora_input_shapes",
    "random_lora",
    "reserved_bytes",
    "stacked",
    "step_flops",
]

DOWN, UP, BIAS = "lora_down", "lora_up", "lora_bias"


def lora_input_shapes(layers: Iterable[LayerSpec], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each reserved input by its name; nothing for a rank of 0.

    ``<layer>.lora_down`` is [members · rank, K], ``<layer>.lora_up`` [N, rank], and ``<layer>.lora_bias`` [N].

    Args:
        layers: The quantized layers of a transformer.
        rank: The rank that is reserved.
    """
    if not rank:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in layers:
        shapes[f"{spec.name}.{DOWN}"] = (len(spec.members) * rank, spec.features)
        shapes[f"{spec.name}.{UP}"] = (spec.out_features, rank)
        shapes[f"{spec.name}.{BIAS}"] = (spec.out_features,)
    return shapes


def is_lora_input(name: str) -> bool:
    """Return whether a graph input is one of those that are reserved for LoRAs.

    Args:
        name: The name of the input.
    """
    return name.rpartition(".")[2] in (DOWN, UP, BIAS)


def install_lora_inputs(
    model: nn.Module, rank: int, dtype: torch.dtype, values: Mapping[str, Tensor] | None = None
) -> None:
    """Give every QuantLinear of a model the branch, as buffers that a trace finds and a forward hook that adds it.

    Args:
        model: The quantized model, which is changed in place.
        rank: The rank that is reserved; 0 leaves the model as it is.
        dtype: The dtype of the matrices.
        values: What is in them, by the names of :func:`lora_input_shapes`. None puts placeholders of one element there,
            for a trace.
    """
    for layer in quant_linears(model).values() if rank else ():
        for name, shape in lora_input_shapes([layer.spec], rank).items():
            tensor = empty_tensor(shape, dtype) if values is None else values[name]
            layer.register_buffer(name.rpartition(".")[2], tensor, persistent=False)
        layer.register_forward_hook(_add_branch)


def _add_branch(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add the branch of a layer to its output; the matrices are taken in the dtype of x."""
    assert isinstance(layer, QuantLinear)
    x, rows = args[0], list(layer.spec.rows)
    down, up, bias = (layer.get_buffer(name).to(x.dtype) for name in (DOWN, UP, BIAS))
    inner, rank = functional.linear(x, down), up.shape[1]
    if len(rows) == 1:
        return output + (functional.linear(inner, up) + bias)
    parts = zip(torch.split(inner, [rank] * len(rows), dim=-1), torch.split(up, rows, dim=0))
    return output + (torch.cat([functional.linear(part, matrix) for part, matrix in parts], dim=-1) + bias)


def reserved_bytes(plan: ModelPlan, rank: int) -> int:
    """Return the size of the inputs that are reserved for LoRAs, which a session holds on the device, in bytes.

    Args:
        plan: The plan of the model.
        rank: The rank that is reserved.
    """
    shapes = lora_input_shapes(plan.layers, rank).values()
    return plan.dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes)


def step_flops(plan: ModelPlan, sizes: Sizes, rank: int) -> tuple[float, float]:
    """Return the operations of one step: those of the branches, and those of the quantized layers beside them.

    A step is one call at the ``opt`` sizes; each element counts twice for every token that its layer sees. It is the same
    whether a LoRA is loaded or not: the matrices are zeros then.

    Args:
        plan: The plan of the model.
        sizes: The sizes of the graphs, in latent units.
        rank: The rank that is reserved.
    """
    frames, height, width = (Axis.fixed(size) for size in sizes.at("opt"))
    tokens = layer_tokens(plan, Sizes(frames, height, width, sizes.text_tokens, sizes.batch))
    branches = layers = 0
    for spec in plan.layers:
        branches += 2 * tokens[spec.name] * rank * (len(spec.members) * spec.features + spec.out_features)
        layers += 2 * tokens[spec.name] * spec.features * spec.out_features
    return float(branches), float(layers)


def random_lora(plan: ModelPlan, seed: int = 0) -> dict[str, Tensor]:
    """Draw matrices for every reserved input of a plan, for checks; for standard normal x the change is about 0.1.

    Args:
        plan: The plan of the model.
        seed: The seed of the numbers.

    Returns:
        Tensors in the dtype of the plan, by the name of the input; none if the plan reserves no rank.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in lora_input_shapes(plan.layers, plan.lora_rank).items():
        kind = name.rpartition(".")[2]
        size = 0.1 if kind == BIAS else float(shape[-1]) ** -0.5 * (0.1 if kind == UP else 1.0)
        found[name] = (size * torch.randn(shape, generator=generator)).to(plan.dtype)
    return found


def stacked(spec: LayerSpec, rank: int, pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Return (down, up) of a layer, fp32, from the changes of its members; the rest of the rank is zeros.

    Args:
        spec: The layer.
        rank: The rank that is reserved; the ranks of a member's changes are at most so much together.
        pairs: (B [rows, r], A [r, K]) of each change, by the name of the member.
    """
    down, up = torch.zeros(len(spec.members) * rank, spec.features), torch.zeros(spec.out_features, rank)
    row = 0
    for index, (member, rows) in enumerate(zip(spec.members, spec.rows)):
        first = 0
        for b, a in pairs.get(member, ()):
            last = first + a.shape[0]
            down[index * rank + first : index * rank + last] = a
            up[row : row + rows, first:last] = b
            first = last
        row += rows
    return down, up
