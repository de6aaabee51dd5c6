"""The engine stage: each graph is lowered for its precision and built, and the result is described."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from dvdquant.artifact.entries import EngineEntry
from dvdquant.artifact.layout import graph_path
from dvdquant.backends import TENSORRT
from dvdquant.errors import EngineError
from dvdquant.export.engines import build_engine
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.report import BuildReport, Shapes
from dvdquant.export.graph.trace import profile_shapes
from dvdquant.export.options import ExportOptions
from dvdquant.export.passes.fp8_attention import fp8_attention
from dvdquant.export.passes.fuse_prologues import fuse_prologues
from dvdquant.export.passes.initializers_to_inputs import kept_to_inputs
from dvdquant.export.passes.lowering.int8 import lower_int8
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4
from dvdquant.export.passes.lowering.qdq_int4 import lower_qdq_int4
from dvdquant.export.passes.lowering.store import TensorStore
from dvdquant.export.passes.plugin_inputs import plugin_inputs
from dvdquant.model.families import Sizes
from dvdquant.model.kept_inputs import kept_inputs, kept_inputs_bytes
from dvdquant.model.plan import ModelPlan
from dvdquant.system.files import hash_file
from dvdquant.system.progress import Progress

__all__ = [
    "BuildSettings",
    "EngineStage",
    "build_settings",
    "check_attention",
    "find_current",
    "fuses",
    "is_compatible",
    "lowered_path",
    "run_builder",
]


@dataclass
class EngineStage:
    """The builder of the engines of one transformer from the ONNX graphs in ``root``.

    Args:
        root: The folder of the export.
        plan: The plan of the model.
        sizes: The sizes of the graphs, in latent units.
        component: The name of the transformer's folder.
        options: The options of the export.
        progress: The place that stages report to.
        hashes: Relative path -> SHA-256 of each QuantLinear graph.
        weight_source: A function from the name of a layer to its rotated weight from the original checkpoint, fp32 [N,
            K]; None if there is no checkpoint.
        fused: How many layers of the graph that was lowered last are fused with what comes before them.
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
    _quantized: int = 0  # attentions in FP8 of the graph that was lowered last
    fused: int = 0
    _kept: set[str] = field(default_factory=set)  # precisions of graphs that are for another machine

    def build(self, engine: EnginePlan) -> tuple[EngineEntry, BuildReport]:
        """Build one engine, and return its entry for the manifest and the builder's report.

        Args:
            engine: The engine to build.

        Raises:
            EngineError: The builder refuses; the error holds the tail of its log.
            ExportError: The graph cannot be lowered for this precision.
            OutputError: A file cannot be written.
            ResourceError: Disk or memory is full.
        """
        # 1. Lower the graph.
        source = self.root / graph_path(self.component, engine.act_bits, "tensorrt")
        target = self.root / engine.path(self.component)
        target.parent.mkdir(parents=True, exist_ok=True)
        graph = self._for_plugin(source, engine) if engine.precision == "plugin" else self._lower(source, engine)
        # 2. Build the engine.
        try:
            report = run_builder(
                graph,
                target,
                backend=engine.backend,
                sms=engine.sms,
                profile=profile_shapes(self.plan.family, self.sizes),
                plugins=self.options.plugins,
                workspace_gib=self.options.workspace_gib,
                timing_cache=self.options.timing_cache,
                optimization_level=self.options.optimization_level,
                version_compatible=is_compatible(engine.backend, self.options.version_compatible),
                data_root=self.root / "onnx",
                fp8_attentions=self._quantized,
                progress=self.progress,
            )
        except EngineError as error:
            what = f"{self.component} a{engine.act_bits} for {engine.backend} SM {', '.join(engine.sms)}: {error.what}"
            fix = error.fix if error.has_own_fix else None
            raise EngineError(what, available=error.available, fix=fix) from error
        finally:
            if graph != source and not self.options.keep_graphs:
                graph.unlink(missing_ok=True)
        return self._entry(engine, report), report

    def prepare(self, engine: EnginePlan) -> tuple[str, int]:
        """Write the graph that the builder of an engine reads, for a builder on another machine.

        Args:
            engine: The engine that is to be built.

        Returns:
            The path of the graph relative to the export, and the number of its attentions in FP8.

        Raises:
            ExportError: The graph cannot be lowered for this precision.
            OutputError: A file cannot be written.
            ResourceError: Disk or memory is full.
        """
        source = self.root / graph_path(self.component, engine.act_bits, "tensorrt")
        graph = self._for_plugin(source, engine) if engine.precision == "plugin" else self._lower(source, engine)
        self._kept.add(engine.precision)
        return graph.relative_to(self.root).as_posix(), self._quantized

    def _attention(self, model: ir.Model, engine: EnginePlan) -> None:
        """Quantize the attention in the graph where the engine is to have it in FP8; it reads weights, so it comes first."""
        self._quantized = 0
        if engine.attention == "fp8":
            self._quantized = len(fp8_attention(model, self.plan.family.tokens(*self.sizes.at("max"))))
            if not self._quantized:
                raise EngineError(
                    "the graph has no self-attention that can run in FP8",
                    fix="use a recipe with attention 16 (--attention 16)",
                )

    def _for_plugin(self, source: Path, engine: EnginePlan) -> Path:
        """Write the graph for TensorRT's parser and the plugin, and return its path; it holds no packed weights.

        Raises:
            EngineError: Layers are to be fused, and none can be.
        """
        model = ir.load(source)
        self._attention(model, engine)
        self.fused = fuse_layers(model) if self.options.fuse else 0
        plugin_inputs(model)
        self._share_kept(model, engine)
        path = self.root / lowered_path(self.component, engine, bool(self.fused))
        ir.save(model, path)
        return path

    def _lower(self, source: Path, engine: EnginePlan) -> Path:
        """Write the graph as it is lowered for its precision, and return its path.

        The weights that it derives are the same at every bit-width, so they are written once.
        """
        model = ir.load(source)
        model.functions.clear()
        self.fused = 0
        self._attention(model, engine)
        stem = self.root / "onnx" / f"{self.component}_rtx_{engine.precision}"
        store = self._stores.get(engine.precision)
        if store is None:
            store = self._stores[engine.precision] = TensorStore(stem.with_suffix(".bin"), self.root / "onnx")
        if engine.precision == "int8":
            lower_int8(model, store)
        elif engine.precision == "nvfp4":
            lower_nvfp4(model, self.weight_source, store)
        else:
            lower_qdq_int4(model, store)
        self._share_kept(model, engine)
        path = self.root / lowered_path(self.component, engine)
        ir.save(model, path)
        return path

    def _share_kept(self, model: ir.Model, engine: EnginePlan) -> None:
        """Make inputs of what stays in 16 bit and is to be outside of an engine: one copy for all engines, which LoRAs change."""
        kept_to_inputs(model, kept_inputs(self.plan, engine.precision == "plugin"))

    def close(self) -> None:
        """Remove the derived weights, unless the graphs that read them are kept."""
        for precision, store in self._stores.items():
            keep = self.options.keep_graphs or precision in self._kept
            if store.path is not None and not (keep and store.bytes_written):
                store.path.unlink(missing_ok=True)

    def _entry(self, engine: EnginePlan, report: BuildReport) -> EngineEntry:
        """Return the entry of a built engine for the manifest."""
        graph = graph_path(self.component, engine.act_bits, "tensorrt")
        shapes: dict[str, Any] = dict(self.sizes.to_json())
        return EngineEntry(
            path=engine.path(self.component),
            backend=engine.backend,
            sm=list(engine.sms),
            act_bits=engine.act_bits,
            precision=engine.precision,
            executes=engine.executes,
            onnx_sha256=self.hashes[graph],
            versions={engine.backend: report.version},
            shapes=shapes,
            attention=dict(report.attention),
            fused_layers=self.fused,
            version_compatible=is_compatible(engine.backend, self.options.version_compatible),
            kept_inputs=kept_inputs_bytes(self.plan, engine.precision == "plugin"),
        )


def lowered_path(component: str, engine: EnginePlan, fused: bool = False) -> str:
    """Return the path of the graph that the builder of an engine reads, relative to the export.

    The graph of an engine with FP8 attention, or with fused layers, has another name than that of one without.

    Args:
        component: The name of the transformer's folder.
        engine: The engine.
        fused: Whether layers are fused with what comes before them, which engines with the plugin alone can have.
    """
    form = "plugin" if engine.precision == "plugin" else f"rtx_{engine.precision}"
    form += "_fp8" if engine.attention == "fp8" else ""
    return f"onnx/{component}_a{engine.act_bits}_{form}{'_fused' if fused else ''}.onnx"


def run_builder(
    graph: Path,
    target: Path,
    *,
    backend: str,
    sms: Sequence[str],
    profile: Shapes | None,
    plugins: Sequence[Path],
    workspace_gib: float | None,
    timing_cache: Path | None,
    optimization_level: int | None,
    version_compatible: bool,
    data_root: Path,
    fp8_attentions: int,
    progress: Progress,
) -> BuildReport:
    """Build an engine from a graph as an export does, tell ``progress`` that the builder lives, and check its attention.

    Args:
        graph: The graph for the builder.
        target: The engine to write.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        sms: The compute capabilities that it is for.
        profile: Input name -> its (min, opt, max) shape; None if all sizes are fixed.
        plugins: The plugin libraries, which TensorRT alone loads.
        workspace_gib: The builder's workspace limit in GiB; None means its own default.
        timing_cache: A TensorRT timing cache to read and update.
        optimization_level: The builder's effort, 0 to 5; None means its own default.
        version_compatible: Whether TensorRT's lean runtime of the same release is to run the engine, too.
        data_root: The folder that the graph's weights may lie in.
        fp8_attentions: The number of attentions that the graph has in FP8.
        progress: The place that the build reports to.

    Raises:
        EngineError: The builder refuses, or fuses fewer attentions in FP8 than the graph has.
        OutputError: A file cannot be written.
        ResourceError: Disk or memory is full.
    """
    report = build_engine(
        graph,
        target,
        backend=backend,
        sms=sms,
        profile=profile,
        plugins=plugins if backend == "tensorrt" else (),
        workspace_bytes=int(workspace_gib * 2**30) if workspace_gib else None,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        data_roots=(data_root,),
        progress=progress.draws_bars,
        alive=functools.partial(progress.working, "engines", target.name),
    )
    check_attention(backend, fp8_attentions, report, target)
    return report


def check_attention(backend: str, wanted: int, report: BuildReport, target: Path) -> None:
    """Remove an engine of TensorRT-RTX in which fewer attentions are fused in FP8 than its graph has, and say so.

    TensorRT names its kernels otherwise, and its listing was never seen: what it lists is recorded alone.

    Args:
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        wanted: The number of attentions in FP8 of the graph.
        report: The builder's report.
        target: The engine.

    Raises:
        EngineError: There are fewer.
    """
    fused = report.attention.get("FP8", 0)
    if backend == "tensorrt_rtx" and fused < wanted:
        target.unlink(missing_ok=True)
        raise EngineError(
            f"{fused} of {wanted} attentions became one FP8 kernel",
            available=f"by type: {dict(report.attention)}",
            fix="use a recipe with attention 16 (--attention 16)",
        )


@dataclass(frozen=True)
class BuildSettings:
    """The settings that an engine of a given path depends on; an engine that was built with other ones is built again.

    Args:
        onnx_sha256: The SHA-256 of the QuantLinear graph that it was lowered from; the weights behind it are the same
            in one export.
        precision: The way in which its QuantLinear nodes run.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        version: The version of the builder. An engine loads only in the release that built it.
        optimization_level: The builder's effort, 0 to 5; None means its own default.
        workspace_gib: The builder's workspace limit in GiB; None means its own default.
        plugins: The SHA-256 of the plugin libraries that the builder loaded, in their order.
        fuse: Whether layers are fused with what comes before them.
        version_compatible: Whether TensorRT's lean runtime of the same release runs the engine, too.
        kept_inputs: The bytes of its inputs that are not quantized.
    """

    onnx_sha256: str
    precision: str
    backend: str
    version: str
    optimization_level: int | None
    workspace_gib: float | None
    plugins: tuple[str, ...]
    fuse: bool = False
    version_compatible: bool = False
    kept_inputs: int = 0

    @property
    def digest(self) -> str:
        """Return a short text that is the same for the same settings, for the name of a step."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def recorded(self) -> dict[str, Any]:
        """Return the settings that an engine's entry in the manifest holds besides its own fields."""
        return {
            "optimization_level": self.optimization_level,
            "workspace_gib": self.workspace_gib,
            "plugins": list(self.plugins),
        }

    def made(self, entry: Mapping[str, Any]) -> bool:
        """Return whether the engine of a manifest entry was built with these settings.

        Older exports lack these fields. They count as built with the builder's defaults, and with the same plugin
        libraries: a library that does not fit an engine is found out when the engine is loaded. They have nothing that is not
        quantized as an input, and are built again where this version shares it.

        Args:
            entry: The entry of the engine in a manifest.
        """
        return (
            entry["onnx_sha256"] == self.onnx_sha256
            and entry["precision"] == self.precision
            and entry["versions"].get(self.backend) == self.version
            and entry.get("optimization_level") == self.optimization_level
            and entry.get("workspace_gib") == self.workspace_gib
            and entry.get("plugins", list(self.plugins)) == list(self.plugins)
            and bool(entry.get("fused_layers")) == self.fuse
            and bool(entry.get("version_compatible")) == self.version_compatible
            and entry.get("kept_inputs", 0) == self.kept_inputs
        )


def build_settings(
    engine: EnginePlan,
    component: str,
    plan: ModelPlan,
    options: ExportOptions,
    hashes: Mapping[str, str],
    version: str,
) -> BuildSettings:
    """Return the settings that the options ask for.

    Args:
        engine: The engine to build.
        component: The name of the transformer's folder.
        plan: The plan of the model.
        options: The options of the export.
        hashes: Relative path -> SHA-256 of each graph.
        version: The version of the engine's builder.

    Raises:
        OutputError: A plugin library cannot be read.
    """
    plugins = options.plugins if engine.backend == "tensorrt" else ()
    return BuildSettings(
        hashes[graph_path(component, engine.act_bits, "tensorrt")],
        engine.precision,
        engine.backend,
        version,
        options.optimization_level,
        options.workspace_gib,
        tuple(hash_file(plugin)["sha256"] for plugin in plugins),
        fuses(engine, options),
        is_compatible(engine.backend, options.version_compatible),
        kept_inputs_bytes(plan, engine.precision == "plugin"),
    )


def fuse_layers(model: ir.Model) -> int:
    """Fuse the layers of a graph with what comes before them; return how many.

    Args:
        model: The graph with QuantLinear nodes, which is changed in place.

    Raises:
        EngineError: None can be fused.
    """
    fused = fuse_prologues(model)
    if not fused:
        raise EngineError(
            "no layer of the graph can be fused with what comes before it",
            available="rotations without an outer factor, and inputs that nothing else reads",
            fix="export without --fuse",
        )
    return fused


def fuses(engine: EnginePlan, options: ExportOptions) -> bool:
    """Return whether the layers of an engine are fused with what comes before them: --fuse, and the plugin runs them.

    Args:
        engine: The engine.
        options: The options of the export.
    """
    return options.fuse and engine.precision == "plugin"


def is_compatible(backend: str, asked: bool) -> bool:
    """Return whether an engine is built as version-compatible: it was asked for, and TensorRT builds it.

    Args:
        backend: The library that builds the engine.
        asked: Whether version-compatible engines were asked for.
    """
    return asked and backend == TENSORRT


def find_current(
    engine: EnginePlan, component: str, entries: Sequence[EngineEntry], settings: BuildSettings
) -> EngineEntry | None:
    """Return the entry of an engine that need not be rebuilt, or None.

    Such an engine is at the same path and was built with the same settings.

    Args:
        engine: The engine to build.
        component: The name of the transformer's folder.
        entries: The entries of the engines that are there.
        settings: The settings to build it with.
    """
    path = engine.path(component)
    return next((entry for entry in entries if entry["path"] == path and settings.made(entry)), None)
