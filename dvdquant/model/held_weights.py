"""What a GPU holds of a model's weights, packed or expanded, and what a step pays for expanding them.

Nothing runs: bytes are counted from the plan of the model and the table of paths, and the cost from two data-sheet
figures of a GPU. A layer of K → N on M tokens whose path multiplies 8 bits is expanded before its product: K·N/2 bytes
are read and K·N are written, at the bandwidth B. The product itself takes 2·M·K·N operations at the rate R. So the
expansion costs ``0.75 · (R/B) / M`` of the product, whatever K and N are, and less of a whole step, in which attention
takes its time too.
What a path of 4 bits multiplies is the packed weight, and costs nothing. Layers that are fused with what comes before
them hold their weights in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import OPERATIONS_PER_BYTE, RATES, WeightForm
from dvdquant.model.families import Sizes
from dvdquant.model.kept_inputs import kept_inputs_bytes
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.packed_rows import packed_bytes, rows_bytes
from dvdquant.ops.paths import choose_path, form_of
from dvdquant.ops.repack import LayerShape, prepared_bytes

__all__ = ["HeldLayer", "HeldWeights", "KeptTensor", "held_weights", "largest_kept", "packed_inputs", "shape_of"]


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that stays in 16 or 32 bit.

    Args:
        name: Its name.
        dtype: Its dtype.
        shape: Its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class HeldLayer:
    """The bytes of one quantized layer on a GPU.

    Args:
        name: Its name.
        packed: Held once and packed, by a PyTorch session.
        expanded: Held as the paths of all widths multiply it, by a PyTorch session.
        stored: The packed tensors as the files hold them, which a TensorRT engine has as inputs.
        rows: What the plugin holds beside those inputs where the weight stays packed.
        plugin_expanded: What the plugin holds beside them where it is expanded: 4-bit paths multiply the inputs all the same.
        scratch: What one call expands it into, at most; 0 where no path of it expands.
        traffic: The bytes that a step reads and writes to expand it, by activation bits.
    """

    name: str
    packed: int
    expanded: int
    stored: int
    rows: int = 0
    plugin_expanded: int = 0
    scratch: int = 0
    traffic: tuple[tuple[int, int], ...] = ()

    def added(self, plugin: bool) -> int:
        """Return what it takes more where it is held expanded.

        Args:
            plugin: Whether an engine with the TensorRT plugin holds it.
        """
        return self.plugin_expanded - self.rows if plugin else self.expanded - self.packed


@dataclass(frozen=True)
class HeldWeights:
    """The bytes of one transformer's weights on a GPU, and the cost of packed ones.

    Args:
        kept: What a PyTorch session holds of what is not quantized: tensors in 16 or 32 bit, and the powers of two and constants
            before quantized layers.
        layers: The quantized layers.
        pace: For each of the activation bits, the bytes that the memory moves while the tensor cores take a step; empty
            without a size.
        shared: What of that is an input of engines with the plugin, held once for all of them.
        constants: What these engines hold in themselves, all together: the rest of it, and the matrices of rotations.
    """

    kept: int
    layers: tuple[HeldLayer, ...]
    pace: tuple[tuple[int, float], ...] = ()
    shared: int = 0
    constants: int = 0

    @property
    def packed(self) -> int:
        """Return the bytes of the quantized layers, each held once and packed."""
        return sum(layer.packed for layer in self.layers)

    @property
    def expanded(self) -> int:
        """Return the bytes of the quantized layers as the paths of all widths multiply them."""
        return sum(layer.expanded for layer in self.layers)

    @property
    def stored(self) -> int:
        """Return the bytes of the packed tensors as the files hold them, which a TensorRT engine has as inputs."""
        return sum(layer.stored for layer in self.layers)

    @property
    def scratch(self) -> int:
        """Return what one call expands a weight into, at most; a part of its workspace. 0 where nothing is expanded."""
        return max((layer.scratch for layer in self.layers), default=0)

    @property
    def traffic(self) -> tuple[tuple[int, int], ...]:
        """Return the bytes that a step reads and writes to expand all weights, by activation bits."""
        found: dict[int, int] = {}
        for layer in self.layers:
            for bits, moved in layer.traffic:
                found[bits] = found.get(bits, 0) + moved
        return tuple(found.items())

    @property
    def cost(self) -> float:
        """Return the modelled share of the slowest width's step that expanding takes; 0 without a size."""
        traffic = dict(self.traffic)
        return max((traffic.get(bits, 0) / pace for bits, pace in self.pace), default=0.0)

    def nbytes(self, form: WeightForm, plugin: bool = False) -> int:
        """Return what a PyTorch session on the kernels holds, or what engines with the TensorRT plugin hold, all together.

        Args:
            form: ``packed`` or ``expanded``.
            plugin: Whether engines hold it, which have the packed and the large tensors as inputs.
        """
        if plugin:
            return self.outside_engines(form) + self.constants
        return self.kept + (self.packed if form == "packed" else self.expanded)

    def outside_engines(self, form: WeightForm) -> int:
        """Return what engines with the plugin hold outside of themselves: their inputs, and what the plugin holds beside those.

        Args:
            form: ``packed`` or ``expanded``.
        """
        return self.shared + sum(
            layer.stored + (layer.rows if form == "packed" else layer.plugin_expanded) for layer in self.layers
        )


def held_weights(
    plan: ModelPlan, sm: int, bits: Sequence[int], sizes: Sizes | None = None, shared: Sequence[int] | None = None
) -> HeldWeights:
    """Count what a GPU holds of a model.

    Args:
        plan: The plan of the model.
        sm: The compute capability, major · 10 + minor.
        bits: The activation bits that are loaded.
        sizes: The sizes of the export; the cost is of a step at the size that it is tuned for.
        shared: For each engine with the plugin, the bytes of its inputs that are not quantized, as the manifest has them; None
            means one engine for each of the bits, as they are built now.

    Raises:
        UnsupportedError: No kernels run on this SM.
    """
    choose_path(LayerShape(8, 256), sm)
    kept = sum(tensor.nbytes for tensor in largest_kept(plan, None))
    if shared is None:
        shared = [kept_inputs_bytes(plan, plugin=True)] * len(bits)
    inside = kept + _rotation_bytes(plan) + sum(_pre_quant_bytes(spec) for spec in plan.layers)
    constants = sum(inside - size for size in shared)
    layers, products = [], dict.fromkeys(bits, 0.0)
    for spec in plan.layers:
        before = _pre_quant_bytes(spec)
        # In 16 bit too, scales and offsets in turns, as the kernels read them.
        kept += before + (4 * spec.features if before else 0)
        inputs = _tensor_bytes(spec) - before
        try:
            runs = {width: shape_of(spec, plan, width) for width in bits}
            paths = {width: choose_path(layer, sm) for width, layer in runs.items()}
        except (UnsupportedError, ShapeError):
            layers.append(HeldLayer(spec.name, inputs, inputs, inputs))  # PyTorch computes it from the stored tensors
            continue
        layers.append(_held_layer(spec.name, inputs, runs, paths))
        for width, path in paths.items():
            # 4-bit tensor cores take half the time of those for 8 bits.
            products[width] += runs[width].n * runs[width].k / (2 if form_of(path) == "s4" else 1)
    pace: list[tuple[int, float]] = []
    if sizes is not None:
        tokens = plan.family.tokens(*sizes.at("opt")) * sizes.batch
        ratio = OPERATIONS_PER_BYTE.get(sm, max(OPERATIONS_PER_BYTE.values()))
        # Attention is in 16 bit; it is counted in operations of INT8 that take as long.
        sixteen = RATES[sm].sixteen_bit_cost if sm in RATES else 2.0
        attention = sixteen * 4.0 * (tokens / sizes.batch) ** 2 * sizes.batch * sum(map(_attention_width, plan.layers))
        pace = [(width, (2.0 * tokens * products[width] + attention) / ratio) for width in bits]
    moving = tuple((width, moved) for width, moved in pace if moved)
    return HeldWeights(kept, tuple(layers), moving, max(shared, default=0), constants)


def packed_inputs(plan: ModelPlan) -> int:
    """Return the bytes of the packed tensors of all layers, which engines with the plugin have as inputs.

    Args:
        plan: The plan of the model.
    """
    return sum(_tensor_bytes(spec) - _pre_quant_bytes(spec) for spec in plan.layers)


def _tensor_bytes(spec: LayerSpec, start: str = "") -> int:
    """Return the bytes of a layer's stored tensors whose names within the layer begin with ``start``."""
    return sum(
        dtype.itemsize * torch.Size(shape).numel()
        for name, (dtype, shape) in spec.tensors().items()
        if name.rpartition(".")[2].startswith(start)
    )


def _pre_quant_bytes(spec: LayerSpec) -> int:
    return _tensor_bytes(spec, "pre_quant")


def _rotation_bytes(plan: ModelPlan) -> int:
    """Return the bytes of the factors of all rotations, each order once and in fp32, as a graph holds them."""
    factors = {factor for spec in plan.layers for factor in ((0, spec.rotation.inner), (1, spec.rotation.outer))}
    ones = any(order == 1 for _, order in factors)  # the same tensor for both factors
    return 4 * (ones + sum(order**2 for _, order in factors if order > 1))


def _held_layer(name: str, inputs: int, runs: Mapping[int, LayerShape], paths: Mapping[int, str]) -> HeldLayer:
    """Count one layer that the kernels run; ``inputs`` are the bytes of its stored tensors, the others are by width."""
    shape = next(iter(runs.values()))
    rows = rows_bytes(shape)  # what groups have is read from the inputs
    forms = {form_of(path): prepared_bytes(runs[width], path) for width, path in paths.items()}
    wide = [size for form, size in forms.items() if form != "s4"]
    weights = shape.n * shape.k
    traffic = tuple((width, 0 if form_of(path) == "s4" else weights + weights // 2) for width, path in paths.items())
    return HeldLayer(
        name,
        packed=packed_bytes(shape),
        expanded=sum(forms.values()),
        stored=inputs,
        rows=rows,
        plugin_expanded=sum(wide) + (rows if "s4" in forms else 0),
        scratch=max(wide, default=0),
        traffic=traffic,
    )


def largest_kept(plan: ModelPlan, count: int | None = 8) -> list[KeptTensor]:
    """Return the tensors that stay in 16 or 32 bit, the largest first.

    Args:
        plan: The plan of the model.
        count: How many; None means all.
    """
    tensors = [KeptTensor(name, dtype, shape) for name, (dtype, shape) in plan.kept.items()]
    return sorted(tensors, key=lambda tensor: (-tensor.nbytes, tensor.name))[:count]


def shape_of(spec: LayerSpec, plan: ModelPlan, bits: int) -> LayerShape:
    """Return a layer of a plan as the kernels know it at one width.

    Args:
        spec: The layer.
        plan: The plan of its model.
        bits: The activation bits of the graph.
    """
    grid = spec.activation(plan.recipe.activation(bits))
    rotation = spec.rotation
    return LayerShape(
        spec.out_features, spec.features, spec.groups, spec.float_zero_point, rotation.inner, rotation.outer,
        grid.bits, grid.group_size, DTYPE_NAMES.get(plan.dtype, "bf16"),
    )  # fmt: skip


def _attention_width(spec: LayerSpec) -> int:
    """Return the width of the self-attention whose queries and keys are rows of a layer; 0 if they are not."""
    ends = [member.rpartition(".")[2] for member in spec.members]
    return spec.rows[ends.index("to_q")] if "to_q" in ends and "to_k" in ends else 0
