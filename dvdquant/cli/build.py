"""``dvdq-build``: the engines of an export, built on the device that they are for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.cli.shared.common import ExamplesCommand, echo, paragraphs, setup_logging, table
from dvdquant.cli.shared.paths import PATH
from dvdquant.errors import OutputError, UnsupportedError
from dvdquant.text import amount, json_text

if TYPE_CHECKING:
    from dvdquant.artifact.bundle import Bundle
    from dvdquant.artifact.entries import BuildEntry
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.backends import Backend
    from dvdquant.export.on_device import DeviceBuild, DeviceResult
    from dvdquant.system.gpu import Gpu
    from dvdquant.system.progress import Progress

BUNDLED = "bundled"

EXAMPLES = """
# on a Jetson Orin: unpack a bundle, build, check and time its engines, with the plugin library that it holds
dvdq-build orin.tar -o orin --plugin bundled

# an export folder that was copied, with a plugin library that was built here; go on after an interruption
dvdq-build out/orin --plugin build/plugins/libdvdquant_plugins.so --resume

# engines that TensorRT's lean runtime of the same release runs, too
dvdq-build out/orin --plugin build/plugins/libdvdquant_plugins.so --version-compatible

# what would be built, and does it fit?
dvdq-build orin.tar --dry-run

# TensorRT-RTX engines that dvdq-export --build device left over; needs no GPU
dvdq-build out/wan
"""


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.argument("source", metavar="OUT|BUNDLE", type=PATH)
@click.option("-o", "--output", "out", type=PATH, help="Folder for a bundle.  [default: its name without .tar]")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    type=PATH,
    help="TensorRT plugin library, which engines need again when they run; bundled takes the bundle's own. Its code runs: "
    "take none that you do not trust.",
)
@click.option(
    "--bits", type=click.IntRange(4, 8), multiple=True, help="Only engines of these activation bits; repeatable."
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Build TensorRT engines that the lean runtime of the same release runs, too: dvdq-run then needs no TensorRT with a "
    "builder. They may be slower. Never ran on a GPU.",
)
@click.option("--timing-cache", type=PATH, help="TensorRT timing cache to read and update.")
@click.option("--no-check", is_flag=True, help="Do not run and time the new engines.")
@click.option("--resume", is_flag=True, help="Go on from an interrupted build.")
@click.option(
    "--replace",
    is_flag=True,
    help="Unpack a bundle in the place of a finished export of another model, another recipe or other sizes, whose engines go.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be built, and whether it fits; write nothing.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", count=True)
@click.version_option(__version__, prog_name="dvdq-build")
def main(
    source: Path,
    out: Path | None,
    plugins: tuple[Path, ...],
    bits: tuple[int, ...],
    version_compatible: bool,
    timing_cache: Path | None,
    no_check: bool,
    resume: bool,
    replace: bool,
    dry_run: bool,
    log_format: str,
    verbose: int,
) -> None:
    """Build the engines that an export left to this machine, check and time them, and enter them into its manifest.

    OUT is an export of dvdq-export --target tensorrt (or --build device), BUNDLE a file of dvdq-bundle, which is unpacked
    first: whole or not at all. A folder that holds it already is compared with it; engines that were built of it stay. What
    does not fit this GPU, this TensorRT or the memory is refused before any work.
    """
    setup_logging(verbose, log_format)
    from dvdquant.artifact.bundle import open_bundle
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.artifact.unpack import holds_bundle, unpacked_manifest
    from dvdquant.export.on_device import build_on_device, plan_on_device
    from dvdquant.system.gpu import read_gpu
    from dvdquant.system.progress import Progress
    from dvdquant.system.whole_file import check_writable

    # 1. The export: unpacked from a bundle, unless the folder holds it already, or the folder that was named.
    if timing_cache is not None:
        check_writable(timing_cache)
    gpu, progress = read_gpu(), Progress(log_format)  # type: ignore[arg-type]
    if source.is_file():
        folder = out or Path(source.name.removesuffix(".tar"))
        if folder.resolve() == source.resolve():
            raise UnsupportedError(f"{source} has no .tar to leave out of its name", fix="give a folder with -o")
        with open_bundle(source) as bundle:
            if dry_run and log_format == "text":
                echo(_bundle_text(bundle))
            ours = _bundle_builds(bundle, gpu, plugins, bits, version_compatible)
            there = _export_in(folder)
            _check_replaced(bundle, folder, there, replace)
            held = there if there is not None and holds_bundle(there, bundle) else None
            if dry_run or held is None:  # else memory is asked for below, once the folder is known to be whole
                first = _bundle_plan(bundle, folder, held or unpacked_manifest(bundle, there), gpu, plugins, ours)
            if dry_run:
                echo(json_text(_bundle_json(bundle, first)) if log_format == "json" else _bundle_plan_text(first))
                return
            _check_plugin_choice(bundle, plugins, ours)
            manifest = _unpacked(bundle, folder, held, replace, progress)
    elif out is not None or replace:
        raise UnsupportedError(
            f"{'--replace' if out is None else '-o'} is for a bundle, and {source} is none",
            fix=f"leave {'--replace' if out is None else '-o'} out: engines go into the export",
        )
    else:
        folder, manifest = source, load_manifest(source)
    # 2. What is to be built here.
    chosen = tuple(_plugin(path, folder, manifest, PLUGIN_PLACE) for path in plugins)
    plan = plan_on_device(folder, manifest, gpu, plugins=chosen, bits=bits, version_compatible=version_compatible)
    if dry_run:
        echo(json_text(_plan_json(plan)) if log_format == "json" else _plan_text(plan))
        return
    if not plan.builds:
        _say_current(plan, log_format, progress)
        return
    # 3. Build, check and time it.
    for path in plan.plugins:
        progress.say(f"{path} is loaded, and its code runs")
    from dvdquant.deploy.engine_check import check_engine

    result = build_on_device(
        plan, progress, resume=resume, check=None if no_check else check_engine, timing_cache=timing_cache
    )
    if not result.reports:  # another run built them meanwhile
        _say_current(result.plan, log_format, progress)
    elif log_format == "json":
        progress.event("done", **_result_json(result))
    else:
        echo(_result_text(result))


def _bundle_builds(
    bundle: Bundle, gpu: Gpu | None, plugins: tuple[Path, ...], bits: tuple[int, ...], version_compatible: bool
) -> list[BuildEntry]:
    """Return the engines of a bundle that this machine builds, and refuse what it cannot, but for memory.

    Args:
        bundle: The open bundle.
        gpu: The GPU of this machine, or None.
        plugins: What ``--plugin`` says.
        bits: What ``--bits`` says.
        version_compatible: What ``--version-compatible`` says.

    Raises:
        UnsupportedError: There is nothing for this GPU, this release of TensorRT or this processor.
        EngineError: TensorRT is not installed.
    """
    from dvdquant.backends import load_backend
    from dvdquant.export.on_device import as_compatible, builds_here, refuse_idle_plugins
    from dvdquant.plugin_library import check_plugin
    from dvdquant.system.plugin_file import machine_name, read_plugin

    source, facts = bundle.path, bundle.facts
    ours = builds_here(bundle.manifest, gpu, bits, str(source))
    if version_compatible:
        ours = as_compatible(ours, str(source))
    refuse_idle_plugins(ours, plugins, str(source))
    tensorrt = any(entry["backend"] == "tensorrt" for entry in ours)
    if tensorrt:
        backend = load_backend("tensorrt")
        major = int(backend.version.partition(".")[0])
        if facts["tensorrt_major"] not in (None, major):
            raise UnsupportedError(
                f"{source} is for TensorRT {facts['tensorrt_major']}, and this machine has {backend.version}",
                fix=f"make the bundle with a plugin library for TensorRT {major}",
            )
    if facts["machine"] not in (None, machine_name()):
        raise UnsupportedError(
            f"{source} is for {facts['machine']}, and this machine is {machine_name()}",
            fix="run it on the device that the bundle is for, or make a bundle with a plugin library for this one",
        )
    named = [bundle.library if str(path) == BUNDLED else read_plugin(path) for path in plugins]
    for library in named or [bundle.library]:
        if tensorrt and library is not None:
            check_plugin(library, backend, gpu)
    return ours


def _bundle_plan(
    bundle: Bundle,
    folder: Path,
    manifest: Manifest,
    gpu: Gpu | None,
    plugins: tuple[Path, ...],
    ours: list[BuildEntry],
) -> DeviceBuild:
    """Return what would be built of a bundle in a folder, and refuse it where the memory is too small for that.

    Args:
        bundle: The open bundle.
        folder: The folder.
        manifest: The manifest that it would have with the bundle in it.
        gpu: The GPU of this machine, or None.
        plugins: What ``--plugin`` says; where it says nothing, that of the bundle is taken.
        ours: The engines of the bundle that this machine builds.

    Raises:
        ResourceError: The memory is too small.
        EngineError: A builder of engines that are there is not installed.
    """
    from dvdquant.artifact.layout import PLUGIN_PLACE
    from dvdquant.artifact.unpack import listed_files
    from dvdquant.backends import load_backend
    from dvdquant.export.on_device import DeviceBuild, without_current
    from dvdquant.system.files import hash_file

    there = {entry["path"] for entry in manifest.engines}
    builders = {entry["backend"] for entry in ours if entry["engine"] in there}  # the others are not asked for yet
    backends: dict[str, Backend] = {name: load_backend(name) for name in sorted(builders)}
    packed = listed_files(bundle)
    named = plugins or ((Path(BUNDLED),) if bundle.library is not None else ())
    libraries = [packed.get(PLUGIN_PLACE) if str(path) == BUNDLED else hash_file(path) for path in named]
    hashes = tuple(each["sha256"] for each in libraries if each is not None)
    return without_current(DeviceBuild(folder, manifest, tuple(ours), (), backends, plugins, hashes, gpu))


def _check_plugin_choice(bundle: Bundle, plugins: tuple[Path, ...], ours: list[BuildEntry]) -> None:
    """Refuse a bundle whose plugin library was not named, or that holds none where its own was named.

    Raises:
        UnsupportedError: It is so.
    """
    holds_plugin = bundle.library is not None
    tensorrt = any(entry["backend"] == "tensorrt" for entry in ours)
    if (tensorrt and not plugins) or (not holds_plugin and BUNDLED in map(str, plugins)):
        raise UnsupportedError(
            f"TensorRT engines need the dvdquant plugin library, and {bundle.path} holds none"
            if plugins or not holds_plugin
            else "TensorRT engines need the dvdquant plugin library, and --plugin does not say which is loaded for "
            f"{bundle.path}",
            fix="--plugin bundled takes that of the bundle"
            if holds_plugin
            else "give --plugin the library that make plugin built for this machine, or bundle one: dvdq-bundle --plugin",
        )


def _export_in(folder: Path) -> Manifest | None:
    """Return the manifest of the export in a folder, or None where there is none that can be read."""
    from dvdquant.artifact.manifest import load_manifest

    with contextlib.suppress(OutputError):
        return load_manifest(folder)
    return None


def _check_replaced(bundle: Bundle, folder: Path, there: Manifest | None, replace: bool) -> None:
    """Refuse to unpack a bundle in the place of another export, as ``dvdq-export`` does.

    Args:
        bundle: The open bundle.
        folder: The folder.
        there: The manifest of the export in it, or None.
        replace: What ``--replace`` says.

    Raises:
        OutputError: The folder holds an export of another model, another recipe or other sizes.
    """
    from dvdquant.export.replacement import check_replacement
    from dvdquant.recipe import Recipe

    if not replace:
        new = bundle.manifest
        recipe = Recipe.from_json(new.recipe)
        check_replacement(
            folder, there, new.source, new.components, recipe, new.shapes, new.lora_rank, has_options=False
        )


def _unpacked(bundle: Bundle, folder: Path, held: Manifest | None, replace: bool, progress: Progress) -> Manifest:
    """Unpack a bundle, unless the folder holds it already and whole, and return the manifest that is there.

    Args:
        bundle: The open bundle.
        folder: The folder.
        held: The manifest of the export in it, if that is the one of the bundle; else None.
        replace: What ``--replace`` says.
        progress: The place that stages report to.

    Raises:
        OutputError: The folder holds another export, the bundle was changed, or the folder cannot be written.
        ResourceError: The disk is too small.
    """
    from dvdquant.artifact.unpack import kept_engines, listed_files, unpack_bundle
    from dvdquant.artifact.verify_files import verify_files

    if held is not None:
        names = [name for name in listed_files(bundle) if name in held.files]
        try:
            with progress.stage("check", sum(held.files[name]["bytes"] for name in names), "B") as stage:
                verify_files(folder, held, names, stage.update)
            progress.say(f"{folder} holds what {bundle.path} holds")
            return held
        except OutputError as error:
            progress.say(f"{error.what}: unpacked again from {bundle.path}")

    def accept(previous: Manifest | None) -> None:
        _check_replaced(bundle, folder, previous, replace)
        count = 0 if previous is None else len(previous.engines) - len(kept_engines(previous, bundle))
        if count:
            progress.say(f"{folder} has engines of other graphs or weights, which are replaced with the rest: {count}")

    with progress.stage("unpack", bundle.nbytes, "B") as stage:
        return unpack_bundle(bundle, folder, stage.update, accept)


def _bundle_json(bundle: Bundle, plan: DeviceBuild) -> dict[str, Any]:
    facts = {name: value for name, value in bundle.facts.items() if name != "files"}
    return {
        "bundle": {"path": str(bundle.path), **facts, "files": len(bundle.facts["files"]), "bytes": bundle.nbytes},
        "gpu": None if plan.gpu is None else vars(plan.gpu),
        "builds": [dict(entry) for entry in plan.builds],
        "up_to_date": [entry["engine"] for entry in plan.current],
    }


def _bundle_plan_text(plan: DeviceBuild) -> str:
    """Return which engines of a bundle would be built in its folder, in words."""
    would = [f"{entry['engine']} would be built" for entry in plan.builds]
    return "\n".join([*would, *_current_lines(plan), "dry run: nothing was unpacked"])


def _bundle_text(bundle: Bundle) -> str:
    """Return what a bundle is, and what builds it, in words."""
    source, facts = bundle.path, bundle.facts
    line = f"{source}: {len(facts['files'])} files of {amount(bundle.nbytes)} for SM {', '.join(facts['sm'])}, by dvdquant "
    line += f"{facts['dvdquant']}; a build is estimated to take up to {amount(facts['builder_bytes'])} of memory"
    if any(entry["backend"] == "tensorrt" for entry in bundle.manifest.builds):
        library = "bundled" if bundle.library is not None else "FILE, for it holds no plugin library"
        line += f"\nbuild it with TensorRT {facts['tensorrt_major'] or ''}".rstrip() + f" and --plugin {library}"
    return line


def _plugin(path: Path, folder: Path, manifest: Manifest, place: str) -> Path:
    """Return the plugin library that an argument means; that of the bundle only as the manifest vouches for it."""
    if str(path) != BUNDLED:
        return path.absolute()
    from dvdquant.artifact.verify_files import verify_files

    if place not in manifest.files:
        raise UnsupportedError(
            f"{folder} holds no plugin library", available=f"{place} in a bundle of dvdq-bundle --plugin"
        )
    verify_files(folder, manifest, [place])
    return (folder / place).absolute()


def _facts(plan: DeviceBuild) -> str:
    """Return what this machine is, in words."""
    gpu = plan.gpu
    where = "no GPU" if gpu is None else f"{gpu.name}, SM {gpu.sm}, {amount(gpu.memory_bytes)}"
    return f"{where}; " + ", ".join(f"{name} {backend.version}" for name, backend in plan.backends.items())


def _plan_text(plan: DeviceBuild) -> str:
    rows = [
        (
            e["engine"],
            ", ".join(e["sm"]),
            amount(e["builder_bytes"]),
            amount(e["held_bytes"]),
            amount(e["working_bytes"]) if "working_bytes" in e else "not known",
        )
        for e in plan.builds
    ]
    lines = [_facts(plan), ""]
    if rows:
        lines += [table(("engine", "SM", "memory to build", "weights held", "to work in"), rows, right=(2, 3, 4)), ""]
        lines += ["memory is estimated, not measured on this machine", ""]
        lines += [paragraphs([(f"a{e['act_bits']}", e["executes"]) for e in plan.builds]), ""]
        lines += [f"by hand: {e['command']}" for e in plan.builds if e["command"]]
        lines += [
            f"{e['engine']}: TensorRT's lean runtime of the same release runs it, too"
            for e in plan.builds
            if e.get("version_compatible")
        ]
    return "\n".join([*lines, *_current_lines(plan), "dry run: nothing was written"])


def _current_lines(plan: DeviceBuild) -> list[str]:
    """Return a line for each engine that is there already."""
    return [f"{entry['engine']} is up to date" for entry in plan.current]


def _plan_json(plan: DeviceBuild) -> dict[str, Any]:
    return {
        "gpu": None if plan.gpu is None else vars(plan.gpu),
        "builders": {name: backend.version for name, backend in plan.backends.items()},
        "builds": [dict(entry) for entry in plan.builds],
        "up_to_date": [entry["engine"] for entry in plan.current],
    }


def _say_current(plan: DeviceBuild, log_format: str, progress: Progress) -> None:
    if log_format == "json":
        names = [entry["engine"] for entry in plan.current]
        progress.event("done", output=str(plan.out), engines=[], up_to_date=names)
    else:
        echo("\n".join([*_current_lines(plan), "nothing to do"]))


def _result_json(result: DeviceResult) -> dict[str, Any]:
    engines = [dict(e) for e in result.manifest.engines if e["path"] in result.reports]
    return {
        "output": str(result.plan.out),
        "engines": engines,
        "files": {path: dict(result.manifest.files[path]) for path in result.reports},
        "builds": {path: report.to_json() for path, report in result.reports.items()},
        "up_to_date": [entry["engine"] for entry in result.plan.current],
        "notes": result.notes,
    }


def _result_text(result: DeviceResult) -> str:
    rows = []
    for entry in result.manifest.engines:
        if entry["path"] not in result.reports:
            continue
        measured, file = entry.get("measured"), result.manifest.files[entry["path"]]
        time = "not run" if measured is None else f"{measured['milliseconds']:.1f} ms"
        error = measured["relative_error"] if measured else None
        rows.append(
            (
                entry["path"],
                ", ".join(entry["sm"]),
                amount(file["bytes"]),
                f"{result.reports[entry['path']].seconds:.0f} s",
                time,
                "-" if error is None else f"{error:.4f}",
                file["sha256"][:12],
            )
        )
    header = ("engine", "SM", "size", "built in", "a pass", "error", "SHA-256")
    lines = [_facts(result.plan), "", table(header, rows, right=(2, 3, 4, 5)), "", *result.notes]
    return "\n".join([*lines, f"{result.plan.out}/manifest.json written"])


if __name__ == "__main__":
    main()
