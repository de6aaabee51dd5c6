"""The keys of LoRA files: which layer each is about, and which part of the change it is.

Three formats are told apart by their names alone: diffusers and PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``), the
authors' names as ComfyUI and lightx2v have them (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``), and kohya's and
musubi's flat names (``lora_unet_blocks_0_self_attn_q.lora_down.weight``). A file may mix them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Layer", "foreign_kind", "group", "strip_prefixes"]

# The end of a key -> what it holds. ``bias`` is trained beside the low-rank weights, ``diff*`` is added as it is.
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("down", re.compile(r"\.lora_(?:A|down)(?:\.(?!weight$)[A-Za-z0-9_-]{1,80})?\.weight$")),
    ("up", re.compile(r"\.lora_(?:B|up)(?:\.(?!weight$)[A-Za-z0-9_-]{1,80})?\.weight$")),
    ("bias", re.compile(r"\.lora_(?:B|up)(?:\.(?!bias$)[A-Za-z0-9_-]{1,80})?\.bias$")),
    ("down", re.compile(r"\.lora(?:_linear_layer)?\.down\.weight$")),
    ("up", re.compile(r"\.lora(?:_linear_layer)?\.up\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.diff$")),
    ("diff_b", re.compile(r"\.diff_b$")),
    ("diff_m", re.compile(r"\.diff_m$")),
)
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "unet.",
    "dit.",
    "module.",
    "model.",
)
_COMPONENT = re.compile(r"(transformer(?:_\d+)?)\.")
_FLAT = re.compile(r"(?:lora_(?:unet|transformer|dit)|lycoris)_+([^.]+)")

# Keys of changes that are no plain low-rank ones -> what they are called, and what they need.
_FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\.dora_scale$|lora_magnitude_vector)"), "a DoRA, which also rescales every row of a weight"),
    (re.compile(r"\.lokr_[wt]\d?"), "a LoKr, whose changes are Kronecker products"),
    (re.compile(r"\.hada_[wt]\d"), "a LoHa, whose changes are products of two low-rank ones"),
    (re.compile(r"\.(oft_|boft_)"), "an OFT, which rotates weights"),
    (re.compile(r"\.lora_mid\."), "a LoCon with a third factor (lora_mid)"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "a GLoRA"),
)


@dataclass
class Layer:
    """The keys of a file that belong to one layer of another tool.

    Args:
        name: The layer without the prefixes around it.
        flat: Whether the dots of the name are underscores.
        component: The transformer that the key names, None where it names none.
        prefixed: Whether ComfyUI's prefix stood before the name.
        parts: Kind (``down``, ``up``, ``bias``, ``alpha``, ``diff``, ``diff_b``) -> key.
    """

    name: str
    flat: bool
    component: str | None
    prefixed: bool
    parts: dict[str, str] = field(default_factory=dict)


def group(keys: Iterable[str]) -> tuple[list[Layer], list[str]]:
    """Return the layers that ``keys`` are about, and the keys that are no part of a LoRA.

    Of two keys for one part of one layer, the second counts as the latter.

    Args:
        keys: The names of the tensors in the file.
    """
    layers: dict[tuple[str, str | None], Layer] = {}
    unknown = []
    for key in keys:
        found = next(((kind, match) for kind, end in _PARTS if (match := end.search(key))), None)
        if found is None or not key[: found[1].start()]:
            unknown.append(key)
            continue
        kind, match = found
        layer = strip_prefixes(key[: match.start()])
        if kind == "diff_m":
            # The modulation of a block, or of the head, is a table of its own beside the layers.
            kind, layer.name = "diff", f"{layer.name}{'_' if layer.flat else '.'}modulation"
        layer = layers.setdefault((layer.name, layer.component), layer)
        if kind in layer.parts:
            unknown.append(key)
        else:
            layer.parts[kind] = key
    return list(layers.values()), unknown


def strip_prefixes(module: str) -> Layer:
    """Return the layer that a key's module names, without what trainers and pipelines put before it.

    Args:
        module: The name of the module in the file.
    """
    component, prefixed = None, False
    while True:
        if (match := _COMPONENT.match(module)) is not None:
            component, module = match[1], module[match.end() :]
        elif prefix := next((p for p in _PREFIXES if module.startswith(p) and len(module) > len(p)), None):
            prefixed, module = prefixed or "diffusion_model." in prefix, module.removeprefix(prefix)
        else:
            break
    if match := _FLAT.fullmatch(module):
        return Layer(match[1], True, component, prefixed)
    return Layer(module, False, component, prefixed)


def foreign_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return what kind of change is not supported, and the first key that says so; None if all are plain.

    Args:
        keys: The names of the tensors in the file.
    """
    for key in keys:
        for pattern, what in _FOREIGN:
            if pattern.search(key):
                return what, key
    return None
