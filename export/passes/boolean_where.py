"""The pass that writes Where on booleans as logic: ONNX Runtime's CPU provider has no boolean Where."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["boolean_where"]


def boolean_where(model: ir.Model) -> bool:
    """Rewrite every ``Where(c, a, b)`` of boolean ``a`` and ``b``.

    1. It becomes ``Or(And(c, a), And(Not(c), b))``, with broadcasting as in Where.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if there was such a node.
    """
    changed = False
    for node in list(model.graph):
        if node.op_type != "Where" or node.domain or node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        condition, when_true, when_false = node.inputs
        tape = ir.tape.Tape()
        chosen = tape.op("And", [condition, when_true])
        other = tape.op("And", [tape.op("Not", [condition]), when_false])
        result = tape.op("Or", [chosen, other])
        for value in (chosen, other, result):
            value.dtype = ir.DataType.BOOL
        result.shape = node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], list(tape.nodes), [node.outputs[0]], [result]
        )
        changed = True
    return changed
