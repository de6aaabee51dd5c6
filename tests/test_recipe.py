"""Recipes: what is valid, what is refused and how, and that they survive the manifest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvdquant.errors import RecipeError
from dvdquant.recipe import (
    ATTENTION,
    GROUP_SIZES,
    RECIPES,
    SOLVERS,
    ZERO_POINTS,
    ActivationSpec,
    Recipe,
    WeightSpec,
    get_recipe,
)

GOOD = RECIPES["w4a4"].to_json()
LOOKS: list[dict[str, Any]] = [
    {},
    {"inputs": "synthetic"},
    {"inputs": "synthetic", "smooth": True},
    {"inputs": "synthetic", "smooth": True, "random_signs": True},
    {"inputs": "synthetic", "shift": True},
]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    bits = draw(st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=3, unique=True))
    group = draw(st.sampled_from(GROUP_SIZES))
    zeros = ZERO_POINTS if group == 0 else tuple(z for z in ZERO_POINTS if z != "paper")
    globs = st.lists(st.text(max_size=20), max_size=3).map(tuple)
    return Recipe(
        draw(st.text(min_size=1, max_size=20)),
        tuple(ActivationSpec(b, draw(st.sampled_from(GROUP_SIZES))) for b in bits),
        WeightSpec(group, draw(st.sampled_from(zeros)), draw(st.sampled_from(SOLVERS))),  # type: ignore[arg-type]
        rotation=draw(st.sampled_from(["auto", "full", "none", 2, 64, 192])),
        keep=draw(globs),
        force=draw(globs),
        modulation=draw(st.sampled_from(["keep", "a8"])),
        attention=draw(st.sampled_from(ATTENTION)),  # type: ignore[arg-type]
        **draw(st.sampled_from(LOOKS)),
    )


@given(recipes())
def test_json_round_trip(recipe: Recipe) -> None:
    text = json.dumps(recipe.to_json())
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(json.loads(text)) == recipe
    assert json.dumps(Recipe.from_json(text).to_json()) == text


def test_a_recipe_without_the_attention_reads_as_16_bit() -> None:
    older = {name: value for name, value in GOOD.items() if name != "attention"}
    assert Recipe.from_json(older).attention == "16"


def test_named_recipes() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert get_recipe(name) is recipe
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert recipe.activation(8).bits == 8
    with pytest.raises(RecipeError) as info:
        get_recipe("w4")
    assert all(name in str(info.value) for name in RECIPES)
    with pytest.raises(RecipeError, match="no 4-bit"):
        RECIPES["w4a8"].activation(4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"version": 3}, "version"),
    ({"version": None}, "version"),
    ({"activations": []}, "at least one"),
    ({"activations": [{"bits": 5}]}, "activations.bits"),
    ({"activations": [{"bits": 4}, {"bits": 4, "group_size": 64}]}, "same bits"),
    ({"activations": [{"bits": 4, "group_size": 48}]}, "group_size"),
    ({"activations": [{"bits": 4, "scale": "x"}]}, "unknown field"),
    ({"activations": [{}]}, "missing"),
    ({"activations": 4}, "field activations is 4"),
    ({"activations": None}, "field activations is None"),
    ({"activations": ["48"]}, "field activations[0] is '48'"),
    ({"activations": [{"bits": 4.0}]}, "field activations[0].bits is 4.0"),
    ({"activations": [{"bits": True}]}, "field activations[0].bits is True"),
    ({"weight": {"group_size": 256}}, "weight.group_size"),
    ({"weight": {"bits": 3}}, "weight.bits"),
    ({"weight": {"zero_point": "free"}}, "weight.zero_point"),
    ({"weight": {"solver": "gptq"}}, "weight.solver"),
    ({"weight": {"zero_point": "paper", "group_size": 64}}, "cannot be combined"),
    ({"weight": {"bits": 4, "extra": 1}}, "unknown field"),
    ({"weight": [1]}, "field weight is [1]"),
    ({"weight": {"zero_point": ["float"]}}, "field weight.zero_point is ['float']"),
    ({"name": 3}, "field name is 3"),
    ({"rotation": 10**30}, "rotation block 1000"),
    ({"smooth": 1}, "field smooth is 1"),
    ({"modulation": "a4"}, "modulation"),
    ({"modulation": True}, "modulation"),
    ({"attention": "int4"}, "attention"),
    ({"attention": 16}, "attention"),
    ({"rotation": "half"}, "rotation"),
    ({"rotation": 1}, "rotation"),
    ({"rotation": -64}, "rotation"),
    ({"rotation": True}, "rotation"),
    ({"rotation": 1.5}, "rotation"),
    ({"rotation": None}, "rotation"),
    ({"rotation": "regular"}, "one scale per row and codes around zero"),
    (
        {"rotation": "regular", "weight": {"zero_point": "symmetric"}, "inputs": "ignored", "smooth": False}
        | {"random_signs": False, "shift": False},
        "neither balances nor shifts",
    ),
    ({"surprise": 1}, "unknown field"),
    ({"keep": 5}, "field keep is 5"),
    ({"keep": "proj_out"}, "field keep is 'proj_out'"),
    ({"force": [3]}, "field force[0] is 3"),
    ({"version": True}, "version True"),
    ({"random_signs": True, "smooth": False}, "are those of the smooth scales"),
    ({"random_signs": "yes"}, "random_signs"),
    ({"shift": True, "inputs": "ignored", "smooth": False, "random_signs": False}, "needs to know their mean"),
    ({"shift": 2}, "shift"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[json.dumps(c) for c, _ in BAD])
def test_bad_recipes(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as info:
        Recipe.from_json({**GOOD, **change})
    assert named in str(info.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '"w4a4"', "{}", "NaN"])
def test_not_a_recipe(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_json(text)


def test_missing_fields() -> None:
    for name in ("name", "activations"):
        with pytest.raises(RecipeError, match=name):
            Recipe.from_json({k: v for k, v in GOOD.items() if k != name})


def test_globs() -> None:
    recipe = Recipe("r", (ActivationSpec(8),), keep=("blocks.0.*",), force=("blocks.0.ffn*",))
    family = ("proj_out", "*.norm")
    assert recipe.keeps("proj_out", family)
    assert recipe.keeps("a.b.norm", family)
    assert recipe.keeps("blocks.0.attn", family)
    assert not recipe.keeps("blocks.0.ffn.1", family)
    assert not recipe.keeps("blocks.1.attn", family)
    assert not recipe.keeps("BLOCKS.0.attn", family)
    more = recipe.with_globs(("blocks.1.*",), ("proj_out",))
    assert more.keeps("blocks.1.attn", family)
    assert not more.keeps("proj_out", family)
    assert recipe.keep == ("blocks.0.*",)


def test_recipes_of_version_1_are_read_under_their_old_names() -> None:
    for name in RECIPES:
        recipe = get_recipe(name)
        data = recipe.to_json()
        data["balance"], data["signs"] = data.pop("smooth"), data.pop("random_signs")
        if data["weight"]["zero_point"] == "float":
            data["weight"]["zero_point"] = "real"
        assert Recipe.from_json({**data, "version": 1}) == recipe
        with pytest.raises(RecipeError, match=r"balance|zero_point"):
            Recipe.from_json(data)
