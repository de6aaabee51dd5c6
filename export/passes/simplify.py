"""Constant folding and clean-up that never looks at a weight."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from dvdquant.export.passes.interleave_pairs import interleave_pairs
from dvdquant.export.passes.static_sizes import static_sizes

__all__ = ["simplify"]

# Rotary tables of a whole video are constants that folding would make large: 32 760 tokens × 128 × 2 tables.
MAX_FOLDED_BYTES = 1 << 20


def simplify(model: ir.Model, parameters: Collection[str]) -> bool:
    """Fold constants, and drop no-op casts, dead nodes and duplicates.

    1. Parameters hold no data yet. They are graph inputs while the folder runs, so nothing derived from them is folded.
    2. Sizes that are fixed are constants, also of tensors with axes that vary. Constants over 1 MiB are left as computed.
    3. Rotary embeddings that are written pair by pair into an empty tensor become concatenations.
    4. Common subexpressions (the rotary tables are recomputed in every block) and equal constants are shared.

    onnxscript's pattern rewriter is not used. It tries every rule on every node, which takes minutes for 40 blocks, and
    the engine builders find the same patterns (chains of reshapes and transposes).

    Args:
        model: The graph, which is changed in place.
        parameters: The names of the model's parameters.

    Returns:
        True.
    """
    graph = model.graph
    # 1. Make the parameters graph inputs.
    weights = [graph.initializers.pop(name) for name in list(graph.initializers) if name in parameters]
    placeholders = {value.name: value.const_value for value in weights}
    for value in weights:
        value.const_value = None
        graph.inputs.append(value)
    # 2. Fold constants and tidy up. Sizes that are known come first, since constants are computed from them.
    static_sizes(model)
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
    # 3. Make the parameters initializers again.
    for value in weights:
        graph.inputs.remove(value)
        value.const_value = placeholders[value.name]
        if value.uses():
            graph.initializers[value.name or ""] = value
    return True


def _should_fold(node: ir.Node) -> bool | None:
    """Return False where folding would first make a huge tensor and then discard it; None leaves it to the folder."""
    if node.op_type in ("Expand", "ConstantOfShape", "Tile"):
        shape = node.outputs[0].shape
        if shape is not None and shape.is_static() and 8 * _elements(shape) > MAX_FOLDED_BYTES:
            return False
    return None


def _elements(shape: ir.Shape) -> int:
    """Return the number of elements of a static shape."""
    product = 1
    for size in shape.numpy():
        product *= int(size)
    return product


def _tidy() -> list[ir.passes.InPlacePass]:
    """Return the passes that clean a graph up, in order."""
    return [
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=MAX_FOLDED_BYTES),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ]
