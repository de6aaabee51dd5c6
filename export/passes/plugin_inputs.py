"""The pass that prepares a graph with QuantLinear nodes for TensorRT's parser and the dvdquant plugin."""

from __future__ import annotations

import onnx_ir as ir

from dvdquant.export.passes.fuse_prologues import FUSED
from dvdquant.export.passes.initializers_to_inputs import to_input
from dvdquant.onnx.schema import DOMAIN

__all__ = ["PLUGIN_NAMESPACE", "PLUGIN_VERSION", "plugin_inputs"]

# The plugin library registers itself under these (plugins/csrc/quant_linear.h).
PLUGIN_NAMESPACE = DOMAIN
PLUGIN_VERSION = "1"

# Positions of weight, weight_scale, weight_group_scale, weight_zero and bias. The rotation matrices stay in the engine,
# because they are few and small.
_PACKED = range(1, 6)


def plugin_inputs(model: ir.Model) -> bool:
    """Make the QuantLinear and FusedQuantLinear nodes plugin nodes, whose packed weights are graph inputs.

    1. A node gets ``plugin_version`` and ``plugin_namespace``: the parser looks a plugin up by op type and these, never
       by domain. ``layer`` names the layer in messages and keeps its prepared weight apart from others.
    2. The packed weight of a layer leaves the initializers and becomes graph inputs of fixed shape under the same
       names: the engines of both activation widths are bound to one copy, and hold none.
    3. Inputs of type UINT8 are declared INT8, with the bytes unchanged: TensorRT passes no UINT8 to a plugin.
    4. The function body is removed: before TensorRT 10.7 the parser prefers it to the plugin.

    The result is for TensorRT only: ONNX Runtime has no QuantLinear without the body.

    Args:
        model: The graph, which is changed in place.

    Returns:
        True if there was such a node.
    """
    changed = False
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in ("QuantLinear", FUSED):
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
                to_input(model.graph, value)
                if value.dtype == ir.DataType.UINT8:
                    value.dtype = ir.DataType.INT8
    model.functions.pop((DOMAIN, "QuantLinear", ""), None)
    return changed
