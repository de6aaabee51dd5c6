"""The ``--verify`` of the graphs of all components of an export, one transformer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from dvdquant.artifact.entries import GraphEntry, LayerEntry
from dvdquant.errors import ExportError
from dvdquant.export.verify.graph import GraphCheck, Verifier, change_text, load_quantized
from dvdquant.export.verify.layers import choose_layers
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import TensorInfo

__all__ = ["verify_export", "worst_layers"]

WORST = 4  # this many layers with the largest weight errors are always judged


def verify_export(
    tree: Path,
    plans: Mapping[str, ModelPlan],
    graphs: Iterable[GraphEntry],
    tensors: Callable[[str], Mapping[str, tuple[str, TensorInfo]]],
    layers: Sequence[LayerEntry],
    sizes: Sizes,
    progress: Progress,
    changes: Collection[tuple[bool, bool]] = (),
) -> list[GraphCheck]:
    """Run every graph in ONNX Runtime and judge its layers, the places between them, and the whole of it.

    Graphs with ranges of sizes run at their smallest sizes.

    Args:
        tree: The folder of the export.
        plans: The plan of each transformer, by component.
        graphs: The entries of the graphs in the manifest.
        tensors: A function from a component to the places of its packed tensors; see
            :func:`dvdquant.export.verify.graph.load_quantized`.
        layers: The manifest's table of weight errors.
        sizes: The sizes of the graphs, in latent units.
        progress: The place that stages report to.
        changes: How engines, here or on the device, run the graphs: whether with attention in FP8, and whether with layers
            fused with what comes before them. Each graph that engines come from is checked so, too.

    Returns:
        A check for every graph.

    Raises:
        ExportError: A graph does not run, or something in it is out of bounds.
    """
    # 1. Find the graphs of every component and the layers to judge.
    known = list(graphs)
    of = {name: [g for g in known if Path(g["path"]).name.startswith(f"{name}_a")] for name in plans}
    worst = worst_layers(plans, layers)
    # 2. Check the graphs of one component after another.
    runs = {name: [(entry, False, False) for entry in of[name]] for name in plans}
    more = sorted(change for change in changes if any(change))
    for name in plans:
        runs[name] += [(entry, *how) for how in more for entry in of[name] if entry["target"] == "tensorrt"]
    total = sum(len(runs[name]) * (len(choose_layers(plan.layers, worst[name])) + 1) for name, plan in plans.items())
    checks = []
    with progress.stage("verify", total, "check") as stage:
        for name, plan in plans.items():
            model = load_quantized(plan, tensors(name), tree, plan.recipe.activations[0].bits)
            verifier = Verifier(plan, sizes, model, which="min", worst=worst[name])
            for entry, in_fp8, as_fused in runs[name]:
                stage.update(0, entry["path"])
                if (in_fp8 or as_fused) and not verifier.whole:
                    progress.say(
                        f"{entry['path']} {change_text(in_fp8, as_fused)}: not checked, {verifier.tokens} tokens are too many "
                        "to run here"
                    )
                    stage.update(len(verifier.chosen) + 1)
                    continue
                check = verifier.check(
                    tree / entry["path"], entry["act_bits"], lambda done: stage.update(1, done), in_fp8, as_fused
                )
                checks.append(check)
                if not check.passed:
                    raise ExportError(
                        f"{entry['path']}: {'; '.join(check.faults())}",
                        fix="this is a fault of the exporter: report it with the model's config.json",
                    )
            del verifier, model
    return checks


def worst_layers(plans: Mapping[str, ModelPlan], layers: Sequence[LayerEntry]) -> dict[str, list[str]]:
    """Return the layers of each transformer with the largest weight errors.

    The table lists one transformer after the other: two of one model have layers of the same names.

    Args:
        plans: The plan of each transformer, by component.
        layers: The entries of all their layers, as the manifest has them.
    """
    worst, first = {}, 0
    for component, plan in plans.items():
        entries = layers[first : first + len(plan.layers)]
        first += len(plan.layers)
        errors = {entry["name"]: entry["relative_mse"] or 0.0 for entry in entries}
        worst[component] = sorted(errors, key=lambda name: -errors[name])[:WORST]
    return worst
