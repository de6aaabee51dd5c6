"""Traced graphs that the exports of one test process share: a trace is most of the time of a tiny export."""

from __future__ import annotations

import json

import onnx_ir as ir

from dvdquant.export import pipeline
from dvdquant.export.graph.trace import trace_graph
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan

__all__ = ["share_traces", "traced"]

_TRACES: dict[str, ir.Model] = {}


def traced(plan: ModelPlan, sizes: Sizes) -> ir.Model:
    """As :func:`trace_graph`: a copy of the graph that this process traced for the same plan and sizes, or a new one."""
    config = json.dumps(plan.family.config, sort_keys=True, default=repr)
    # All that a trace depends on; the solver of a recipe, and what it does to the weights, is not in the graph.
    decided = (plan.recipe.activations[0], plan.dtype, plan.layers, plan.kept, plan.lora_rank)
    key = repr((plan.family.name, config, *decided, sizes))
    if key not in _TRACES:
        _TRACES[key] = trace_graph(plan, sizes)
    return _TRACES[key].clone()


def share_traces() -> None:
    """Let every export of this process take its graph from here."""
    pipeline.trace_graph = traced  # type: ignore[attr-defined]
