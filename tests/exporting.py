"""Quantized layers and exports made of real weights, and the bounds their executors must keep.

A 4-bit-activation network is chaotic at rounding ties: one flipped code moves every later layer. So executors are compared
layer by layer on the very input the executor saw, with a bound that follows from the number formats:

    |y − y₆₄| ≤ Σ_{k near a tie} s[m,k]·|W[n,k]|  +  rounding of sums  +  rounding of y

where y₆₄ is the op in float64 and a code is near a tie if the error of x̃ can carry it over the tie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from torch import Tensor

from dvdquant.arq import QMAX
from dvdquant.bgr import quantize_weight
from dvdquant.checkpoint import open_checkpoint
from dvdquant.export.graphs import FLAVOURS, GraphWriter
from dvdquant.export.onnx import trace_graph
from dvdquant.export.verify import load_quantized, prepare_for_onnxruntime
from dvdquant.families import Sizes
from dvdquant.hadamard import Rotation, rotate
from dvdquant.layers import QuantLinear
from dvdquant.manifest import GraphEntry
from dvdquant.model import ModelPlan, plan_model
from dvdquant.ops.quant_linear import dequantize_weight, rotate_by_matrices
from dvdquant.packing import pack_int4
from dvdquant.progress import Progress
from dvdquant.quantize import PackedWeights, quantize_checkpoint
from dvdquant.recipe import Recipe, WeightSpec
from dvdquant.transaction import ExportTransaction

REPOSITORY = Path(__file__).parent.parent
TINY_WAN = REPOSITORY / "examples" / "tiny-wan"
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A sum of n independent rounding errors of at most u stays below λ·√n·u except with probability 2·exp(−λ²/2), which
# is 5e-11 for 7 (Hoeffding).
LAMBDA = 7.0


# ------------------------------------------------------------------------------------------------------------- one op


@dataclass
class OpInputs:
    """The tensors and attributes of one ``dvdquant::QuantLinear``."""

    tensors: dict[str, Tensor]
    act_bits: int
    act_group: int

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """In the order of the op."""
        return (x, *self.tensors.values(), self.act_bits, self.act_group)


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
        "weight_factor": quantized.factor,
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


@dataclass
class Judged:
    """The op in float64 on one input, and how far an executor may be from it.

    Args:
        y: [..., N] fp64. bound: the same shape. codes: fp64 [..., K]. near: bool [..., K], codes at a tie.
    """

    y: Tensor
    bound: Tensor
    codes: Tensor
    near: Tensor

    def excess(self, got: Tensor) -> float:
        """Largest |got − y| / bound; at most 1 where the executor is right, infinite for a NaN out of nothing."""
        distance = (got.double() - self.y).abs() / self.bound
        return float("inf") if bool(distance.isnan().any()) else float(distance.max())


def judge(
    op: OpInputs, x: Tensor, rotated_in: torch.dtype = torch.float32, rounded: torch.dtype | None = None
) -> Judged:
    """What float64 says of ``op`` on ``x``, and the bound of an executor.

    Args:
        rotated_in: dtype the executor rounds x̃ (and the product) to; fp32 where all of the op runs in fp32.
        rounded: dtype of y, that of x by default.
    """
    t = {name: value.double() if value.is_floating_point() else value for name, value in op.tensors.items()}
    wide = x.double()
    rotated = rotate_by_matrices(wide, t["hadamard"], t["outer"])
    group, qmax = op.act_group or x.shape[-1], QMAX[op.act_bits]
    grouped = rotated.reshape(*x.shape[:-1], -1, group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    grid = grouped * (qmax / amax)
    codes = grid.round().clamp(-qmax, qmax)
    # The error of x̃: of the rotation's sums in fp32, then of its rounding; amax carries the same error.
    unit, fine = UNIT[rotated_in], UNIT[torch.float32]
    block = op.tensors["hadamard"].shape[0] * op.tensors["outer"].shape[0]
    size = wide.reshape(*x.shape[:-1], -1, block).norm(dim=-1, keepdim=True).expand(*x.shape[:-1], -1, block)
    sums = (LAMBDA * fine * 2 * size.reshape(grouped.shape)) if block > 1 else torch.zeros_like(grouped)
    error = (sums + 2 * unit * grouped.abs()) * (qmax / amax) + grid.abs() * (2 * unit + 4 * fine)
    near = ((grid - grid.floor() - 0.5).abs() <= error) & (grid.abs() < qmax + 0.5)
    weight = dequantize_weight(
        *(t[f] for f in ("weight", "weight_scale", "weight_factor", "weight_zero")), torch.float64
    )
    step = (amax / qmax).expand(grouped.shape)
    flat = x.shape
    y = (codes * step).reshape(flat) @ weight.T + t["bias"]
    flips = (near * step).reshape(flat)
    spread = torch.minimum(flips @ weight.abs().T, LAMBDA * (flips.square() @ weight.square().T).sqrt())
    act = (codes * step).reshape(flat)
    # ‖terms‖₂ of every sum. A sum of K terms in fp32 has K rounding errors of about that size.
    terms = LAMBDA * (act.square() @ weight.square().T).sqrt()
    bound = spread + terms * (x.shape[-1] ** 0.5 * fine + (2 * unit if unit > fine else 0.0))
    # The scale of each group carries the error of its amax; the sum before the zero-point's share is taken off a rounding.
    scale_error = (sums.amax(-1, keepdim=True) / amax + 4 * max(unit, fine)).expand(grouped.shape).reshape(flat)
    bound = bound + LAMBDA * ((act * scale_error).square() @ weight.square().T).sqrt()
    zero_share = (act @ (weight - _uncentred(t)).T).abs()
    bound = bound + 4 * max(unit, fine) * (y.abs() + t["bias"].abs() + zero_share)
    bound = bound + UNIT[rounded or x.dtype] * (y.abs() + bound) + 1e-30
    if (rounded or x.dtype) == torch.float16:
        bound = bound + 2.0**-24  # fp16 is subnormal below 6e-5
    return Judged(y, bound, codes.reshape(flat), near.reshape(flat))


def _uncentred(t: Mapping[str, Tensor]) -> Tensor:
    zero = torch.zeros(len(t["weight_zero"]))
    return dequantize_weight(t["weight"], t["weight_scale"], t["weight_factor"], zero, torch.float64)


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
    base = trace_graph(plan, sizes)
    # Never committed: the files are moved out before the transaction sweeps them.
    with ExportTransaction(out / "work") as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress())
        writer = GraphWriter(transaction.tree, plan, "transformer", base, packed.tensors)
        graphs = [writer.write(a.bits, flavour) for a in recipe.activations for flavour in flavours]
        transaction.tree.rename(out / "tree")
    return Export(out / "tree", plan, sizes, packed, graphs)


# ------------------------------------------------------------------------------------------------------ layer by layer


@dataclass
class LayerCheck:
    """One layer of a graph against float64 on the input it had: ``excess`` ≤ 1 is right, ``ties`` codes were near one."""

    name: str
    excess: float
    ties: int
    codes: int


def check_layers(
    export: Export,
    path: Path,
    bits: int,
    inputs: Mapping[str, Tensor],
    edit: Callable[[ir.Model], None] | None = None,
) -> list[LayerCheck]:
    """Run the graph at ``path`` in ONNX Runtime, then every quantized layer again, cut out, on the x it had there.

    Cut out, because ONNX Runtime drops the rounding between an fp16 operator it runs in fp32 and the layer's first
    cast: inside the graph a layer does not see quite the x that comes out as an output.

    Args:
        edit: a change to the graph before it runs, for tests that plant a fault.
    """
    model = ir.load(path)
    if edit is not None:
        edit(model)
    lowered = path.stem.endswith("_qdq")
    prepare_for_onnxruntime(model)
    names = [spec.name for spec in export.plan.layers]
    taps = {name: _tap(model, name, lowered) for name in names}
    seen = _run(_with_outputs(model, [x for x, _ in taps.values()]), path.parent, inputs)
    feeds = {f"{name}::x": seen[x.name or ""] for name, (x, _) in taps.items()}
    ys = {name: y.name or "" for name, (_, y) in taps.items()}
    values = _run(_cut_out(model, taps), path.parent, feeds)
    torch_model = export.model(bits)
    dtype = export.plan.dtype
    checks = []
    for module in torch_model.modules():
        if not isinstance(module, QuantLinear):
            continue
        x, y = feeds[f"{module.spec.name}::x"], values[ys[module.spec.name]]
        hadamard, outer = module._table[0].matrices(module.spec.rotation)
        names = ("weight", "weight_scale", "weight_factor", "weight_zero", "bias")
        tensors = {name: getattr(module, name) for name in names} | {"hadamard": hadamard, "outer": outer}
        op = OpInputs(tensors, module.act_bits, module.act_group)
        judged = judge(op, x, rotated_in=dtype if lowered else torch.float32, rounded=dtype)
        checks.append(LayerCheck(module.spec.name, judged.excess(y), int(judged.near.sum()), judged.near.numel()))
    return checks


def _tap(model: ir.Model, layer: str, lowered: bool) -> tuple[ir.Value, ir.Value]:
    """x and y of a layer: of its QuantLinear node, or of the first and last node it was lowered to."""
    by_name = {node.name: node for node in model.graph}
    if lowered:
        first = by_name.get(f"{layer}.rotate") or by_name[f"{layer}.abs"]
        if first.op_type == "Abs" and f"{layer}.act_groups" in by_name:
            first = by_name[f"{layer}.act_groups"]
        x, y = first.inputs[0], by_name[f"{layer}.output"].outputs[0]
    else:
        (node,) = [n for n in model.graph if n.op_type == "QuantLinear" and n.inputs[1].name == f"{layer}.weight"]
        x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    return x, y


def _with_outputs(model: ir.Model, wanted: Iterable[ir.Value]) -> ir.Model:
    for value in wanted:
        if all(value is not output for output in model.graph.outputs):
            model.graph.outputs.append(value)
    return model


def _cut_out(model: ir.Model, taps: Mapping[str, tuple[ir.Value, ir.Value]]) -> ir.Model:
    """The layers alone: an input ``<layer>::x`` and the output y for each."""
    graph = model.graph
    for layer, (x, y) in taps.items():
        fed = ir.Value(name=f"{layer}::x", type=ir.TensorType(x.dtype or ir.DataType.FLOAT), shape=x.shape)
        graph.inputs.append(fed)
        for node, index in list(x.uses()):
            if node is y.producer() or (node.name or "").startswith(f"{layer}."):
                node.replace_input_with(index, fed)
    graph.outputs.clear()
    graph.outputs.extend(y for _, y in taps.values())
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    return model


def _run(model: ir.Model, folder: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All outputs by name."""
    import onnxruntime

    for value in model.graph.outputs:
        value.dtype = value.dtype or ir.DataType.FLOAT
    copy_path = folder / ".tapped.onnx"
    ir.save(model, copy_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(copy_path), options, providers=["CPUExecutionProvider"])
    feeds = {
        i.name: (t.float() if (t := inputs[i.name]).dtype == torch.bfloat16 else t).numpy()
        for i in session.get_inputs()
    }
    results = session.run(None, feeds)
    copy_path.unlink()
    return {o.name: torch.from_numpy(np.asarray(value)) for o, value in zip(session.get_outputs(), results)}


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
