"""What the passes over a traced block's graph ask of its nodes."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx

__all__ = ["as_float", "is_call", "is_method", "value_of"]


def value_of(node: Any) -> Any:
    """Return the example tensor that a node was traced with; None for what is no node or has none.

    Args:
        node: A node, or another argument of one.
    """
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def is_call(node: Any, targets: Container[Any]) -> bool:
    """Return whether a node calls one of some functions.

    Args:
        node: A node, or another argument of one.
        targets: The functions.
    """
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_method(node: Any, name: str, *arguments: Any) -> bool:
    """Return whether a node calls a method with these positional arguments.

    Args:
        node: A node, or another argument of one.
        name: The method.
        arguments: What it is given beside the tensor.
    """
    return bool(
        isinstance(node, fx.Node) and (node.op, node.target) == ("call_method", name) and node.args[1:] == arguments
    )


def as_float(graph: fx.Graph, node: Any) -> Any:
    """Return a new node that is a node in fp32, at the place where the graph inserts; None for None.

    Args:
        graph: The graph.
        node: The node, or None.
    """
    return None if node is None else graph.call_method("float", (node,))
