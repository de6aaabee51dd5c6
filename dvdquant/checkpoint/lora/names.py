"""The names that other tools give the layers of a transformer, and where each lies in the checkpoint.

The names are those of :mod:`dvdquant.checkpoint.formats`. Where the authors keep several layers in one (queries, keys and
values), each has its rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dvdquant.checkpoint.formats.hunyuan_video import SWAPPED
from dvdquant.checkpoint.formats.names import Names
from dvdquant.checkpoint.formats.translate import SCHEMES

__all__ = ["Place", "aliases"]

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Place:
    """The place of another tool's layer in the checkpoint.

    Args:
        weight: Name of the tensor; a table without ``.weight`` is one, too.
        bias: Name of its bias, None where it has none.
        rows: [start, stop) of the other tool's output rows, in the order of ours; None is all of them as they are.
        height: Rows that the other tool's layer has.
        original: Whether it is the authors' name rather than that of diffusers.
    """

    weight: str
    bias: str | None
    rows: Rows | None
    height: int
    original: bool


def aliases(class_name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Place, ...]]:
    """Return every name a layer of the transformer is known by, and where it lies.

    Args:
        class_name: The diffusers class.
        shapes: The shape of every tensor of the checkpoint, by name.
    """
    modules = dict(_modules(shapes))
    found: dict[str, tuple[Place, ...]] = {name: (place,) for name, place in modules.items()}
    known = next((scheme.names for scheme in SCHEMES if scheme.class_name == class_name), Names())
    swapped = {ours for theirs in (SWAPPED,) for ours in known.ours(theirs)}
    for module, place in modules.items():
        for name in known.theirs(module):
            half = place.height // 2
            rows = ((half, place.height), (0, half)) if module in swapped else place.rows
            _add(found, name, (replace(place, rows=rows, original=True),))
        for name, parts in known.joined(module):
            if all(part in modules for part in parts):
                _add(found, name, _joined([modules[part] for part in parts]))
    return found


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in shapes:
            continue
        bias = f"{module}.bias" if kind == "weight" and f"{module}.bias" in shapes else None
        layer = module if kind == "weight" and module else name
        yield layer, Place(name, bias, None, shape[0] if shape else 1, False)


def _joined(parts: list[Place]) -> tuple[Place, ...]:
    height, start, places = sum(part.height for part in parts), 0, []
    for part in parts:
        places.append(Place(part.weight, part.bias, ((start, start + part.height),), height, True))
        start += part.height
    return tuple(places)


def _add(found: dict[str, tuple[Place, ...]], name: str, places: tuple[Place, ...]) -> None:
    """Note a name, unless diffusers gives it to another layer of its own."""
    found.setdefault(name, places)
