"""The whole chain of ``dvdq-export``: checkpoint → packed weights → ONNX → engines, as one transaction."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from dvdquant.artifact.entries import BuildEntry, EngineEntry, GraphEntry, LayerEntry
from dvdquant.artifact.layout import constants_path, graph_path
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.transaction import ExportTransaction, require_disk
from dvdquant.artifact.verify_files import intact_files, verify_files
from dvdquant.checkpoint.lora.fuse import lora_lines
from dvdquant.checkpoint.read_once import ReadOnce
from dvdquant.errors import CheckpointError, ExportError, OutputError, ResourceError, UnsupportedError
from dvdquant.export.elsewhere import SCRIPT, build_entry, build_script, same_build
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.stage import (
    BuildSettings,
    EngineStage,
    build_settings,
    find_current,
    fuses,
)
from dvdquant.export.estimate import require_memory
from dvdquant.export.graph.trace import trace_graph
from dvdquant.export.graph.writer import FLAVOURS, GraphWriter
from dvdquant.export.layouts.comfy import comfy_path, write_comfy
from dvdquant.export.model_card import model_card
from dvdquant.export.passes.lowering.modelopt_hooks import check_nvfp4
from dvdquant.export.plan import ExportPlan, check_previous, source_of
from dvdquant.export.recorded import graph_tools, lora_entries, recorded_manifest
from dvdquant.export.result import ExportResult, WriteReport
from dvdquant.export.source_text import source_lines
from dvdquant.export.steps import is_step
from dvdquant.export.verify.export import verify_export
from dvdquant.export.verify.graph import GraphCheck
from dvdquant.export.verify.links import check_links
from dvdquant.export.verify.stored import StoredCheck, verify_stored
from dvdquant.model.plan import ModelPlan
from dvdquant.quantize.checkpoint import PackedWeights, plan_shards, quantize_checkpoint
from dvdquant.quantize.layer import rotated_weight
from dvdquant.system.files import FileEntry, hash_file
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header, read_tensor, stored_reader

__all__ = ["run_export"]


def run_export(plan: ExportPlan, progress: Progress, write_report: WriteReport | None = None) -> ExportResult:
    """Carry out a plan; the output folder then holds all of the new export, or what it held before.

    Args:
        plan: The plan of the export.
        progress: The place that stages report to.
        write_report: The writer of the report, needed where the options ask for one.

    Raises:
        UnsupportedError: The options ask for a report, and there is no writer; or modelopt cannot pack NVFP4 weights.
        ResourceError: Disk or memory is too small or gets full.
        DvdquantError: The export failed in another way. The output folder is as it was. Finished steps are kept for
            ``--resume``, unless the checkpoint is at fault.
    """
    # 1. Check what can fail before the work.
    options = plan.options
    if options.report and write_report is None:
        raise UnsupportedError(
            "a report was asked for without its writer", fix="use dvdquant.export_model, which has it"
        )
    require_memory(plan.estimate, plan.plans, plan.engines)
    require_disk(options.out, plan.estimate.disk_bytes, "the export")
    if plan.makes_nvfp4:
        check_nvfp4()
    with ExportTransaction(
        options.out, key=plan.key, resume=options.resume, keep_for_resume=True, accept=is_step
    ) as transaction:
        check_previous(plan, transaction.previous)  # again: another export may have finished since the plan
        run = _Run(plan, transaction, progress, write_report)
        for line in lora_lines(plan.components, plan.checkpoints):
            progress.say(line)
        for component, checkpoint, model_plan in zip(plan.components, plan.checkpoints, plan.plans):
            for line in source_lines(component, checkpoint, model_plan.family):
                progress.say(line)
        # 2. Use the weights and graphs that are there, or make them.
        if options.resume and not (transaction.resumed or transaction.complete):
            progress.say(f"nothing to resume in {options.out}, starting from the beginning")
        if transaction.complete and transaction.previous is not None and run.adopt(transaction.previous):
            progress.say(f"weights and graphs in {options.out} are up to date")
            previous = transaction.previous
            same = (previous.lora, previous.sampling, previous.source.get("pipeline")) == (
                lora_entries(plan),
                options.sampling,
                source_of(plan).get("pipeline"),
            )
            missing = run.missing_engines() or run.missing_builds() or run.missing_layouts()
            if not (missing or options.verify or options.report) and same:
                return ExportResult(options.out, transaction.previous, up_to_date=True)
        else:
            try:
                run.weights_and_graphs()
            except CheckpointError:
                transaction.keep_for_resume = False  # going on with the same weights would fail in the same place
                raise
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{options.torch_device} has no memory left for a layer: {str(error).splitlines()[0]:.200}",
                    fix="free the GPU's memory, or use --device cpu",
                ) from error
        # 3. Verify, build the engines, and put the export in place.
        if options.verify:
            run.verify_stored()  # before the engines: nothing is built from weights that are not the checkpoint's
            run.verify_graphs()
        run.build_engines()
        run.prepare_builds()
        run.write_layouts()
        checks = run.verify() if options.verify else []
        manifest = run.commit(checks)
    return ExportResult(options.out, manifest, checks, run.stored, progress.seconds, run.builds)


class _Run:
    """The stages of one export, and the results that they leave for each other.

    Args:
        plan: The plan of the export.
        transaction: The transaction of the output folder, entered.
        progress: The place that stages report to.
        write_report: The writer of the report, or None.

    Attributes:
        known: Relative path -> size and SHA-256 of the files that are finished.
        packed: The weight files that this run wrote, by component; empty where those of the previous export are used.
        weights: The checkpoints with the tensors that are held in memory, by component.
        graphs: The entries of the graphs.
        engines: The entries of the engines.
        later: The entries of the engines that are left to the machine that they are for.
        builds: The path and the report of every engine that this run built or resumed.
        stored: The comparisons with the checkpoints.
        previous: The manifest of the export whose weights and graphs are used, or None.
    """

    def __init__(
        self,
        plan: ExportPlan,
        transaction: ExportTransaction,
        progress: Progress,
        write_report: WriteReport | None = None,
    ) -> None:
        self.plan, self.transaction, self.progress = plan, transaction, progress
        self.write_report = write_report
        self.known: dict[str, FileEntry] = {}
        self.packed: dict[str, PackedWeights] = {}
        self.weights: dict[str, ReadOnce] = {}
        self.graphs: list[GraphEntry] = []
        self.engines: list[EngineEntry] = []
        self.later: list[BuildEntry] = []
        self.builds: list[dict[str, Any]] = []
        self.stored: list[StoredCheck] = []
        self.previous: Manifest | None = None
        self._traced: list[tuple[ModelPlan, ir.Model]] = []

    # ---------------------------------------------------------------------------------------------- reuse

    def adopt(self, previous: Manifest) -> bool:
        """Put the files of the previous export into the new tree; damaged engines are left out, to be built again.

        Args:
            previous: The manifest of the previous export.

        Returns:
            False if a weight file or a graph is damaged. Then nothing is put into the tree.
        """
        out = self.transaction.out
        tops = ("onnx/", "engines/", "comfy/")
        weights, engines, layouts = ([n for n in previous.files if n.startswith(top)] for top in tops)
        total = sum(previous.files[name]["bytes"] for name in (*weights, *engines, *layouts))
        with self.progress.stage("check", total, "B") as stage:
            try:
                verify_files(out, previous, weights, stage.update)
            except OutputError as error:
                self.progress.say(f"the previous export is damaged and is made again: {error.what}")
                return False

            def damaged(name: str, error: OutputError) -> None:
                what = "an engine is damaged and is built again" if name in engines else "left out"
                self.progress.say(f"{what}: {error.what}")

            good = [*weights, *intact_files(out, previous, (*engines, *layouts), stage.update, damaged)]
        for name in good:
            self.transaction.take_over(name)
            self.known[name] = previous.files[name]
        self.previous = previous
        self.graphs = list(previous.graphs)
        self.engines = [entry for entry in previous.engines if entry["path"] in self.known]
        self.later = list(previous.builds)
        return True

    def missing_engines(self) -> list[tuple[str, EnginePlan]]:
        """Return (component, engine) of every planned engine that is not there in its present form."""
        missing = []
        for component in self.plan.components:
            for engine in self.plan.engines:
                if find_current(engine, component, self.engines, self._settings(component, engine)) is None:
                    missing.append((component, engine))
        return missing

    def _settings(self, component: str, engine: EnginePlan) -> BuildSettings:
        """Return the settings that an engine of this export is built with."""
        hashes = {name: entry["sha256"] for name, entry in self.known.items()}
        plan = self.plan.plans[self.plan.components.index(component)]
        return build_settings(engine, component, plan, self.plan.options, hashes, self.plan.versions[engine.backend])

    # ---------------------------------------------------------------------------------------------- weights, graphs

    def weights_and_graphs(self) -> None:
        """Trace, quantize and write the graphs of every transformer.

        Tracing is first, because it fails in seconds if it fails.

        Raises:
            CheckpointError: A tensor of a checkpoint cannot be used.
            ExportError: A model cannot be traced, or its graphs cannot be written.
            OutputError: A file cannot be written.
            ResourceError: Disk or memory is full.
        """
        plan, options = self.plan, self.plan.options
        flavours = [name for name in FLAVOURS if name == "tensorrt" or "onnx" in options.targets]
        for component, checkpoint, model_plan in zip(plan.components, plan.checkpoints, plan.plans):
            with self.progress.stage("trace", 1, "graph") as stage:
                base = self._base(model_plan)
                stage.update(1, component)
            weights = self.weights[component] = ReadOnce.of(checkpoint, self._room())
            packed = quantize_checkpoint(
                weights,
                model_plan,
                self.transaction,
                self.progress,
                component,
                options.allow_nonfinite,
                options.torch_device,
            )
            if not plan.makes_nvfp4:
                weights.forget()  # only NVFP4 is made from the original weights
            self.packed[component] = packed
            self.known |= packed.files
            bits = [a.bits for a in options.recipe.activations]
            writer = GraphWriter(self.transaction.tree, model_plan, component, base, packed.tensors)
            with self.progress.stage("graphs", len(bits) * len(flavours), "graph") as stage:
                for width in bits:
                    for flavour in flavours:
                        entry = writer.write(width, flavour)
                        self.graphs.append(entry)
                        self.known[entry["path"]] = hash_file(self.transaction.tree / entry["path"])
                        stage.update(1, entry["path"])
        self._traced.clear()

    def _base(self, plan: ModelPlan) -> ir.Model:
        """Return the traced graph of a transformer, for its writer to change; a graph that several have is traced once.

        Args:
            plan: The plan of the transformer.

        Raises:
            ExportError: The transformer cannot be traced.
        """
        traced = next((graph for other, graph in self._traced if plan.same_graph(other)), None)
        if traced is None:
            traced = trace_graph(plan, self.plan.sizes)
            self._traced.append((plan, traced))
        return traced.clone()

    def _room(self) -> int:
        """Return the bytes of one more checkpoint that may be held, as the estimate counted them."""
        return self.plan.estimate.held_bytes - sum(weights.held_bytes for weights in self.weights.values())

    # ---------------------------------------------------------------------------------------------- engines

    def build_engines(self) -> None:
        """Build the engines that are missing.

        Raises:
            EngineError: The builder fails.
            ExportError: A graph cannot be lowered for an engine.
            OutputError: A file cannot be written.
            ResourceError: Disk or memory is full.
        """
        missing = self.missing_engines()
        if not missing:
            return
        # Their graphs are written again now, and removed when the engines are built.
        here = {(component, engine.backend) for component, engine in missing}
        self.later = [entry for entry in self.later if (entry["component"], entry["backend"]) not in here]
        with self.progress.stage("engines", len(missing), "engine") as bar:
            for component in self.plan.components:
                wanted = [engine for name, engine in missing if name == component]
                stage = self._engine_stage(component)
                try:
                    for engine in wanted:
                        bar.update(0, engine.path(component))
                        self._build(stage, component, engine)
                        bar.update(1)
                finally:
                    stage.close()
                    if component in self.weights:
                        self.weights[component].forget()

    def missing_builds(self) -> list[tuple[str, EnginePlan]]:
        """Return (component, engine) of every engine for another machine whose graph is not there in its present form."""
        missing = []
        for index, component in enumerate(self.plan.components):
            for engine in self.plan.later:
                path = engine.path(component)
                there = next((entry for entry in self.later if entry["engine"] == path), None)
                wanted = int(fuses(engine, self.plan.options))
                if there is None or not same_build(there, self._build_entry(index, engine, there["graph"], 0, wanted)):
                    missing.append((component, engine))
        return missing

    def _build_entry(
        self, index: int, engine: EnginePlan, graph: str, fp8_attentions: int, fused_layers: int
    ) -> BuildEntry:
        """Return what the manifest says of an engine for another machine; ``index`` is that of its transformer."""
        plan = self.plan
        hashes = {name: entry["sha256"] for name, entry in self.known.items()}
        component, model_plan = plan.components[index], plan.plans[index]
        return build_entry(
            component, engine, graph, model_plan, plan.sizes, plan.options, hashes, fp8_attentions, fused_layers
        )

    def prepare_builds(self) -> None:
        """Write the graphs of the engines that are built elsewhere, and record what their builders need to know.

        Raises:
            ExportError: A graph cannot be lowered for an engine.
            OutputError: A file cannot be written.
            ResourceError: Disk or memory is full.
        """
        missing = self.missing_builds()
        for index, component in enumerate(self.plan.components):
            wanted = [engine for name, engine in missing if name == component]
            if not wanted:
                continue
            stage = self._engine_stage(component)
            with self.progress.stage("builds", len(wanted), "graph") as bar:
                try:
                    for engine in wanted:
                        graph, attentions = stage.prepare(engine)
                        entry = self._build_entry(index, engine, graph, attentions, stage.fused)
                        self.later = [e for e in self.later if e["engine"] != entry["engine"]] + [entry]
                        bar.update(1, graph)
                finally:
                    stage.close()
            # What was written again has another hash.
            kept = {graph["path"] for graph in self.graphs} | set(map(constants_path, self.plan.components))
            for name in [name for name in self.known if name.endswith((".bin", ".onnx"))]:
                if name not in kept:
                    self.known.pop(name)

    def _engine_stage(self, component: str) -> EngineStage:
        """Return the builder of the engines of one transformer."""
        index = self.plan.components.index(component)
        model_plan, checkpoint = self.plan.plans[index], self.weights.get(component, self.plan.checkpoints[index])
        specs = {spec.name: spec for spec in model_plan.layers}

        def source(layer: str) -> Tensor:
            """Return the rotated weight of a layer from the checkpoint, fp32 [N, K].

            A smoothed layer needs the stored smooth scale of its channels.
            """
            if not specs[layer].smoothed:
                return rotated_weight(checkpoint, specs[layer])
            relative, info = self._tensors(component)[f"{layer}.pre_quant_scale"]
            return rotated_weight(checkpoint, specs[layer], read_tensor(self.transaction.tree / relative, info))

        hashes = {name: entry["sha256"] for name, entry in self.known.items()}
        return EngineStage(
            self.transaction.tree,
            model_plan,
            self.plan.sizes,
            component,
            self.plan.options,
            self.progress,
            hashes,
            source,
        )

    def _build(self, stage: EngineStage, component: str, engine: EnginePlan) -> None:
        """Build one engine as a step of the transaction, and record its entry; a step that is done is not repeated."""
        relative = engine.path(component)
        settings = self._settings(component, engine)
        step = f"engine:{relative}:{settings.digest}"
        if not self.transaction.is_done(step) or not (self.transaction.tree / relative).exists():
            (self.transaction.tree / relative).unlink(missing_ok=True)
            entry, report = stage.build(engine)
            data = {"entry": {**entry, **settings.recorded()}, "report": report.to_json()}
            self.transaction.done(step, data, [relative])
        data = self.transaction.data(step)
        self.engines = [e for e in self.engines if e["path"] != relative] + [data["entry"]]
        self.known.pop(relative, None)
        self.builds.append({"path": relative, **data["report"]})

    # ---------------------------------------------------------------------------------------------- layouts of others

    def missing_layouts(self) -> list[tuple[int, str, str]]:
        """Return (index of the transformer, layout, path) of every file for other programs that is not there."""
        wanted = [
            (index, layout, comfy_path(component, layout))
            for index, component in enumerate(self.plan.components)
            for layout in self.plan.options.also_write
        ]
        return [(index, layout, path) for index, layout, path in wanted if path not in self.known]

    def write_layouts(self) -> None:
        """Write the weights for other programs, from what is stored.

        Raises:
            OutputError: A file cannot be written.
            ResourceError: The disk is full.
        """
        missing = self.missing_layouts()
        if not missing:
            return
        total = sum(self.plan.plans[index].quantized_weights for index, _, _ in missing)
        with self.progress.stage("layouts", total, "weights") as stage:
            for index, layout, relative in missing:
                read = stored_reader(self.transaction.tree, self._tensors(self.plan.components[index]))
                path = self.transaction.path(relative)
                self.known[relative] = write_comfy(path, self.plan.plans[index], layout, read, stage.update)

    # ---------------------------------------------------------------------------------------------- the end

    def verify_stored(self) -> None:
        """Compare all that is stored with the checkpoints, which are read from the disk again for that.

        What the stages before held in memory is no evidence: a fault of theirs could have changed it.

        Raises:
            ExportError: A layer or a tensor is not what it should be.
        """
        entries, first = self._layers(), 0
        plans = self.plan.plans
        kept = sum(math.prod(shape) for plan in plans for _, shape in plan.kept.values())
        total = kept + sum(plan.quantized_weights for plan in plans)
        with self.progress.stage("compare", total, "weights") as stage:
            for component, checkpoint, plan in zip(self.plan.components, self.plan.checkpoints, self.plan.plans):
                mine = entries[first : first + len(plan.layers)]
                first += len(plan.layers)
                check = verify_stored(
                    component,
                    self.transaction.tree,
                    checkpoint,
                    plan,
                    self._tensors(component),
                    mine,
                    self.plan.options.allow_nonfinite,
                    stage.update,
                )
                self.stored.append(check)

    def verify_graphs(self) -> None:
        """Check graphs of a previous export: they must read the stored weights, and be what this version writes.

        Raises:
            OutputError: The files do not fit together.
            ExportError: A graph is another one.
        """
        previous, tree = self.previous, self.transaction.tree
        if previous is None:
            return
        # 1. The files fit together.
        plan, now = self.plan, graph_tools()
        check_links(tree, previous.files, self.graphs, self.engines, plan.components, previous.layers)
        # 2. Other versions of the tools write other graphs, which cannot be compared byte by byte.
        other = [name for name, version in now.items() if previous.tools.get(name, version) != version]
        if other:
            self.progress.say(
                f"the graphs were written with another {', '.join(other)}: they are judged by what they compute alone"
            )
            return
        # 3. Write the graphs again, and compare their hashes.
        for component, model_plan in zip(plan.components, plan.plans):
            with self.progress.stage("trace", 1, "graph") as stage:
                base = self._base(model_plan)
                stage.update(1, component)
            own = [g for g in self.graphs if g["path"] == graph_path(component, g["act_bits"], g["target"])]
            names = [*(graph["path"] for graph in own), constants_path(component)]
            for name in names:
                (tree / name).unlink(missing_ok=True)
            writer = GraphWriter(tree, model_plan, component, base, self._tensors(component))
            for graph in own:
                writer.write(graph["act_bits"], graph["target"])
            for name in names:
                written = hash_file(tree / name) if (tree / name).exists() else None
                if written != self.known.get(name):
                    raise ExportError(
                        f"{name} is not what this version of dvdquant writes for {plan.options.model}",
                        fix="remove the output folder and export again",
                    )
        self._traced.clear()

    def verify(self) -> list[GraphCheck]:
        """Run every graph in ONNX Runtime, and judge it.

        Raises:
            ExportError: A graph is out of bounds.
        """
        plans = dict(zip(self.plan.components, self.plan.plans))
        tree, sizes = self.transaction.tree, self.plan.sizes
        engines = (*self.plan.engines, *self.plan.later)
        changes = {(engine.attention == "fp8", fuses(engine, self.plan.options)) for engine in engines}
        return verify_export(tree, plans, self.graphs, self._tensors, self._layers(), sizes, self.progress, changes)

    def _layers(self) -> tuple[LayerEntry, ...]:
        """Return the table of weight errors: that of the previous export if its weights are used, else this run's."""
        if self.previous is not None:
            return self.previous.layers
        return tuple(entry for packed in self.packed.values() for entry in packed.layers)

    def _tensors(self, component: str) -> dict[str, Any]:
        """Return the places of a component's packed tensors: name -> (weight file relative to the tree, place)."""
        if component in self.packed:
            return dict(self.packed[component].tensors)
        plan = self.plan.plans[self.plan.components.index(component)]
        return {
            name: (relative, info)
            for relative in plan_shards(plan, component)
            for name, info in read_header(self.transaction.tree / relative).tensors.items()
        }

    def commit(self, checks: list[GraphCheck]) -> Manifest:
        """Write config, card and report, hash the tree, put the export in place, and return its manifest.

        Args:
            checks: The checks of the graphs, for the report.

        Raises:
            OutputError: A file cannot be written.
            ResourceError: The disk is full.
        """
        plan, tree = self.plan, self.transaction.tree
        self._drop_other_engines()
        for component, checkpoint in zip(plan.components, plan.checkpoints):
            name = "config.json" if component == plan.components[0] else f"{component}.config.json"
            (tree / name).write_text(json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        manifest = recorded_manifest(
            plan,
            tree,
            layers=self._layers(),
            nonfinite=[name for packed in self.packed.values() for name in packed.nonfinite],
            graphs=self.graphs,
            engines=self.engines,
            later=self.later,
            stored=self.stored,
            previous=self.previous,
        )
        (tree / "README.md").write_text(model_card(manifest), encoding="utf-8")
        if (script := build_script(manifest.builds)) is not None:
            (tree / SCRIPT).write_text(script, encoding="utf-8")
        if self.write_report is not None and plan.options.report:
            self.write_report(
                tree,
                manifest,
                self.known,
                checks=[check.to_json() for check in checks],
                out=plan.options.out,
                samples=plan.options.samples,
                checkpoint_bytes=plan.estimate.source_bytes,
                progress=self.progress,
            )
        return self.transaction.commit(manifest, self.known)

    def _drop_other_engines(self) -> None:
        """Delete the engines of an interrupted run that this run, which resumed it, was not asked for."""
        tree, wanted = self.transaction.tree, {entry["path"] for entry in self.engines}
        for path in sorted(tree.glob("engines/*/*")):
            if path.relative_to(tree).as_posix() not in wanted:
                # A builder that was killed leaves its folder of scratch files.
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                with contextlib.suppress(OSError):  # others are left there
                    path.parent.rmdir()
