"""The names that other tools give the layers of a transformer: those of its authors, by those of diffusers.

A row says what diffusers calls a module and what its authors call it; some have two names, as ComfyUI renames layers. Where the
authors keep several layers in one (queries, keys and values), each has its rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Place", "aliases"]

Rows = tuple[tuple[int, int], ...]

# A module as diffusers calls it (a whole regular expression) -> as its authors call it.
_Names = tuple[tuple[str, tuple[str, ...]], ...]

_BLOCK = r"((?:vace_)?blocks\.\d+)"
_WAN: _Names = (
    *(
        (rf"{_BLOCK}\.attn{number}\.{ours}", (rf"\1.{attention}.{theirs}",))
        for number, attention in ((1, "self_attn"), (2, "cross_attn"))
        for ours, theirs in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            (r"to_out\.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("norm_added_k", "norm_k_img"),
        )
    ),
    (rf"{_BLOCK}\.ffn\.net\.0\.proj", (r"\1.ffn.0",)),
    (rf"{_BLOCK}\.ffn\.net\.2", (r"\1.ffn.2",)),
    # The norm before the cross attention is the authors' third, and the second of diffusers.
    (rf"{_BLOCK}\.norm2", (r"\1.norm3",)),
    (rf"{_BLOCK}\.scale_shift_table", (r"\1.modulation",)),
    (r"(vace_blocks\.\d+)\.proj_in", (r"\1.before_proj",)),
    (r"(vace_blocks\.\d+)\.proj_out", (r"\1.after_proj",)),
    (r"condition_embedder\.time_embedder\.linear_1", ("time_embedding.0",)),
    (r"condition_embedder\.time_embedder\.linear_2", ("time_embedding.2",)),
    (r"condition_embedder\.time_proj", ("time_projection.1",)),
    (r"condition_embedder\.text_embedder\.linear_1", ("text_embedding.0",)),
    (r"condition_embedder\.text_embedder\.linear_2", ("text_embedding.2",)),
    (r"condition_embedder\.image_embedder\.norm1", ("img_emb.proj.0",)),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", ("img_emb.proj.1",)),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", ("img_emb.proj.3",)),
    (r"condition_embedder\.image_embedder\.norm2", ("img_emb.proj.4",)),
    (r"condition_embedder\.image_embedder\.pos_embed", ("img_emb.emb_pos",)),
    ("proj_out", ("head.head",)),
    ("scale_shift_table", ("head.modulation",)),
)

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)", r"single_transformer_blocks\.(\d+)"
_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)"
_REFINER_AUTHORS = r"txt_in.individual_token_refiner.blocks.\1"
_HUNYUAN: _Names = (
    (r"x_embedder\.proj", ("img_in.proj",)),
    *(
        (rf"{ours}\.linear_{number}", (f"{theirs}.mlp.{2 * number - 2}", f"{theirs}.{layer}"))
        for ours, theirs in (
            (r"time_text_embed\.timestep_embedder", "time_in"),
            (r"time_text_embed\.guidance_embedder", "guidance_in"),
            (r"context_embedder\.time_text_embed\.timestep_embedder", "txt_in.t_embedder"),
        )
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    ),
    (r"time_text_embed\.text_embedder\.linear_1", ("vector_in.in_layer",)),
    (r"time_text_embed\.text_embedder\.linear_2", ("vector_in.out_layer",)),
    (
        r"context_embedder\.time_text_embed\.text_embedder\.linear_1",
        ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ),
    (
        r"context_embedder\.time_text_embed\.text_embedder\.linear_2",
        ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ),
    *(
        (rf"{_DOUBLE}\.{ours}", tuple(rf"double_blocks.\1.{name}" for name in theirs))
        for ours, theirs in (
            (r"attn\.norm_q", ("img_attn_q_norm", "img_attn.norm.query_norm")),
            (r"attn\.norm_k", ("img_attn_k_norm", "img_attn.norm.key_norm")),
            (r"attn\.norm_added_q", ("txt_attn_q_norm", "txt_attn.norm.query_norm")),
            (r"attn\.norm_added_k", ("txt_attn_k_norm", "txt_attn.norm.key_norm")),
            (r"attn\.to_out\.0", ("img_attn_proj", "img_attn.proj")),
            (r"attn\.to_add_out", ("txt_attn_proj", "txt_attn.proj")),
            (r"norm1\.linear", ("img_mod.linear", "img_mod.lin")),
            (r"norm1_context\.linear", ("txt_mod.linear", "txt_mod.lin")),
            (r"ff\.net\.0\.proj", ("img_mlp.fc1", "img_mlp.0")),
            (r"ff\.net\.2", ("img_mlp.fc2", "img_mlp.2")),
            (r"ff_context\.net\.0\.proj", ("txt_mlp.fc1", "txt_mlp.0")),
            (r"ff_context\.net\.2", ("txt_mlp.fc2", "txt_mlp.2")),
        )
    ),
    *(
        (rf"{_SINGLE}\.{ours}", tuple(rf"single_blocks.\1.{name}" for name in theirs))
        for ours, theirs in (
            (r"attn\.norm_q", ("q_norm", "norm.query_norm")),
            (r"attn\.norm_k", ("k_norm", "norm.key_norm")),
            ("proj_out", ("linear2",)),
            (r"norm\.linear", ("modulation.linear", "modulation.lin")),
        )
    ),
    (r"context_embedder\.proj_in", ("txt_in.input_embedder",)),
    *(
        (rf"{_REFINER}\.{ours}", tuple(f"{_REFINER_AUTHORS}.{name}" for name in theirs))
        for ours, theirs in (
            (r"(?:norm1)", ("norm1",)),
            (r"(?:norm2)", ("norm2",)),
            (r"attn\.to_out\.0", ("self_attn_proj", "self_attn.proj")),
            (r"ff\.net\.0\.proj", ("mlp.fc1", "mlp.0")),
            (r"ff\.net\.2", ("mlp.fc2", "mlp.2")),
            (r"norm_out\.linear", ("adaLN_modulation.1",)),
        )
    ),
    ("proj_out", ("final_layer.linear",)),
)

_LTX: _Names = (
    ("proj_in", ("patchify_proj",)),
    (r"time_embed\.(.+)", (r"adaln_single.\1",)),
    (r"(.+\.attn\d)\.norm_q", (r"\1.q_norm",)),
    (r"(.+\.attn\d)\.norm_k", (r"\1.k_norm",)),
)

# How the name of a class begins -> its authors' names. SkyReels-V2 and ChronoEdit are built of Wan's blocks.
_FAMILIES: dict[str, _Names] = {
    "Wan": _WAN,
    "SkyReelsV2": _WAN,
    "ChronoEdit": _WAN,
    "HunyuanVideo": _HUNYUAN,
    "LTX": _LTX,
}

# Layers of diffusers that are one layer of the authors', in the order of their rows; the first one's name gives the block.
_JOINED: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "HunyuanVideo": (
        (
            rf"{_DOUBLE}\.attn\.to_q",
            ("attn.to_q", "attn.to_k", "attn.to_v"),
            (r"double_blocks.\1.img_attn_qkv", r"double_blocks.\1.img_attn.qkv"),
        ),
        (
            rf"{_DOUBLE}\.attn\.add_q_proj",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            (r"double_blocks.\1.txt_attn_qkv", r"double_blocks.\1.txt_attn.qkv"),
        ),
        (
            rf"{_SINGLE}\.attn\.to_q",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            (r"single_blocks.\1.linear1",),
        ),
        (
            rf"{_REFINER}\.attn\.to_q",
            ("attn.to_q", "attn.to_k", "attn.to_v"),
            (f"{_REFINER_AUTHORS}.self_attn_qkv", f"{_REFINER_AUTHORS}.self_attn.qkv"),
        ),
    )
}


@dataclass(frozen=True)
class Place:
    """Where a layer of another tool's lies in the checkpoint.

    Args:
        weight: name of the tensor; a table without ``.weight`` is one, too.
        bias: name of its bias, None where it has none.
        rows: [start, stop) of the other tool's output rows, in the order of ours; None is all of them as they are.
        height: rows that the other tool's layer has.
        original: whether it is the authors' name rather than that of diffusers.
    """

    weight: str
    bias: str | None
    rows: Rows | None
    height: int
    original: bool


def aliases(class_name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Place, ...]]:
    """Return every name a layer of the transformer is known by, and where it lies.

    Args:
        class_name: the diffusers class.
        shapes: of every tensor of the checkpoint, by name.
    """
    modules = dict(_modules(shapes))
    found: dict[str, tuple[Place, ...]] = {name: (place,) for name, place in modules.items()}
    family = next((key for key in _FAMILIES if class_name.startswith(key)), "")
    rows = _FAMILIES.get(family, ())
    for pattern, names in rows:
        compiled = re.compile(pattern)
        for module, place in modules.items():
            if match := compiled.fullmatch(module):
                for name in names:
                    _add(found, match.expand(name), (_as_original(place),))
    for pattern, parts, names in _JOINED.get(family, ()):
        compiled, first = re.compile(pattern), parts[0]
        for module in modules:
            if match := compiled.fullmatch(module):
                block = module.removesuffix(first)
                joined = [modules[block + part] for part in parts if block + part in modules]
                for name in names if len(joined) == len(parts) else ():
                    _add(found, match.expand(name), _joined(joined))
    if family == "HunyuanVideo" and (last := modules.get("norm_out.linear")):
        # The authors have shift before scale, diffusers scale before shift.
        half = last.height // 2
        swapped = Place(last.weight, last.bias, ((half, last.height), (0, half)), last.height, True)
        _add(found, "final_layer.adaLN_modulation.1", (swapped,))
    return found


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in shapes:
            continue
        bias = f"{module}.bias" if kind == "weight" and f"{module}.bias" in shapes else None
        layer = module if kind == "weight" and module else name
        yield layer, Place(name, bias, None, shape[0] if shape else 1, False)


def _as_original(place: Place) -> Place:
    return Place(place.weight, place.bias, place.rows, place.height, True)


def _joined(parts: list[Place]) -> tuple[Place, ...]:
    height, start, places = sum(part.height for part in parts), 0, []
    for part in parts:
        places.append(Place(part.weight, part.bias, ((start, start + part.height),), height, True))
        start += part.height
    return tuple(places)


def _add(found: dict[str, tuple[Place, ...]], name: str, places: tuple[Place, ...]) -> None:
    """Note a name, unless diffusers gives it to another layer of its own."""
    found.setdefault(name, places)
