"""The engine stage: lower each graph for its realization, build it, and describe the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from dvdquant.errors import EngineError
from dvdquant.families import Sizes
from dvdquant.manifest import EngineEntry
from dvdquant.model import ModelPlan
from dvdquant.progress import Progress

from .builders import build_engine
from .builders.report import BuildReport
from .graphs import graph_path
from .onnx import profile_shapes
from .options import ExportOptions
from .passes.lower_int8 import lower_int8
from .passes.lower_nvfp4 import lower_nvfp4
from .passes.lower_qdq_int4 import lower_qdq_int4
from .passes.lower_store import TensorStore
from .passes.plugin_inputs import plugin_inputs
from .realize import EnginePlan

__all__ = ["EngineStage", "engine_path", "find_current"]


def engine_path(component: str, engine: EnginePlan) -> str:
    """Where an engine lies, relative to the export."""
    backend = engine.backend.removeprefix("tensorrt_")
    return f"engines/{backend}-sm{'+'.join(sm.replace('.', '') for sm in engine.sms)}/{component}_a{engine.act_bits}.engine"


@dataclass
class EngineStage:
    """Builds the engines of one transformer from the ONNX graphs in ``root``.

    Args:
        weight_source: the rotated fp32 weight of a layer from the original checkpoint, where there is one.
        hashes: SHA-256 of each QuantLinear graph, by relative path.
    """

    root: Path
    plan: ModelPlan
    sizes: Sizes
    component: str
    options: ExportOptions
    progress: Progress
    hashes: dict[str, str]
    weight_source: Callable[[str], Tensor] | None = None
    _stores: dict[str, TensorStore] = field(default_factory=dict)

    def build(self, engine: EnginePlan) -> tuple[EngineEntry, BuildReport]:
        """Build one engine; EngineError when the builder refuses, with its log's tail."""
        source = self.root / graph_path(self.component, engine.act_bits, "tensorrt")
        target = self.root / engine_path(self.component, engine)
        target.parent.mkdir(parents=True, exist_ok=True)
        graph = self._for_plugin(source, engine) if engine.realization == "plugin" else self._lower(source, engine)
        workspace = self.options.workspace_gib
        try:
            report = build_engine(
                graph,
                target,
                backend=engine.backend,
                sms=engine.sms,
                profile=profile_shapes(self.plan.family, self.sizes),
                plugins=self.options.plugins if engine.backend == "tensorrt" else (),
                workspace_bytes=int(workspace * 2**30) if workspace else None,
                timing_cache=self.options.timing_cache,
                optimization_level=self.options.optimization_level,
                data_roots=(self.root / "onnx",),
                progress=self.progress.log_format == "text",
                alive=lambda seconds, silent: self.progress.event(
                    "working", stage="engines", label=target.name, seconds=round(seconds, 1), silent=round(silent, 1)
                ),
            )
        except EngineError as error:
            what = f"{self.component} a{engine.act_bits} for {engine.backend} SM {', '.join(engine.sms)}: {error.what}"
            raise EngineError(what, available=error.available, fix=error.fix) from error
        finally:
            if graph != source and not self.options.keep_graphs:
                graph.unlink(missing_ok=True)
        return self._entry(engine, report), report

    def _for_plugin(self, source: Path, engine: EnginePlan) -> Path:
        """The graph as TensorRT's parser and the plugin need it; it holds no packed weights."""
        model = ir.load(source)
        plugin_inputs(model)
        path = source.with_name(f"{self.component}_a{engine.act_bits}_plugin.onnx")
        ir.save(model, path)
        return path

    def _lower(self, source: Path, engine: EnginePlan) -> Path:
        """The graph with standard operators only. Its derived weights, the same at every bit-width, are written once."""
        model = ir.load(source)
        model.functions.clear()
        stem = self.root / "onnx" / f"{self.component}_rtx_{engine.realization}"
        store = self._stores.get(engine.realization)
        if store is None:
            store = self._stores[engine.realization] = TensorStore(stem.with_suffix(".bin"), self.root / "onnx")
        if engine.realization == "int8":
            lower_int8(model, store)
        elif engine.realization == "nvfp4":
            lower_nvfp4(model, self.weight_source, store)
        else:
            lower_qdq_int4(model, store)
        path = stem.with_name(f"{self.component}_a{engine.act_bits}_rtx_{engine.realization}.onnx")
        ir.save(model, path)
        return path

    def close(self) -> None:
        """Remove the derived weights, unless the graphs that read them are kept."""
        for store in self._stores.values():
            if store.path is not None and (not self.options.keep_graphs or not store.bytes_written):
                store.path.unlink(missing_ok=True)

    def _entry(self, engine: EnginePlan, report: BuildReport) -> EngineEntry:
        graph = graph_path(self.component, engine.act_bits, "tensorrt")
        shapes: dict[str, Any] = dict(self.sizes.to_json())
        return EngineEntry(
            path=engine_path(self.component, engine),
            backend=engine.backend,
            sm=list(engine.sms),
            act_bits=engine.act_bits,
            realization=engine.realization,
            executes=engine.executes,
            onnx_sha256=self.hashes[graph],
            versions={engine.backend: report.version},
            shapes=shapes,
        )


def find_current(
    engine: EnginePlan, component: str, entries: Sequence[EngineEntry], onnx_sha256: str, version: str
) -> EngineEntry | None:
    """The entry of an engine that need not be rebuilt: same graph, same realization, same SMs, same builder."""
    for entry in entries:
        same = (
            entry["path"] == engine_path(component, engine)
            and entry["onnx_sha256"] == onnx_sha256
            and entry["realization"] == engine.realization
            and entry["versions"].get(engine.backend) == version
        )
        if same:
            return entry
    return None
