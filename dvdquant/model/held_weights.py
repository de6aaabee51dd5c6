"""What a GPU holds of a model's weights, packed or expanded, and what a step pays for expanding them.

Nothing runs: bytes are counted from the plan of the model and the table of paths, and the cost from two data-sheet
figures of a GPU. A layer of K → N on M tokens whose path multiplies 8 bits is expanded before its product: K·N/2 bytes
are read and K·N are written, at the bandwidth B. The product itself takes 2·M·K·N operations at the rate R. So the
expansion costs ``0.75 · (R/B) / M`` of the product, whatever K and N are, and less of a whole step, in which attention
takes its time too. What a path of 4 bits multiplies is the packed weight, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import COST_LIMIT, OPERATIONS_PER_BYTE, WeightForm, WeightPolicy
from dvdquant.model.families import Sizes
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.packed_rows import packed_bytes, rows_bytes
from dvdquant.ops.paths import choose_path, form_of
from dvdquant.ops.repack import LayerShape, prepared_bytes

__all__ = ["HeldWeights", "KeptTensor", "held_weights", "largest_kept", "shape_of"]


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
class HeldWeights:
    """The bytes of one transformer's weights on a GPU, and the cost of packed ones.

    Args:
        kept: What is not quantized, and the powers of two and constants before quantized layers.
        packed: The quantized layers, each held once and packed.
        expanded: The quantized layers as the paths of all widths multiply them.
        stored: The packed tensors as the files hold them, which a TensorRT engine has as inputs.
        rows: What the plugin holds beside those inputs where weights stay packed.
        scratch: What one call expands a weight into, at most; a part of its workspace. 0 where nothing is expanded.
        traffic: The bytes that a step reads and writes to expand weights, by activation bits.
        cost: The modelled share of the slowest width's step; 0 without a size.
    """

    kept: int
    packed: int
    expanded: int
    stored: int
    rows: int
    scratch: int
    traffic: tuple[tuple[int, int], ...]
    cost: float

    def nbytes(self, form: WeightForm) -> int:
        """Return what a PyTorch session on the kernels holds.

        Args:
            form: ``packed`` or ``expanded``.
        """
        return self.kept + (self.packed if form == "packed" else self.expanded)

    def plugin_bytes(self, form: WeightForm) -> int:
        """Return what engines with the TensorRT plugin hold, which have the packed tensors as inputs.

        Args:
            form: ``packed`` or ``expanded``.
        """
        return self.kept + self.stored + (self.rows if form == "packed" else self.expanded)

    def choose(self, policy: WeightPolicy, room: int | None = None, plugin: bool = False) -> WeightForm:
        """Return the form of a policy.

        ``auto`` is packed where that costs a step :data:`.COST_LIMIT` at most, and where expanded weights do not fit.

        Args:
            policy: One of :data:`dvdquant.hardware.weights.WEIGHTS`.
            room: The free bytes of the device, if known.
            plugin: Whether engines with the TensorRT plugin hold them.
        """
        if policy == "packed" or policy == "expanded":
            return policy
        large = self.plugin_bytes("expanded") if plugin else self.nbytes("expanded")
        too_large = room is not None and large > room
        return "packed" if self.cost <= COST_LIMIT or too_large else "expanded"


def held_weights(plan: ModelPlan, sm: int, bits: Sequence[int], sizes: Sizes | None = None) -> HeldWeights:
    """Count what a GPU holds of a model.

    Args:
        plan: The plan of the model.
        sm: The compute capability, major · 10 + minor.
        bits: The activation bits that are loaded.
        sizes: The sizes of the export; the cost is of a step at the size that it is tuned for.

    Raises:
        UnsupportedError: No kernels run on this SM.
    """
    choose_path(LayerShape(8, 256), sm)
    kept = sum(tensor.nbytes for tensor in largest_kept(plan, None))
    packed = expanded = stored = rows = scratch = 0
    traffic, products = dict.fromkeys(bits, 0), dict.fromkeys(bits, 0.0)
    for spec in plan.layers:
        files = {name.rpartition(".")[2]: (dtype, shape) for name, (dtype, shape) in spec.tensors().items()}
        sizes_of = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape) in files.items()}
        before = sum(size for key, size in sizes_of.items() if key.startswith("pre_quant"))
        # In 16 bit too, scales and offsets in turns, as the kernels read them.
        kept += before + (4 * spec.features if before else 0)
        inputs = sum(sizes_of.values()) - before
        stored += inputs
        try:
            shapes = {width: shape_of(spec, plan, width) for width in bits}
            runs = {width: (layer, choose_path(layer, sm)) for width, layer in shapes.items()}
        except (UnsupportedError, ShapeError):
            packed, expanded = packed + inputs, expanded + inputs  # PyTorch computes it from the stored tensors
            continue
        shape = next(iter(runs.values()))[0]
        packed += packed_bytes(shape)
        rows += rows_bytes(shape)  # what groups have is read from the inputs
        forms = {form_of(path): prepared_bytes(layer, path) for layer, path in runs.values()}
        expanded += sum(forms.values())
        scratch = max([scratch, *(size for form, size in forms.items() if form != "s4")])
        for width, (layer, path) in runs.items():
            weights = layer.n * layer.k
            # 4-bit tensor cores take half the time of those for 8 bits.
            native = path.startswith("s4")
            traffic[width] += 0 if native else weights + weights // 2
            products[width] += weights / 2 if native else weights
    cost = 0.0
    if sizes is not None:
        tokens = plan.family.tokens(*sizes.at("opt")) * sizes.batch
        ratio = OPERATIONS_PER_BYTE.get(sm, max(OPERATIONS_PER_BYTE.values()))
        # Attention in 16 bit, at half the rate: as many operations of 8 bits twice.
        attention = 2 * 4.0 * (tokens / sizes.batch) ** 2 * sizes.batch * sum(map(_attention_width, plan.layers))
        for width in bits:
            operations = 2.0 * tokens * products[width] + attention
            cost = max(cost, traffic[width] * ratio / operations if operations else 0.0)
    return HeldWeights(kept, packed, expanded, stored, rows, scratch, tuple(traffic.items()), cost)


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
