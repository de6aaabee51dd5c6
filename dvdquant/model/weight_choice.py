"""Which layers of a model a GPU holds expanded: none, all, or as few as keep the cost of the packed ones small.

A layer that is held expanded takes more memory, and saves what its expansion takes of every step. Where expanding all layers
takes more of a step than :data:`.COST_LIMIT`, ``auto`` holds some of them expanded: those that save most for a byte come
first, and among them the large ones, since what a small weight is expanded into is likelier to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from dvdquant.hardware.weights import COST_LIMIT, HeldForm, WeightPolicy
from dvdquant.model.held_weights import HeldLayer, HeldWeights

__all__ = ["WeightChoice", "choose_weights", "expand_named"]


@dataclass(frozen=True)
class WeightChoice:
    """The form in which a GPU holds the weights of one transformer.

    Args:
        form: ``packed``, ``expanded``, or ``mixed``, where some layers are expanded.
        expanded: The names of the layers that are expanded.
        share: The part of the quantized weights that they are, by packed bytes.
        nbytes: What is held in all.
        beside: What of it the plugin holds beside an engine's inputs; 0 for a PyTorch session.
        cost: The modelled share of the slowest width's step that expanding the others takes; 0 without a size.
        made: What of all is made in the first passes: the quantized layers, or what the plugin holds beside its inputs.
    """

    form: HeldForm
    expanded: frozenset[str]
    share: float
    nbytes: int
    beside: int
    cost: float
    made: int = 0


def choose_weights(
    held: HeldWeights, policy: WeightPolicy, room: int | None = None, plugin: bool = False
) -> WeightChoice:
    """Return how weights are held under a policy.

    ``auto`` is packed where that costs a step :data:`.COST_LIMIT` at most. Else it expands the fewest layers that leave so
    much, as far as they fit.

    Args:
        held: The bytes of the transformer on the GPU.
        policy: One of :data:`dvdquant.hardware.weights.WEIGHTS`.
        room: The free bytes of the device, if known.
        plugin: Whether engines with the TensorRT plugin hold them.
    """
    if policy == "packed":
        chosen: list[HeldLayer] = []
    elif policy == "expanded":
        chosen = list(held.layers)
    else:
        chosen = _enough(held, room, plugin)
    choice = expand_named(held, [layer.name for layer in chosen], plugin)
    return replace(choice, form="expanded") if policy == "expanded" else choice


def expand_named(held: HeldWeights, names: Collection[str], plugin: bool = False) -> WeightChoice:
    """Return how weights are held where the layers of some names are expanded, and the others stay packed.

    Args:
        held: The bytes of the transformer on the GPU.
        names: Names of layers; those of other transformers change nothing.
        plugin: Whether engines with the TensorRT plugin hold them.
    """
    chosen = [layer for layer in held.layers if layer.name in names]
    expanded = frozenset(layer.name for layer in chosen)
    beside = (
        sum(layer.plugin_expanded if layer.name in expanded else layer.rows for layer in held.layers) if plugin else 0
    )
    packed = held.nbytes("packed", plugin)
    nbytes = packed + sum(layer.added(plugin) for layer in chosen)
    # A layer that no path expands is the same in both forms.
    rest = [layer for layer in held.layers if layer.name not in expanded and layer.scratch]
    form: HeldForm = "packed" if not expanded else "mixed" if rest else "expanded"
    return WeightChoice(
        form,
        expanded,
        sum(layer.packed for layer in chosen) / max(1, held.packed),
        nbytes,
        beside,
        _cost(held, expanded),
        beside if plugin else nbytes - held.kept,
    )


def _cost(held: HeldWeights, expanded: frozenset[str]) -> float:
    layers = tuple(layer for layer in held.layers if layer.name not in expanded)
    return HeldWeights(0, layers, held.pace).cost


def _enough(held: HeldWeights, room: int | None, plugin: bool) -> list[HeldLayer]:
    """Return the layers to expand, in turn, until what is left costs little or nothing more fits."""
    traffic, pace = dict(held.traffic), dict(held.pace)

    def cost(bits: int) -> float:
        return traffic[bits] / pace[bits]

    if not pace or held.cost <= COST_LIMIT:
        return []
    slowest = max(pace, key=cost)
    size = held.nbytes("packed", plugin)

    def order(layer: HeldLayer) -> tuple[float, int, str]:
        moved = dict(layer.traffic)[slowest]
        return -moved / max(1, layer.added(plugin)), -moved, layer.name

    chosen = []
    for layer in sorted((layer for layer in held.layers if any(moved for _, moved in layer.traffic)), key=order):
        if max(map(cost, pace)) <= COST_LIMIT:
            break
        if room is not None and size + layer.added(plugin) > room:
            continue
        chosen.append(layer)
        size += layer.added(plugin)
        for bits, moved in layer.traffic:
            traffic[bits] -= moved
    # The last ones may save more than was left to save: then some of the first were not needed.
    for layer in list(chosen):
        if all((traffic[bits] + moved) / pace[bits] <= COST_LIMIT for bits, moved in layer.traffic if bits in pace):
            chosen.remove(layer)
            for bits, moved in layer.traffic:
                traffic[bits] += moved
    return chosen
