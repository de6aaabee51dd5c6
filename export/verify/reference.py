"""The quantized PyTorch model as a reference: in its own dtype and in float64, free-running or led by a graph's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.model.layers import QuantLinear, set_activation
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.activation_grid import quantize_activation
from dvdquant.ops.reference import rotate_by_matrices

__all__ = ["Free", "Reference", "as_float64", "quant_linears", "relative_distance"]

RECORDED_TOKENS = 256


@dataclass
class Free:
    """What the model says at one bit-width: in its own dtype, in float64, and the share of codes that differ."""

    same_dtype: Tensor
    exact: Tensor
    flipped_codes: float


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers by name, in module order."""
    return {m.spec.name: m for m in model.modules() if isinstance(m, QuantLinear)}


def relative_distance(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64; the numerator alone where the reference is zero."""
    norm = float(reference.double().norm())
    return float((value.double() - reference.double()).norm()) / (norm or 1.0)


class Reference:
    """The loaded quantized model and its float64 copy, which shares the packed weights.

    Args:
        model: see :func:`dvdquant.export.verify.graph.load_quantized`.
    """

    def __init__(self, plan: ModelPlan, model: nn.Module) -> None:
        self.plan, self.model = plan, model
        self.layers = quant_linears(model)
        self._exact: nn.Module | None = None

    def use(self, bits: int) -> None:
        """Switch both to the activation grids of a bit-width."""
        for model in (self.model, self._exact):
            if model is not None:
                set_activation(model, self.plan.recipe.activation(bits))
        self._bits = bits

    def free(self, inputs: Mapping[str, Tensor], bits: int) -> Free:
        """Both models on the same inputs."""
        self._exact = self._exact or as_float64(self.model)
        self.use(bits)
        same_dtype, codes = self._recording(self.model, inputs)
        exact, exact_codes = self._recording(self._exact, self._wide(inputs))
        flips = sum(int((a != b).sum()) for a, b in zip(codes, exact_codes))
        return Free(same_dtype, exact, flips / max(1, sum(c.numel() for c in codes)))

    def led(self, inputs: Mapping[str, Tensor], ys: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What the layers' ops receive, by name, and the output as ``sample``, where every quantized layer says ``ys``:
        first in the model's dtype, then in float64. Nothing is rounded to codes on the way, so nothing is chaotic.
        """
        self._exact = self._exact or as_float64(self.model)
        rounded = {name: y.to(self.plan.dtype) for name, y in ys.items()}
        for model, given in ((self.model, inputs), (self._exact, self._wide(inputs))):
            seen: dict[str, Tensor] = {}
            with _replaced(model, rounded, seen), torch.no_grad():
                seen["sample"] = GraphWrapper(model, self.plan.family)(dict(given))
            yield seen

    def layer_inputs(self, inputs: Mapping[str, Tensor], bits: int, step: int) -> dict[str, Tensor]:
        """x of every layer in the model's dtype, every ``step``-th token of it."""
        self.use(bits)
        seen: dict[str, Tensor] = {}

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, QuantLinear)
            seen[_name(module)] = module.smooth(_strided(args[0], step)).clone()

        self._run(self.model, inputs, record)
        return seen

    def _recording(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output, and activation codes (int8, at most ``RECORDED_TOKENS`` a layer) in call order."""
        codes: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, QuantLinear)
            tokens = args[0].shape[-2] if args[0].dim() > 1 else 1
            x = module.smooth(_strided(args[0], -(-tokens // RECORDED_TOKENS)))
            compute = torch.float64 if x.dtype == torch.float64 else torch.float32
            hadamard, outer = (m.to(compute) for m in module._table[0].matrices(module.spec.rotation))
            rotated = rotate_by_matrices(x.to(compute), hadamard, outer)
            codes.append(quantize_activation(rotated, module.act_bits, module.act_group)[0].to(torch.int8))

        return self._run(model, inputs, record), codes

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor], record: Callable[..., None]) -> Tensor:
        hooks = [layer.register_forward_pre_hook(record) for layer in quant_linears(model).values()]
        try:
            with torch.no_grad():
                output: Tensor = GraphWrapper(model, self.plan.family)(dict(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return output

    def _wide(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.double() if t.dtype == self.plan.dtype else t for name, t in inputs.items()}


@contextmanager
def _replaced(model: nn.Module, ys: Mapping[str, Tensor], seen: dict[str, Tensor]) -> Iterator[None]:
    """Every quantized layer gives its part of ``ys`` in the dtype of its input, which goes to ``seen``."""
    layers = quant_linears(model)

    def forward(name: str) -> Callable[[Tensor], Tensor]:
        def give(x: Tensor) -> Tensor:
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
    assert isinstance(module, QuantLinear)
    return module.spec.name


def _strided(x: Tensor, step: int) -> Tensor:
    return x[..., ::step, :] if step > 1 and x.dim() > 1 else x


def as_float64(model: nn.Module) -> nn.Module:
    """A copy with float parameters in float64; packed buffers are shared. QuantLinear then computes in float64."""
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
