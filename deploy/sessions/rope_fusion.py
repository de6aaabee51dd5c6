"""The norms and the rope before 8-bit attention, taken into one kernel each for q and k: a pass over the graph of a traced block.

Recognised is what diffusers does in these families. Anything else stays as it is.

- Wan: an RMS norm over all heads, and rope of interleaved pairs that are written to a new tensor.
- LTX-Video: the same norm, then ``apply_rotary_emb`` over all channels, before they are split into heads.
- HunyuanVideo: an RMS norm over each head, then ``apply_rotary_emb`` of the video. The text behind it has norms of its own in
  double blocks, and those of the video in single blocks.
- CogVideoX: a layer norm over each head, then ``apply_rotary_emb`` of the video behind the text, written in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dvdquant.deploy.sessions.fx_nodes import as_float, inverse_rms, is_call, is_method, value_of

# Registers the operations.
from dvdquant.ops.attention.operation import attention, rope_attention  # noqa: F401
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.system.torch_hooks import set_example_value

__all__ = ["fuse_attention"]

_RMS_NORMS = {torch.rms_norm, F.rms_norm}
_HEADS = (32, 64, 128, 256)
_MAX_CHANNELS = 8192
_ALL, _EVEN, _ODD = slice(None), slice(0, None, 2), slice(1, None, 2)


@dataclass
class _Part:
    """Tokens of q or k that one layer gives, and their norm; nodes of the graph."""

    x: Any  # [B, S, C], of the layer
    kind: str  # of the norm: as of Rope
    weight: Any
    bias: Any
    eps: Any


@dataclass
class _Found:
    """The nodes of the graph that make q or k."""

    parts: list[_Part]  # the video, or all tokens; and the text behind it where it has a layer and a norm of its own
    cosines: Any
    sines: Any
    first: Any = 0  # the token of a sample where rope begins
    per_channel: bool = True
    gone: list[Any] = field(default_factory=list)  # what the kernel takes the place of


def fuse_attention(module: fx.GraphModule, number: int) -> int:
    """Fuse the 8-bit attentions of a graph with the norms and the rope of their q and k; return how many.

    Args:
        module: The graph, as torch.compile traces a block; it is changed in its place.
        number: The number of the kernels, of :func:`.handle_of`.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.dvdquant.attention.default:
            q, k = (_find(part, node) for part in node.args[:2])
            if q is None or k is None or not _same_form(q, k):
                continue
            _replace(module.graph, node, q, k, number)
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _find(node: Any, reader: Any) -> _Found | None:
    """Return what an operand of attention is made of, or None where it is something else or others read it."""
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dtype not in DTYPE_NAMES or value.ndim != 4:
        return None
    head, channels = int(value.shape[3]), int(value.shape[2] * value.shape[3])
    if head not in _HEADS or channels > _MAX_CHANNELS:
        return None
    forms: tuple[Callable[[Any], _Found | None], ...] = (_halves, _over_all_heads, _over_each_head, _joined, _in_place)
    for form in forms:
        found = form(node)
        if found is not None:
            gone = {node, *found.gone}
            alone = all(
                user is reader or user in gone or _names_dtype(part, user) for part in gone for user in part.users
            )
            same = all(value_of(part.x).dtype == value.dtype for part in found.parts)
            found.gone.append(node)
            return found if alone and same and _writes_before(gone, reader) else None
    return None


def _writes_before(gone: set[Any], reader: Any) -> bool:
    """Return whether all that is written in place is written before the attention."""
    order = {node: i for i, node in enumerate(reader.graph.nodes)}
    return all(order[node] < order[reader] for node in gone)


# --------------------------------------------------------------------------------------------------------------- forms


def _halves(node: Any) -> _Found | None:
    """Wan: the even and the odd channels are written to a new tensor, which is cast."""
    out: Any = node.args[0] if _is_cast(node) else node
    if not is_call(out, {torch.empty_like}) or value_of(out).dtype != value_of(node).dtype:
        return None
    writes = {user.args[1][-1].start: user for user in out.users if _is_half(user, out)}
    if set(writes) != {0, 1}:
        return None
    even, odd = writes[0].args[2], writes[1].args[2]
    # x1 cos - x2 sin and x1 sin + x2 cos.
    if not (is_call(even, {operator.sub}) and is_call(odd, {operator.add})):
        return None
    products = [*even.args, *odd.args]
    if not all(is_call(product, {operator.mul}) for product in products):
        return None
    (x1, cosines), (x2, sines), other_sin, other_cos = (product.args for product in products)
    if other_sin != (x1, sines) or other_cos != (x2, cosines):
        return None
    pairs = _unbound(x1, x2)
    heads = out.args[0]
    if pairs is None or not is_method(pairs.args[0], "unflatten", -1, (-1, 2)) or pairs.args[0].args[0] is not heads:
        return None
    gone = [*writes.values(), even, odd, *products, x1, x2, pairs, pairs.args[0], out, heads]
    norm = _split_of(heads)
    part = None if norm is None else _norm(norm, gone, "all")
    if part is None or not all(_is_table(rows, heads, 1, 2, each=2) for rows in (cosines, sines)):
        return None
    return _Found([part], cosines, sines, per_channel=False, gone=gone)


def _over_all_heads(node: Any) -> _Found | None:
    """LTX-Video: norm and rope before the heads."""
    whole = _split_of(node)
    gone: list[Any] = [whole]
    turned = _turned(whole, gone)
    part = None if turned is None else _norm(turned[0], gone, "all")
    if turned is None or part is None:
        return None
    norm, cosines, sines = turned
    if value_of(norm).ndim != 3 or not all(_is_table(rows, norm, 1, None, samples=True) for rows in (cosines, sines)):
        return None
    return _Found([part], cosines, sines, gone=gone)


def _over_each_head(node: Any) -> _Found | None:
    """HunyuanVideo's video, and all tokens where no text comes behind: heads, norm, rope."""
    gone: list[Any] = []
    turned = _turned(node, gone)
    if turned is None:
        return None
    norm, cosines, sines = turned
    part = _norm_of_heads(norm, gone)
    if part is None or not all(_is_table(rows, norm, 1, 2) for rows in (cosines, sines)):
        return None
    return _Found([part], cosines, sines, gone=gone)


def _joined(node: Any) -> _Found | None:
    """HunyuanVideo: the text behind the video."""
    if not is_call(node, {torch.cat}) or node.kwargs != {"dim": 1} or len(node.args) != 1 or len(node.args[0]) != 2:
        return None
    video, text = node.args[0]
    # 1. Of one tensor: a single block.
    gone: list[Any] = [video, text]
    turned = _turned(video, gone)
    if turned is not None and is_call(turned[0], {operator.getitem}) and is_call(text, {operator.getitem}):
        front, cosines, sines = turned
        norm, key = front.args
        end = key[1].stop if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], slice) else None
        if end is None or key != (_ALL, slice(None, end)) or text.args != (norm, (_ALL, slice(end, None))):
            return None
        gone.append(front)
        part = _norm_of_heads(norm, gone)
        if part is None or not all(_is_table(rows, front, 1, 2) for rows in (cosines, sines)):
            return None
        return _Found([part], cosines, sines, gone=gone)
    # 2. Of two: a double block.
    found = _over_each_head(video)
    if found is None:
        return None
    part = _norm_of_heads(text, found.gone)
    if part is None or part.kind != found.parts[0].kind or part.bias is not None:
        return None
    found.parts.append(part)
    found.gone += [video, text]
    return found


def _in_place(node: Any) -> _Found | None:
    """CogVideoX: rope is written over the video, which comes behind the text."""
    if not is_method(node, "transpose", 1, 2):
        return None
    norm = node.args[0]
    writes = [user for user in norm.users if is_call(user, {operator.setitem}) and user.args[0] is norm]
    if len(writes) != 1:
        return None
    _, key, written = writes[0].args
    gone = [writes[0], written]
    turned = _turned(written, gone)
    if turned is None or not is_call(turned[0], {operator.getitem}) or turned[0].args != (norm, key):
        return None
    front, cosines, sines = turned
    first = key[2].start if isinstance(key, tuple) and len(key) == 3 and isinstance(key[2], slice) else None
    # A number below zero counts from the end.
    if key != (_ALL, _ALL, slice(first, None)) or not (isinstance(first, fx.Node) or (first or -1) >= 0):
        return None
    if isinstance(first, fx.Node) and not statically_known_true(value_of(first) >= 0):
        return None
    gone.append(front)
    part = _norm(norm, gone, "head")
    if part is None or not is_method(part.x, "transpose", 1, 2):
        return None
    heads = part.x.args[0]
    gone += [part.x, heads]
    if getattr(heads, "op", None) != "call_method" or heads.target != "view" or not _is_split(heads):
        return None
    part.x = heads.args[0]
    if not all(_is_table(rows, front, 2, 1) for rows in (cosines, sines)):
        return None
    return _Found([part], cosines, sines, first, gone=gone)


# --------------------------------------------------------------------------------------------------------------- parts


def _turned(node: Any, gone: list[Any]) -> tuple[Any, Any, Any] | None:
    """Return x, cosines and sines of diffusers' ``apply_rotary_emb``: (x cos + (-x2, x1) sin) in fp32, cast to x's dtype."""
    if not _is_cast(node) or not is_call(node.args[0], {operator.add}):
        return None
    total = node.args[0]
    if value_of(total).dtype != torch.float32 or not all(is_call(part, {operator.mul}) for part in total.args):
        return None
    (wide, cosines), (across_wide, sines) = (part.args for part in total.args)
    if not is_method(wide, "float") or not is_method(across_wide, "float"):
        return None
    x, across = wide.args[0], across_wide.args[0]
    value = value_of(x)
    if (
        not isinstance(value, Tensor)
        or value.dtype != value_of(node).dtype
        or not is_method(across, "flatten", value.ndim - 1)
    ):
        return None
    stack = across.args[0]
    if (
        not is_call(stack, {torch.stack})
        or stack.kwargs != {"dim": -1}
        or len(stack.args) != 1
        or len(stack.args[0]) != 2
    ):
        return None
    minus, x1 = stack.args[0]
    x2 = minus.args[0] if is_call(minus, {operator.neg}) else None
    pairs = _unbound(x1, x2)
    if pairs is None:
        return None
    split = pairs.args[0]
    if not any(getattr(split, "op", "") == "call_method" and split.target == name for name in ("unflatten", "reshape")):
        return None
    shape = value_of(split).shape
    if (
        split.args[0] is not x
        or len(shape) != value.ndim + 1
        or not _equal(shape, (*value.shape[:-1], value.shape[-1] // 2, 2))
    ):
        return None
    gone += [node, total, *total.args, wide, across_wide, across, stack, minus, x1, x2, pairs, split]
    return x, cosines, sines


def _unbound(x1: Any, x2: Any) -> Any:
    """Return the node that x1 and x2 are the two halves of, by ``unbind(-1)``, or None."""
    pairs: Any = x1.args[0] if is_call(x1, {operator.getitem}) and x1.args[1] == 0 else None
    if not is_call(x2, {operator.getitem}) or x2.args != (pairs, 1) or not is_method(pairs, "unbind", -1):
        return None
    return pairs


def _norm_of_heads(node: Any, gone: list[Any]) -> _Part | None:
    """Return the norm over each head that a node is, of x before it was split."""
    part = _norm(node, gone, "head")
    if part is None:
        return None
    heads = part.x
    x = _split_of(heads)
    if x is None:
        return None
    gone.append(heads)
    part.x = x
    return part


def _norm(node: Any, gone: list[Any], kind: str) -> _Part | None:
    """Return the norm over the last axis that a node is; over all heads (``all``) or over each (``head``)."""
    width = int(value_of(node).shape[-1]) if isinstance(value_of(node), Tensor) else 0
    if is_call(node, _RMS_NORMS | {F.layer_norm}) and not node.kwargs and tuple(node.args[1]) == (width,):
        rms = node.target is not F.layer_norm
        x, _, weight, *rest = node.args
        if len(rest) != (1 if rms else 2) or rest[-1] is None or not (rms or kind == "head"):
            return None
        gone.append(node)
        return _Part(x, kind if rms else "layer", weight, None if rms else rest[0], rest[-1])
    # diffusers' RMSNorm: x · rsqrt(mean(x²) + eps), cast to 16 bits, times the weight.
    core, weight = node, None
    if is_call(node, {operator.mul}) and len(node.args) == 2 and _is_cast(node.args[0]):
        core, weight = node.args
        rows = value_of(weight)
        if (
            not isinstance(rows, Tensor)
            or tuple(rows.shape) != (width,)
            or value_of(node).dtype != value_of(core).dtype
        ):
            return None
    product: Any = core.args[0] if _is_cast(core) else None
    if not is_call(product, {operator.mul}) or len(product.args) != 2:
        return None
    x, inverse = product.args
    found = inverse_rms(inverse)
    if found is None:
        return None
    wide, eps, between = found
    if not is_method(wide, "to", torch.float32) or wide.args[0] is not x:
        return None
    gone += [node, core, product, inverse, *between, wide]
    return _Part(x, kind, weight, None, eps)


def _split_of(heads: Any) -> Any:
    """Return x [B, S, C] of a node that is its heads [B, S, H, d], or None."""
    if getattr(heads, "op", "") != "call_method" or heads.target != "unflatten" or heads.args[1] != 2:
        return None
    return heads.args[0] if _is_split(heads) else None


def _is_split(heads: Any) -> bool:
    """Return whether a node's tensor is [B, S, H, d] of one that is [B, S, C]."""
    x, value = value_of(heads.args[0]), value_of(heads)
    if not isinstance(x, Tensor) or not isinstance(value, Tensor) or x.ndim != 3 or value.ndim != 4:
        return False
    return _equal(x.shape, (*value.shape[:2], value.shape[2] * value.shape[3]))


def _is_table(rows: Any, turned: Any, tokens: int, heads: int | None, *, each: int = 1, samples: bool = False) -> bool:
    """Return whether a node holds a row for each token of what is turned, the same for all heads and samples.

    Args:
        rows: The node.
        turned: The node of what is turned.
        tokens: The axis of the tokens.
        heads: The axis of the heads, or None where channels are those of all heads.
        each: The channels that share a value.
        samples: Whether samples may have rows of their own.
    """
    table, value = value_of(rows), value_of(turned)
    if not isinstance(table, Tensor) or table.ndim != value.ndim:
        return False
    shape = [1] * value.ndim
    shape[tokens], shape[-1] = value.shape[tokens], value.shape[-1] // each
    own = [value.shape[0], *shape[1:]]
    return _equal(table.shape, shape) or (samples and _equal(table.shape, own))


def _equal(shape: Any, other: Any) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other))


def _names_dtype(node: Any, reader: Any) -> bool:
    """Return whether a node is read for its dtype alone, by a cast that changes nothing."""
    if not is_method(reader, "type_as", node) or reader.args[0] is node:
        return False
    value = value_of(reader.args[0])
    return isinstance(value, Tensor) and value.dtype == value_of(node).dtype


def _is_cast(node: Any) -> bool:
    """Return whether a node is another in its own or another dtype, on the same device."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in ("to", "type_as"):
        return False
    before, after = (value_of(part) for part in (node.args[0], node))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.device == after.device


def _is_half(node: Any, out: Any) -> bool:
    """Return whether a node writes the even or the odd channels of a tensor."""
    if not is_call(node, {operator.setitem}) or node.args[0] is not out:
        return False
    place = node.args[1]
    return bool(isinstance(place, tuple) and len(place) == 2 and place[0] is Ellipsis and place[1] in (_EVEN, _ODD))


def _same_form(q: _Found, k: _Found) -> bool:
    """Return whether one call serves q and k: the same angles, tokens and kinds of norms."""

    def whole(node: Any) -> Any:
        while _is_cast(node) and value_of(node).dtype == value_of(node.args[0]).dtype:
            node = node.args[0]
        return (node.args[0], str(node.args[1])) if is_call(node, {operator.getitem}) else node

    def form(found: _Found) -> Any:
        kinds = [(part.kind, part.bias is None) for part in found.parts]
        return kinds, found.first, found.per_channel, whole(found.cosines), whole(found.sines)

    return bool(form(q) == form(k))


# ----------------------------------------------------------------------------------------------------------- rewriting


def _replace(graph: fx.Graph, node: Any, q: _Found, k: _Found, number: int) -> None:
    value, bounds, scale, session = node.args[2:]
    # Casts to the dtype of what goes change nothing.
    for found in (q, k):
        for part in found.gone:
            for user in list(part.users):
                if _names_dtype(part, user) and user not in found.gone:
                    user.replace_all_uses_with(user.args[0])
                    graph.erase_node(user)
    with graph.inserting_before(node):

        def table(rows: Any) -> Any:
            return as_float(graph, graph.call_method("reshape", (rows, -1, int(value_of(rows).shape[-1]))))

        # Of q and k, the video and the text.
        (q_part, *q_text), (k_part, *k_text) = q.parts, k.parts
        parts = [q_part, k_part, *q_text, *k_text]
        weights = [as_float(graph, part.weight) for part in parts] + [None] * (4 - len(parts))
        epsilons = [part.eps for part in parts] + [0.0] * (4 - len(parts))
        text = [part.x for part in parts[2:]] + [None] * (4 - len(parts))
        biases = [as_float(graph, part.bias) for part in parts[:2]]
        fused = graph.call_function(
            torch.ops.dvdquant.rope_attention.default,
            (q_part.x, k_part.x, value, *text, *weights, *biases, table(q.cosines), table(q.sines), bounds, q_part.kind,
             *epsilons, q.first, q.per_channel, scale, session, number),
        )  # fmt: skip
        set_example_value(fused, value_of(node))
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
    gone = {*q.gone, *k.gone}
    for write in [part for part in gone if is_call(part, {operator.setitem})]:
        graph.erase_node(write)
    # k's own views of the tables, which nothing reads any more, go with the rest.
    for rows in (k.cosines, k.sines):
        while rows.op != "placeholder":
            gone.add(rows)
            rows = rows.args[0]
    last = fused.prev
    while last.op != "root":
        before = last.prev
        if last in gone and not last.users:
            graph.erase_node(last)
        last = before
