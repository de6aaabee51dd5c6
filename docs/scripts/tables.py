"""The tables of the documentation that come from the code: what GPUs execute, the recipes, the fields of a manifest.

``python docs/scripts/tables.py`` prints them. The site takes them in while it is built (hooks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvdquant.artifact import entries
from dvdquant.artifact.manifest import Manifest
from dvdquant.export.engines.precision import RTX_SMS, TENSORRT_SMS, choose_precision, what_executes
from dvdquant.hardware.listing import HEADER, SHORT_HEADER, gpu_rows, short_rows
from dvdquant.hardware.shared_memory import SEEN
from dvdquant.hardware.weights import RATES
from dvdquant.recipe import RECIPES, ActivationSpec, Recipe
from dvdquant.system.files import FileEntry
from dvdquant.text import markdown_table


def executes_table() -> str:
    """Builder, SMs, graph and what executes, for recipe w4a4; SMs with the same words share a row."""
    recipe = RECIPES["w4a4"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for backend, name, sms in (
        ("tensorrt_rtx", "`rtx`", RTX_SMS),
        ("tensorrt", "`tensorrt` (with the plugin)", TENSORRT_SMS),
    ):
        for activation in recipe.activations:
            for sm in sms:
                precision = choose_precision(backend, sm, activation)
                words = what_executes(precision, activation.bits, sm, recipe, from_checkpoint=True)
                rows.setdefault((name, f"a{activation.bits}", words), []).append(sm)
    ordered = ((name, ", ".join(sms), graph, words) for (name, graph, words), sms in rows.items())
    return markdown_table(("`--target`", "SM", "graph", "what executes"), ordered)


def recipe_table() -> str:
    """Name, weight grid, activations, rotation of every recipe, and whether it looks at inputs."""
    return markdown_table(
        ("recipe", "weights, 4 bits", "activations", "rotation", "inputs"), map(_recipe_row, RECIPES.values())
    )


def _recipe_row(recipe: Recipe) -> tuple[str, ...]:
    weight = recipe.weight
    grid = f"scale per {weight.group_size} inputs" if weight.group_size else "scale per row"
    activations = ", ".join(f"a{a.bits} per {_group(a)}" for a in recipe.activations)
    return (
        f"`{recipe.name}`",
        f"{grid}; {weight.zero_point} zero-point; {weight.solver}",
        activations,
        str(recipe.rotation),
        "; ".join(
            ["predicted"]
            + ["channels balanced"] * recipe.smooth
            + ["random signs"] * recipe.random_signs
            + ["means subtracted"] * recipe.shift
        )
        if recipe.inputs == "synthetic"
        else "ignored",
    )


def _group(activation: ActivationSpec) -> str:
    return f"{activation.group_size} channels" if activation.group_size else "token"


def schema_tables() -> str:
    """Return the fields of a manifest and of its entries, with their types."""
    parts = []
    records: dict[str, Any] = {
        "The manifest": Manifest,
        "`source`": entries.Source,
        "An entry of `files`": FileEntry,
        "An entry of `layers`": entries.LayerEntry,
        "An entry of `graphs`": entries.GraphEntry,
        "An entry of `engines`": entries.EngineEntry,
    }
    for title, record in records.items():
        rows = [(f"`{name}`", f"`{kind}`") for name, kind in record.__annotations__.items()]
        parts += [f"### {title}", "", _prose(record.__doc__ or ""), "", markdown_table(("field", "type"), rows), ""]
    return "\n".join(parts)


def _prose(docstring: str) -> str:
    """Return the text of a docstring before its sections, as Markdown."""
    text = docstring.split("Args:")[0]
    return " ".join(text.split()).replace("``", "`").replace(":func:", "")


def gpu_table() -> str:
    """Return every GPU of the table with what an export for it is."""
    return markdown_table(HEADER, (row.cells() for row in gpu_rows()))


def short_gpu_table() -> str:
    """Return a row for every compute capability; the README holds it as it is."""
    return markdown_table(SHORT_HEADER, short_rows())


def rate_table() -> str:
    """Return the rates of the cards that the cost of packed weights is modelled with, and where they are from."""
    header = ("SM", "card", "INT8, TOPS, dense", "memory, GB/s", "operations a byte", "where from")
    rows = (
        (f"{sm / 10:.1f}", r.card, f"{r.operations:g}", f"{r.bandwidth:g}", str(r.per_byte), r.source)
        for sm, r in RATES.items()
    )
    return markdown_table(header, rows)


def seen_table() -> str:
    """Return what the systems of modules with shared memory see of it, and who says so."""
    rows = (
        (each.module, f"{each.nbytes / 2**30:.1f}", f"{each.nbytes / (gib << 30):.3f}", each.source)
        for (_, gib), each in SEEN.items()
    )
    return markdown_table(("module", "seen, GiB", "of what it is sold with", "where from"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "executes": executes_table,
    "gpus": gpu_table,
    "rates": rate_table,
    "recipes": recipe_table,
    "seen": seen_table,
}


if __name__ == "__main__":
    for make in (*TABLES.values(), short_gpu_table, schema_tables):
        print(make(), end="\n\n")
