"""The pass that turns initializers into graph inputs, so that a runtime says what is in them."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

__all__ = ["initializers_to_inputs", "kept_to_inputs", "to_input"]


def initializers_to_inputs(model: ir.Model, names: Container[str]) -> bool:
    """Turn the named initializers into inputs of fixed shape, in the order of the initializers.

    Args:
        model: The graph, which is changed in place.
        names: The names of the initializers; one that the graph does not have counts for nothing.

    Returns:
        True if an initializer became an input.
    """
    values = [value for name, value in model.graph.initializers.items() if name in names]
    for value in values:
        to_input(model.graph, value)
    return bool(values)


def kept_to_inputs(model: ir.Model, kept: Container[str]) -> bool:
    """Turn what an export keeps in 16 bit into inputs of an engine: a LoRA can change it there, and engines share it.

    1. A kept tensor that a node other than Conv reads: it becomes an input.
    2. The kernel of a convolution stays a constant: builders choose kernels by it.

    Args:
        model: The graph, which is changed in place.
        kept: The names of the tensors that become inputs.

    Returns:
        True if an initializer became an input.
    """
    kernels = {
        value.name
        for node in model.graph.all_nodes()
        if node.op_type.startswith("Conv")
        for value in node.inputs
        if value
    }
    return initializers_to_inputs(
        model, {name for name in model.graph.initializers if name in kept and name not in kernels}
    )


def to_input(graph: ir.Graph, value: ir.Value) -> None:
    """Turn one initializer into a graph input of its type and shape.

    Args:
        graph: The graph, which is changed in place.
        value: The initializer.
    """
    tensor = value.const_value
    if tensor is not None:
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape)
    graph.initializers.pop(str(value.name))
    value.const_value = None
    graph.inputs.append(value)
