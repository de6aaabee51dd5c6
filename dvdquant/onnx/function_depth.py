"""A bound on what the functions of a graph unfold to, before anything unfolds them.

ONNX Runtime puts the body of a function in the place of its call, one level of its own stack for each level of calls. A file of
a few kilobytes can so ask for millions of nodes (each function calls the next one twice) or end the process (thousands of
functions, each calling the next one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx

__all__ = ["MAX_CALLS", "MAX_NODES", "check_functions"]

MAX_CALLS = 32
"""Functions that call each other in a row. QuantLinear has a body, which calls that of a rotation: 2."""
MAX_NODES = 2_000_000
"""Nodes with all calls unfolded. A layer of a transformer has about 60, and a model of 14e9 weights about 400 layers."""

_Key = tuple[str, str, str]


def check_functions(model: onnx.ModelProto) -> None:
    """Refuse a graph whose functions call themselves, call each other too deep, or unfold to too many nodes.

    Args:
        model: The graph.

    Raises:
        ValueError: The bounds are exceeded; the error names the function.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {key: _calls(function.node, functions) for key, function in functions.items()}
    own = {key: sum(1 for _ in _nodes(function.node)) for key, function in functions.items()}
    # 1. Functions whose callees are all known come next: without a ring, every one is reached.
    callers: dict[_Key, list[_Key]] = {key: [] for key in functions}
    for key, called in calls.items():
        for each in called:
            callers[each].append(key)
    missing = {key: len(called) for key, called in calls.items()}
    ready = [key for key, count in missing.items() if not count]
    depth: dict[_Key, int] = {}
    nodes: dict[_Key, int] = {}
    while ready:
        key = ready.pop()
        depth[key] = 1 + max((depth[each] for each in calls[key]), default=0)
        nodes[key] = min(own[key] + sum(count * nodes[each] for each, count in calls[key].items()), MAX_NODES + 1)
        for caller in callers[key]:
            missing[caller] -= 1
            if not missing[caller]:
                ready.append(caller)
    # 2. Judge them.
    for key in functions:
        if key not in depth:
            raise ValueError(f"function {key[1]!r:.80} calls itself, or one that does")
        if depth[key] > MAX_CALLS:
            raise ValueError(f"more than {MAX_CALLS} functions call each other in a row, from {key[1]!r:.80}")
    total = sum(1 for _ in _nodes(model.graph.node))
    total += sum(count * nodes[key] for key, count in _calls(model.graph.node, functions).items())
    if total > MAX_NODES:
        raise ValueError(f"its functions unfold to more than {MAX_NODES} nodes")


def _calls(nodes: Iterable[onnx.NodeProto], functions: dict[_Key, onnx.FunctionProto]) -> Counter[_Key]:
    """Return how often nodes, and those of their subgraphs, call each function of the model."""
    keys = ((node.domain, node.op_type, node.overload) for node in _nodes(nodes))
    return Counter(key for key in keys if key in functions)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes and those of their subgraphs; protobuf refuses messages that are nested more than 100 levels deep."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                waiting.extend(graph.node)
