"""The norms and the rope before 8-bit attention, taken into one kernel each for q and k: a pass over the graph of a traced block.

Recognised is what diffusers does in Wan: an RMS norm over all heads, and rope of interleaved pairs that are written to a new
tensor. q and k of other families stay as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dvdquant.deploy.sessions.fx_nodes import as_float, is_call, is_method, value_of

# Registers the operations.
from dvdquant.ops.attention.operation import attention, rope_attention  # noqa: F401
from dvdquant.ops.packed_layer import DTYPE_NAMES

__all__ = ["fuse_attention"]

_NORMS = {torch.rms_norm, F.rms_norm}
_HEADS = (32, 64, 128, 256)
_MAX_CHANNELS = 8192
_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)


@dataclass
class _Found:
    """What q or k is made of; nodes of the graph."""

    x: Any  # [B, S, C], of the layer
    weight: Any
    eps: Any
    cosines: Any  # [1, S, 1, d/2]
    sines: Any
    gone: list[Any]  # what the kernel takes the place of, the last first


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
            # One table turns both.
            if q is None or k is None or not _same_table(q, k):
                continue
            _replace(module.graph, node, q, k, number)
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _names_dtype(node: Any, reader: Any) -> bool:
    """Return whether a node is read for its dtype alone, by a cast that changes nothing."""
    if not is_method(reader, "type_as", node) or reader.args[0] is node:
        return False
    value = value_of(reader.args[0])
    return isinstance(value, Tensor) and value.dtype == value_of(node).dtype


def _find(node: Any, reader: Any) -> _Found | None:
    """Return what an operand of attention is made of, or None where it is something else or others read it."""
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dtype not in DTYPE_NAMES:
        return None
    gone = [node]
    # 1. The cast, and the tensor that rope writes to.
    if not all(user is reader or _names_dtype(node, user) for user in node.users):
        return None
    out: Any = node.args[0] if _is_cast(node) else node
    if not is_call(out, {torch.empty_like}) or value_of(out).dtype != value_of(node).dtype:
        return None
    writes = {user.args[1][-1].start: user for user in out.users if _is_half(user, out)}
    if set(writes) != {0, 1} or any(user not in (*writes.values(), node) for user in out.users):
        return None
    even, odd = writes[0].args[2], writes[1].args[2]
    if any(write.users for write in writes.values()):
        return None
    # 2. x1 cos - x2 sin and x1 sin + x2 cos.
    if not (is_call(even, {operator.sub}) and is_call(odd, {operator.add})):
        return None
    products = [*even.args, *odd.args]
    if not all(is_call(product, {operator.mul}) and len(product.users) == 1 for product in products):
        return None
    (x1, cosines), (x2, sines), other_sin, other_cos = (product.args for product in products)
    if other_sin != (x1, sines) or other_cos != (x2, cosines):
        return None
    pairs: Any = x1.args[0] if is_call(x1, {operator.getitem}) and x1.args[1] == 0 else None
    if not is_call(x2, {operator.getitem}) or x2.args != (pairs, 1) or not is_method(pairs, "unbind", -1):
        return None
    # 3. The heads, and the norm over all of them.
    split = pairs.args[0]
    if not is_method(split, "unflatten", -1, (-1, 2)) or split.args[0] is not out.args[0]:
        return None
    heads: Any = split.args[0]
    rest = {split, out, node}
    if not all(user in rest or _names_dtype(heads, user) for user in heads.users):
        return None
    if (heads.op, heads.target) != ("call_method", "unflatten") or heads.args[1] != 2:
        return None
    norm = heads.args[0]
    if not is_call(norm, _NORMS) or len(norm.args) != 4 or set(norm.users) != {heads}:
        return None
    x, shape, weight, eps = norm.args
    if (
        eps is None
        or len(shape) != 1
        or not _fits(value_of(x), value_of(heads), value_of(cosines), value_of(sines), int(shape[0]))
    ):
        return None
    gone += [*writes.values(), even, odd, *products, x1, x2, pairs, split, out, heads, norm]
    return _Found(x, weight, eps, cosines, sines, gone)


def _is_cast(node: Any) -> bool:
    return bool(node.op == "call_method" and node.target in ("to", "type_as"))


def _is_half(node: Any, out: Any) -> bool:
    """Return whether a node writes the even or the odd channels of a tensor."""
    if not is_call(node, {operator.setitem}) or node.args[0] is not out:
        return False
    place = node.args[1]
    return bool(isinstance(place, tuple) and len(place) == 2 and place[0] is Ellipsis and place[1] in (_EVEN, _ODD))


def _fits(x: Any, heads: Any, cosines: Any, sines: Any, over: int) -> bool:
    """Return whether the kernel takes these shapes: x [B, S, C], heads [B, S, H, d], tables [1, S, 1, d/2]."""
    if not all(isinstance(part, Tensor) for part in (x, heads, cosines, sines)) or x.ndim != 3 or heads.ndim != 4:
        return False
    head, channels = int(heads.shape[3]), int(x.shape[2])
    if head not in _HEADS or channels > _MAX_CHANNELS or over != channels or x.dtype != heads.dtype:
        return False
    for table in (cosines, sines):
        wanted = (1, x.shape[1], 1, head // 2)
        if table.ndim != 4 or not all(statically_known_true(a == b) for a, b in zip(table.shape, wanted)):
            return False
    return True


def _same_table(q: _Found, k: _Found) -> bool:
    """Return whether q and k are turned by the same angles: the same slices of the same tensors."""

    def whole(node: Any) -> Any:
        return (node.args[0], str(node.args[1])) if is_call(node, {operator.getitem}) else node

    return bool(whole(q.cosines) == whole(k.cosines) and whole(q.sines) == whole(k.sines))


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
            return as_float(graph, graph.call_method("flatten", (graph.call_method("flatten", (rows, 0, 2)), 1)))

        weights = [as_float(graph, found.weight) for found in (q, k)]
        fused = graph.call_function(
            torch.ops.dvdquant.rope_attention.default,
            (q.x, k.x, value, *weights, table(q.cosines), table(q.sines), bounds, "all", q.eps, k.eps, scale, session, number),
        )  # fmt: skip
        fused.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
    gone = {*q.gone, *k.gone}
    for write in [part for part in gone if is_call(part, {operator.setitem})]:
        graph.erase_node(write)
    last = fused.prev
    while last.op != "root":
        before = last.prev
        if last in gone and not last.users:
            graph.erase_node(last)
        last = before
