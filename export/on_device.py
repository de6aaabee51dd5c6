"""The engines that an export left to this machine: what fits is decided before any work, then built, checked and entered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dvdquant.artifact.entries import BuildEntry, EngineEntry, Measured
from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.transaction import ExportTransaction, require_disk
from dvdquant.artifact.verify_files import intact_files, verify_files
from dvdquant.backends import Backend, load_backend
from dvdquant.errors import EngineError, OutputError, UnsupportedError
from dvdquant.export.build_room import check_builds
from dvdquant.export.elsewhere import COMPATIBLE, SCRIPT
from dvdquant.export.engines.report import BuildReport
from dvdquant.export.engines.stage import BuildSettings, is_compatible, run_builder
from dvdquant.export.model_card import model_card
from dvdquant.export.steps import is_step
from dvdquant.model.families import Sizes
from dvdquant.plugin_library import check_plugin
from dvdquant.system.files import hash_file
from dvdquant.system.gpu import Gpu
from dvdquant.system.plugin_file import read_plugin
from dvdquant.system.progress import Progress
from dvdquant.text import first_of, shell_line

__all__ = [
    "CheckEngine",
    "DeviceBuild",
    "DeviceResult",
    "as_compatible",
    "build_on_device",
    "builds_here",
    "plan_on_device",
    "refuse_idle_plugins",
    "without_current",
]

# What an export has of its engines besides them.
_WRITTEN_AGAIN = ("README.md", "report.html", SCRIPT)


class CheckEngine(Protocol):
    """A judge of a new engine on this machine's GPU.

    :func:`dvdquant.deploy.engine_check.check_engine` is one. It needs the runtime, which the builder does not know.
    """

    def __call__(self, tree: Path, entry: EngineEntry, component: str, plugins: Sequence[Path]) -> Measured | None:
        """Run an engine and return what was measured; None where it cannot run here.

        Args:
            tree: An export that holds the engine.
            entry: Its entry.
            component: The transformer that it is of.
            plugins: The plugin libraries.

        Raises:
            EngineError: It does not run, or computes something else.
        """


@dataclass(frozen=True)
class DeviceBuild:
    """The engines that are to be built in an export on this machine.

    Args:
        out: The folder of the export.
        manifest: Its manifest.
        builds: The engines to build.
        current: The engines that are there already.
        backends: The builders, by their name.
        plugins: The plugin libraries for TensorRT.
        plugin_hashes: The SHA-256 of each of them, in their order.
        gpu: The GPU of this machine; None if its driver names none.
        bits: The activation bits that were asked for; empty means all.
        version_compatible: Whether version-compatible engines were asked for.
    """

    out: Path
    manifest: Manifest
    builds: tuple[BuildEntry, ...]
    current: tuple[BuildEntry, ...]
    backends: Mapping[str, Backend]
    plugins: tuple[Path, ...]
    plugin_hashes: tuple[str, ...]
    gpu: Gpu | None
    bits: tuple[int, ...] = ()
    version_compatible: bool = False


@dataclass
class DeviceResult:
    """The engines that were built.

    Args:
        plan: The plan that was carried out: the one that was given, or the one for what another run made of the export meanwhile.
        manifest: The manifest of the export as it is now.
        reports: The builder's report of each engine that was built, by its path.
        notes: What there is to say besides.
    """

    plan: DeviceBuild
    manifest: Manifest
    reports: dict[str, BuildReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- refusals


def _check_sm(sms: Sequence[str], gpu: Gpu | None, what: str) -> None:
    """Refuse TensorRT engines that are for another GPU than this machine's.

    Args:
        sms: The compute capabilities that they are for.
        gpu: The GPU of this machine, or None.
        what: What is for them, as the subject of the error.

    Raises:
        UnsupportedError: There is no GPU, or it is another one.
    """
    if gpu is None:
        raise UnsupportedError(
            f"{what} is for SM {', '.join(sms)}, TensorRT builds on the GPU itself, and the driver of this machine names none",
            fix="run this on the device, with the GPU's driver (in a container: with --gpus all or --runtime nvidia)",
        )
    if gpu.sm not in sms:
        raise UnsupportedError(
            f"{what} is for SM {', '.join(sms)}, and this GPU ({gpu.name}) has SM {gpu.sm}",
            available=f"SM {', '.join(sms)}",
            fix=f"export for this GPU: dvdq-export … --target tensorrt --sm {gpu.sm}",
        )


def builds_here(manifest: Manifest, gpu: Gpu | None, bits: Sequence[int], what: str) -> list[BuildEntry]:
    """Return the engines of a manifest that this machine builds.

    Args:
        manifest: The manifest.
        gpu: The GPU of this machine, or None.
        bits: The activation bits whose engines are built; empty means all.
        what: What holds the manifest, as the subject of the error.

    Raises:
        UnsupportedError: There is nothing to build, or nothing for this GPU.
    """
    if not manifest.builds:
        raise UnsupportedError(
            f"{what} has no engine that was left to be built",
            available=[entry["path"] for entry in manifest.engines] or "no engine at all",
            fix="export with --target tensorrt --sm X.Y, or with --build device",
        )
    wanted = [entry for entry in manifest.builds if not bits or entry["act_bits"] in bits]
    if not wanted:
        widths = sorted({entry["act_bits"] for entry in manifest.builds})
        raise UnsupportedError(
            f"{what} has no engine of {', '.join(map(str, bits))} bits to build",
            available=[f"{b} bits" for b in widths],
        )
    # TensorRT-RTX compiles for GPUs that are elsewhere, TensorRT for the one that is here.
    ours = [e for e in wanted if e["backend"] == "tensorrt_rtx" or (gpu is not None and gpu.sm in e["sm"])]
    if not ours:
        _check_sm(sorted({sm for entry in wanted for sm in entry["sm"]}, key=float), gpu, what)
    return ours


def as_compatible(builds: Sequence[BuildEntry], what: str) -> list[BuildEntry]:
    """Return the engines to build with TensorRT's made version-compatible; those of TensorRT-RTX stay as they are.

    Args:
        builds: The engines to build.
        what: What holds them, as the subject of the error.

    Raises:
        UnsupportedError: None of them is TensorRT's.
    """
    if not any(entry["backend"] == "tensorrt" for entry in builds):
        raise UnsupportedError(
            f"{what} has TensorRT-RTX engines to build, and --version-compatible is for TensorRT engines",
            available="an engine of TensorRT-RTX loads in its own release alone",
            fix="leave --version-compatible out, or export with --target tensorrt",
        )
    return [
        entry
        if entry["backend"] != "tensorrt" or entry.get("version_compatible")
        else {**entry, "version_compatible": True, "command": f"{entry['command']} {shell_line([*COMPATIBLE])}"}
        for entry in builds
    ]


def refuse_idle_plugins(builds: Sequence[BuildEntry], plugins: Sequence[Path], what: str) -> None:
    """Refuse plugin libraries where no engine to build takes them.

    Args:
        builds: The engines to build.
        plugins: The plugin libraries that were given.
        what: What holds the engines, as the subject of the error.

    Raises:
        UnsupportedError: There are some, and all engines are TensorRT-RTX's.
    """
    if plugins and not any(entry["backend"] == "tensorrt" for entry in builds):
        raise UnsupportedError(
            f"{what} has TensorRT-RTX engines to build here, and --plugin is for TensorRT engines",
            fix="leave --plugin out",
        )


def plan_on_device(
    out: Path,
    manifest: Manifest,
    gpu: Gpu | None,
    *,
    plugins: Sequence[Path] = (),
    bits: Sequence[int] = (),
    version_compatible: bool = False,
) -> DeviceBuild:
    """Decide what is built here, and refuse what cannot be, before any work.

    Args:
        out: The folder of the export.
        manifest: Its manifest.
        gpu: The GPU of this machine, or None if its driver names none.
        plugins: The plugin libraries for TensorRT.
        bits: The activation bits whose engines are built; empty means all.
        version_compatible: Build TensorRT engines that the lean runtime of the same release runs, too, as the export may ask
            for by itself.

    Raises:
        UnsupportedError: The export has nothing to build, nothing for this GPU, or no engine that can be version-compatible;
            or a plugin library is missing, without use, for another processor, another TensorRT or other GPUs.
        EngineError: A builder is not installed.
        ResourceError: The memory is too small for what is not there yet; the error says what fits.
    """
    # 1. What is for this machine.
    ours = builds_here(manifest, gpu, bits, str(out))
    if version_compatible:
        ours = as_compatible(ours, str(out))
    # 2. The builders and the plugin.
    refuse_idle_plugins(ours, plugins, str(out))
    backends: dict[str, Backend] = {name: load_backend(name) for name in sorted({e["backend"] for e in ours})}
    if "tensorrt" in backends:
        if not plugins:
            raise UnsupportedError(
                "TensorRT engines need the dvdquant plugin library, and --plugin was not given",
                fix="give the library that make plugin built for this machine (--plugin bundled takes that of the bundle)",
            )
        for path in plugins:
            check_plugin(read_plugin(path), backends["tensorrt"], gpu)
    # 3. What is there already.
    hashes = tuple(hash_file(plugin)["sha256"] for plugin in plugins)
    plan = DeviceBuild(
        out, manifest, tuple(ours), (), backends, tuple(plugins), hashes, gpu, tuple(bits), version_compatible
    )
    return without_current(plan)


def without_current(plan: DeviceBuild) -> DeviceBuild:
    """Return a plan whose engines that are there already are no longer among those to build, if there is memory for the rest.

    Args:
        plan: The plan, with all engines among those to build. The builders of those that are there have to be known.

    Raises:
        ResourceError: The memory is too small for what is not there yet; the error says what fits.
    """
    current = [entry for entry in plan.builds if _is_current(plan, entry)]
    builds = [entry for entry in plan.builds if entry not in current]
    check_builds(builds, plan.manifest, plan.gpu)
    return dataclasses.replace(plan, builds=tuple(builds), current=(*plan.current, *current))


# ---------------------------------------------------------------------------------------------------------------- build


def _settings(plan: DeviceBuild, entry: BuildEntry) -> BuildSettings:
    """Return the settings that an engine is built with here."""
    return BuildSettings(
        entry["onnx_sha256"],
        entry["precision"],
        entry["backend"],
        plan.backends[entry["backend"]].version,
        entry["optimization_level"],
        entry["workspace_gib"],
        plan.plugin_hashes if entry["backend"] == "tensorrt" else (),
        bool(entry.get("fused_layers")),
        is_compatible(entry["backend"], bool(entry.get("version_compatible"))),
        entry.get("kept_inputs", 0),
    )


def _is_current(plan: DeviceBuild, entry: BuildEntry) -> bool:
    """Return whether the engine of an entry is there, intact, and built with the settings of now."""
    there = [e for e in plan.manifest.engines if e["path"] == entry["engine"]]
    if not there or not _settings(plan, entry).made(there[0]) or there[0]["sm"] != entry["sm"]:
        return False
    return bool(intact_files(plan.out, plan.manifest, [entry["engine"]]))


def build_on_device(
    plan: DeviceBuild,
    progress: Progress,
    *,
    resume: bool = False,
    check: CheckEngine | None = None,
    timing_cache: Path | None = None,
) -> DeviceResult:
    """Build the engines of a plan; the export then has all of them, or is as it was.

    Args:
        plan: The plan.
        progress: The place that stages report to.
        resume: Go on from an interrupted build.
        check: The judge of the new engines, or None.
        timing_cache: A TensorRT timing cache to read and update.

    Raises:
        EngineError: A builder fails, or an engine computes something else. Finished engines are kept for ``resume``.
        OutputError: The export is damaged, or cannot be written.
        ResourceError: Disk or memory is full.
    """
    while True:
        settings = {entry["engine"]: _settings(plan, entry) for entry in plan.builds}
        key = {"device_build": hashlib.sha256(plan.manifest.to_json().encode()).hexdigest()}
        key |= {"engines": json.dumps({path: one.digest for path, one in settings.items()})}
        require_disk(plan.out, _disk_bytes(plan), "the engines and a copy of the weights")
        with ExportTransaction(plan.out, key=key, resume=resume, keep_for_resume=True, accept=is_step) as transaction:
            now = transaction.previous
            if now == plan.manifest:
                return _build_locked(plan, settings, transaction, progress, check, timing_cache)
        # Another run finished between the plan and the lock.
        plan = _planned_onto(plan, now)
        progress.say(f"{plan.out} has other engines since this was planned: they stay")
        if not plan.builds:
            return DeviceResult(plan, plan.manifest)


def _disk_bytes(plan: DeviceBuild) -> int:
    """Return the bytes that a build writes, by estimate."""
    engines = sum(entry["held_bytes"] for entry in plan.builds if entry["backend"] == "tensorrt_rtx")
    return engines + sum(entry["bytes"] for name, entry in plan.manifest.files.items() if name.startswith("onnx/"))


def _planned_onto(plan: DeviceBuild, now: Manifest | None) -> DeviceBuild:
    """Return the plan for an export to which another run added engines, or engines to build, since it was planned.

    Args:
        plan: The plan.
        now: The manifest of the export as it is now, or None.

    Raises:
        OutputError: The export is another one now, or has gone.
        DvdquantError: See :func:`plan_on_device`.
    """
    before, found = plan.manifest, "no export"
    if now is not None:
        own = [name for name in before.files if not name.startswith("engines/") and name not in _WRITTEN_AGAIN]
        other = [name for name in own if now.files.get(name) != before.files[name]]
        other += [entry["engine"] for entry in before.builds if entry not in now.builds]
        if not other:
            return plan_on_device(
                plan.out,
                now,
                plan.gpu,
                plugins=plan.plugins,
                bits=plan.bits,
                version_compatible=plan.version_compatible,
            )
        found = f"not as it was: {first_of(other)}"
    raise OutputError(
        f"{plan.out} was changed meanwhile by another run: nothing was built",
        available=found,
        fix="run the same line again",
    )


def _build_locked(
    plan: DeviceBuild,
    settings: Mapping[str, BuildSettings],
    transaction: ExportTransaction,
    progress: Progress,
    check: CheckEngine | None,
    timing_cache: Path | None,
) -> DeviceResult:
    """Build the engines of a plan and commit them; the lock of the export is held, and it is what was planned from.

    Args:
        plan: The plan.
        settings: The settings of each engine, by its path.
        transaction: The transaction, entered.
        progress: The place that stages report to.
        check: The judge of the new engines, or None.
        timing_cache: A TensorRT timing cache to read and update.

    Raises:
        DvdquantError: See :func:`build_on_device`.
    """
    out, manifest, result = plan.out, plan.manifest, DeviceResult(plan, plan.manifest)
    # 1. Nothing is built from files that are not those of the export, and no engine is entered again that is not its own.
    own = [name for name in manifest.files if not name.startswith("engines/")]
    others = [entry["path"] for entry in manifest.engines if entry["path"] not in settings]
    with progress.stage("check", sum(manifest.files[name]["bytes"] for name in (*own, *others)), "B") as stage:
        verify_files(out, manifest, own, stage.update)

        def damaged(name: str, error: OutputError) -> None:
            progress.say(f"the engine is left out: {error.what}")

        intact = intact_files(out, manifest, others, stage.update, damaged)
    # 2. Build each engine as a step of its own.
    engines = {entry["path"]: entry for entry in manifest.engines if entry["path"] in (*intact, *settings)}
    with progress.stage("engines", len(plan.builds), "engine") as bar:
        for entry in plan.builds:
            bar.update(0, entry["engine"])
            engine, report = _build(plan, entry, settings[entry["engine"]], transaction, progress, timing_cache)
            engines[entry["engine"]] = engine
            result.reports[entry["engine"]] = report
            bar.update(1)
    # 3. The rest of the export, without the card, which is written anew.
    known = {name: manifest.files[name] for name in (*own, *intact) if name != "README.md"}
    for name in known:
        transaction.take_over(name)
    # 4. Judge the new engines in place.
    now = dataclasses.replace(manifest, engines=tuple(engines.values()))
    if check is not None:
        now = _judge(plan, now, known, transaction, check, result.notes)
    transaction.path("README.md").write_text(model_card(now), encoding="utf-8")
    result.manifest = transaction.commit(now, known, export_key=manifest.export_key)
    return result


def _build(
    plan: DeviceBuild,
    entry: BuildEntry,
    settings: BuildSettings,
    transaction: ExportTransaction,
    progress: Progress,
    timing_cache: Path | None,
) -> tuple[EngineEntry, BuildReport]:
    """Build one engine, or take that of the interrupted run, and return its entry and the builder's report."""
    path = entry["engine"]
    target = transaction.path(path)
    step = f"engine:{path}:{settings.digest}"
    if not transaction.is_done(step) or not target.exists():
        target.unlink(missing_ok=True)
        profile = entry["profile"]
        report = run_builder(
            plan.out / entry["graph"],
            target,
            backend=entry["backend"],
            sms=entry["sm"],
            profile=None if profile is None else {n: tuple(tuple(s) for s in three) for n, three in profile.items()},
            plugins=plan.plugins,
            workspace_gib=entry["workspace_gib"],
            timing_cache=timing_cache,
            optimization_level=entry["optimization_level"],
            version_compatible=settings.version_compatible,
            data_root=plan.out / "onnx",
            fp8_attentions=entry["fp8_attentions"],
            progress=progress,
        )
        made = EngineEntry(
            path=path,
            backend=entry["backend"],
            sm=list(entry["sm"]),
            act_bits=entry["act_bits"],
            precision=entry["precision"],
            executes=entry["executes"],
            onnx_sha256=entry["onnx_sha256"],
            versions={entry["backend"]: report.version},
            shapes=dict(Sizes.from_json(plan.manifest.shapes).to_json()),
            attention=dict(report.attention),
            fused_layers=entry.get("fused_layers", 0),
            version_compatible=settings.version_compatible,
            kept_inputs=settings.kept_inputs,
        )
        data = {"entry": {**made, **settings.recorded()}, "report": report.to_json()}
        transaction.done(step, data, [path])
    data = transaction.data(step)
    return data["entry"], BuildReport.from_json(data["report"])


def _judge(
    plan: DeviceBuild,
    manifest: Manifest,
    known: dict[str, Any],
    transaction: ExportTransaction,
    check: CheckEngine,
    notes: list[str],
) -> Manifest:
    """Run the new engines where they can run, and return the manifest with what was measured.

    Raises:
        EngineError: One does not run, or computes something else.
    """
    for entry in plan.builds:
        known[entry["engine"]] = hash_file(transaction.path(entry["engine"]))
    there = transaction.tree / MANIFEST
    components = {entry["engine"]: entry["component"] for entry in plan.builds}
    engines = []
    try:
        # The runtime opens only what a manifest vouches for; the commit writes the final one.
        there.write_text(dataclasses.replace(manifest, files=dict(known)).to_json(), encoding="utf-8")
        for engine in manifest.engines:
            if engine["path"] in components:
                measured = check(transaction.tree, engine, components[engine["path"]], plan.plugins)
                if measured is None:
                    where = f"SM {', '.join(engine['sm'])}"
                    notes.append(f"{engine['path']} was not run: PyTorch sees no GPU of {where} here")
                else:
                    engine = {**engine, "measured": measured}
            engines.append(engine)
    except EngineError as error:
        fix = error.fix if error.has_own_fix else "report it with the log"
        raise EngineError(error.what, available=error.available, fix=fix) from error
    finally:
        there.unlink(missing_ok=True)
    return dataclasses.replace(manifest, engines=tuple(engines))
