"""Choose the activation grid of every QuantLinear node."""

from __future__ import annotations

import onnx_ir as ir

from dvdquant.export.schema import DOMAIN
from dvdquant.recipe import ActivationSpec

__all__ = ["set_activation"]


def set_activation(model: ir.Model, activation: ActivationSpec) -> bool:
    """Write ``act_bits`` and ``act_group``; returns whether any node changed.

    1. A node with other bits or another group gets the new attributes.
    2. A node that has them already is left alone.
    """
    changed = False
    wanted = {"act_bits": activation.bits, "act_group": activation.group_size}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type != "QuantLinear":
            continue
        for name, value in wanted.items():
            if node.attributes[name].as_int() != value:
                node.attributes[name] = ir.AttrInt64(name, value)
                changed = True
    return changed
