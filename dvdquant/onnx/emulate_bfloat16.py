"""A bfloat16 graph as a float32 graph that rounds like it: ONNX Runtime's CPU provider has no bfloat16 kernels."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

__all__ = ["emulate_bfloat16"]

BF16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT

# Operators that move values without computing: their outputs need no rounding if their inputs are rounded.
EXACT = frozenset(
    "Reshape Transpose Slice Concat Split Squeeze Unsqueeze Expand Gather Identity ScatterND Flatten Tile Where".split()  # noqa: SIM905
)


def emulate_bfloat16(model: ir.Model) -> bool:
    """Replace bfloat16 by float32 everywhere, and round to bfloat16 after every operator.

    PyTorch on a CPU and tensor cores on a GPU do the same: operands in bfloat16, float32 inside, one rounding after.

    1. A graph input or output in bfloat16 becomes float32. Its values must be representable: feed rounded data.
    2. A bfloat16 initializer stays as stored, with one Cast to float32 behind it.
    3. A node with bfloat16 outputs computes in float32, followed by a Cast to bfloat16 and a Cast back. Operators that
       only move values are not followed by casts.
    4. ``Cast(to=bfloat16)`` becomes a Cast to float32 and the rounding pair.

    Types that the graph does not name are inferred first: a value of unknown type would not be rounded.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if there was any bfloat16.
    """
    graph = model.graph
    changed = False
    if any(value.dtype is None for node in graph for value in node.outputs):
        ShapeInferencePass()(model)  # in place
    for value in graph.inputs:
        if value.dtype == BF16:
            value.dtype, changed = FP32, True
    for value in list(graph.initializers.values()):
        if value.dtype == BF16 or (value.const_value is not None and value.const_value.dtype == BF16):
            _upcast_initializer(graph, value)
            changed = True
    for node in list(graph):
        changed |= _emulate_node(graph, node)
    return changed


def _upcast_initializer(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast to float32 between an initializer and its users."""
    users = list(value.uses())
    if not users:
        return
    name = f"{value.name}_fp32"
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", FP32.value)], num_outputs=1, name=name)
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, FP32, value.shape
    graph.insert_before(next(iter(graph)), cast)
    for user, index in users:
        user.replace_input_with(index, result)


def _emulate_node(graph: ir.Graph, node: ir.Node) -> bool:
    """Let a node with bfloat16 outputs compute in float32, and return True if it has such outputs."""
    changed = False
    outputs = [o for o in node.outputs if o.dtype == BF16]
    if node.op_type == "Constant" and outputs:
        tensor = node.attributes["value"].as_tensor()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype("float32")))
    if node.op_type == "Cast" and node.attributes["to"].as_int() == BF16.value:
        node.attributes["to"] = ir.AttrInt64("to", FP32.value)
    for output in outputs:
        output.dtype, changed = FP32, True
        if node.op_type not in EXACT and node.op_type != "Constant":
            _round(graph, node, output)
    return changed


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Round an output to bfloat16 and back to float32 before its users see it.

    Args:
        graph: The graph, which is changed in place.
        node: The node that computes the output.
        output: The output, already float32.
    """
    users = list(output.uses())
    down = ir.Node("", "Cast", [output], [ir.AttrInt64("to", BF16.value)], num_outputs=1, name=f"{output.name}_round")
    up = ir.Node("", "Cast", [down.outputs[0]], [ir.AttrInt64("to", FP32.value)], num_outputs=1)
    rounded = up.outputs[0]
    down.outputs[0].dtype, rounded.dtype, rounded.shape = BF16, FP32, output.shape
    down.outputs[0].name = f"{output.name}_bf16"
    graph.insert_after(node, [down, up])
    for user, index in users:
        user.replace_input_with(index, rounded)
    if output.is_graph_output():
        position = list(graph.outputs).index(output)
        name = output.name
        output.name = f"{name}_unrounded"
        rounded.name = name
        graph.outputs[position] = rounded
    else:
        rounded.name = f"{output.name}_rounded"
