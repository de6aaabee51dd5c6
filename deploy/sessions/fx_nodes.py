"""What the passes over a traced block's graph ask of its nodes."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx

from dvdquant.system.torch_hooks import example_value

__all__ = ["as_float", "inverse_rms", "is_call", "is_method", "value_of"]


def value_of(node: Any) -> Any:
    """Return the example tensor that a node was traced with; None for what is no node or has none.

    Args:
        node: A node, or another argument of one.
    """
    return example_value(node) if isinstance(node, fx.Node) else None


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


def inverse_rms(node: Any) -> tuple[Any, Any, tuple[Any, ...]] | None:
    """Return x, eps and the nodes between where a node is ``rsqrt(mean(x²) + eps)`` over the last axis, or None.

    Args:
        node: A node, or another argument of one.
    """
    if not is_call(node, {torch.rsqrt}) or not is_call(node.args[0], {operator.add, torch.add}):
        return None
    total = node.args[0]
    mean, eps = total.args
    if not is_method(mean, "mean", -1) or not mean.kwargs.get("keepdim") or not is_method(mean.args[0], "pow", 2):
        return None
    power = mean.args[0]
    return power.args[0], eps, (total, mean, power)


def as_float(graph: fx.Graph, node: Any) -> Any:
    """Return a new node that is a node in fp32, at the place where the graph inserts; None for None.

    Args:
        graph: The graph.
        node: The node, or None.
    """
    return None if node is None else graph.call_method("float", (node,))
