"""Quantized layers with their weight as an fp32 matrix, for ONNX Runtime sessions that trade memory for time."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from dvdquant.errors import EngineError
from dvdquant.onnx.schema import DOMAIN
from dvdquant.ops.reference import dequantize_weight

__all__ = ["EXPANDED", "expand_weights", "expanded_weight"]

EXPANDED = ".expanded"
_PACKED = ("weight", "weight_scale", "weight_group_scale", "weight_zero")
_KEY = (DOMAIN, "QuantLinear", "")


def expand_weights(model: ir.Model) -> bool:
    """Give every QuantLinear its weight as a new graph input, fp32 [K, N], in place of its packed weight.

    1. A QuantLinear node ``(x, weight, scale, group_scale, zero, bias, …)`` becomes ``(x, expanded, bias, …)``. The new
       graph input is called ``<layer>.expanded``.
    2. In its function body, that input becomes the right operand of the product. The nodes that unpacked the weight are
       removed.
    3. A graph without QuantLinear is not changed.

    ONNX Runtime's own constant folding does the same, but it keeps a copy per session and every intermediate result.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if the graph has a QuantLinear.

    Raises:
        EngineError: A weight has no known shape, or the function body of QuantLinear has an unknown form.
    """
    nodes = [node for node in model.graph if (node.domain, node.op_type) == _KEY[:2]]
    # 1. Replace each node by one that takes the expanded weight.
    for node in nodes:
        weight = node.inputs[1]
        if weight is None or weight.name is None or weight.shape is None:
            raise EngineError(f"{node.name} has no weight of known shape", fix="export again")
        rows, half = (int(d) for d in weight.shape.numpy())  # packed weight: uint8 [N, K/2]
        expanded = ir.Value(
            name=weight.name.removesuffix(".weight") + EXPANDED,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([2 * half, rows]),
        )
        model.graph.inputs.append(expanded)
        inputs = [node.inputs[0], expanded, *node.inputs[1 + len(_PACKED) :]]
        attributes = list(node.attributes.values())
        new = ir.Node(DOMAIN, "QuantLinear", inputs, attributes, num_outputs=1, name=node.name)
        output = new.outputs[0]
        output.dtype, output.shape = node.outputs[0].dtype, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], [node.outputs[0]], [output])
    # 2. Change the function body once, and drop the initializers that nothing uses any more.
    if nodes:
        _expand_body(model.functions[_KEY])
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                model.graph.initializers.pop(name)
    return bool(nodes)


def _expand_body(function: ir.Function) -> None:
    products = [
        node
        for node in function
        if node.op_type == "MatMul" and (right := node.inputs[1]) is not None and _made_by(right) == "Transpose"
    ]
    if len(products) != 1:
        raise EngineError("the body of QuantLinear has another form than this version knows", fix="export again")
    expanded = ir.Value(name="expanded")
    products[0].replace_input_with(1, expanded)
    packed = [value for value in function.inputs if value.name in _PACKED]
    for node in reversed(list(function)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            function.remove(node, safe=True)
    for value in packed:
        function.inputs.remove(value)
    function.inputs.insert(1, expanded)


def _made_by(value: ir.Value) -> str | None:
    producer = value.producer()
    return None if producer is None else producer.op_type


def expanded_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of one layer as fp32 [K, N], contiguous.

    Args:
        tensors: The four packed tensors of the layer: ``weight``, ``weight_scale``, ``weight_group_scale`` and
            ``weight_zero``.
    """
    weight, scale, group_scale, zero = (tensors[kind] for kind in _PACKED)
    return dequantize_weight(weight, scale, group_scale, zero, torch.float32).T.contiguous()
