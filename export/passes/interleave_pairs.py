"""The pass that turns rotary embeddings into concatenations; a ScatterND over a whole tensor is slow everywhere."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["interleave_pairs"]


def interleave_pairs(model: ir.Model) -> bool:
    """Rewrite ``out = empty; out[..., 0::2] = a; out[..., 1::2] = b`` as a concatenation.

    Tracing makes of it, with the last axis brought to the front by ``Transpose(perm)``::

        ScatterND(ScatterND(base, evens, Transpose(a)), odds, Transpose(b))

    with Identity or a pair of inverse Transposes between the two.

    1. ``evens`` and ``odds`` are the constants 0, 2, … and 1, 3, … and cover the axis: the nodes are replaced by
       ``Transpose(Reshape(Concat(Unsqueeze(a), Unsqueeze(b))))``, and the base, which is never read, is dropped.
    2. A Transpose that follows is composed with that one, and dropped if both cancel.
    3. Other indices or permutations are left alone.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if the pattern was there.
    """
    changed = False
    for node in list(model.graph):
        if node.graph is None or node.op_type != "ScatterND" or node.domain:
            continue
        if (parts := _match(node)) is not None:
            _rewrite(model.graph, node, *parts)
            changed = True
    return changed


def _match(odd: ir.Node) -> tuple[ir.Value, ir.Value, tuple[int, ...]] | None:
    """Return (a, b, perm) if the node ends a pattern of case 1, else None.

    Args:
        odd: A ScatterND node, perhaps the outer one of the pattern.
    """
    inner = _source(odd.inputs[0])
    if inner is None or inner.op_type != "ScatterND":
        return None
    # 1. Both updates are transposed in the same way, which swaps the first and the last axis.
    transposed = [node.inputs[2].producer() if node.inputs[2] is not None else None for node in (inner, odd)]
    perms = [
        tuple(t.attributes["perm"].as_ints()) if t is not None and t.op_type == "Transpose" else None
        for t in transposed
    ]
    first = perms[0]
    if first is None or perms[0] != perms[1] or first != (len(first) - 1, *range(1, len(first) - 1), 0):
        return None
    # 2. The indices are the even and the odd numbers, and cover the axis.
    size = odd.outputs[0].shape[0] if odd.outputs[0].shape is not None else None
    for start, node in enumerate((inner, odd)):
        index = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if (
            index is None
            or not isinstance(size, int)
            or not np.array_equal(index.numpy().ravel(), np.arange(start, size, 2))
        ):
            return None
    evens, odds = (t.inputs[0] for t in transposed if t is not None)
    return (evens, odds, first) if evens is not None and odds is not None else None


def _source(value: ir.Value | None) -> ir.Node | None:
    """Return the node behind Identity and Transposes that undo each other, or None if they do not."""
    node = value.producer() if value is not None else None
    order: list[int] | None = None
    while node is not None and node.op_type in ("Identity", "Transpose") and node.inputs[0] is not None:
        if node.op_type == "Transpose":
            perm = list(node.attributes["perm"].as_ints())
            order = perm if order is None else [perm[i] for i in order]
        node = node.inputs[0].producer()
    return node if order is None or order == sorted(order) else None


def _rewrite(graph: ir.Graph, node: ir.Node, evens: ir.Value, odds: ir.Value, perm: tuple[int, ...]) -> None:
    """Put the concatenation in the place of the pattern.

    Args:
        graph: The graph, which is changed in place.
        node: The outer ScatterND node.
        evens: The values a at the even places [..., d/2].
        odds: The values b at the odd places [..., d/2].
        perm: The permutation that brings the last axis to the front.
    """
    rank = len(perm)
    tape = ir.tape.Tape()
    axis = _constant(tape, [rank], f"{node.name}_axis")
    shape = _constant(tape, [*([0] * (rank - 1)), -1], f"{node.name}_shape")
    # 1. Pair the values: [..., d/2] twice -> [..., d/2, 2] -> [..., d].
    pairs = tape.op("Concat", [tape.op("Unsqueeze", [evens, axis]), tape.op("Unsqueeze", [odds, axis])], {"axis": rank})
    joined = tape.op("Reshape", [pairs, shape])
    output = node.outputs[0]
    for value in (pairs, joined, *(n.outputs[0] for n in tape.nodes if n.op_type == "Unsqueeze")):
        value.dtype = output.dtype
    if output.shape is not None:
        joined.shape = ir.Shape([output.shape[perm.index(i)] for i in range(rank)])
    # 2. Compose the Transposes that follow with the one of the pattern.
    replacements = []
    for user, _ in list(output.uses()):
        if user.op_type == "Transpose" and not output.is_graph_output():
            composed = [perm[i] for i in user.attributes["perm"].as_ints()]
            straight = composed == sorted(composed)
            replacements.append((user, joined if straight else tape.op("Transpose", [joined], {"perm": composed})))
    whole = tape.op("Transpose", [joined], {"perm": list(perm)})
    # 3. Put the new nodes in, and connect the users.
    graph.insert_before(node, list(tape.nodes))
    for user, value in replacements:
        old = user.outputs[0]
        value.dtype, value.shape = old.dtype, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        graph.remove(user, safe=True)
    whole.dtype, whole.shape = output.dtype, output.shape
    ir.convenience.replace_all_uses_with(output, whole, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(tape: ir.tape.Tape, values: list[int], name: str) -> ir.Value:
    """Add an int64 constant of one axis, and return its value."""
    value: ir.Value = tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64), name=name)})
    value.dtype, value.shape = ir.DataType.INT64, ir.Shape([len(values)])
    return value
