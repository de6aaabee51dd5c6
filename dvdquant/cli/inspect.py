"""``dvdq-inspect``: what an export holds, how good its weights are, and whether its files are intact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvdquant import __version__
from dvdquant.clashes import Clash, refuse_clashes
from dvdquant.cli.exports.engine_copies import copies_text, sum_by_width
from dvdquant.cli.shared.common import ExamplesCommand, echo, loading, paragraphs, setup_logging, table
from dvdquant.cli.shared.paths import EXPORT, PATH, WORD
from dvdquant.errors import OutputError
from dvdquant.text import amount, json_text, shown

if TYPE_CHECKING:
    from dvdquant.artifact.entries import EngineEntry, LayerEntry
    from dvdquant.artifact.manifest import Manifest

EXAMPLES = """
# files, engines and what executes on each SM, the ten worst layers
dvdq-inspect out/tiny-wan

# check every file against the SHA-256 in the manifest
dvdq-inspect out/tiny-wan --check

# all layers, with the error of BGR beside min-max
dvdq-inspect out/tiny-wan --layers

# device memory for the weights, packed and expanded, on every GPU
dvdq-inspect out/tiny-wan --weights

# one graph as Polygraphy sees it, and whether TensorRT-RTX's parser takes it
dvdq-inspect out/tiny-wan --graph onnx/transformer_a4_qdq.onnx

# an export on the hub, and whether its files are whole
dvdq-inspect user/wan2.1-1.3b-w4a4 --check

# what every step of a clip ran, and what a step cache left out; with --html it is a part of the page
dvdq-inspect out/tiny-wan --trace clip.json

# all of it as one page, with clips of two prompts
dvdq-inspect out/tiny-wan --html tiny-wan.html --samples 2
"""


@click.command(
    cls=ExamplesCommand,
    examples=EXAMPLES,
)
@click.argument("out", type=EXPORT)
@click.option("--check", is_flag=True, help="Hash every file, compare with the manifest and each other.")
@click.option("--layers", "all_layers", is_flag=True, help="Every layer, not only the ten worst.")
@click.option(
    "--graph",
    type=WORD,
    metavar="PATH",
    help="One ONNX file by Polygraphy; of a QDQ graph also what TensorRT-RTX would refuse.",
)
@click.option(
    "--html",
    "page",
    type=PATH,
    metavar="PATH",
    help="Write the report of the export as one HTML page.",
)
@click.option(
    "--trace",
    type=PATH,
    metavar="PATH",
    help="Show the steps of a run, from the trace that dvdq-run wrote: bits, reasons, what a step cache skipped.",
)
@click.option(
    "--weights",
    is_flag=True,
    help="What each GPU holds of the weights, packed and expanded, and the largest tensors in 16 bit.",
)
@click.option(
    "--samples",
    type=click.IntRange(0, 16),
    default=0,
    show_default=True,
    help="Prompts the page shows clips of; for models with a prompt table.",
)
@click.option(
    "--revision", type=WORD, metavar="REVISION", help="Branch, tag or commit, where OUT is user/name on the hub."
)
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
@click.option("-v", "--verbose", count=True)
@click.version_option(__version__, prog_name="dvdq-inspect")
def main(
    out: Path,
    check: bool,
    all_layers: bool,
    graph: str | None,
    page: Path | None,
    trace: Path | None,
    weights: bool,
    samples: int,
    revision: str | None,
    as_json: bool,
    verbose: int,
) -> None:
    """Show the export OUT, a folder or user/name on the hub: sizes, graphs, engines and what they execute, weight errors."""
    setup_logging(verbose, "text")
    from dvdquant.artifact.manifest import load_manifest
    from dvdquant.hub.locate import locate_export

    refuse_clashes(
        _clashes(graph, page, trace, all_layers=all_layers, weights=weights, samples=samples, as_json=as_json)
    )
    out = locate_export(out, revision)
    manifest = load_manifest(out)
    if page is not None:
        loading("PyTorch and the report")
    elif weights:
        loading("PyTorch and the plan of the layers", "json" if as_json else "text")
    elif graph is not None or check:
        loading("ONNX", module="onnx")
    elif trace is not None:
        loading("the report's reader")
    if page is not None:
        _write_page(out, manifest, page, samples, trace)
        echo(f"{page} written", err=as_json)  # stdout is the JSON's alone
    if graph is not None:
        echo(_graph_summary(out, manifest, graph))
    elif weights:
        echo(_weights(out, manifest, as_json))
    elif trace is not None and page is None:
        echo(_trace(trace, manifest))
    elif as_json:
        echo(manifest.to_json().rstrip())
    elif page is None or all_layers:
        echo(summary_text(out, manifest, all_layers))
    if check:
        echo(_check_files(out, manifest), err=as_json)


def _clashes(
    graph: str | None,
    page: Path | None,
    trace: Path | None,
    *,
    all_layers: bool,
    weights: bool,
    samples: int,
    as_json: bool,
) -> list[Clash]:
    """Return the pairs of options of which one says that the other has nothing to show."""
    return [
        Clash(
            samples and page is None,
            "--samples without --html",
            fix="give --html PATH too: samples are a part of the page",
        ),
        Clash(graph and as_json, "--graph shows one graph, as text, so --json does not apply"),
        Clash(graph and all_layers, "--graph shows one graph, as text, so --layers does not apply"),
        Clash(weights and graph, "--weights is a view of its own, so --graph does not apply"),
        Clash(weights and page, "--weights is a view of its own, so --html does not apply"),
        Clash(weights and all_layers, "--weights is a view of its own, so --layers does not apply"),
        Clash(trace and graph, "--trace shows a run, so --graph does not apply"),
        Clash(trace and weights, "--trace shows a run, so --weights does not apply"),
        Clash(trace and as_json, "--trace shows a run, so --json does not apply"),
        Clash(trace and all_layers and page is None, "--trace shows a run, so --layers does not apply"),
    ]


def _trace(path: Path, manifest: Manifest) -> str:
    from dvdquant.deploy.report.run_trace import read_trace, trace_lines

    return "\n".join(trace_lines(read_trace(path, manifest))).rstrip()


def _write_page(out: Path, manifest: Manifest, page: Path, samples: int, trace: Path | None) -> None:
    from dvdquant.deploy.report.page import check_place, collect, write_report
    from dvdquant.deploy.report.run_trace import read_trace
    from dvdquant.system.progress import Progress

    check_place(page, out, manifest)
    runs = [] if trace is None else read_trace(trace, manifest)
    write_report(page, collect(out, manifest, Progress("text"), samples=samples, runs=runs))


def _weights(out: Path, manifest: Manifest, as_json: bool) -> str:
    from dvdquant.cli.exports.held_text import held_json, held_text
    from dvdquant.deploy.artifact import Artifact

    artifact = Artifact.of(out, manifest)
    return json_text(held_json(artifact), indent=1) if as_json else held_text(artifact)


def _graph_summary(out: Path, manifest: Manifest, graph: str) -> str:
    from dvdquant.export.engines.polygraphy_tools import onnx_summary, rtx_unsupported

    targets = {g["path"]: g["target"] for g in manifest.graphs}
    if graph not in targets:
        raise OutputError(f"the export has no graph {graph!r:.200}", available=targets)
    path = (out / graph).absolute()
    lines = [onnx_summary(path)]
    if targets[graph] == "onnx":
        # A QuantLinear graph is for the plugin; whether TensorRT-RTX takes it says nothing.
        refused = rtx_unsupported(path)
        lines += [
            "",
            "TensorRT-RTX's parser takes the whole graph" if not refused else "TensorRT-RTX's parser refuses:",
        ]
        lines += [f"  {operator} {name}: {reason}" for operator, name, reason in refused]
    return "\n".join(lines)


def _check_files(out: Path, manifest: Manifest) -> str:
    from dvdquant.artifact.verify_files import verify_files
    from dvdquant.export.verify.links import check_links, unlisted_files
    from dvdquant.system.progress import Progress

    total = sum(entry["bytes"] for entry in manifest.files.values())
    with Progress("text").stage("check", total, "B") as stage:
        verify_files(out, manifest, progress=stage.update)
    check_links(out, manifest.files, manifest.graphs, manifest.engines, manifest.components, manifest.layers)
    inside, outside = unlisted_files(out, manifest.files)
    if inside:
        raise OutputError(
            f"{out} holds {len(inside)} files of graphs or engines that its manifest does not list: "
            + ", ".join(shown(name) for name in inside[:5]),
            available=f"the {len(manifest.files)} files it lists are as they were written",
            fix="remove them, or move them out of the export",
        )
    lines = [f"{len(manifest.files)} files match the manifest ({amount(total)}) and fit together"]
    if outside:
        lines.append(f"not of the export: {', '.join(shown(name) for name in outside[:5])}" + " …" * (len(outside) > 5))
    return "\n".join(lines)


def summary_text(out: Path, manifest: Manifest, all_layers: bool) -> str:
    """Return what the command says of an export.

    Args:
        out: The export folder, as the user named it.
        manifest: Its manifest.
        all_layers: Whether every layer is listed, or those of the largest errors alone.
    """
    from dvdquant.artifact.provenance import lora_room, lora_text, sampling_sentence, source_text
    from dvdquant.artifact.verified import verified_text
    from dvdquant.ops.attention.libraries import ladders_text
    from dvdquant.recipe import error_name, fitted_text, looks_at_inputs

    # 1. The model, the recipe, the files.
    recipe = manifest.recipe
    inputs = ["inputs predicted" if looks_at_inputs(recipe) else "inputs ignored", *fitted_text(recipe)]
    weight = recipe["weight"]
    sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    shapes = ", ".join(f"{axis} {_range(manifest.shapes[axis])}" for axis in ("frames", "height", "width"))
    lines = [
        f"{out}: {manifest.source['class_name']} from {manifest.source['model']}",
        *([f"source: {words}"] if (words := source_text(manifest.source)) else []),
        f"exported {manifest.created} by dvdquant {manifest.dvdquant_version}; "
        + ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        f"recipe {recipe['name']}: rotation {recipe['rotation']}, weight groups {weight['group_size'] or 'row'}, "
        f"zero-point {weight['zero_point']}, solver {weight['solver']}, {', '.join(inputs)}",
        *lora_text(manifest.lora),
        *lora_room(manifest.lora_rank),
        *([sampling_sentence(manifest.sampling)] if manifest.sampling else []),
        *ladders_text(recipe["attention"]),
        "before quantized layers, PyTorch sessions: norm, modulation, residual, GELU in the layers' kernels with --compile, on "
        "GPUs that the kernels are built for; --no-fuse leaves them apart",
        verified_text(manifest.verified),
        f"latent sizes: {shapes}; {manifest.shapes['text_tokens']} text tokens, {manifest.shapes['dtype']}",
        "",
        table(("file", "size"), [(name, amount(size)) for name, size in sorted(sizes.items())], right=(1,)),
    ]
    # 2. The engines.
    if manifest.engines:
        rows = [(e["path"], ", ".join(e["sm"]), _needs(e)) for e in manifest.engines]
        lines += ["", table(("engine", "SM", "needs"), rows), ""]
        lines += [
            paragraphs([(f"a{e['act_bits']} on SM {', '.join(e['sm'])}", e["executes"]) for e in manifest.engines])
        ]
        lines += [words] if (words := _copies(manifest)) else []
    fused = sorted({n for e in (*manifest.engines, *manifest.builds) if (n := e.get("fused_layers"))})
    if fused:
        counts = " or ".join(map(str, fused))
        lines += [f"TensorRT engines, one plugin node each: {counts} layers with what comes before them (--fuse)"]
    # 3. The layers.
    lines += ["", _layer_table(list(manifest.layers), all_layers, error_name(manifest.recipe))]
    lines += [
        f"{len(manifest.kept)} linear layers in 16 bit: {', '.join(manifest.kept[:6])}{' …' * (len(manifest.kept) > 6)}"
    ]
    return "\n".join(lines)


def _copies(manifest: Manifest) -> str:
    """Return what engines of both widths take beside the layers in 16 bit, or "" where there is one."""
    engines = [engine for engine in manifest.engines if engine["precision"] != "plugin"]
    held = sum_by_width((e["sm"], e["act_bits"], manifest.files[e["path"]]["bytes"]) for e in engines)
    sixteen = sum(2 * entry["features_in"] * entry["features_out"] for entry in manifest.layers)
    return copies_text(held, sixteen, "the quantized layers")


def _needs(engine: EngineEntry) -> str:
    """Return the library that runs an engine, with its release."""
    libraries = " ".join(f"{name} {version}" for name, version in engine["versions"].items())
    return libraries + (", or its lean runtime" if engine.get("version_compatible") else "")


def _range(axis: list[int]) -> str:
    low, best, high = axis
    return str(best) if low == high else f"{low}..{high} (tuned for {best})"


def _layer_table(layers: list[LayerEntry], all_layers: bool, error: str) -> str:
    known = [entry for entry in layers if entry["relative_mse"] is not None]
    listed = layers if all_layers else sorted(known, key=_error, reverse=True)[:10]
    rows: list[tuple[Any, ...]] = []
    for e in listed:
        ours, minmax = e["relative_mse"], e["relative_mse_minmax"]
        better = f"{100 * (1 - ours / minmax):.0f} %" if ours is not None and minmax else "-"
        texts = ["-" if value is None else f"{value:.5f}" for value in (ours, minmax)]
        rows.append((e["name"], f"{e['features_in']} → {e['features_out']}", e["rotation_block"], *texts, better))
    title = f"all {len(layers)} layers" if all_layers else f"worst {len(listed)} of {len(layers)} layers"
    header = (title, "K → N", "block", "relative MSE", "min-max", "less")
    return table(header, rows, right=(2, 3, 4, 5)) + f"\nrelative MSE: {error}"


def _error(entry: LayerEntry) -> float:
    return entry["relative_mse"] or 0.0


if __name__ == "__main__":
    main()
