"""What TensorRT's parser and the dvdquant plugin need of a graph with QuantLinear nodes."""

from __future__ import annotations

import onnx_ir as ir

from dvdquant.onnx.schema import DOMAIN

__all__ = ["PLUGIN_NAMESPACE", "PLUGIN_VERSION", "plugin_inputs"]

# As the plugin library registers itself (plugins/csrc/quant_linear.h).
PLUGIN_NAMESPACE = DOMAIN
PLUGIN_VERSION = "1"

# weight, weight_scale, weight_group_scale, weight_zero, bias; the rotation matrices stay in the engine, they are few and small.
_PACKED = range(1, 6)


def plugin_inputs(model: ir.Model) -> bool:
    """Make the QuantLinear nodes plugin nodes whose packed weights are graph inputs; returns whether there were any.

    1. A node gets ``plugin_version`` and ``plugin_namespace``: the parser looks a plugin up by op type and these, never
       by domain. ``layer`` names the layer in messages and keeps its prepared weight apart from others.
    2. The packed weight of a layer leaves the initializers and becomes graph inputs of fixed shape under the same
       names: the engines of both activation widths are bound to one copy, and hold none.
    3. Those of type UINT8 are declared INT8, the bytes unchanged: TensorRT passes no UINT8 to a plugin.
    4. The function body is removed: before TensorRT 10.7 the parser prefers it to the plugin.

    A model for TensorRT only: ONNX Runtime has no QuantLinear without the body.
    """
    changed = False
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type != "QuantLinear":
            continue
        changed = True
        weight = node.inputs[1]
        layer = (weight.name or "" if weight is not None else "").removesuffix(".weight")
        for name, text in {
            "plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE, "layer": layer,
        }.items():  # fmt: skip
            node.attributes[name] = ir.AttrString(name, text)
        for position in _PACKED:
            value = node.inputs[position]
            if value is not None and value.name in model.graph.initializers:
                _to_input(model.graph, value)
    model.functions.pop((DOMAIN, "QuantLinear", ""), None)
    return changed


def _to_input(graph: ir.Graph, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is not None:
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape)
    if value.dtype == ir.DataType.UINT8:
        value.dtype = ir.DataType.INT8
    graph.initializers.pop(str(value.name))
    value.const_value = None
    graph.inputs.append(value)
