"""Quantized linear layers in simulation: what a method does to a layer, put in place of the layer in the fp32 model.

Every method is compared on the same layers with the same arithmetic: operands on their grids, one matrix product, the
result in 16 bit as a kernel would write it. What runs on integers is in ``kernels/``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.simulation.grid import Grid, rotated_to_grid
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import plan_model
from dvdquant.numerics.hadamard import Rotation
from dvdquant.quantize.hessian import InputHessian
from dvdquant.recipe import RECIPES

__all__ = [
    "Layer",
    "Simulated",
    "SimulatedGroup",
    "install",
    "layers_of",
    "product",
    "sampled_inputs",
    "set_product_dtype",
]


@dataclass(frozen=True)
class Layer:
    """Holds what a method may look at: one linear layer, those that share their input (q, k, v) merged as the export does.

    Args:
        name: The dotted name, the members joined by ``+``.
        spec: The export's own plan of this layer.
        weight: fp32 [N, K].
        bias: fp32 [N], or None.
        inputs: fp32 [T, K], inputs that this layer had while clips of other prompts and seeds were generated. They are for the
            methods that calibrate; DVD-Quant does not read them.
        predicted: The same, predicted without data (``predict.py``), by the name of the prediction.
        hessian: What the export predicts of the inputs.
    """

    name: str
    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    predicted: Mapping[str, Tensor] = field(default_factory=dict)
    hessian: InputHessian | None = None


@dataclass
class Simulated:
    """Describes a layer: ``y = A(x̂ R) Ŵᵀ + (x̂ Lᵀ) Uᵀ + shift·Wᵀ + bias`` with ``x̂ = (x − shift) / divide``.

    Args:
        weight: Ŵ, fp32 [N, K], quantized in the divided and rotated space.
        activation: A, gives [..., K] on its grid; None leaves the input as it is.
        divide: fp32 [K], or None.
        rotation: R, or None.
        low_rank: (L [r, K], U [N, r]), a branch in 16 bit, or None; not together with a shift.
        whole: Replaces all of it: x [..., K] to y [..., N] without bias, for packages that bring their own product.
        shift: fp32 [K], or None.
        biased: Whether ``whole`` adds the bias itself.
    """

    weight: Tensor
    activation: Callable[[Tensor], Tensor] | None = None
    divide: Tensor | None = None
    rotation: Rotation | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    whole: Callable[[Tensor], Tensor] | None = None
    shift: Tensor | None = None
    biased: bool = False


# The operands are codes times scales. bf16 adds 2⁻⁹ to each, an order of magnitude below what W4A8 changes, and it is what
# the unquantized layers of the deployed model compute in. Inputs are divided and rotated in fp32, as the kernels do.
_PRODUCT_DTYPE = [torch.bfloat16]


def set_product_dtype(dtype: torch.dtype) -> None:
    """Set the dtype of the operands of every simulated product; it is bf16 until then.

    Args:
        dtype: The dtype.
    """
    _PRODUCT_DTYPE[0] = dtype


class SimulatedGroup:
    """Computes one merged layer: x [..., K] to y [..., N] in the dtype of the products, whatever autocast says.

    Args:
        layer: The layer.
        simulated: What it became.
        dtype: The dtype of the operands; None for that of :func:`set_product_dtype`.
    """

    def __init__(self, layer: Layer, simulated: Simulated, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or _PRODUCT_DTYPE[0]
        self.layer, self.simulated, self.dtype = layer, simulated, dtype
        self.weight = _factor(simulated.weight, dtype)
        bias, self.shift = layer.bias, simulated.shift
        if self.shift is not None:
            added = layer.weight @ self.shift
            bias = added if bias is None else bias + added
        self.bias = None if bias is None else _factor(bias, dtype)
        self.divide = None if simulated.divide is None else simulated.divide.float().contiguous()
        rotation = simulated.rotation
        self.rotation = None if rotation is None or rotation.identity else rotation
        self.matrices = None if self.rotation is None else self.rotation.matrices(torch.float32)
        self.down: Tensor | None = None
        if simulated.low_rank is not None:
            # The branch as more columns of the product, [A(x̂ R), x̂ Lᵀ] [Ŵ, U]ᵀ: one sum, rounded once.
            down, up = simulated.low_rank
            self.down = _factor(down if self.divide is None else down / self.divide, dtype)
            self.weight = torch.cat((self.weight, _factor(up, dtype)), dim=1)

    @torch.autocast("cpu", enabled=False)
    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: [..., K], floating point.
        """
        sim = self.simulated
        if sim.whole is not None:
            y = sim.whole(x.float())
            return (
                y.to(self.dtype) if self.bias is None or sim.biased else (y.float() + self.bias.float()).to(self.dtype)
            )
        operand = self._on_grid(x)
        if self.down is not None:
            operand = torch.cat((operand, _linear(x.to(self.dtype), self.down)), dim=-1)
        return _linear(operand, self.weight, self.bias)

    def _on_grid(self, x: Tensor) -> Tensor:
        """Return the shifted, divided, rotated and quantized input, [..., K] in the dtype of the operands."""
        activation = self.simulated.activation
        if isinstance(activation, Grid) and self.dtype == torch.bfloat16:
            compiled = rotated_to_grid(x, self.shift, self.divide, self.rotation, activation)
            if compiled is not None:
                return compiled
        if activation is None and self.shift is None and self.divide is None and self.matrices is None:
            return x.to(self.dtype)
        x = x.float() if self.shift is None else x.float() - self.shift
        divided = x if self.divide is None else x / self.divide
        rotated = divided if self.matrices is None else _rotate(divided, *self.matrices)
        return (rotated if activation is None else activation(rotated)).to(self.dtype)


WIDE_PRODUCTS = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
"""Whether bf16 is multiplied in float32: without AVX-512, a product in bf16 takes much longer.

Products of two bf16 numbers are exact in float32, so the same operands give the same sum but for its order."""


def _factor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values rounded to ``dtype``, in the dtype that :func:`_linear` multiplies in."""
    rounded = values.to(dtype)
    return rounded.float() if WIDE_PRODUCTS and dtype == torch.bfloat16 else rounded


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weightᵀ + bias`` in the dtype of ``x``, rounded once; weight and bias come from :func:`_factor`."""
    if weight.dtype == torch.float32:
        # oneDNN's fp32 product; the one behind linear is slower on AMD.
        wide = x.float().contiguous()
        return torch.ops.mkldnn._linear_pointwise(wide, weight, bias, "none", [], "").to(x.dtype)  # type: ignore[no-any-return]
    return nn.functional.linear(x, weight, bias)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` in the dtype of ``x``, rounded once.

    Args:
        x: [..., M, K], floating point.
        y: [..., K, N], of the same dtype.
    """
    if not (WIDE_PRODUCTS and x.dtype == torch.bfloat16):
        return x @ y
    with torch.autocast("cpu", enabled=False):  # it would round the operands, and take the slow product again
        return (x.float() @ y.float()).to(x.dtype)


def _rotate(x: Tensor, hadamard: Tensor, outer: Tensor) -> Tensor:
    """Return x [..., K] times a rotation of two factors."""
    inner, cores = len(hadamard), len(outer)
    if cores == 1:
        return (x.reshape(-1, inner) @ hadamard).reshape(x.shape)
    return (outer.T @ (x.reshape(-1, cores, inner) @ hadamard)).reshape(x.shape)


class _Shared:
    """Computes a merged layer once per input and hands it out to its members."""

    def __init__(self, group: SimulatedGroup) -> None:
        self.group = group
        self.input: Tensor | None = None
        self.output: tuple[Tensor, ...] = ()

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return the rows of one member, [..., rows]; the last member frees what is kept."""
        if self.input is not x:
            self.output = self.group(x).split(list(self.group.layer.spec.rows), dim=-1)
            self.input = x
        part = self.output[index]
        if index == len(self.output) - 1:
            self.input, self.output = None, ()
        return part


class _Member(nn.Module):
    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self._shared, self._index = [shared], index

    def forward(self, x: Tensor) -> Tensor:
        return self._shared[0].take(self._index, x)


def layers_of(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | None = None,
    predicted: Mapping[str, Mapping[str, Tensor]] | None = None,
    hessian: Mapping[str, InputHessian] | None = None,
) -> list[Layer]:
    """Return the layers that every method quantizes: those that the export would, of a float model.

    Args:
        model: The diffusers transformer in fp32.
        inputs: Calibration inputs, fp32 [T, K], by the name of a layer's first member; [0, K] where there are none.
        predicted: Such inputs by the name of a prediction.
        hessian: What the export predicts of the inputs, by the name of the layer.
    """
    # Of the recipe that says most of a layer: whether it can be shifted.
    config: Any = model.config
    plan = plan_model(dict(config), RECIPES["w4a4"], torch.float32)
    found = []
    for spec in plan.layers:
        linears: list[Any] = [model.get_submodule(name) for name in spec.members]
        weight = torch.cat([m.weight.detach().float() for m in linears])
        biases = [m.bias for m in linears]
        bias = None if biases[0] is None else torch.cat([b.detach().float() for b in biases])
        first, none = spec.members[0], weight.new_zeros(0, spec.features)
        seen = (inputs or {}).get(first, none)
        guessed = {name: values.get(first, none) for name, values in (predicted or {}).items()}
        found.append(Layer(spec.name, spec, weight, bias, seen, guessed, (hessian or {}).get(spec.name)))
    return found


@contextmanager
def sampled_inputs(model: nn.Module, kept: int, generator: torch.Generator) -> Iterator[dict[str, list[Tensor]]]:
    """Keep random tokens, fp32 [kept, K], of every call of every layer while it is open, by the name of its first member.

    Args:
        model: The transformer.
        kept: The tokens of a call.
        generator: Chooses them.
    """
    names = [layer.spec.members[0] for layer in layers_of(model)]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            seen[name].append(tokens[torch.randint(len(tokens), (kept,), generator=generator)].clone())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def install(
    model: nn.Module,
    layers: Iterable[Layer],
    method: Callable[[Layer], Simulated],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a copy of the model with ``method`` in place of its layers; what is not replaced is shared with ``model``.

    The copy is exact in what it leaves alone. ``compiled.py`` does the same for many clips.

    Args:
        model: The transformer.
        layers: Its layers, with what a method may look at.
        method: What a layer becomes.
        dtype: The dtype of the operands; None for that of :func:`set_product_dtype`.
    """
    memo = {id(p): p for p in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, memo)
    for layer in layers:
        shared = _Shared(SimulatedGroup(layer, method(layer), dtype))
        for index, name in enumerate(layer.spec.members):
            parent, _, child = name.rpartition(".")
            setattr(changed.get_submodule(parent), child, _Member(shared, index))
    return changed
