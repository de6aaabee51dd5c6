"""Modulation linears: kept in 16 bit by default, or packed with activations of at least 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dvdquant.model.plan import plan_model, quantized_skeleton
from dvdquant.model.quantized_model import quant_linears, set_activation
from dvdquant.recipe import ActivationSpec, Recipe, get_recipe
from tests.support.tiny_models import COGVIDEOX, COGVIDEOX_15, EVEN, HUNYUAN, WAN


def packed(name: str = "w4a4") -> Recipe:
    return replace(get_recipe(name), modulation="a8")


@pytest.mark.parametrize(("config", "names"), [(HUNYUAN, 3), (COGVIDEOX, 4)])
def test_kept_by_default_and_packed_on_request(config: dict[str, object], names: int) -> None:
    kept = plan_model(config, get_recipe("w4a4"), torch.bfloat16)
    every = plan_model(config, packed(), torch.bfloat16)
    new = [s for s in every.layers if s.name not in {k.name for k in kept.layers}]
    assert len(new) == names
    assert all(s.floor == ActivationSpec(8) for s in new)
    assert all(set(s.members) <= set(kept.kept_linears) for s in new)
    assert all(s.floor is None for s in kept.layers)


def test_wan_has_none() -> None:
    assert (
        plan_model(WAN, packed(), torch.bfloat16).layers == plan_model(WAN, get_recipe("w4a4"), torch.bfloat16).layers
    )


def test_floor_is_the_recipes_own_8_bit_grid() -> None:
    recipe = Recipe("x", (ActivationSpec(4, 64), ActivationSpec(8, 128)), modulation="a8")
    assert recipe.modulation_activation == ActivationSpec(8, 128)
    assert replace(recipe, activations=(ActivationSpec(4),)).modulation_activation == ActivationSpec(8)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_four_bit_graph_runs_them_with_eight() -> None:
    from dvdquant.export.passes.set_activation import set_activation as set_nodes
    from tests.support.traces import traced

    plan = plan_model(COGVIDEOX_15, packed("paper"), torch.float16)
    model = quantized_skeleton(plan, 4)
    bits = {name: layer.act_bits for name, layer in quant_linears(model).items()}
    expected = {s.name: 8 if s.floor else 4 for s in plan.layers}
    assert bits == expected
    set_activation(model, ActivationSpec(8))
    assert {layer.act_bits for layer in quant_linears(model).values()} == {8}

    graph = traced(plan, EVEN)
    specs = {s.name: s for s in plan.layers}
    asked = plan.recipe.activation(4)
    set_nodes(graph, asked, lambda layer: specs[layer].activation(asked))
    nodes = {
        (n.inputs[1].name or "").removesuffix(".weight"): n.attributes["act_bits"].as_int()
        for n in graph.graph
        if n.op_type == "QuantLinear" and n.inputs[1] is not None
    }
    assert nodes == expected
