"""Traced graphs that the exports of one test run share: a trace is most of the time of a tiny export."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import onnx
import onnx_ir as ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dvdquant.export import fusable, pipeline
from dvdquant.export.graph.trace import trace_graph
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan
from tests.support.folders import shared_folder

__all__ = ["share_traces", "traced", "without_graphs"]

_TRACES: dict[str, ir.Model] = {}


def traced(plan: ModelPlan, sizes: Sizes) -> ir.Model:
    """As :func:`trace_graph`: a copy of the graph that a process of this run traced for the same plan and sizes, or a new one."""
    config = json.dumps(plan.family.config, sort_keys=True, default=repr)
    # All that a trace depends on. A recipe's solver is not in the graph, and the grids of its activations are written into
    # every graph by a pass (:func:`dvdquant.export.passes.set_activation.set_activation`).
    decided = (plan.dtype, plan.layers, plan.kept, plan.lora_rank)
    key = repr((plan.family.name, config, *decided, sizes))
    if key not in _TRACES:

        def trace(folder: Path) -> None:
            (folder / "graph.onnx").write_bytes(ir.to_proto(trace_graph(plan, sizes)).SerializeToString())

        name = f"trace-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        stored = (shared_folder(name, trace) / "graph.onnx").read_bytes()
        _TRACES[key] = ir.from_proto(onnx.ModelProto.FromString(stored))
    return _TRACES[key].clone()


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Let the exports within write graphs that have no node: weights and a manifest are all that PyTorch sessions read."""
    empty = ir.Model(ir.Graph((), (), nodes=(), opset_imports={"": 23}), ir_version=10)
    with mock.patch.object(pipeline, "trace_graph", return_value=empty):  # of which every writer takes a copy
        yield


def share_traces() -> None:
    """Let every export of this process take its graph from here, and torch list its translations to ONNX once."""
    for module in (pipeline, fusable):
        module.trace_graph = traced  # type: ignore[attr-defined]
    listed = functools.cache(ONNXRegistry.from_torchlib)

    def copied(**options: int) -> ONNXRegistry:
        registry = copy.copy(listed(**options))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[assignment]
