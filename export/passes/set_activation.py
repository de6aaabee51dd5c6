"""The pass that chooses the activation grid of every QuantLinear node."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from dvdquant.onnx.schema import DOMAIN
from dvdquant.recipe import ActivationSpec

__all__ = ["set_activation"]


def set_activation(
    model: ir.Model, activation: ActivationSpec, chosen: Callable[[str], ActivationSpec] | None = None
) -> bool:
    """Write ``act_bits`` and ``act_group`` of every QuantLinear node.

    1. A node with other bits or another group gets the new attributes.
    2. A node that has them already is left alone.
    3. With ``chosen``, the grid of a node is what this function returns for the name of its layer.

    Args:
        model: The graph, which is changed in place.
        activation: The activation grid, where ``chosen`` is None.
        chosen: A function from the name of a layer to its activation grid, or None.

    Returns:
        True if a node changed.
    """
    changed = False
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type != "QuantLinear":
            continue
        layer = (node.inputs[1].name or "" if node.inputs[1] is not None else "").removesuffix(".weight")
        grid = chosen(layer) if chosen is not None else activation
        wanted = {"act_bits": grid.bits, "act_group": grid.group_size}
        for name, value in wanted.items():
            if node.attributes[name].as_int() != value:
                node.attributes[name] = ir.AttrInt64(name, value)
                changed = True
    return changed
