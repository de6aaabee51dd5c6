"""The pass that turns a size that is known into a constant, where other axes of the same tensor are not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["static_sizes"]


def static_sizes(model: ir.Model) -> bool:
    """Replace ``Gather(Shape(x), axes)`` by a constant where x has these axes at a fixed size.

    Constant folding takes the shape of a tensor as a whole: one axis that may vary keeps all of them out. In a graph for a
    range of sizes the indices of rotary embeddings then stay computed, ``Range(0, head size)``, although no head varies.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if a size became a constant.
    """
    changed = False
    for node in list(model.graph):
        if node.op_type == "Gather" and not node.domain and (sizes := _sizes(node)) is not None:
            output = node.outputs[0]
            constant = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", ir.tensor(sizes))}, num_outputs=1)
            value = constant.outputs[0]
            value.name, value.dtype, value.shape = output.name, ir.DataType.INT64, ir.Shape(sizes.shape)
            model.graph.insert_before(node, constant)
            ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            changed = True
    return changed


def _sizes(gather: ir.Node) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Return the sizes that a Gather takes out of a Shape, int64 of the shape of its indices; None where one may vary.

    Args:
        gather: A Gather node.
    """
    source, indices = gather.inputs[:2]
    shape = source.producer() if source is not None else None
    index = ir.convenience.get_const_tensor(indices) if indices is not None else None
    if shape is None or shape.op_type != "Shape" or shape.domain or index is None or shape.inputs[0] is None:
        return None
    known = shape.inputs[0].shape
    if known is None:
        return None
    start, end = (shape.attributes.get(name) for name in ("start", "end"))
    dims = list(known)[slice(start.as_int() if start else None, end.as_int() if end else None)]
    picked = index.numpy().astype(np.int64)
    if any(not -len(dims) <= i < len(dims) or not isinstance(dims[i], int) for i in picked.ravel()):
        return None
    return np.array([dims[i] for i in picked.ravel()], np.int64).reshape(picked.shape)
