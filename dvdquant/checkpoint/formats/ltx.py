"""LTX-Video as its authors and ComfyUI name it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dvdquant.checkpoint.formats.names import Names
from dvdquant.checkpoint.formats.scheme import Piece, Scheme
from dvdquant.checkpoint.formats.shapes import NEED_CONFIG, Shapes, known_fields
from dvdquant.errors import CheckpointError

__all__ = ["LTX"]

HEADS = {2048: 32, 4096: 32}
"""Width -> heads of the published models: 2B and 13B."""
NAMES = Names(words={"patchify_proj": "proj_in", "adaln_single": "time_embed", "q_norm": "norm_q", "k_norm": "norm_k"})


def _pieces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    return {name: [Piece(next(iter(NAMES.ours(name)), name))] for name in shapes}


_Number = Annotated[int, Field(ge=1, le=1 << 17)]


class _Config(BaseModel):
    """The fields of the authors' config that no shape tells."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    num_attention_heads: _Number | None = None
    attention_head_dim: _Number | None = None
    norm_eps: Annotated[float, Field(ge=0, le=1)] | None = None


def _config(shapes: Shapes, known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    inner = known.get("transformer", known)
    given = known_fields(_Config, inner if isinstance(inner, dict) else {}, shapes.place)
    width, inside = shapes.of("proj_in.weight", 2)
    assumed: list[str] = []
    heads = given.num_attention_heads
    if heads is None and width in HEADS:
        heads = HEADS[width]
        assumed.append(f"{heads} heads, as the published LTX-Video of width {width} has")
    if heads is None or width % heads or given.attention_head_dim not in (None, width // heads):
        raise CheckpointError(
            f"{shapes.place}: the number of heads of an LTX transformer of width {width} is not known", fix=NEED_CONFIG
        )
    config = {
        "_class_name": LTX.class_name,
        "in_channels": inside,
        "out_channels": shapes.of("proj_out.weight", 2)[0],
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": shapes.of("transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "num_layers": shapes.blocks("transformer_blocks"),
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6 if given.norm_eps is None else given.norm_eps,
        "caption_channels": shapes.of("caption_projection.linear_1.weight", 2)[1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in shapes,
        "attention_out_bias": "transformer_blocks.0.attn1.to_out.0.bias" in shapes,
    }
    return config, assumed


LTX = Scheme(
    title="LTX-Video",
    class_name="LTXVideoTransformer3DModel",
    original=re.compile(r"^patchify_proj\.weight$"),
    diffusers=re.compile(r"^time_embed\.emb\.timestep_embedder\.linear_1\.weight$"),
    unsupported=(
        (re.compile(r"^(audio_(patchify_proj|adaln_single|proj_in|proj_out)|av_ca_)"), "LTX-2 (video with audio)"),
    ),
    names=NAMES,
    pieces=_pieces,
    config=_config,
)
