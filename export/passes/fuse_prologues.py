"""Residual, norm and modulation, or GELU, before a quantized layer become one node with it: ``dvdquant::FusedQuantLinear``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch

from dvdquant.onnx.schema import DOMAIN
from dvdquant.ops.fused import MAX_CHANNELS
from dvdquant.ops.smooth import pack_pre_quant

__all__ = ["FUSED", "READS", "expand_prologues", "fuse_prologues"]

FUSED = "FusedQuantLinear"
# What a node reads behind the eight inputs of QuantLinear, in this order (plugins/csrc/layer.h); its attribute ``reads`` names
# those that are there.
READS = ("y", "gate", "multiplier", "addend", "pre_quant")

_LAYER_INPUTS = 8
_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOATS = _NARROW | {ir.DataType.FLOAT}
_NORMS = {"LayerNormalization": "layer", "RMSNormalization": "rms"}


@dataclass
class _Found:
    """The operations before a layer. The rows are values of [..., K]."""

    x: ir.Value
    norm: str = "none"
    gelu: bool = False
    eps: float = 0.0
    weight: ir.Value | None = None
    bias: ir.Value | None = None
    multiplier: ir.Value | None = None
    addend: ir.Value | None = None
    y: ir.Value | None = None
    gate: ir.Value | None = None
    hidden: ir.Value | None = None
    pre_quant: np.ndarray | None = field(default=None, repr=False)


def fuse_prologues(model: ir.Model) -> int:
    """Replace quantized layers, and what is computed before them, by single nodes; returns how many.

    1. ``QuantLinear(smooth(a · norm(x + gate · y) + b))`` becomes ``FusedQuantLinear``, whose second output is the sum, for
       whoever reads it further on. The residual, the gate, a, b and the smoothing may be missing; ``gelu(x)`` by tanh stands in
       their place. The definition is :func:`dvdquant.ops.fused.apply_prologue`: sums and norms in fp32, the sum and the result
       rounded to 16 bits.
    2. Rows (gate, a, b) are one for all tokens, one for each sample or one for each token, in fp32. The weight and the bias of
       a norm are folded into a and b.
    3. Its scale and shift are a constant of the node, in the form that the kernel reads.
    4. Left alone: a layer whose input something else reads, too, with an outer factor of its rotation, or with more than 32768
       channels; a norm over something else than the last axis.

    Args:
        model: The graph with QuantLinear nodes, which is changed in place.
    """
    done = 0
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "QuantLinear")]:
        found = _find(model.graph, node)
        if found is not None and _rewrite(model.graph, node, found):
            done += 1
    if done:
        # Readers of a sum may stand before the node that now computes it.
        model.graph.sort()
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return done


# ---------------------------------------------------------------------------------------------------------------- reading


def _find(graph: ir.Graph, layer: ir.Node) -> _Found | None:
    value, outer = layer.inputs[0], layer.inputs[7]
    if value is None or value.dtype not in _NARROW or value.shape is None or outer is None or outer.shape is None:
        return None
    channels = value.shape[-1]
    if tuple(outer.shape) != (1, 1) or not isinstance(channels, int) or channels > MAX_CHANNELS:
        return None
    # 1. The smoothing: (z − shift) · scale.
    scale, value = _smoothing_step(value, "Mul", ".pre_quant_scale", layer)
    shift, value = _smoothing_step(value, "Sub", ".pre_quant_shift", layer) if value is not None else (None, None)
    # 2. What it is of.
    start = _only_for(value)
    if start is None:
        return None
    found = _gelu(start) or _modulated(start)
    if found is None or found.x.dtype != layer.outputs[0].dtype:
        return None
    if scale is not None or shift is not None:
        dtype = torch.bfloat16 if found.x.dtype == ir.DataType.BFLOAT16 else torch.float16
        parts = [None if part is None else torch.from_numpy(part) for part in (scale, shift)]
        packed = pack_pre_quant(parts[0], parts[1], dtype)
        found.pre_quant = packed.view(torch.int16).numpy()
    if found.norm != "none":
        _take_residual(graph, found)
    return found


def _smoothing_step(
    value: ir.Value | None, operator: str, suffix: str, layer: ir.Node
) -> tuple[np.ndarray | None, ir.Value | None]:
    """Return the constant of a step of the smoothing and what it is applied to, or None and the value itself."""
    node = _producer(value, operator)
    if node is None or not _has_one_reader(value):
        return None, value
    name = ((layer.inputs[1].name if layer.inputs[1] is not None else "") or "").removesuffix(".weight")
    constant = _uncast(node.inputs[1])
    if constant is None or constant.name != name + suffix or constant.const_value is None:
        return None, value
    return np.array(constant.const_value.numpy(), dtype=np.float32), node.inputs[0]


def _gelu(value: ir.Value) -> _Found | None:
    node = _producer(value, "Gelu")
    if node is None or "approximate" not in node.attributes or node.attributes["approximate"].value != "tanh":
        return None
    x = _narrow(node.inputs[0])
    return None if x is None else _Found(x, gelu=True)


def _modulated(value: ir.Value) -> _Found | None:
    """Return ``norm``, ``a · norm``, ``norm + b`` or ``a · norm + b`` that is a value."""
    found = _norm(value)
    if found is not None:
        return found
    for operator in ("Add", "Mul"):
        node = _producer(value, operator)
        if node is None:
            continue
        for inner, rows in (node.inputs, node.inputs[::-1]):
            core = _only_for(inner)
            if core is None:
                continue
            product = operator == "Add" and _producer(core, "Mul") is not None
            found = _modulated(core) if product else _norm(core)
            if found is None or not _are_rows(rows, found.x):
                continue
            if operator == "Add":
                found.addend = rows
            else:
                found.multiplier = rows
            return found
    return None


def _norm(value: ir.Value) -> _Found | None:
    """Return the norm over the channels that a value is."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in _NORMS:
        return None
    axis, eps = node.attributes.get("axis"), node.attributes.get("epsilon")
    x = _narrow(node.inputs[0])
    if x is None or x.shape is None or (axis is not None and axis.as_int() not in (-1, len(x.shape) - 1)):
        return None
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if _is_ones(weight):
        weight = None
    if any(rows is not None and not _are_rows(rows, x) for rows in (weight, bias)):
        return None
    return _Found(x, _NORMS[node.op_type], eps=eps.as_float() if eps is not None else 1e-5, weight=weight, bias=bias)


def _is_ones(weight: ir.Value | None) -> bool:
    """Return whether the weight of a norm is the exporter's own for one without. A parameter stays: a LoRA may change it."""
    if weight is None or weight.const_value is None or "." in (weight.name or ""):
        return False
    return bool((np.asarray(weight.const_value.numpy()).astype(np.float32) == 1).all())


def _take_residual(graph: ir.Graph, found: _Found) -> None:
    """Look behind the norm for ``x + gate · y`` or ``x + y``, where y is what a quantized layer gives."""
    hidden = found.x
    total = _uncast(hidden)
    node = _producer(total, "Add")
    if node is None or any(output is hidden for output in graph.outputs):
        return
    # The sum before its rounding is nowhere any more.
    if total is not hidden and not _has_one_reader(total):
        return
    for first, second in (node.inputs, node.inputs[::-1]):
        x, y, gate = _narrow(first), _narrow(second), None
        product = _producer(_uncast(second), "Mul")
        if product is not None:
            pairs = [(_narrow(a), b) for a, b in (product.inputs, product.inputs[::-1])]
            y, gate = next(((a, b) for a, b in pairs if _is_given(a) and _are_rows(b, hidden)), (None, None))
        if x is None or y is None or x is y or not _is_given(y):
            continue
        if any(part.shape != hidden.shape or part.dtype != hidden.dtype for part in (x, y)):
            continue
        rows = (gate, found.multiplier, found.addend, found.weight, found.bias)
        if hidden in _ancestors(part for part in rows if part is not None):
            continue
        found.x, found.y, found.gate, found.hidden = x, y, gate, hidden
        return


def _is_given(value: ir.Value | None) -> bool:
    """Return whether a value is what a quantized layer gives, or a part of it."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Split", "Slice") and not node.domain:
        return _is_given(node.inputs[0])
    return node is not None and node.domain == DOMAIN and value is node.outputs[0]


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the values that some others are computed from, with these."""
    seen: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        stack += [part for part in (node.inputs if node is not None else ()) if part is not None]
    return seen


def _are_rows(rows: ir.Value | None, x: ir.Value) -> bool:
    """Return whether a value holds one row of channels for all tokens, for each of the first axes, or for each token."""
    if rows is None or rows.shape is None or x.shape is None or rows.dtype not in _FLOATS:
        return False
    if not 1 <= len(rows.shape) <= len(x.shape) or rows.shape[-1] != x.shape[-1]:
        return False
    batch = [1] * (len(x.shape) - len(rows.shape)) + list(rows.shape)[:-1]
    ones = False
    for size, whole in zip(batch, list(x.shape)[:-1], strict=True):
        if not ones and size == whole and not (isinstance(size, ir.SymbolicDim) and size.value is None):
            continue
        if size != 1:
            return False
        ones = True
    return True


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type == operator else None


def _has_one_reader(value: ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _uncast(value: ir.Value | None) -> ir.Value | None:
    while (node := _producer(value, "Cast")) is not None and node.inputs[0] is not None:
        if value is None or value.dtype not in _FLOATS or node.inputs[0].dtype not in _FLOATS:
            break
        value = node.inputs[0]
    return value


def _only_for(value: ir.Value | None) -> ir.Value | None:
    """Return what a value is a cast of, if nothing else reads any of it; else None."""
    while _has_one_reader(value):
        node = _producer(value, "Cast")
        if node is None:
            return value
        value = node.inputs[0]
    return None


def _narrow(value: ir.Value | None) -> ir.Value | None:
    """Return the 16-bit value that another is a widening of, or the value itself where it has 16 bits."""
    if value is None or value.dtype in _NARROW:
        return value
    node = _producer(value, "Cast")
    source = node.inputs[0] if node is not None else None
    return source if source is not None and source.dtype in _NARROW else None


# ------------------------------------------------------------------------------------------------------------- rewriting


class _Rows:
    """The nodes that make the rows of one layer."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def widen(self, rows: ir.Value | None) -> ir.Value | None:
        """Return rows in fp32."""
        if rows is None or rows.dtype == ir.DataType.FLOAT:
            return rows
        return self._add("Cast", [rows], rows.shape, {"to": int(ir.DataType.FLOAT)})

    def both(self, operator: str, one: ir.Value | None, other: ir.Value | None) -> ir.Value | None:
        """Return the sum or product of rows, or the one that is there."""
        if one is None or other is None:
            return other if one is None else one
        longer = (
            one if one.shape is not None and other.shape is not None and len(one.shape) >= len(other.shape) else other
        )
        return self._add(operator, [one, other], longer.shape, {})

    def _add(
        self, operator: str, inputs: list[ir.Value], shape: ir.Shape | None, attributes: dict[str, int]
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        self.nodes.append(node)
        value = node.outputs[0]
        value.dtype, value.shape = ir.DataType.FLOAT, shape
        return value


def _rewrite(graph: ir.Graph, layer: ir.Node, found: _Found) -> bool:
    """Put one node in the place of a layer and what is before it; returns whether the rows have a form that it reads."""
    name = ((layer.inputs[1].name if layer.inputs[1] is not None else "") or "").removesuffix(".weight")
    # 1. a = weight · multiplier, b = bias · multiplier + addend.
    rows = _Rows()
    multiplier, addend = rows.widen(found.multiplier), rows.widen(found.addend)
    bias = rows.widen(found.bias)
    if bias is not None:
        bias = rows.both("Mul", bias, multiplier)
    a, b = rows.both("Mul", rows.widen(found.weight), multiplier), rows.both("Add", bias, addend)
    if a is not None and b is not None and a.shape != b.shape:
        return False
    reads: dict[str, ir.Value | None] = {
        "y": found.y, "gate": rows.widen(found.gate), "multiplier": a, "addend": b, "pre_quant": None
    }  # fmt: skip
    # 2. The smoothing.
    if found.pre_quant is not None:
        kind = found.x.dtype or ir.DataType.BFLOAT16
        tensor = ir.tensor(found.pre_quant.view(kind.numpy()), dtype=kind, name=f"{name}.pre_quant")
        reads["pre_quant"] = ir.Value(
            name=tensor.name, type=ir.TensorType(kind), shape=tensor.shape, const_value=tensor
        )
        graph.register_initializer(reads["pre_quant"])
    # 3. The node. Its first output is the layer's, its second the sum.
    extra = {what: value for what, value in reads.items() if value is not None}
    node = ir.node(
        FUSED,
        [found.x, *layer.inputs[1:_LAYER_INPUTS], *extra.values()],
        attributes={
            "act_bits": layer.attributes["act_bits"].as_int(),
            "act_group": layer.attributes["act_group"].as_int(),
            "reads": ",".join(extra),
            "norm": found.norm,
            "gelu": int(found.gelu),
            "eps": found.eps,
        },
        domain=DOMAIN,
        num_outputs=1 if found.y is None else 2,
        name=layer.name,
    )
    old = [layer.outputs[0]] if found.hidden is None else [layer.outputs[0], found.hidden]
    for index, (before, now) in enumerate(zip(old, node.outputs, strict=True)):
        now.dtype, now.shape = before.dtype, before.shape
        now.name = before.name if index == 0 else f"{name}.sum"
    graph.insert_before(layer, [*rows.nodes, node])
    for before, now in zip(old, node.outputs, strict=True):
        ir.convenience.replace_all_uses_with(before, now, replace_graph_outputs=True)
    graph.remove(layer, safe=True)
    return True


def expand_prologues(model: ir.Model) -> None:
    """Write every FusedQuantLinear as its definition: standard operators, and QuantLinear of what they give.

    Executors without the plugin run this form, and it is judged in the place of the other.

    Args:
        model: The graph, which is changed in place.
    """
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, FUSED)]:
        _expand(model.graph, node)
    model.graph.sort()


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    words = node.attributes["reads"].as_string()
    reads = dict(zip(words.split(",") if words else [], node.inputs[_LAYER_INPUTS:], strict=True))
    x = node.inputs[0]
    assert x is not None
    kind, shape, tape = x.dtype or ir.DataType.BFLOAT16, x.shape, ir.tape.Tape()

    def op(
        operator: str, inputs: list[ir.Value | None], dtype: ir.DataType = ir.DataType.FLOAT, **given: object
    ) -> ir.Value:
        value = tape.op(operator, inputs, attributes=given or None)
        value.dtype, value.shape = dtype, shape
        return value

    def wide(value: ir.Value | None) -> ir.Value:
        return op("Cast", [value], to=int(ir.DataType.FLOAT))

    def constant(value: np.ndarray) -> ir.Value:
        return tape.op("Constant", [], attributes={"value": ir.tensor(value)})

    hidden = x
    if "y" in reads:
        y = wide(reads["y"])
        if "gate" in reads:
            y = op("Mul", [y, reads["gate"]])
        hidden = op("Cast", [op("Add", [wide(x), y])], kind, to=int(kind))
    if node.attributes["gelu"].as_int():
        z = op("Gelu", [wide(x)], approximate="tanh")
    else:
        z, norm = wide(hidden), node.attributes["norm"].as_string()
        if norm != "none":
            operator = next(name for name, word in _NORMS.items() if word == norm)
            ones = constant(np.ones(int(shape[-1]) if shape is not None else 0, np.float32))
            z = op(operator, [z, ones], axis=-1, epsilon=node.attributes["eps"].as_float(), stash_type=1)
        if "multiplier" in reads:
            z = op("Mul", [z, reads["multiplier"]])
        if "addend" in reads:
            z = op("Add", [z, reads["addend"]])
    z = op("Cast", [z], kind, to=int(kind))
    if "pre_quant" in reads:
        packed = reads["pre_quant"]
        assert packed is not None
        assert packed.const_value is not None
        held = np.asarray(packed.const_value.numpy()).astype(np.float32)
        scale, offset = (constant(np.ascontiguousarray(held[:, i]).reshape(-1)) for i in (0, 1))
        z = op("Cast", [op("Add", [op("Mul", [wide(z), scale]), offset])], kind, to=int(kind))
    grid = {name: node.attributes[name].as_int() for name in ("act_bits", "act_group")}
    layer = ir.node("QuantLinear", [z, *node.inputs[1:_LAYER_INPUTS]], attributes=grid, domain=DOMAIN, name=node.name)
    layer.outputs[0].dtype, layer.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
    new = [layer.outputs[0], hidden][: len(node.outputs)]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*tape.nodes, layer], list(node.outputs), new)
