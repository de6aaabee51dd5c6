"""A rewrite that gives attention masks their query axis, which ONNX Runtime's CPU Attention does not broadcast."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["expand_attention_mask"]


def expand_attention_mask(model: ir.Model) -> bool:
    """Expand attention masks with a query axis of size 1, for ONNX Runtime only.

    TensorRT broadcasts the axis, and a full mask for a self-attention over 100 000 tokens fits into no memory.

    1. ``Attention(q, k, v, mask[…, 1, S])``: the mask is expanded to ``[…, L, S]``, with L read from q at run time.
    2. A mask whose query axis is symbolic or already L, or no mask: the node is left unchanged.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if a mask was expanded.
    """
    changed = False
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask.shape is None or mask.shape[-2] != 1:
            continue
        ones = ir.tensor(np.ones(len(mask.shape) - 2, np.int64), name=f"{node.name}_lead")
        last = ir.tensor(np.ones(1, np.int64), name=f"{node.name}_last")
        tape = ir.tape.Tape()
        lead = tape.op("Constant", [], {"value": ones})
        keys = tape.op("Constant", [], {"value": last})
        length = tape.op("Shape", [query], {"start": 2, "end": 3})
        expanded = tape.op("Expand", [mask, tape.op("Concat", [lead, length, keys], {"axis": 0})])
        expanded.dtype = mask.dtype
        model.graph.insert_before(node, list(tape.nodes))
        node.replace_input_with(3, expanded)
        changed = True
    return changed
