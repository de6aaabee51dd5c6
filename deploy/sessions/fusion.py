"""What comes before a quantized layer, taken into its kernel: a pass over the graph of a block that torch.compile traced.

The graph holds the operations as diffusers calls them, so no code of a model is copied. From every quantized layer the pass
looks back for GELU, or for a modulation, a norm and a residual, and puts ``dvdquant::fused_linear`` in their place where nothing
else needs what lies between. What it does not recognise stays as it is.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dvdquant.deploy.sessions.fx_nodes import as_float, inverse_rms, is_call, value_of
from dvdquant.deploy.sessions.rope_fusion import fuse_attention
from dvdquant.ops.fused import MAX_CHANNELS
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.system.torch_hooks import check_example_values, compiler_named, set_example_value

__all__ = ["fuse_graph", "fusing_backend"]

log = logging.getLogger(__name__)

# Both are registered by the import above.
_LAYERS = {torch.ops.dvdquant.prepared_linear.default, torch.ops.dvdquant.packed_linear.default}
_CASTS = {"to", "float", "type_as", "contiguous"}
_ADDS, _PRODUCTS = {operator.add, torch.add}, {operator.mul, torch.mul}
_PURE = _ADDS | _PRODUCTS | {F.gelu, F.layer_norm, F.rms_norm, F.dropout, torch.rsqrt}
_PURE_METHODS = _CASTS | {"mean", "pow"}


@dataclass
class _Found:
    """The nodes of the graph that were recognised before a layer."""

    x: Any
    y: Any = None
    gate: Any = None
    hidden: Any = None  # the sum of x and y, which others read too
    multipliers: tuple[Any, ...] = ()
    addend: Any = None
    weight: Any = None
    bias: Any = None
    norm: str = "none"
    gelu: bool = False
    eps: Any = 0.0

    def inputs(self) -> set[Any]:
        """Return the nodes that the kernel reads."""
        parts = (self.x, self.y, self.gate, *self.multipliers, self.addend, self.weight, self.bias, self.eps)
        return {part for part in parts if isinstance(part, fx.Node)}


@functools.cache
def fusing_backend(inner: str | None) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return a backend of torch.compile that fuses, and hands the graph on. It is the same one for all sessions.

    Args:
        inner: The backend that compiles what is left, or None to run the operations one by one.

    Raises:
        UnsupportedError: This PyTorch does not note what the passes ask of a graph's nodes.
    """
    check_example_values()

    def compile_fused(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        numbers = [_kernels_number(node) for node in graph.graph.nodes if is_call(node, _LAYERS)]
        if numbers and (attentions := fuse_attention(graph, numbers[0])):
            log.info("%d attentions of a block are fused with the norms and the rope before them", attentions)
        count = fuse_graph(graph)
        layers = count + sum(is_call(node, _LAYERS) for node in graph.graph.nodes)
        log.info("%d of %d quantized layers of a block are fused with what comes before them", count, layers)
        if inner is None:
            return graph.forward
        compiled: Callable[..., Any] = compiler_named(inner)(graph, inputs)
        return compiled

    return compile_fused


def fuse_graph(module: fx.GraphModule) -> int:
    """Fuse the layers of a graph with what comes before them, in its place; return how many.

    Args:
        module: The graph, as torch.compile traces a block.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _LAYERS and _takes_prologue(node):
            found = _find(node)
            if found is not None:
                _replace(module.graph, node, found)
                count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


# ---------------------------------------------------------------------------------------------------------- recognising


def _is_narrow(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in DTYPE_NAMES


def _takes_prologue(layer: Any) -> bool:
    """Return whether the kernels can fuse a layer: no outer factor, and a row that fits."""
    x, outer = value_of(layer.args[0]), value_of(layer.args[1])
    if not isinstance(x, Tensor) or not isinstance(outer, Tensor) or x.dtype not in DTYPE_NAMES:
        return False
    return tuple(outer.shape) == (1, 1) and int(x.shape[-1]) <= MAX_CHANNELS


def _kernels_number(layer: Any) -> int:
    """Return the number of a layer's kernels."""
    at = 4 if layer.target is torch.ops.dvdquant.prepared_linear.default else 5
    return int(layer.args[at])


def _is_cast(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor):
        return False
    if node.op == "call_method" and node.target in _CASTS:
        return bool(value_of(node).device == value_of(node.args[0]).device)
    return node.target is F.dropout and not (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True))


def _through_casts(node: Any) -> Any:
    while _is_cast(node):
        node = node.args[0]
    return node


def _narrow_source(node: Any) -> Any:
    """Return the 16-bit tensor that a node is a cast of."""
    while _is_cast(node) and (not _is_narrow(node) or _is_narrow(node.args[0])):
        node = node.args[0]
    return node if _is_narrow(node) else None


def _find(layer: Any) -> _Found | None:
    """Return what comes before a layer, or None."""
    top = layer.args[0]
    start = _through_casts(top)
    if not _only_for(top, start, layer):
        return None
    if is_call(start, {F.gelu}):
        x = _narrow_source(start.args[0])
        same = start.kwargs.get("approximate") == "tanh"
        found = _Found(x, gelu=True) if same and x is not None else None
        return found if found is not None and _can_move(found, layer) else None
    found = _modulated(start)
    if found is None:
        return None
    _take_residual(found, layer)
    return found if _can_move(found, layer) else None


def _can_move(found: _Found, layer: Any) -> bool:
    """Return whether the operations between what the kernel reads and the layer may as well happen at the layer.

    They may not where something is changed in place in between, and not where they round to a third dtype.
    """
    moved, queue, inputs = set(), [layer.args[0]], found.inputs()
    narrow = value_of(found.x).dtype
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in moved or node in inputs:
            continue
        if not _is_pure(node) or value_of(node).dtype not in (torch.float32, narrow):
            return False
        moved.add(node)
        queue += [node.args[0]] if _is_cast(node) else node.all_input_nodes
    node = layer.prev
    while moved:
        if _changes(node):
            return False
        moved.discard(node)
        node = node.prev
    return True


def _is_pure(node: Any) -> bool:
    return is_call(node, _PURE) or (node.op == "call_method" and node.target in _PURE_METHODS)


def _changes(node: Any) -> bool:
    """Return whether an operation may change a tensor in place."""
    if node.op == "call_method":
        return bool(node.target.endswith("_") and not node.target.endswith("__"))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    changing = node.target is operator.setitem or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    return changing or name.endswith("_") or "out" in node.kwargs


def _only_for(top: Any, bottom: Any, reader: Any) -> bool:
    """Return whether the nodes from ``top`` back to ``bottom`` through casts are read by nothing else."""
    node = top
    while True:
        if not isinstance(node, fx.Node) or set(node.users) != {reader}:
            return False
        if node is bottom:
            return True
        node, reader = node.args[0], node


def _modulated(node: Any) -> _Found | None:
    """Return ``norm``, ``norm · a``, ``norm + b`` or ``norm · a + b`` that ends in a node."""
    found = _norm(node)
    if found is not None:
        return found
    for targets in (_ADDS, _PRODUCTS):
        if not is_call(node, targets) or len(node.args) != 2:
            continue
        for inner, rows in (node.args, node.args[::-1]):
            core = _through_casts(inner)
            if (
                not isinstance(core, fx.Node)
                or not _only_for(inner, core, node)
                or not isinstance(value_of(rows), Tensor)
            ):
                continue
            if targets is _ADDS and is_call(core, _PRODUCTS):
                found = _modulated(core)
            else:
                found = _norm(core)
            if found is None or not _are_rows(rows, found.x):
                continue
            if targets is _ADDS:
                found.addend = rows
            else:
                found.multipliers += (rows,)
            return found
    return None


def _norm(node: Any) -> _Found | None:
    """Return the norm that a node is."""
    if is_call(node, {F.layer_norm, F.rms_norm}):
        x = _narrow_source(node.args[0])
        channels = node.args[1]
        if x is None or len(node.kwargs) or len(channels) != 1 or value_of(x).shape[-1] != channels[0]:
            return None
        if node.target is F.layer_norm:
            _, _, weight, bias, eps = node.args
            return _Found(x, weight=weight, bias=bias, norm="layer", eps=eps)
        _, _, weight, eps = node.args
        return _Found(x, weight=weight, norm="rms", eps=eps) if eps is not None else None
    if not is_call(node, _PRODUCTS) or len(node.args) != 2:
        return None
    # diffusers' RMSNorm without a weight: x · rsqrt(mean(x²) + eps).
    wide, inverse = node.args
    x = _narrow_source(wide)
    found = inverse_rms(inverse)
    if x is None or found is None:
        return None
    squared, eps, _ = found
    # Of a tensor with heads it is no layer's input.
    if _narrow_source(squared) is not x or value_of(squared).ndim != 3:
        return None
    return _Found(x, norm="rms", eps=eps)


def _are_rows(node: Any, x: Any) -> bool:
    """Return whether a tensor holds one row of channels for all tokens, for each batch, or for each token."""
    rows, shape = value_of(node), value_of(x).shape
    if not isinstance(rows, Tensor) or rows.ndim > len(shape) or rows.ndim < 1:
        return False
    if not statically_known_true(rows.shape[-1] == shape[-1]):
        return False
    batch = (1,) * (len(shape) - rows.ndim) + tuple(rows.shape[:-1])
    # Axes that are there come first: the row of a token is its number over the tokens of a row.
    whole = [statically_known_true(have == want) for have, want in zip(batch, shape[:-1])]
    single = [statically_known_true(have == 1) for have in batch]
    first = next((i for i, one in enumerate(single) if one and not whole[i]), len(batch))
    return all(whole[:first]) and all(single[first:])


def _take_residual(found: _Found, layer: Any) -> None:
    """Look behind the norm for ``x + gate · y`` or ``x + y``, whose sum is read by nothing before the layer."""
    hidden = found.x
    total = _through_casts(hidden)
    if not is_call(total, _ADDS) or len(total.args) != 2:
        return
    # The sum is there after the layer. What reads it before goes away with the layer, or the sum stays apart.
    order = {node: i for i, node in enumerate(hidden.graph.nodes)}
    gone = _freed(layer)
    if any(order[user] < order[layer] and user not in gone for user in hidden.users):
        return
    for first, second in (total.args, total.args[::-1]):
        x, gate = _narrow_source(first), None
        core = _through_casts(second)
        y = _narrow_source(second)
        if is_call(core, _PRODUCTS) and len(core.args) == 2:
            sides = [(_narrow_source(a), b) for a, b in (core.args, core.args[::-1])]
            pair = next(((a, b) for a, b in sides if _comes_from_layer(a) and _are_rows(b, found.x)), None)
            if pair is None:
                continue
            y, gate = pair
        elif not _comes_from_layer(y):
            continue
        if x is None or y is None or x is y or not all(_same_shape(part, hidden) for part in (x, y)):
            continue
        found.x, found.y, found.gate, found.hidden = x, y, gate, hidden
        return


def _same_shape(node: Any, other: Any) -> bool:
    a, b = value_of(node), value_of(other)
    return (
        a.dtype == b.dtype and a.ndim == b.ndim and all(map(statically_known_true, map(operator.eq, a.shape, b.shape)))
    )


def _comes_from_layer(node: Any) -> bool:
    """Return whether a tensor is what a layer, or attention behind it, gives: the smaller side of a residual."""
    node = _through_casts(node)
    if is_call(node, {operator.getitem}):
        node = _through_casts(node.args[0])
    return _is_narrow(node) and node.op != "placeholder" and not is_call(node, _ADDS | {torch.ops.aten.add.Tensor})


def _freed(layer: Any) -> set[Any]:
    """Return the operations that nothing but a layer needs, in the end: they go when it takes their place."""
    gone, node = {layer}, layer.prev
    while node.op != "root":
        if node.users and _is_pure(node) and all(user in gone for user in node.users):
            gone.add(node)
        node = node.prev
    return gone - {layer}


# ----------------------------------------------------------------------------------------------------------- rewriting


def _replace(graph: fx.Graph, layer: Any, found: _Found) -> None:
    if layer.target is torch.ops.dvdquant.prepared_linear.default:
        _, _, prepared, pre_quant, number, rows, *grid = layer.args
        packed_rows = None
    else:
        _, _, prepared, packed_rows, pre_quant, number, *grid = layer.args
        rows = -1
    with graph.inserting_before(layer):

        def product(a: Any, b: Any) -> Any:
            return b if a is None else a if b is None else graph.call_function(operator.mul, (a, b))

        # norm · weight + bias, times a, plus b.
        scale = None
        for rows_of in found.multipliers:
            scale = product(scale, as_float(graph, rows_of))
        addend, multiplier = as_float(graph, found.addend), product(as_float(graph, found.weight), scale)
        if found.bias is not None:
            bias = product(as_float(graph, found.bias), scale)
            addend = bias if addend is None else graph.call_function(operator.add, (bias, addend))
        if multiplier is not None and addend is not None:
            # Both have rows for as many tokens.
            both = graph.call_function(torch.broadcast_tensors, (multiplier, addend))
            multiplier, addend = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        gate = as_float(graph, found.gate)
        fused = graph.call_function(
            torch.ops.dvdquant.fused_linear.default,
            (found.x, found.y, gate, multiplier, addend, found.norm, found.gelu, found.eps, prepared, packed_rows,
             pre_quant, number, rows, *grid),
        )  # fmt: skip
        out = graph.call_function(operator.getitem, (fused, 0))
        set_example_value(out, value_of(layer))
        hidden = None
        if found.hidden is not None:
            hidden = graph.call_function(operator.getitem, (fused, 1))
            set_example_value(hidden, value_of(found.hidden))
    gone = _freed(layer)
    layer.replace_all_uses_with(out)
    graph.erase_node(layer)
    if hidden is not None:
        for user in list(found.hidden.users):
            if user not in gone:
                user.replace_input_with(found.hidden, hidden)
    # What nothing needs any more, from the layer back.
    node = fused.prev
    while node.op != "root":
        before = node.prev
        if _is_pure(node) and not node.users:
            graph.erase_node(node)
        node = before
