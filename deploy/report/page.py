"""``report.html`` of an export: one page that needs nothing besides itself.

Numbers come from the manifest, from the files it lists and, where they are there, from the checks of this export, from
``schedule.json`` and from samples. Names, paths and prompts are untrusted: they go through :func:`shown`, the template
escapes them, and a content policy in the page forbids whatever could be loaded or run.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.artifact.commit import walk_files
from dvdquant.artifact.entries import LayerEntry
from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.provenance import model_name, source_of
from dvdquant.checkpoint.lora.fuse import model_fingerprint
from dvdquant.checkpoint.lora.recorded import with_recorded
from dvdquant.checkpoint.opening import open_checkpoint, read_config_file
from dvdquant.checkpoint.pipeline_facts import with_pipeline_facts
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.report.charts import error_chart, line_chart, schedule_chart
from dvdquant.deploy.report.text import (
    commands,
    executions,
    kept_groups,
    lora_rows,
    python_lines,
    recipe_text,
    shown,
    size_text,
)
from dvdquant.errors import DvdquantError, OutputError
from dvdquant.model.families.base import ImageInputs
from dvdquant.recipe import error_name, looks_at_inputs
from dvdquant.system.files import FileEntry, hash_file
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header
from dvdquant.system.whole_file import write_whole
from dvdquant.text import amount, count_in_words

if TYPE_CHECKING:
    from dvdquant.deploy.report.run_trace import RunClip
    from dvdquant.deploy.report.samples import Sample
    from dvdquant.deploy.switching.schedule import Schedule

__all__ = ["REPORT", "Report", "add_report", "check_place", "collect", "render_report", "write_report"]

REPORT = "report.html"
WORST = 10
DEFAULT_SAMPLES = 1
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """The content of a page.

    Args:
        manifest: The manifest, with its files.
        out: The folder, as commands are to name it.
        checkpoint_bytes: The bytes of the source's tensors; None when it is not at hand.
        parameters: The numbers of weights in 4 bits and kept in 16 bit, the second None when the weight files cannot be read.
        checks: What ``--verify`` found, one record a graph, if it ran.
        schedule: What ``schedule.json`` holds; None where there is none.
        samples: The clips of the samples, see :mod:`.samples`.
        notes: What is missing from the page, and why.
        images: The images that the model draws from.
        runs: The clips of a trace.
    """

    manifest: Manifest
    out: str
    checkpoint_bytes: int | None = None
    parameters: tuple[int, int | None] = (0, None)
    checks: tuple[Mapping[str, Any], ...] = ()
    schedule: Schedule | None = None
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    images: ImageInputs = field(default_factory=ImageInputs)
    runs: tuple[RunClip, ...] = ()


# ------------------------------------------------------------------------------------------------------ collecting it


def collect(
    root: Path,
    manifest: Manifest,
    progress: Progress,
    *,
    out: Path | None = None,
    samples: int = 0,
    checks: Sequence[Mapping[str, Any]] = (),
    checkpoint_bytes: int | None = None,
    runs: Sequence[RunClip] = (),
) -> Report:
    """Gather a page about the export whose files lie in ``root``.

    What cannot be had (a source that is gone, a schedule of another model, samples that fail) becomes a note of the page,
    and is said on the way: the export is good without it.

    Args:
        root: The folder of the files.
        manifest: The manifest of the export.
        progress: The receiver of progress and notes.
        out: The folder that the export is or will be in, with its schedule.json; the default is ``root``.
        samples: The number of prompts to draw clips of.
        checks: What ``--verify`` found, one record a graph.
        checkpoint_bytes: The bytes of the source's tensors, if they are known already.
        runs: The clips of a trace that were drawn.
    """
    folder, notes = out or root, []

    def note(text: str) -> None:
        notes.append(text)
        progress.say(f"report: {text}")

    schedule = None
    if (folder / "schedule.json").is_file():
        from dvdquant.deploy.switching.schedule import Schedule

        try:
            schedule = Schedule.load(folder / "schedule.json", manifest)
        except DvdquantError as error:
            note(f"schedule.json is left out: {error.what}")
    made: list[Sample] = []
    if samples:
        from dvdquant.deploy.report.samples import make_samples

        try:
            made = make_samples(root, manifest.source["model"], samples, schedule, progress)
        except DvdquantError as error:
            note(f"no samples: {error.what}")
    kept: int | None = None
    try:
        kept = _kept_parameters(root, manifest)
    except DvdquantError as error:
        note(f"the weights in 16 bit are not counted: {error.what}")
    quantized = sum(e["features_in"] * e["features_out"] for e in manifest.layers)
    source = checkpoint_bytes if checkpoint_bytes is not None else _source_bytes(manifest)
    return Report(
        manifest,
        str(folder),
        source,
        (quantized, kept),
        tuple(checks),
        schedule,
        tuple(made),
        tuple(notes),
        _images(root, manifest),
        tuple(runs),
    )


def _images(root: Path, manifest: Manifest) -> ImageInputs:
    """Return what images the model draws from, by its config; none where the files of the export cannot tell."""
    try:
        return Artifact.of(root, manifest).family(manifest.components[0]).images()
    except DvdquantError:
        return ImageInputs()


def _kept_parameters(root: Path, manifest: Manifest) -> int:
    """Elements of the stored tensors that are not in 4 bits: those of other layers, and the quantized layers' biases."""
    layers, total = {entry["name"] for entry in manifest.layers}, 0
    for name in manifest.files:
        if name.startswith("onnx/") and name.endswith(".safetensors"):
            for tensor, info in read_header(root / name).tensors.items():
                layer, _, kind = tensor.rpartition(".")
                total += math.prod(info.shape) if layer not in layers or kind == "bias" else 0
    return total


def _source_bytes(manifest: Manifest) -> int | None:
    """Bytes of the source's tensors where it is local and still the same; None elsewhere."""
    try:
        if not os.path.exists(os.path.expanduser(manifest.source["model"])):
            return None
        config = read_config_file(manifest.source["config"]) if "config" in manifest.source else None
        places = {name: source_of(manifest.source, name) for name in manifest.components}
        # With what its pipeline says, as the exporter opened it: that is a part of the fingerprint.
        opened = [
            with_recorded(
                with_pipeline_facts(open_checkpoint(model, component=inside, config=config)), manifest.lora, name
            )
            for name, (model, inside) in places.items()
        ]
        same = model_fingerprint(opened) == manifest.source["fingerprint"]
        return sum(checkpoint.nbytes for checkpoint in opened) if same else None
    except (DvdquantError, OSError, ValueError):
        return None  # the size of a source that is not there, or no longer the same, is not known


# ---------------------------------------------------------------------------------------------------------- the page


def render_report(report: Report) -> str:
    """Return the page as HTML.

    Args:
        report: The content of the page.
    """
    page: str = _template().render(_context(report))
    return page


@functools.cache
def _template() -> Any:
    """Return the template of the page, compiled once: that takes longer than to fill it in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["amount"] = amount
    environment.filters["in_words"] = count_in_words
    environment.filters["thousands"] = lambda value: f"{value:,}".replace(",", "\u202f")
    return environment.get_template("report.html.j2")


def write_report(path: Path, report: Report) -> None:
    """Write the page to ``path``, whole or not at all. OutputError or ResourceError when that fails.

    Args:
        path: The path of the file.
        report: The content of the page.
    """
    write_whole(path, render_report(report).encode())


def check_place(path: Path, out: Path, manifest: Manifest) -> Path:
    """Return ``path`` if a page may be written there: .html, and no file of the export, whose hash would then differ.

    Args:
        path: The path of the page.
        out: The folder of the export.
        manifest: The manifest of the export.

    Raises:
        OutputError: The suffix is another, the folder cannot be written, or the manifest of ``out`` lists the file.
    """
    from dvdquant.deploy.generation.video import check_target

    check_target(path, (".html", ".htm"))
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(out))
    listed = {MANIFEST, *manifest.files}
    if place.is_relative_to(root) and place.relative_to(root).as_posix() in listed:
        raise OutputError(
            f"{path} is a file of the export, which its manifest has the hash of",
            fix="pick another name, or export again with --report to renew it",
        )
    return path


def add_report(
    tree: Path,
    manifest: Manifest,
    known: dict[str, FileEntry],
    *,
    checks: Sequence[Mapping[str, Any]],
    out: Path,
    samples: int | None,
    checkpoint_bytes: int,
    progress: Progress,
) -> None:
    """Write the page of an unfinished export into its ``tree``, from where the commit takes it like every other file.

    Args:
        tree: The folder of the unfinished export.
        manifest: The manifest, without its list of files.
        known: The hashes that are known; those of the other files of ``tree`` are added.
        checks: What ``--verify`` found, one record a graph.
        out: The folder that the export will lie in, for the lines that the page shows.
        samples: The number of prompts to draw clips of; None is one where a clip costs seconds.
        checkpoint_bytes: The bytes of the source's tensors.
        progress: The receiver of progress and notes.
    """
    for name in sorted(walk_files(tree)):
        entry = known.get(name)
        if name not in (MANIFEST, REPORT) and (entry is None or entry["bytes"] != (tree / name).stat().st_size):
            known[name] = hash_file(tree / name)
    there = {name: known[name] for name in sorted(known) if (tree / name).is_file()}
    complete = replace(manifest, files=there)
    count = default_samples(manifest.source["model"]) if samples is None else samples
    try:
        # The runtime opens only what a manifest vouches for; the commit writes the final one.
        (tree / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
        report = collect(
            tree,
            complete,
            progress,
            out=out,
            samples=count,
            checks=checks,
            checkpoint_bytes=checkpoint_bytes,
        )
    finally:
        (tree / MANIFEST).unlink(missing_ok=True)
    write_report(tree / REPORT, report)


def default_samples(model: str) -> int:
    """Return the number of sampled prompts: one for a model with a prompt table, whose clips cost seconds; else none.

    Args:
        model: The model as the manifest names it.
    """
    from dvdquant.deploy.report.samples import has_prompt_table

    return DEFAULT_SAMPLES if has_prompt_table(model) else 0


# -------------------------------------------------------------------------------------------------------- its content


def _context(report: Report) -> dict[str, Any]:
    """Return what the template shows; every text in it is :func:`shown`, every chart is finished SVG."""
    manifest = Manifest(**shown({f: getattr(report.manifest, f) for f in Manifest.__dataclass_fields__}))
    rows, slow = executions(manifest)
    table, prompt = _prompt(report)
    schedule, facts = report.schedule, _facts(report)
    return {
        "m": manifest,
        "name": model_name(manifest.source["model"]),
        "created": manifest.created[:16].replace("T", " "),
        "recipe": [*recipe_text(manifest.recipe, manifest.family), *lora_rows(manifest)],
        "sizes": size_text(manifest.shapes),
        "facts": facts,
        "bars": _bars(report, manifest, facts),
        "error_chart": error_chart(manifest.layers, error_name(manifest.recipe)),
        "worst": _worst(manifest.layers),
        "unmeasured": sum(e["relative_mse"] is None for e in manifest.layers),
        "kept": kept_groups(manifest),
        "executions": rows,
        "slow": slow,
        "checks": [shown(dict(check)) for check in report.checks],
        "schedule": None if schedule is None else _schedule(schedule),
        "samples": [_sample(sample) for sample in report.samples],
        "commands": shown(commands(manifest, report.out, prompt, schedule is not None, report.images)),
        "python": _lines(python_lines(manifest, shown(report.out), prompt, table, report.images)),
        "notes": shown(report.notes),
        "runs": report.runs,
    }


def _lines(text: str) -> str:
    return "\n".join(shown(line) for line in text.split("\n"))


def _prompt(report: Report) -> tuple[bool, str]:
    """Return whether the source has a prompt table, and a prompt for the commands."""
    from dvdquant.deploy.report.samples import has_prompt_table

    model = report.manifest.source["model"]
    if report.samples:
        return True, shown(report.samples[0].prompt)
    if not has_prompt_table(model):
        return False, "a cat walks on grass"
    from dvdquant.checkpoint.prompt_table import PromptTable

    try:
        return True, shown(PromptTable.open(model).example())
    except DvdquantError:
        return False, "a cat walks on grass"  # a damaged table: the pipeline lines are what is left to show


def _facts(report: Report) -> dict[str, Any]:
    """Return the numbers of the summary."""
    manifest, (quantized, kept) = report.manifest, report.parameters
    known = [(e["relative_mse"], e["relative_mse_minmax"]) for e in manifest.layers]
    pairs = [(ours, theirs) for ours, theirs in known if ours is not None and theirs is not None]
    ours, theirs = (sum(column) / len(pairs) for column in zip(*pairs)) if pairs else (None, None)
    packed = sum(size for name, size in _sizes(manifest) if name.startswith("onnx/") and not name.endswith(".onnx"))
    total = sum(size for _, size in _sizes(manifest))
    return {
        "error_name": error_name(manifest.recipe),
        "error_of_weights": not looks_at_inputs(manifest.recipe),
        "error": ours,
        "minmax": theirs,
        "less": 100 * (1 - ours / theirs) if ours is not None and theirs else None,
        "measured": len(pairs),
        "quantized": quantized,
        "kept": kept,
        "share": 100 * quantized / (quantized + kept) if kept is not None and quantized + kept else None,
        "layers": len(manifest.layers),
        "packed": packed,
        "sixteen": 2 * (quantized + kept) if kept is not None else None,
        "total": total,
        "checkpoint": report.checkpoint_bytes,
        "resident": next((s.executed.get("resident_bytes") for s in report.samples), None),
        "backend": next((shown(f"{s.executed['backend']} on {s.executed['device']}") for s in report.samples), ""),
    }


def _sizes(manifest: Manifest) -> list[tuple[str, int]]:
    return [(name, entry["bytes"]) for name, entry in manifest.files.items()]


def _bars(report: Report, manifest: Manifest, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Checkpoint, packed weights, the whole export, and every engine."""
    sizes = dict(_sizes(manifest))
    rows: list[tuple[str, str, int, str]] = []
    if report.checkpoint_bytes is not None:
        rows.append(("checkpoint", "as it was read", report.checkpoint_bytes, "before"))
    # Where the checkpoint is in 16 bit anyway, a second bar says nothing.
    if (
        facts["sixteen"] is not None
        and abs(facts["sixteen"] - (report.checkpoint_bytes or 0)) > 0.02 * facts["sixteen"]
    ):
        rows.append((f"weights in {manifest.shapes.get('dtype', '16 bit')}", "computed", facts["sixteen"], "before"))
    rows.append(("packed weights", "once for all graphs", facts["packed"], "ours"))
    rows += [(e["path"], f"a{e['act_bits']}", sizes.get(e["path"], 0), "engine") for e in manifest.engines]
    rows.append(("whole export", f"{len(sizes)} files", facts["total"], "total"))
    largest = max(row[2] for row in rows) or 1
    return [{"name": n, "note": t, "bytes": b, "kind": k, "share": round(100 * b / largest, 2)} for n, t, b, k in rows]


def _worst(layers: Sequence[LayerEntry]) -> list[dict[str, Any]]:
    known = [e for e in layers if e["relative_mse"] is not None]
    rows = []
    for entry in sorted(known, key=lambda e: -(e["relative_mse"] or 0.0))[:WORST]:
        ours, theirs = entry["relative_mse"], entry["relative_mse_minmax"]
        less = 100 * (1 - ours / theirs) if ours is not None and theirs else None
        rows.append({**entry, "less": less})
    return rows


def _schedule(schedule: Schedule) -> dict[str, Any]:
    counts = {bits: sum(b == bits for b in schedule.bits) for bits in (4, 6, 8)}
    words: dict[str, Any] = shown(
        {
            "steps": schedule.steps,
            "delta": schedule.delta,
            "average": schedule.average_bits,
            "counts": {bits: count for bits, count in counts.items() if count},
            "skipped": sum(b is None for b in schedule.bits),
            "prompts": len(schedule.prompts),
            "last_high": schedule.details.get("last_high"),
            "weighting": schedule.details.get("weighting"),
        }
    )
    return words | {"chart": schedule_chart(schedule.bits)}


def _sample(sample: Sample) -> dict[str, Any]:
    """With its charts; the pictures are ours and stay as they are."""
    rows = [
        {"name": row.name, "note": shown(row.note), "picture": row.picture, "width": row.width, "height": row.height}
        | {"bits": schedule_chart(row.bits) if row.name == "switch" else ""}
        for row in sample.rows
    ]
    chart = line_chart(sample.errors, "relative L2 of the output", "Distance from the original at every step")
    mean = {key: sum(line) / len(line) for key, line in sample.errors.items() if line}
    return {"prompt": shown(sample.prompt), "seed": sample.seed, "steps": sample.steps, "rows": rows} | {
        "chart": chart,
        "mean": mean,
    }
