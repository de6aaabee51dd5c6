"""HunyuanVideo as its authors name it, and as ComfyUI does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from dvdquant.checkpoint.formats.names import Names, Stack
from dvdquant.checkpoint.formats.scheme import Piece, Scheme
from dvdquant.checkpoint.formats.shapes import NEED_CONFIG, Shapes
from dvdquant.errors import CheckpointError

__all__ = ["HUNYUAN_VIDEO"]

AXES = {128: [16, 56, 56]}
"""Channels of a head -> those of its rotary axes, in every published model."""

# ComfyUI's names of modules, whole or inside of a block -> the authors'.
_COMFY = {
    **{
        f"{part}.{theirs}_layer": f"{part}.{layer}"
        for part, layers in (
            ("time_in", ("mlp.0", "mlp.2")),
            ("guidance_in", ("mlp.0", "mlp.2")),
            ("txt_in.t_embedder", ("mlp.0", "mlp.2")),
            ("txt_in.c_embedder", ("linear_1", "linear_2")),
        )
        for theirs, layer in zip(("in", "out"), layers)
    },
    **{f"{side}_mod.lin": f"{side}_mod.linear" for side in ("img", "txt")},
    **{
        f"{side}_mlp.{index}": f"{side}_mlp.{layer}"
        for side in ("img", "txt")
        for index, layer in ((0, "fc1"), (2, "fc2"))
    },
    **{f"{side}_attn.qkv": f"{side}_attn_qkv" for side in ("img", "txt", "self")},
    **{f"{side}_attn.proj": f"{side}_attn_proj" for side in ("img", "txt", "self")},
    **{f"{side}_attn.norm.query_norm": f"{side}_attn_q_norm" for side in ("img", "txt")},
    **{f"{side}_attn.norm.key_norm": f"{side}_attn_k_norm" for side in ("img", "txt")},
    "norm.query_norm": "q_norm",
    "norm.key_norm": "k_norm",
    "modulation.lin": "modulation.linear",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}

_MODULES = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_SINGLE = {
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "modulation.linear": "norm.linear",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
NAMES = Names(
    _MODULES,
    (
        Stack(
            "txt_in.individual_token_refiner.blocks",
            "context_embedder.token_refiner.refiner_blocks",
            _REFINER,
            {"self_attn_qkv": _QKV},
        ),
        Stack(
            "double_blocks",
            "transformer_blocks",
            _DOUBLE,
            {"img_attn_qkv": _QKV, "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")},
        ),
        Stack("single_blocks", "single_transformer_blocks", _SINGLE, {"linear1": (*_QKV, "proj_mlp")}),
    ),
    _COMFY,
)
SWAPPED = "final_layer.adaLN_modulation.1"
"""The authors have shift before scale in it, diffusers scale before shift."""


def _pieces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    first = shapes.get("img_in.proj.weight") or (0,)
    return {name: _split(name, shape, first[0]) for name, shape in shapes.items()}


def _split(name: str, shape: tuple[int, ...], width: int) -> list[Piece]:
    """Return the tensors that one becomes; itself where it is not known.

    Args:
        name: Its name in the file.
        shape: Its shape.
        width: The number of channels of a token.
    """
    module, _, parameter = name.rpartition(".")
    ours = NAMES.ours(module)
    if module.endswith(("query_norm", "key_norm")):  # of ComfyUI's files, which call the weight so
        if parameter != "scale":
            return [Piece(name)]
        parameter = "weight"
    named = [f"{part}.{parameter}" for part in ours]
    if len(named) == 1:
        return [Piece(named[0], swapped=module == SWAPPED)]
    if len(named) == 3 and shape and shape[0] % 3 == 0:
        edges = [i * shape[0] // 3 for i in range(4)]
    elif len(named) == 4 and shape and 0 < 3 * width < shape[0]:
        edges = [0, width, 2 * width, 3 * width, shape[0]]
    else:
        return [Piece(name)]
    return [Piece(part, rows) for part, rows in zip(named, pairwise(edges))]


def _config(shapes: Shapes, known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    del known  # the authors' files hold no config
    width, inside, *patch = shapes.of("x_embedder.proj.weight", 5)
    (head,) = shapes.of("transformer_blocks.0.attn.norm_q.weight", 1)
    if width % head or head not in AXES:
        raise CheckpointError(
            f"{shapes.place}: the rotary axes of a HunyuanVideo transformer with heads of {head} channels are not known",
            fix=NEED_CONFIG,
        )
    outside, left = divmod(shapes.of("proj_out.weight", 2)[0], math.prod(patch))
    if left or patch[1] != patch[2]:
        raise CheckpointError(
            f"{shapes.place}: the patch is {'×'.join(map(str, patch))}, and proj_out.weight has "
            f"{shapes.of('proj_out.weight', 2)[0]} rows",
            fix="download the file again",
        )
    assumed: list[str] = []
    condition = None
    if inside == 2 * outside + 1:
        condition = "latent_concat"
    elif inside == outside:
        if re.search(r"(?<![a-z0-9])(i2v|image.?to.?video)", shapes.place.rpartition("/")[2], re.IGNORECASE):
            raise CheckpointError(
                f"{shapes.place} is named as image to video, and its shapes are those of text to video, too",
                fix=NEED_CONFIG,
            )
        assumed.append(
            "text to video; the image-to-video model of as many channels has the same shapes, and is told by --config alone"
        )
    config = {
        "_class_name": HUNYUAN_VIDEO.class_name,
        "in_channels": inside,
        "out_channels": outside,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": shapes.blocks("transformer_blocks"),
        "num_single_layers": shapes.blocks("single_transformer_blocks"),
        "num_refiner_layers": shapes.blocks("context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": shapes.of("transformer_blocks.0.ff.net.0.proj.weight", 2)[0] / width,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes.of("context_embedder.proj_in.weight", 2)[1],
        "pooled_projection_dim": shapes.of("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "rope_theta": 256.0,
        "rope_axes_dim": AXES[head],
        "image_condition_type": condition,
    }
    return config, assumed


HUNYUAN_VIDEO = Scheme(
    title="HunyuanVideo",
    class_name="HunyuanVideoTransformer3DModel",
    original=re.compile(r"^txt_in\.individual_token_refiner\.blocks\.\d+\."),
    diffusers=re.compile(r"^context_embedder\.token_refiner\.refiner_blocks\.\d+\."),
    unsupported=(
        (re.compile(r"^(byt5_in|vision_in|cond_type_embedding|image_embedder)\b"), "HunyuanVideo-1.5"),
        (re.compile(r"^(clean_x_embedder|image_projection)\."), "HunyuanVideo FramePack"),
        (re.compile(r"^(audio_proj|audio_adapter)"), "HunyuanVideo-Avatar"),
    ),
    names=NAMES,
    pieces=_pieces,
    config=_config,
)
