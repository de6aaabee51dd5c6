"""The whole chain of ``dvdq-export``: checkpoint → packed weights → ONNX → engines, as one transaction."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dvdquant import __version__
from dvdquant.artifact.manifest import (
    EngineEntry,
    FileEntry,
    GraphEntry,
    LayerEntry,
    Manifest,
    Source,
    Verified,
    hash_file,
    verify_files,
)
from dvdquant.artifact.output_folder import check_output
from dvdquant.artifact.transaction import ExportTransaction, require_disk
from dvdquant.checkpoint.pipeline_facts import with_pipeline_facts
from dvdquant.checkpoint.read_once import ReadOnce
from dvdquant.checkpoint.reader import Checkpoint, open_checkpoint
from dvdquant.errors import CheckpointError, EngineError, ExportError, OutputError, ResourceError, UnsupportedError
from dvdquant.export.engines import load_backend
from dvdquant.export.engines.attention import attention_wish
from dvdquant.export.engines.precision import EnginePlan, check_sms, plan_engines
from dvdquant.export.engines.stage import BuildSettings, EngineStage, build_settings, engine_path, find_current
from dvdquant.export.estimate import Estimate, estimate_export, require_memory
from dvdquant.export.graph.trace import trace_graph
from dvdquant.export.graph.writer import FLAVOURS, GraphWriter
from dvdquant.export.model_card import model_card
from dvdquant.export.options import ExportOptions, check_text, recorded_model, resolve_sizes, with_table_defaults
from dvdquant.export.steps import is_step
from dvdquant.export.verify.export import verify_export
from dvdquant.export.verify.graph import GraphCheck
from dvdquant.export.verify.links import check_links
from dvdquant.export.verify.stored import StoredCheck, verify_stored
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.quantize.checkpoint import (
    PackedWeights,
    check_weights,
    quantize_checkpoint,
    reading_bytes,
    rotated_weight,
)
from dvdquant.system.copies import copy_file, link_file
from dvdquant.system.memory import memory_limit
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_io import read_tensor

__all__ = ["ExportPlan", "ExportResult", "plan_export", "run_export"]


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do, decided before anything is written.

    Args:
        checkpoints, plans: one per transformer, in the order of ``components``.
        engines: those built for each transformer.
        versions: of each engine builder that is needed.
    """

    options: ExportOptions
    components: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    plans: tuple[ModelPlan, ...]
    sizes: Sizes
    engines: tuple[EnginePlan, ...]
    versions: dict[str, str]
    estimate: Estimate

    @property
    def key(self) -> dict[str, Any]:
        """What weights and graphs depend on; engines are matched one by one."""
        options = self.options
        return {
            "checkpoints": [c.fingerprint() for c in self.checkpoints],
            "components": list(self.components),
            "recipe": options.recipe.to_json(),
            # What the recipe came to, which another version of its rules may decide otherwise.
            "layers": [[[s.name, s.rotation.block, s.groups] for s in plan.layers] for plan in self.plans],
            "dtype": options.dtype,
            "sizes": self.sizes.to_json(),
            "qdq_graphs": "onnx" in options.targets,
            "allow_nonfinite": options.allow_nonfinite,
            "device": options.torch_device.type,  # codes at rounding ties depend on the order of sums
            "dvdquant": __version__,
        }


@dataclass
class ExportResult:
    """What came out: the manifest, the checks of ``--verify`` (of graphs, and of what is stored), seconds per stage, and
    whether anything was done.
    """

    out: Path
    manifest: Manifest
    checks: list[GraphCheck] = field(default_factory=list)
    stored: list[StoredCheck] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    builds: list[dict[str, Any]] = field(default_factory=list)
    up_to_date: bool = False


def plan_export(options: ExportOptions) -> ExportPlan:
    """Open the checkpoint, decide layers, sizes and engines, and estimate; writes nothing.

    Raises:
        DvdquantError: whatever would make the export fail later and can be known now.
    """
    check_sms(options.sms)
    check_text(options)
    names = (
        [options.subfolder] if options.subfolder else Checkpoint.components(options.model, revision=options.revision)
    )
    components = tuple(name.rpartition("/")[2] for name in names)
    opened = []
    for name in components:
        arguments: dict[str, Any] = {"revision": options.revision}
        arguments |= {"subfolder": options.subfolder} if options.subfolder else {"component": name}
        opened.append(with_pipeline_facts(open_checkpoint(options.model, **arguments)))
    plans = []
    for checkpoint in opened:
        plan = plan_model(checkpoint.config, options.recipe, options.torch_dtype, checkpoint)
        check_weights(checkpoint, plan)
        if not plan.layers:
            raise UnsupportedError(
                "no layer is left to quantize", available=list(plan.kept_linears)[:5], fix="give fewer --keep globs"
            )
        plans.append(plan)
    sizes = resolve_sizes(plans[0].family, with_table_defaults(options))
    for plan in plans[1:]:
        plan.family.check(sizes)
    engines: list[EnginePlan] = []
    versions = {}
    for backend in options.backends:
        engines += plan_engines(
            backend,
            options.sms,
            options.recipe.activations,
            recipe=options.recipe,
            override=options.precision if backend == "tensorrt_rtx" else "auto",
            from_checkpoint=True,
            attention=attention_wish(options.recipe, plans[0].family, sizes),
        )
        versions[backend] = load_backend(backend).version
    if any(e.precision == "plugin" for e in engines) and not options.plugins:
        raise EngineError(
            "the tensorrt target needs the dvdquant plugin library, and --plugin was not given",
            fix="pass the built library with --plugin, or use --target rtx, or --target onnx for graphs alone",
        )
    check_output(options.out)
    largest = max(reading_bytes(info) for c in opened for info in c.tensors.values())
    estimate = estimate_export(plans, engines, options, sum(c.nbytes for c in opened), largest)
    return ExportPlan(options, components, tuple(opened), tuple(plans), sizes, tuple(engines), versions, estimate)


class WriteReport(Protocol):
    """Writes ``report.html`` into the tree of an unfinished export; :func:`dvdquant.deploy.report.page.add_report` is one.

    The report draws clips, which needs the runtime; so it is given to the exporter, which knows none.
    """

    def __call__(
        self,
        tree: Path,
        manifest: Manifest,
        known: dict[str, FileEntry],
        *,
        checks: Sequence[Mapping[str, Any]],
        out: Path,
        samples: int | None,
        checkpoint_bytes: int,
        progress: Progress,
    ) -> None: ...


def run_export(plan: ExportPlan, progress: Progress, write_report: WriteReport | None = None) -> ExportResult:
    """Carry out ``plan``; the output folder holds all of the new export, or what it held before.

    Args:
        write_report: needed where the options ask for a report.

    Raises:
        DvdquantError: with the output folder as it was (and, for finished layers, work kept for ``--resume``).
    """
    options = plan.options
    if options.report and write_report is None:
        raise UnsupportedError(
            "a report was asked for without its writer", fix="use dvdquant.export_model, which has it"
        )
    require_memory(plan.estimate, plan.plans, plan.engines)
    require_disk(options.out, plan.estimate.disk_bytes, "the export")
    with ExportTransaction(
        options.out, key=plan.key, resume=options.resume, keep_for_resume=True, accept=is_step
    ) as transaction:
        run = _Run(plan, transaction, progress, write_report)
        if options.resume and not (transaction.resumed or transaction.complete):
            progress.say(f"nothing to resume in {options.out}, starting from the beginning")
        if transaction.complete and transaction.previous is not None and run.adopt(transaction.previous):
            progress.say(f"weights and graphs in {options.out} are up to date")
            if not (run.missing_engines() or options.verify or options.report):
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
        if options.verify:
            run.verify_stored()  # before the engines: nothing is built from weights that are not the checkpoint's
            run.verify_graphs()
        run.build_engines()
        checks = run.verify() if options.verify else []
        manifest = run.commit(checks)
    return ExportResult(options.out, manifest, checks, run.stored, progress.seconds, run.builds)


class _Run:
    """The stages of one export and what they leave for each other."""

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
        self.builds: list[dict[str, Any]] = []
        self.stored: list[StoredCheck] = []
        self.previous: Manifest | None = None

    # ---------------------------------------------------------------------------------------------- reuse

    def adopt(self, previous: Manifest) -> bool:
        """Link the previous export's files into the new tree, but for damaged engines, which are then built again;
        False when a weight file or graph is damaged.
        """
        out = self.transaction.out
        weights, engines = ([n for n in previous.files if n.startswith(top)] for top in ("onnx/", "engines/"))
        total = sum(previous.files[name]["bytes"] for name in (*weights, *engines))
        good = list(weights)
        with self.progress.stage("check", total, "B") as stage:
            try:
                verify_files(out, previous, weights, stage.update)
            except OutputError as error:
                self.progress.say(f"the previous export is damaged and is made again: {error.what}")
                return False
            for name in engines:
                try:
                    verify_files(out, previous, [name], stage.update)
                    good.append(name)
                except OutputError as error:
                    self.progress.say(f"an engine is damaged and is built again: {error.what}")
        for name in good:
            # Readers of external data refuse files with several links, so graphs and weights are copied.
            (copy_file if name in weights else link_file)(out / name, self.transaction.path(name))
            self.known[name] = previous.files[name]
        self.previous = previous
        self.graphs = list(previous.graphs)
        self.engines = [entry for entry in previous.engines if entry["path"] in self.known]
        return True

    def missing_engines(self) -> list[tuple[str, EnginePlan]]:
        """(component, engine) of every engine that is not there in its present form."""
        missing = []
        for component in self.plan.components:
            for engine in self.plan.engines:
                if find_current(engine, component, self.engines, self._settings(component, engine)) is None:
                    missing.append((component, engine))
        return missing

    def _settings(self, component: str, engine: EnginePlan) -> BuildSettings:
        hashes = {name: entry["sha256"] for name, entry in self.known.items()}
        return build_settings(engine, component, self.plan.options, hashes, self.plan.versions[engine.backend])

    # ---------------------------------------------------------------------------------------------- weights, graphs

    def weights_and_graphs(self) -> None:
        """Trace first (it fails in seconds where it fails), quantize, write the graphs."""
        plan, options = self.plan, self.plan.options
        flavours = [name for name in FLAVOURS if name == "tensorrt" or "onnx" in options.targets]
        for component, checkpoint, model_plan in zip(plan.components, plan.checkpoints, plan.plans):
            with self.progress.stage("trace", 1, "graph") as stage:
                base = trace_graph(model_plan, plan.sizes)
                stage.update(1, component)
            weights = self.weights[component] = ReadOnce.of(checkpoint, self._budget())
            packed = quantize_checkpoint(
                weights,
                model_plan,
                self.transaction,
                self.progress,
                component,
                options.allow_nonfinite,
                options.torch_device,
            )
            if not any(engine.precision == "nvfp4" for engine in plan.engines):
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

    def _budget(self) -> int:
        """Return the bytes of checkpoint that may be held: half of what is free beyond the estimate of the export itself.

        The other half is for what the estimate missed and for other processes.
        """
        return max(0, memory_limit() - self.plan.estimate.peak_bytes) // 2

    # ---------------------------------------------------------------------------------------------- engines

    def build_engines(self) -> None:
        """Build what is missing."""
        missing = self.missing_engines()
        if not missing:
            return
        with self.progress.stage("engines", len(missing), "engine") as bar:
            for component in self.plan.components:
                wanted = [engine for name, engine in missing if name == component]
                stage = self._engine_stage(component)
                try:
                    for engine in wanted:
                        bar.update(0, engine_path(component, engine))
                        self._build(stage, component, engine)
                        bar.update(1)
                finally:
                    stage.close()
                    if component in self.weights:
                        self.weights[component].forget()

    def _engine_stage(self, component: str) -> EngineStage:
        index = self.plan.components.index(component)
        model_plan, checkpoint = self.plan.plans[index], self.weights.get(component, self.plan.checkpoints[index])
        specs = {spec.name: spec for spec in model_plan.layers}

        def source(layer: str) -> Tensor:
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
        relative = engine_path(component, engine)
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
        """Of graphs that were there before: that they read the stored weights, and are what this version writes.

        Raises:
            OutputError: files do not fit together. ExportError: a graph is another one.
        """
        previous, tree = self.previous, self.transaction.tree
        if previous is None:
            return
        plan, now = self.plan, self._tools()
        check_links(tree, previous.files, self.graphs, self.engines, plan.components, previous.layers)
        other = [name for name, version in now.items() if previous.tools.get(name, version) != version]
        if other:
            self.progress.say(
                f"the graphs were written with another {', '.join(other)}: they are judged by what they compute alone"
            )
            return
        for component, model_plan in zip(plan.components, plan.plans):
            with self.progress.stage("trace", 1, "graph") as stage:
                base = trace_graph(model_plan, plan.sizes)
                stage.update(1, component)
            own = [graph for graph in self.graphs if Path(graph["path"]).name.startswith(f"{component}_a")]
            names = [*(graph["path"] for graph in own), f"onnx/{component}.constants.bin"]
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

    def verify(self) -> list[GraphCheck]:
        """Every graph in ONNX Runtime; ExportError if one is out of bounds."""
        plans = dict(zip(self.plan.components, self.plan.plans))
        tree, sizes = self.transaction.tree, self.plan.sizes
        fp8 = any(engine.attention == "fp8" for engine in self.plan.engines)
        return verify_export(tree, plans, self.graphs, self._tensors, self._layers(), sizes, self.progress, fp8)

    def _layers(self) -> tuple[LayerEntry, ...]:
        """Return the table of weight errors."""
        if self.previous is not None:
            return self.previous.layers
        return tuple(entry for packed in self.packed.values() for entry in packed.layers)

    def _tensors(self, component: str) -> dict[str, Any]:
        if component in self.packed:
            return dict(self.packed[component].tensors)
        from dvdquant.quantize.checkpoint import plan_shards
        from dvdquant.system.safetensors_io import read_header

        plan = self.plan.plans[self.plan.components.index(component)]
        return {
            name: (relative, info)
            for relative in plan_shards(plan, component)
            for name, info in read_header(self.transaction.tree / relative).tensors.items()
        }

    def commit(self, checks: list[GraphCheck]) -> Manifest:
        """Write config, card and report, hash, and put the export in place."""
        plan, tree = self.plan, self.transaction.tree
        self._drop_other_engines()
        for component, checkpoint in zip(plan.components, plan.checkpoints):
            name = "config.json" if component == plan.components[0] else f"{component}.config.json"
            (tree / name).write_text(json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        manifest = self._manifest()
        (tree / "README.md").write_text(model_card(manifest), encoding="utf-8")
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
        """Delete the engines of an interrupted run that this one, which resumed it, was not asked for."""
        tree, wanted = self.transaction.tree, {entry["path"] for entry in self.engines}
        for path in sorted(tree.glob("engines/*/*")):
            if path.relative_to(tree).as_posix() not in wanted:
                # A builder that was killed leaves its folder of scratch files.
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                with contextlib.suppress(OSError):  # others are left there
                    path.parent.rmdir()

    def _manifest(self) -> Manifest:
        plan, first, model = self.plan, self.plan.checkpoints[0], recorded_model(self.plan.options.model)
        nonfinite = tuple(name for packed in self.packed.values() for name in packed.nonfinite)
        if self.previous is not None:
            nonfinite = self.previous.nonfinite
        kept = [name for model_plan in plan.plans for name in model_plan.kept_linears]
        tools = {**self._tools(), **_versions("onnxruntime-gpu", "onnxruntime")}
        tools["device"] = _device_name(plan.options.torch_device)
        if self.previous is not None and "device" in self.previous.tools:
            tools["device"] = self.previous.tools["device"]  # it made the weights, which are still the same
        return Manifest(
            source=Source(model=model, class_name=first.class_name, fingerprint=first.fingerprint()),
            family=plan.plans[0].family.name,
            config_sha256=hash_file(self.transaction.tree / "config.json")["sha256"],
            recipe=plan.options.recipe.to_json(),
            shapes={**plan.sizes.to_json(), "dtype": plan.options.dtype},
            layers=self._layers(),
            kept=tuple(dict.fromkeys(kept)),
            nonfinite=nonfinite,
            graphs=tuple(self.graphs),
            engines=tuple(self.engines),
            components=plan.components,
            tools=tools,
            verified=self._verified(),
        )

    def _tools(self) -> dict[str, str]:
        """What graphs depend on besides dvdquant itself."""
        return _versions("torch", "diffusers", "onnx", "onnx-ir", "onnxscript")

    def _verified(self) -> Verified | None:
        """What this run compared; of weights and graphs that were there before, what was compared then."""
        if not self.stored:
            return None if self.previous is None else self.previous.verified
        return Verified(
            dvdquant=__version__,
            layers=sum(check.layers for check in self.stored),
            rows=sum(check.rows for check in self.stored),
            kept=sum(check.kept for check in self.stored),
            graphs=[graph["path"] for graph in self.graphs],
        )


def _versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed: ONNX Runtime has several names."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cuda ({torch.cuda.get_device_name(device)})"
