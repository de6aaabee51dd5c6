"""Which layers are held expanded: the fewest that keep the cost of packed ones small, as far as they fit."""

from __future__ import annotations

import pytest

from benchmarks.held_weights import plan_of, sizes_of
from dvdquant.hardware.weights import COST_LIMIT
from dvdquant.model.held_weights import HeldLayer, HeldWeights, held_weights
from dvdquant.model.weight_choice import choose_weights


def layer(name: str, size: int, moved: int | None = None) -> HeldLayer:
    """A layer of ``size`` packed bytes whose other form is twice as large; at 4 bits nothing of it is expanded."""
    traffic = ((4, 0), (8, 3 * size if moved is None else moved))
    return HeldLayer(name, size, 2 * size, size, 1, 2 * size, 2 * size, traffic)


def held(cost: float) -> HeldWeights:
    layers = (layer("small", 10), layer("large", 60), layer("middle", 30))
    return HeldWeights(100, layers, ((4, 1e9), (8, 300 / cost)), shared=60, constants=50)


def test_what_a_policy_chooses() -> None:
    cheap, dear = held(COST_LIMIT), held(2 * COST_LIMIT)
    assert cheap.cost == pytest.approx(COST_LIMIT)
    for policy, form, nbytes in (("auto", "packed", 200), ("packed", "packed", 200), ("expanded", "expanded", 300)):
        choice = choose_weights(cheap, policy)  # type: ignore[arg-type]
        assert (choice.form, choice.nbytes, choice.beside) == (form, nbytes, 0)
    assert choose_weights(cheap, "expanded").cost == 0
    # Half of the bytes have to go: the large layer alone is more than that.
    mixed = choose_weights(dear, "auto")
    assert (mixed.form, mixed.expanded, mixed.nbytes) == ("mixed", {"large"}, 260)
    assert mixed.share == pytest.approx(0.6)
    assert mixed.cost == pytest.approx(0.4 * 2 * COST_LIMIT)
    # What the plugin holds beside its inputs.
    plugin = choose_weights(dear, "auto", plugin=True)
    assert (plugin.expanded, plugin.beside, plugin.nbytes) == ({"large"}, 122, 332)
    assert choose_weights(dear, "packed", plugin=True).nbytes == dear.nbytes("packed", plugin=True) == 213
    assert choose_weights(dear, "expanded", plugin=True).nbytes == dear.nbytes("expanded", plugin=True) == 410


def test_what_does_not_fit_stays_packed() -> None:
    dear = held(2 * COST_LIMIT)
    tight = choose_weights(dear, "auto", room=259)
    assert (tight.form, tight.expanded, tight.nbytes) == ("mixed", {"middle", "small"}, 240)
    assert COST_LIMIT < tight.cost < dear.cost
    assert choose_weights(dear, "auto", room=209).form == "packed"
    assert choose_weights(dear, "auto", room=260).expanded == {"large"}
    assert choose_weights(held(1000), "auto").form == "expanded"


def test_layers_that_save_most_for_a_byte_come_first() -> None:
    layers = (layer("large", 60), layer("dear", 10, moved=300))
    assert choose_weights(HeldWeights(0, layers, ((8, 9600.0),)), "auto").expanded == {"dear"}
    # Nothing is paid for a layer that PyTorch computes, and it is never chosen.
    alone = HeldWeights(0, (HeldLayer("fp32", 5, 5, 5), layer("one", 10)), ((8, 1.0),))
    choice = choose_weights(alone, "auto")
    assert (choice.form, choice.expanded) == ("expanded", {"one"})


@pytest.mark.parametrize(("name", "sm"), [("ltx-video-2b", 80), ("ltx-video-2b", 110)])
def test_a_published_model_pays_little_and_holds_what_it_must(name: str, sm: int) -> None:
    plan = plan_of(name, "w4a4-g64")
    counted = held_weights(plan, sm, (4, 8), sizes_of(plan))
    assert counted.cost > COST_LIMIT
    for plugin in (False, True):
        choice = choose_weights(counted, "auto", plugin=plugin)
        assert choice.form == "mixed"
        assert COST_LIMIT * 0.95 < choice.cost <= COST_LIMIT
        most = counted.nbytes("expanded", plugin)
        least = counted.nbytes("packed", plugin)
        # Every byte more saves alike, so what is held grows as the cost falls.
        grown = (choice.nbytes - least) / (most - least)
        assert grown == pytest.approx(1 - choice.cost / counted.cost, abs=0.02)
        assert choice.expanded <= {spec.name for spec in plan.layers}
