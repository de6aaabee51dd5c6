"""How many layers of an export will be fused with what comes before them, counted before anything is written."""

from __future__ import annotations

from dvdquant.export.engines.stage import fuse_layers, fuses
from dvdquant.export.graph.trace import trace_graph
from dvdquant.export.plan import ExportPlan
from dvdquant.model.plan import ModelPlan

__all__ = ["planned_fusions"]


def planned_fusions(plan: ExportPlan) -> dict[str, int] | None:
    """Count the layers of each transformer that its TensorRT engines will have fused; return None where none is asked for.

    It traces the graphs as the export does, and takes as long. Bit-widths change nothing of it.

    Args:
        plan: The plan of the export.

    Raises:
        EngineError: No layer of a transformer can be fused, so that the export would fail.
        ExportError: A transformer cannot be traced.
    """
    if not any(fuses(engine, plan.options) for engine in (*plan.engines, *plan.later)):
        return None
    counted: list[tuple[ModelPlan, int]] = []
    for each in plan.plans:
        same = next((count for other, count in counted if each.same_graph(other)), None)
        counted.append((each, fuse_layers(trace_graph(each, plan.sizes)) if same is None else same))
    return {name: count for name, (_, count) in zip(plan.components, counted)}
