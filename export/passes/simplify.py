"""Constant folding and clean-up that never looks at a weight."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from dvdquant.export.passes.interleave_pairs import interleave_pairs

__all__ = ["simplify"]

# Rotary tables of a whole video are constants that folding would blow up: 32 760 tokens × 128 × 2 tables.
MAX_FOLDED_BYTES = 1 << 20


def simplify(model: ir.Model, parameters: Collection[str]) -> bool:
    """Fold constants, drop no-op casts, dead nodes and duplicates, in place; returns True.

    1. Parameters hold no data yet, so they are graph inputs while the folder runs: nothing derived from them is folded.
    2. Constants over 1 MiB are left as computed.
    3. Rotary embeddings written pair by pair into an empty tensor become concatenations.
    4. Common subexpressions (the rotary tables are recomputed in every block) and equal constants are shared.

    onnxscript's pattern rewriter stays out: it tries every rule on every node, minutes for 40 blocks, and what it finds
    here (chains of reshapes and transposes) the engine builders find too.
    """
    graph = model.graph
    weights = [graph.initializers.pop(name) for name in list(graph.initializers) if name in parameters]
    placeholders = {value.name: value.const_value for value in weights}
    for value in weights:
        value.const_value = None
        graph.inputs.append(value)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=MAX_FOLDED_BYTES,
        output_size_limit=MAX_FOLDED_BYTES,
        should_fold=_should_fold,
    )
    ir.passes.Sequential(*_tidy())(model)
    interleave_pairs(model)
    ir.passes.Sequential(*_tidy(), common.NameFixPass(), common.TopologicalSortPass())(model)
    for value in weights:
        graph.inputs.remove(value)
        value.const_value = placeholders[value.name]
        if value.uses():
            graph.initializers[value.name or ""] = value
    return True


def _should_fold(node: ir.Node) -> bool | None:
    """False where folding would first make a huge tensor and then discard it."""
    if node.op_type in ("Expand", "ConstantOfShape", "Tile"):
        shape = node.outputs[0].shape
        if shape is not None and shape.is_static() and 8 * _elements(shape) > MAX_FOLDED_BYTES:
            return False
    return None


def _elements(shape: ir.Shape) -> int:
    product = 1
    for size in shape.numpy():
        product *= int(size)
    return product


def _tidy() -> list[ir.passes.InPlacePass]:
    return [
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=MAX_FOLDED_BYTES),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ]
