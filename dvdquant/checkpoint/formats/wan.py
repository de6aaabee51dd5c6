"""Wan 2.1 and 2.2 as its authors and ComfyUI name it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dvdquant.checkpoint.formats.names import Names, Stack
from dvdquant.checkpoint.formats.scheme import Piece, Scheme
from dvdquant.checkpoint.formats.shapes import NEED_CONFIG, Shapes, known_fields
from dvdquant.errors import CheckpointError

__all__ = ["KINDS", "WAN", "is_original_config"]

KINDS = ("t2v", "i2v", "ti2v", "flf2v")
"""The values of ``model_type`` in the authors' config.json whose class is WanTransformer3DModel."""
HEAD = 128
"""Channels of a head in every published Wan: 12 heads of 1536, 24 of 3072, 40 of 5120."""
_ROTARY = 1024

_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    # Tables without a module of their own.
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_BLOCK = {
    # The affine norm before the cross-attention is the third of the authors and the second of diffusers.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
}
NAMES = Names(_MODULES, (Stack("blocks", "blocks", _BLOCK),))


def _name(name: str) -> str:
    """Return the name of a tensor in diffusers; a table is named as a whole, other tensors by their module."""
    if whole := NAMES.ours(name):
        return whole[0]
    module, _, parameter = name.rpartition(".")
    known = NAMES.ours(module)
    return f"{known[0]}.{parameter}" if known else name


def _pieces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    return {name: [Piece(_name(name))] for name in shapes}


_Number = Annotated[int, Field(ge=1, le=1 << 17)]


class _Config(BaseModel):
    """The fields of the authors' config.json that size a weight or change the graph."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    dim: _Number | None = None
    ffn_dim: _Number | None = None
    freq_dim: _Number | None = None
    in_dim: _Number | None = None
    out_dim: _Number | None = None
    num_heads: _Number | None = None
    num_layers: _Number | None = None
    text_dim: _Number | None = None
    eps: Annotated[float, Field(ge=0, le=1)] | None = None
    model_type: str | None = None


def is_original_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of the authors' code and of a model that is supported.

    Args:
        config: The parsed config.json.
    """
    name = config.get("_class_name")
    return (name == "WanModel" or name is None) and config.get("model_type") in (
        KINDS if name is None else (*KINDS, None)
    )


def _config(shapes: Shapes, known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    # 1. The sizes that the shapes of the first and the last layer tell.
    given = known_fields(_Config, known, shapes.place)
    width, inside, *patch = shapes.of("patch_embedding.weight", 5)
    outside, left = divmod(shapes.of("proj_out.weight", 2)[0], math.prod(patch))
    if left:
        raise CheckpointError(
            f"{shapes.place}: proj_out.weight has {shapes.of('proj_out.weight', 2)[0]} rows, no multiple of a patch of "
            f"{'×'.join(map(str, patch))}",
            fix="download the file again",
        )
    # 2. The number of heads, which no shape tells.
    assumed: list[str] = []
    heads = given.num_heads
    if heads is None:
        heads = width // HEAD
        assumed.append(f"heads of {HEAD} channels, {heads} of them, as every published Wan has")
    if heads * (width // heads if heads else 0) != width or (given.num_heads is None and width % HEAD):
        raise CheckpointError(
            f"{shapes.place}: the number of heads of a Wan transformer of width {width} is not known", fix=NEED_CONFIG
        )
    # 3. The config of diffusers.
    image, position = "condition_embedder.image_embedder.norm1.weight", "condition_embedder.image_embedder.pos_embed"
    config: dict[str, Any] = {
        "_class_name": WAN.class_name,
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": inside,
        "out_channels": outside,
        "text_dim": shapes.of("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes.of("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shapes.of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shapes.blocks("blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6 if given.eps is None else given.eps,
        "image_dim": shapes.of(image, 1)[0] if image in shapes else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
        "rope_max_seq_len": _ROTARY,
        "pos_embed_seq_len": shapes.of(position, 3)[1] if position in shapes else None,
    }
    # 4. The authors' config, where it is given, must say the same.
    told = {
        "dim": width,
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": inside,
        "out_dim": outside,
        "num_layers": config["num_layers"],
        "text_dim": config["text_dim"],
    }
    for field, value in told.items():
        said = getattr(given, field)
        if said is not None and said != value:
            raise CheckpointError(
                f"{shapes.place} does not fit its config.json: {field} is {said} there, and {value} by the weights",
                fix="use the config.json and the weights of one and the same model",
            )
    return config, assumed


WAN = Scheme(
    title="Wan",
    class_name="WanTransformer3DModel",
    original=re.compile(r"^blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]\.weight$"),
    diffusers=re.compile(r"^condition_embedder\.time_proj\.weight$"),
    unsupported=(
        (re.compile(r"^vace_(blocks\.\d+|patch_embedding)\."), "Wan VACE"),
        (re.compile(r"^(face_adapter|motion_encoder|face_encoder|pose_patch_embedding)\."), "Wan Animate"),
        (re.compile(r"^(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask)\b"), "Wan S2V"),
        (re.compile(r"^control_adapter\."), "Wan Fun with camera control"),
        (re.compile(r"^fps_(embedding|projection)\."), "SkyReels-V2 diffusion forcing"),
        (re.compile(r"^ref_conv\."), "Wan Fun with a reference image"),
        (re.compile(r"^(audio_model|audio_proj|multitalk)|\.audio_cross_attn\."), "Wan with audio"),
    ),
    names=NAMES,
    pieces=_pieces,
    config=_config,
)
