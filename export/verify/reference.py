"""The quantized PyTorch model as a reference, in its own dtype and in float64.

It runs freely, or is led by a graph's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.model.layers import QuantLinear
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan
from dvdquant.model.quantized_model import quant_linears, set_activation
from dvdquant.numerics.activation_grid import quantize_activation
from dvdquant.ops.reference import rotate_by_matrices

__all__ = ["Free", "Reference", "as_float64", "relative_distance"]

RECORDED_TOKENS = 256


@dataclass
class Free:
    """The result of the model at one bit-width, when it runs freely.

    Args:
        same_dtype: The output in the model's own dtype.
        exact: The output in float64.
        flipped_codes: The share of activation codes that differ between the two, 0 to 1.
    """

    same_dtype: Tensor
    exact: Tensor
    flipped_codes: float


def relative_distance(value: Tensor, reference: Tensor) -> float:
    """Return ‖value − reference‖ / ‖reference‖ in float64, or the numerator alone if the reference is zero.

    Args:
        value: A tensor of any dtype.
        reference: A tensor of the same shape.
    """
    norm = float(reference.double().norm())
    return float((value.double() - reference.double()).norm()) / (norm or 1.0)


class Reference:
    """The loaded quantized model and its float64 copy, which shares the packed weights.

    Args:
        plan: The plan of the model.
        model: The quantized model; see :func:`dvdquant.export.verify.graph.load_quantized`.

    Attributes:
        layers: Its quantized layers by name.
    """

    def __init__(self, plan: ModelPlan, model: nn.Module) -> None:
        self.plan, self.model = plan, model
        self.layers = quant_linears(model)
        self._exact: nn.Module | None = None

    def use(self, bits: int) -> None:
        """Switch both models to the activation grids of a bit-width.

        Args:
            bits: The bits of the activations, one of the recipe's.

        Raises:
            RecipeError: The recipe has no activations of so many bits.
        """
        for model in (self.model, self._exact):
            if model is not None:
                set_activation(model, self.plan.recipe.activation(bits))
        self._bits = bits

    def free(self, inputs: Mapping[str, Tensor], bits: int) -> Free:
        """Run both models on the same inputs.

        Args:
            inputs: The inputs of the graph by name.
            bits: The bits of the activations, one of the recipe's.
        """
        self._exact = self._exact or as_float64(self.model)
        self.use(bits)
        same_dtype, codes = self._recording(self.model, inputs)
        exact, exact_codes = self._recording(self._exact, self._wide(inputs))
        flips = sum(int((a != b).sum()) for a, b in zip(codes, exact_codes))
        return Free(same_dtype, exact, flips / max(1, sum(c.numel() for c in codes)))

    def led(self, inputs: Mapping[str, Tensor], ys: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield the values of both models where every quantized layer has a given output.

        The first values are in the model's dtype, the second ones in float64. Nothing is rounded to codes on the way,
        so nothing is chaotic.

        Args:
            inputs: The inputs of the graph by name.
            ys: The output of every quantized layer [..., N], by name; it is rounded to the model's dtype.

        Yields:
            The inputs of the layers' ops by name, and the output of the model as ``sample``.
        """
        self._exact = self._exact or as_float64(self.model)
        rounded = {name: y.to(self.plan.dtype) for name, y in ys.items()}
        for model, given in ((self.model, inputs), (self._exact, self._wide(inputs))):
            seen: dict[str, Tensor] = {}
            with _replaced(model, rounded, seen), torch.no_grad():
                seen["sample"] = GraphWrapper(model, self.plan.family)(dict(given))
            yield seen

    def layer_inputs(self, inputs: Mapping[str, Tensor], bits: int, step: int) -> dict[str, Tensor]:
        """Return x of every layer in the model's dtype, with every ``step``-th token.

        Args:
            inputs: The inputs of the graph by name.
            bits: The bits of the activations, one of the recipe's.
            step: Every ``step``-th token is kept.

        Returns:
            x [..., tokens, K] after shift and smooth scale, by the name of the layer.
        """
        self.use(bits)
        seen: dict[str, Tensor] = {}

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            """Keep the smoothed input of a layer."""
            assert isinstance(module, QuantLinear)
            seen[_name(module)] = module.smooth(_strided(args[0], step)).clone()

        self._run(self.model, inputs, record)
        return seen

    def _recording(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and activation codes in call order (int8, at most ``RECORDED_TOKENS`` tokens a layer)."""
        codes: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            """Keep the codes of a layer's input."""
            assert isinstance(module, QuantLinear)
            tokens = args[0].shape[-2] if args[0].dim() > 1 else 1
            x = module.smooth(_strided(args[0], -(-tokens // RECORDED_TOKENS)))
            compute = torch.float64 if x.dtype == torch.float64 else torch.float32
            hadamard, outer = (m.to(compute) for m in module.rotation_matrices())
            rotated = rotate_by_matrices(x.to(compute), hadamard, outer)
            codes.append(quantize_activation(rotated, module.act_bits, module.act_group)[0].to(torch.int8))

        return self._run(model, inputs, record), codes

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor], record: Callable[..., None]) -> Tensor:
        """Run a model, with ``record`` called before every quantized layer, and return its output."""
        hooks = [layer.register_forward_pre_hook(record) for layer in quant_linears(model).values()]
        try:
            with torch.no_grad():
                output: Tensor = GraphWrapper(model, self.plan.family)(dict(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return output

    def _wide(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs in float64 where they are in the model's dtype."""
        return {name: t.double() if t.dtype == self.plan.dtype else t for name, t in inputs.items()}


@contextmanager
def _replaced(model: nn.Module, ys: Mapping[str, Tensor], seen: dict[str, Tensor]) -> Iterator[None]:
    """Let every quantized layer return its part of ``ys`` in the dtype of its input, and keep that input.

    Args:
        model: The quantized model; its layers are restored at the end.
        ys: The outputs of the layers [..., N], by name.
        seen: Gets the smoothed inputs of the layers, by name.
    """
    layers = quant_linears(model)

    def forward(name: str) -> Callable[[Tensor], Tensor]:
        """Return the function that stands for the forward of a layer."""

        def give(x: Tensor) -> Tensor:
            """Keep x, and return the given output."""
            seen[name] = layers[name].smooth(x)
            return ys[name].to(x.dtype)

        return give

    try:
        for name, layer in layers.items():
            layer.__dict__["forward"] = forward(name)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _name(module: nn.Module) -> str:
    """Return the name of a quantized layer."""
    assert isinstance(module, QuantLinear)
    return module.spec.name


def _strided(x: Tensor, step: int) -> Tensor:
    """Return every ``step``-th token of [..., tokens, K]; a tensor with one axis is returned whole."""
    return x[..., ::step, :] if step > 1 and x.dim() > 1 else x


def as_float64(model: nn.Module) -> nn.Module:
    """Return a copy of a model with float parameters in float64; QuantLinear then computes in float64.

    Packed buffers are shared with the original.

    Args:
        model: The quantized model.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = buffer
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        if not isinstance(module, QuantLinear):
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter.is_floating_point():
                    setattr(module, name, nn.Parameter(parameter.double(), requires_grad=False))
    return clone
