"""The pass that gives initializers the names of the parameters they stand for."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

__all__ = ["name_weights"]


def name_weights(model: ir.Model, prefix: str, parameters: Collection[str]) -> bool:
    """Strip the tracing wrapper's prefix from initializers, and shorten the names of the rotation tables.

    1. ``model.blocks.0.ffn.net.2.weight`` → ``blocks.0.ffn.net.2.weight``
    2. ``model.dvdq_rotation.hadamard_256`` → ``hadamard.256``, ``…outer_12`` → ``outer.12``
    3. Anything else (a lifted constant) keeps its name, unless a parameter has it: then ``constant.<name>``.

    Args:
        model: The graph, which is changed in place.
        prefix: The prefix that the wrapper gives to parameters, with its dot.
        parameters: The names of the model's parameters.

    Returns:
        True if a name changed.
    """
    changed = False
    graph = model.graph
    for old, value in list(graph.initializers.items()):
        new = old.removeprefix(prefix)
        if new.startswith("dvdq_rotation."):
            kind, _, order = new.removeprefix("dvdq_rotation.").partition("_")
            new = f"{kind}.{order}"
        elif not old.startswith(prefix) and old in parameters:
            new = f"constant.{old}"
        if new != old:
            graph.initializers.pop(old)
            value.name = new
            graph.initializers[new] = value
            changed = True
    return changed
