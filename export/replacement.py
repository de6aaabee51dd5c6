"""Whether an export may take the place of the finished one in its folder, which may have taken hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvdquant.artifact.entries import Source
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.unfinished import differences
from dvdquant.checkpoint.reader import fingerprint_hint
from dvdquant.errors import OutputError, RecipeError
from dvdquant.recipe import RECIPES, Recipe
from dvdquant.text import shown

__all__ = ["check_replacement"]


def check_replacement(
    out: Path,
    previous: Manifest | None,
    source: Source,
    components: Sequence[str],
    recipe: Recipe,
    shapes: Mapping[str, Any],
    lora_rank: int = 0,
    *,
    has_options: bool = True,
) -> None:
    """Refuse to replace a finished export by one of another model, another recipe, or other sizes.

    The same export with other engines, graphs, checks or a report goes on with what is there, as does one that another
    version of dvdquant or another device makes anew.

    Args:
        out: The output folder.
        previous: The manifest of the export in it, or None.
        source: The origin of the weights of the new export.
        components: The transformers of the new export.
        recipe: The recipe of the new export.
        shapes: Its sizes and dtype, in the form of the manifest.
        lora_rank: The rank that its graphs reserve for LoRAs.
        has_options: Whether the recipe is one of options, so that the error may name those of the export that is there.

    Raises:
        OutputError: The folder holds another export; the error says what differs.
    """
    if previous is None:
        return
    found = [*_models(previous, source, components), *_recipes(previous, recipe)]
    before = {**previous.shapes, "lora_rank": previous.lora_rank}
    found += [differences(before, {**shapes, "lora_rank": lora_rank})]
    if not any(found):
        return
    other = not has_options or found[-1] or any(_models(previous, source, components))
    options = "" if other else _options_of(previous, recipe)
    goes_on = f"{options} goes on with it; or " if options else ""
    raise OutputError(
        f"{out} holds a finished export, made {previous.created}, and this is another one",
        available="; ".join(filter(None, found)),
        fix=f"{goes_on}pick another -o, or give --replace to put the new export in its place once it is whole",
    )


def _models(previous: Manifest, source: Source, components: Sequence[str]) -> list[str]:
    """Return in words where the models differ; LoRAs that are fused into the weights are a part of a model."""
    before, now = previous.source, source
    if tuple(components) != previous.components:
        return [f"transformers: {', '.join(previous.components)} before, {', '.join(components)} now"]
    if before["fingerprint"] == now["fingerprint"]:
        return []
    if fingerprint_hint(before["fingerprint"], now["fingerprint"]) is not None and before["model"] == now["model"]:
        return []  # an older release wrote another kind of fingerprint, which says nothing
    if before["model"] != now["model"]:
        return [f"model: {shown(before['model'])} before, {shown(now['model'])} now"]
    return [f"model: {shown(now['model'])} has other weights or other LoRAs now"]


def _options_of(previous: Manifest, recipe: Recipe) -> str:
    """Return the options of another named recipe, or of other widths of it, that are those of an export, or ""."""
    base = RECIPES.get(str(previous.recipe.get("name")))
    if base is None:
        return ""
    for bits in ((), *((activation.bits,) for activation in base.activations)):
        one = base.with_activations(bits)
        if (one.name, one.activations) != (recipe.name, recipe.activations) and not _recipes(previous, one):
            return f"--recipe {base.name}" + "".join(f" --activations {width}" for width in bits)
    return ""


def _recipes(previous: Manifest, recipe: Recipe) -> list[str]:
    """Return in words where the recipes differ."""
    try:
        before = Recipe.from_json(previous.recipe).to_json()
    except RecipeError:  # of a release with other rules
        before = previous.recipe
    now = recipe.to_json()
    if before == now:
        return []
    if before.get("name") != now["name"]:
        return [f"recipe: {shown(before.get('name'))} before, {shown(now['name'])} now"]
    return [f"recipe {shown(now['name'])}: {differences(before, now)}"]
