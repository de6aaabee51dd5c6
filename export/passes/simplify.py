"""Constant folding and clean-up that never looks at a weight."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from .interleave_pairs import interleave_pairs

__all__ = ["simplify"]

# Rotary tables of a whole video are constants that folding would blow up: 32 760 tokens × 128 × 2 tables.
MAX_FOLDED_BYTES = 1 << 20


def simplify(model: ir.Model, parameters: Collection[str]) -> bool:
    """Fold constants, drop no-op casts, dead nodes and duplicates, in place; returns True.

    1. Parameters hold no data yet, so they are graph inputs while the folder runs: nothing derived from them is folded.
    2. Constants over 1 MiB are left as computed.
    3. Rotary embeddings written pair by pair into an empty tensor become concatenations.
    4. Common subexpressions (the rotary tables are recomputed in every block) and equal constants are shared.
    """
    graph = model.graph
    weights = [graph.initializers.pop(name) for name in list(graph.initializers) if name in parameters]
    placeholders = {value.name: value.const_value for value in weights}
    for value in weights:
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model, input_size_limit=MAX_FOLDED_BYTES, output_size_limit=MAX_FOLDED_BYTES)
    interleave_pairs(model)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(size_limit=MAX_FOLDED_BYTES),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )(model)
    for value in weights:
        graph.inputs.remove(value)
        value.const_value = placeholders[value.name]
        if value.uses():
            graph.initializers[value.name or ""] = value
    return True
