"""Write the generated tables of README.md, each between its two marks: ``python docs/tables.py``.

What GPUs execute comes from ``export/realize.py``, the recipes from ``dvdquant/recipe.py``, the options from the
commands themselves. tests/test_readme.py compares README.md with these functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from dvdquant.cli import export as export_command
from dvdquant.cli import inspect as inspect_command
from dvdquant.cli import plan as plan_command
from dvdquant.cli import run as run_command
from dvdquant.export.realize import RTX_SMS, TENSORRT_SMS, choose_realization, what_executes
from dvdquant.recipe import RECIPES, ActivationSpec, Recipe

README = Path(__file__).resolve().parents[1] / "README.md"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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
                realization = choose_realization(backend, sm, activation)
                words = what_executes(realization, activation.bits, sm, recipe, from_checkpoint=True)
                rows.setdefault((name, f"a{activation.bits}", words), []).append(sm)
    ordered = ((name, ", ".join(sms), graph, words) for (name, graph, words), sms in rows.items())
    return _table(("`--target`", "SM", "graph", "what executes"), ordered)


def recipe_table() -> str:
    """Name, weight grid, activations, rotation of every recipe, and whether it looks at inputs."""
    return _table(
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
            + ["channels balanced"] * recipe.balance
            + ["random signs"] * recipe.signs
            + ["means subtracted"] * recipe.shift
        )
        if recipe.inputs == "synthetic"
        else "ignored",
    )


def _group(activation: ActivationSpec) -> str:
    return f"{activation.group_size} channels" if activation.group_size else "token"


def export_options() -> str:
    """The options of dvdq-export."""
    return _options(export_command.main)


def inspect_options() -> str:
    """The options of dvdq-inspect."""
    return _options(inspect_command.main)


def plan_options() -> str:
    """The options of dvdq-plan."""
    return _options(plan_command.main)


def run_options() -> str:
    """The options of dvdq-run."""
    return _options(run_command.main)


def _options(command: click.Command) -> str:
    context = click.Context(command, info_name=command.name)
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            rows.append((f"`{record[0]}`", record[1]))
    return _table(("option", "what it does"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "executes": executes_table,
    "recipes": recipe_table,
    "export-options": export_options,
    "inspect-options": inspect_options,
    "plan-options": plan_options,
    "run-options": run_options,
}


def fill(text: str) -> str:
    """``text`` with every table between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"README.md must hold the marks of table {name!r} once")
        content = make()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
