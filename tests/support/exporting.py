"""Quantized layers and exports made of real weights, and the product's own check of executors against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from dvdquant.artifact.entries import GraphEntry
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.export.graph.writer import FLAVOURS, GraphWriter
from dvdquant.export.verify.graph import load_quantized
from dvdquant.export.verify.intermediates import load_graph
from dvdquant.export.verify.layers import LayerCheck
from dvdquant.export.verify.layers import check_layers as judge_graph
from dvdquant.export.verify.tolerance import Judged, OpInputs, judge
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.numerics.packing import pack_int4
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.checkpoint import PackedWeights, quantize_checkpoint
from dvdquant.recipe import Recipe, WeightSpec
from dvdquant.system.progress import Progress
from tests.support.traces import traced

__all__ = [
    "REPOSITORY",
    "TINY_WAN",
    "Export",
    "Judged",
    "LayerCheck",
    "OpInputs",
    "activations",
    "check_layers",
    "export_graphs",
    "judge",
    "op_inputs",
    "state_of",
    "with_changes",
]

REPOSITORY = Path(__file__).parents[2]
TINY_WAN = REPOSITORY / "examples" / "tiny-wan"


# ------------------------------------------------------------------------------------------------------------- one op


def op_inputs(
    features: int,
    rows: int,
    *,
    act_bits: int = 8,
    act_group: int = 0,
    weight_group: int = 0,
    zero_point: str = "midrise",
    rotation: str | int = "auto",
    seed: int = 0,
) -> OpInputs:
    """A layer whose weight went through the real quantizer; heavy-tailed weights, a few outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, features, generator=generator)
    weight *= (1 + weight.abs()) / features**0.5
    weight[:, :: max(1, features // 5)] *= 6
    chosen = Rotation.for_features(features, rotation)
    spec = WeightSpec(group_size=weight_group, zero_point=zero_point)  # type: ignore[arg-type]
    quantized = quantize_weight(rotate(weight, chosen), spec)
    hadamard, outer = chosen.matrices(torch.float32)
    tensors = {
        "weight": pack_int4(quantized.codes).view(torch.int8),
        "weight_scale": quantized.scale,
        "weight_group_scale": quantized.group_scale,
        "weight_zero": quantized.zero,
        "bias": torch.randn(rows, generator=generator) * 0.1,
        "hadamard": hadamard,
        "outer": outer,
    }
    return OpInputs(tensors, act_bits, act_group)


def activations(tokens: int, features: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Signed, heavy-tailed, with outlier channels ten times larger; rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, features, generator=generator)
    x *= 1 + 0.3 * x.square()
    x[..., :: max(1, features // 4)] *= 10
    return x.to(dtype)


# ----------------------------------------------------------------------------------------------------- a whole export


@dataclass
class Export:
    """Packed weights and graphs of one transformer, without engines."""

    root: Path
    plan: ModelPlan
    sizes: Sizes
    packed: PackedWeights
    graphs: list[GraphEntry] = field(default_factory=list)

    def path(self, bits: int, flavour: str) -> Path:
        """The ONNX file of a bit-width and flavour."""
        (entry,) = [g for g in self.graphs if g["act_bits"] == bits and g["target"] == flavour]
        return self.root / entry["path"]

    def model(self, bits: int) -> torch.nn.Module:
        """The quantized PyTorch model with the stored weights."""
        return load_quantized(self.plan, self.packed.tensors, self.root, bits)


def export_graphs(
    source: Path,
    out: Path,
    recipe: Recipe,
    sizes: Sizes,
    dtype: torch.dtype,
    flavours: tuple[str, ...] = tuple(FLAVOURS),
) -> Export:
    """Quantize ``source`` and write every graph into ``out``, by the steps the command takes."""
    checkpoint = open_checkpoint(source)
    plan = plan_model(checkpoint.config, recipe, dtype)
    base = traced(plan, sizes)
    # Never committed: the files are moved out before the transaction sweeps them.
    with ExportTransaction(out / "work") as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress())
        writer = GraphWriter(transaction.tree, plan, "transformer", base, packed.tensors)
        graphs = [writer.write(a.bits, flavour) for a in recipe.activations for flavour in flavours]
        transaction.tree.rename(out / "tree")
    return Export(out / "tree", plan, sizes, packed, graphs)


# ------------------------------------------------------------------------------------------------------ layer by layer


def check_layers(
    export: Export,
    path: Path,
    bits: int,
    inputs: Mapping[str, Tensor],
    edit: Callable[[ir.Model], None] | None = None,
) -> list[LayerCheck]:
    """Run the graph at ``path`` in ONNX Runtime and judge every quantized layer on all tokens it had there.

    Args:
        edit: a change to the graph before it runs, for tests that plant a fault.
    """
    return judge_graph(load_graph(path, edit), export.model(bits), inputs, export.plan.dtype, path.parent)


def state_of(folder: Path) -> dict[str, bytes | None] | None:
    """Every path below ``folder`` with its content (None for a folder), or None where there is nothing."""
    if not folder.exists():
        return None
    if folder.is_file():
        return {".": folder.read_bytes()}
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def with_changes(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A deep copy of a config with other values."""
    return {**copy.deepcopy(dict(config)), **changes}
