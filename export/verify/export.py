"""``--verify``: the graphs of all components of an export, one transformer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dvdquant.artifact.manifest import GraphEntry, LayerEntry
from dvdquant.errors import ExportError
from dvdquant.export.verify.graph import GraphCheck, Verifier, load_quantized
from dvdquant.export.verify.layers import choose_layers
from dvdquant.model.families import Sizes
from dvdquant.model.plan import ModelPlan
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_io import TensorInfo

__all__ = ["verify_export"]

WORST = 4  # layers by weight error that are always judged


def verify_export(
    tree: Path,
    plans: Mapping[str, ModelPlan],
    graphs: Iterable[GraphEntry],
    tensors: Callable[[str], Mapping[str, tuple[str, TensorInfo]]],
    layers: Sequence[LayerEntry],
    sizes: Sizes,
    progress: Progress,
) -> list[GraphCheck]:
    """Every graph in ONNX Runtime: its layers one by one, what lies between them, and the whole of it.

    Graphs with ranges of sizes run at their smallest.

    Args:
        tree: folder of the export. plans: by component.
        tensors: where the packed tensors of a component are, see :func:`dvdquant.export.verify.graph.load_quantized`.
        layers: the manifest's table of weight errors.

    Raises:
        ExportError: a graph does not run, or something in it is out of bounds.
    """
    known = list(graphs)
    of = {name: [g for g in known if Path(g["path"]).name.startswith(f"{name}_a")] for name in plans}
    worst = _worst(plans, layers)
    total = sum(len(of[name]) * (len(choose_layers(plan.layers, worst[name])) + 1) for name, plan in plans.items())
    checks = []
    with progress.stage("verify", total, "check") as stage:
        for name, plan in plans.items():
            model = load_quantized(plan, tensors(name), tree, plan.recipe.activations[0].bits)
            verifier = Verifier(plan, sizes, model, which="min", worst=worst[name])
            for entry in of[name]:
                stage.update(0, entry["path"])
                check = verifier.check(tree / entry["path"], entry["act_bits"], lambda done: stage.update(1, done))
                checks.append(check)
                if not check.passed:
                    raise ExportError(
                        f"{entry['path']}: {'; '.join(check.faults())}",
                        fix="this is a fault of the exporter: report it with the model's config.json",
                    )
            del verifier, model
    return checks


def _worst(plans: Mapping[str, ModelPlan], layers: Sequence[LayerEntry]) -> dict[str, list[str]]:
    """Return the layers of each transformer with the largest weight errors.

    The table lists one transformer after the other: two of one model have layers of the same names.
    """
    worst, first = {}, 0
    for component, plan in plans.items():
        entries = layers[first : first + len(plan.layers)]
        first += len(plan.layers)
        errors = {entry["name"]: entry["relative_mse"] or 0.0 for entry in entries}
        worst[component] = sorted(errors, key=lambda name: -errors[name])[:WORST]
    return worst
