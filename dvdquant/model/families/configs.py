"""Records of the config.json of each transformer class, read strictly, with bounds.

A record has the fields of the diffusers constructor and its defaults. Other fields are left out, as diffusers does.
Numbers are bounded one by one if they size a weight, and in products if diffusers computes a table from them: a table
is made when the modules are built, whatever the checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dvdquant.errors import CheckpointError

__all__ = [
    "MOST_BLOCKS",
    "PIPELINE",
    "CogVideoXConfig",
    "HunyuanVideoConfig",
    "LTXVideoConfig",
    "PipelineFacts",
    "TransformerConfig",
    "WanConfig",
    "read_config",
]

PIPELINE = "_pipeline"
"""The field of a stored config.json that holds :class:`PipelineFacts`. diffusers leaves fields out that begin with ``_``."""

# Several times the number in any published model. Building and planning a block takes milliseconds, so the bound limits
# the time.
MOST_BLOCKS = 512
MOST_CHANNELS, MOST_WIDTH = 1 << 17, 1 << 16
MOST_TOKENS = 1 << 16
MOST_PATCH = 4096  # latents in one patch
# Bytes of a table. Published models have 1 MiB (Wan) and 206 MiB (CogVideoX-5B image to video). diffusers computes such
# a table in fp64, in up to five parts.
ROTARY_TABLE, POSITION_TABLE = 64 << 20, 512 << 20
# Elements of a text embedding at the length that the config names.
MOST_TEXT = 1 << 26

FIX = "compare config.json with the one the model was published with"

Count = Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Patch = Annotated[int, Field(ge=1, le=64)]
Epsilon = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=1e-3, le=1e3)]
FeedForward = Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]
# diffusers takes these in any case.
Activation = Annotated[str, StringConstraints(to_lower=True, pattern=r"^(swish|silu|mish|gelu|relu)$")]


def _as_list(value: Any) -> Any:
    """Return a tuple (of a config that diffusers loaded) as the list that JSON has, and anything else unchanged."""
    return list(value) if isinstance(value, tuple) else value


def _problem(text: str, available: str) -> PydanticCustomError:
    """Return an error about several fields at once.

    Args:
        text: The problem.
        available: The values that are allowed.
    """
    return PydanticCustomError("product", "{text}", {"text": text, "available": available})


class TransformerConfig(BaseModel):
    """The fields and checks that all records share.

    Attributes:
        num_attention_heads: The number of attention heads.
        attention_head_dim: The number of channels of a head.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    num_attention_heads: Channels
    attention_head_dim: Channels

    @property
    def inner_dim(self) -> int:
        """Return the number of channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def check(self) -> None:
        """Refuse combinations of fields that no single field shows.

        Raises:
            PydanticCustomError: A combination is refused.
        """

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse too many or odd channels, then run the check of the record."""
        if self.inner_dim > MOST_WIDTH:
            raise _problem(
                f"num_attention_heads {self.num_attention_heads} × attention_head_dim {self.attention_head_dim} is "
                f"{self.inner_dim}",
                f"at most {MOST_WIDTH}",
            )
        if self.attention_head_dim % 2:
            raise _problem(f"attention_head_dim is {self.attention_head_dim}", "an even number")
        self.check()
        return self

    def _check_table(self, what: str, nbytes: int, most: int) -> None:
        """Refuse a table of more than ``most`` bytes.

        Args:
            what: The fields that decide its size, with their values.
            nbytes: Its size in bytes.
            most: The greatest size in bytes.
        """
        if nbytes > most:
            raise _problem(f"{what} makes a table of {nbytes / 2**20:.0f} MiB", f"at most {most >> 20} MiB")

    def _check_patch(self, *sizes: int) -> None:
        """Refuse a patch of more than ``MOST_PATCH`` latents."""
        if math.prod(sizes) > MOST_PATCH:
            raise _problem(f"patch_size is {'×'.join(map(str, sizes))}", f"at most {MOST_PATCH} latents in a patch")


class WanConfig(TransformerConfig):
    """The config of ``WanTransformer3DModel``, with the fields of its diffusers constructor.

    Attributes:
        patch_size: The patch size in latents: time, height, width.
        num_attention_heads: The number of attention heads.
        attention_head_dim: The number of channels of a head.
        in_channels: The channels of the input, latents and conditions together.
        out_channels: The channels of the output latents; None means those of the input.
        text_dim: The channels of the text embedding.
        freq_dim: The channels of the sinusoidal timestep embedding.
        ffn_dim: The inner channels of the feed-forward.
        num_layers: The number of blocks.
        cross_attn_norm: The cross-attention has a norm before it.
        qk_norm: The norm of queries and keys.
        eps: The epsilon of the norms.
        image_dim: The channels of the image embedding; None for a model without one.
        added_kv_proj_dim: The channels of the added key and value projections for the image embedding, or None.
        rope_max_seq_len: The length of the rotary table, in patches along an axis.
        pos_embed_seq_len: The length in tokens of the position embedding of two images, or None.
    """

    patch_size: Annotated[list[Patch], BeforeValidator(_as_list), Field(min_length=3, max_length=3)] = [1, 2, 2]
    num_attention_heads: Channels = 40
    attention_head_dim: Channels = 128
    in_channels: Channels = 16
    out_channels: Channels | None = 16
    text_dim: Channels = 4096
    freq_dim: Annotated[int, Field(ge=2, le=MOST_CHANNELS)] = 256
    ffn_dim: Channels = 13824
    num_layers: Count = 40
    cross_attn_norm: bool = True
    # diffusers builds the same norm whatever this says.
    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    eps: Epsilon = 1e-6
    image_dim: Channels | None = None
    added_kv_proj_dim: Channels | None = None
    rope_max_seq_len: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    pos_embed_seq_len: Annotated[int, Field(ge=2, le=MOST_TOKENS)] | None = None

    def check(self) -> None:
        """Bound the patch and the rotary table: cosines and sines in fp32.

        Raises:
            PydanticCustomError: One of them is too large.
        """
        self._check_patch(*self.patch_size)
        what = f"rope_max_seq_len {self.rope_max_seq_len} × attention_head_dim {self.attention_head_dim}"
        self._check_table(what, 8 * self.rope_max_seq_len * self.attention_head_dim, ROTARY_TABLE)


class HunyuanVideoConfig(TransformerConfig):
    """The config of ``HunyuanVideoTransformer3DModel``, with the fields of its diffusers constructor.

    Attributes:
        in_channels: The channels of the input, latents and conditions together.
        out_channels: The channels of the output latents; None means those of the input.
        num_attention_heads: The number of attention heads.
        attention_head_dim: The number of channels of a head.
        num_layers: The number of blocks with two streams.
        num_single_layers: The number of blocks with one stream.
        num_refiner_layers: The number of blocks of the token refiner.
        mlp_ratio: The inner channels of the feed-forward, as a multiple of the token's channels.
        patch_size: The patch size in height and width, in latents.
        patch_size_t: The patch size in time, in latents.
        qk_norm: The norm of queries and keys.
        guidance_embeds: The guidance scale is an input (it is distilled into the model).
        text_embed_dim: The channels of the text embedding.
        pooled_projection_dim: The channels of the pooled text embedding.
        rope_theta: The base of the rotary frequencies.
        rope_axes_dim: The channels of a head for each axis of the rotary embedding: time, height, width.
        image_condition_type: The way in which a model for image to video gets its image, or None.
    """

    in_channels: Channels = 16
    out_channels: Channels | None = 16
    num_attention_heads: Channels = 24
    attention_head_dim: Channels = 128
    num_layers: Count = 20
    num_single_layers: Count = 40
    num_refiner_layers: Count = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    patch_size: Patch = 2
    patch_size_t: Patch = 1
    qk_norm: Literal["layer_norm", "fp32_layer_norm", "rms_norm", "rms_norm_across_heads"] | None = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: Channels = 4096
    pooled_projection_dim: Channels = 768
    rope_theta: Annotated[float, Field(ge=1, le=1e9)] = 256.0
    rope_axes_dim: Annotated[list[Channels], BeforeValidator(_as_list), Field(min_length=3, max_length=3)] = [
        16,
        56,
        56,
    ]
    image_condition_type: Literal["latent_concat", "token_replace"] | None = None

    def check(self) -> None:
        """Refuse rotary axes that do not fill a head, too large a patch, and too many blocks.

        Raises:
            PydanticCustomError: One of these is found.
        """
        self._check_patch(self.patch_size_t, self.patch_size, self.patch_size)
        axes = self.rope_axes_dim
        if sum(axes) != self.attention_head_dim or any(size % 2 for size in axes):
            raise _problem(
                f"rope_axes_dim is {axes}",
                f"three even numbers that add up to attention_head_dim {self.attention_head_dim}",
            )
        if self.num_layers + self.num_single_layers + self.num_refiner_layers > MOST_BLOCKS:
            raise _problem(
                f"num_layers {self.num_layers}, num_single_layers {self.num_single_layers} and num_refiner_layers "
                f"{self.num_refiner_layers} are too many",
                f"at most {MOST_BLOCKS} together",
            )


class CogVideoXConfig(TransformerConfig):
    """The config of ``CogVideoXTransformer3DModel``, with the fields of its diffusers constructor.

    Attributes:
        num_attention_heads: The number of attention heads.
        attention_head_dim: The number of channels of a head.
        in_channels: The channels of the input, latents and conditions together.
        out_channels: The channels of the output latents.
        flip_sin_to_cos: The timestep embedding has cosines before sines.
        freq_shift: The shift of the frequencies of the timestep embedding: 0 or 1.
        time_embed_dim: The channels of the timestep embedding.
        ofs_embed_dim: The channels of the embedding of ``ofs`` (version 1.5 image to video), or None.
        text_embed_dim: The channels of the text embedding.
        num_layers: The number of blocks.
        dropout: The dropout probability in training.
        attention_bias: The attention projections have a bias.
        sample_width: The width in latents that the position embedding is made for.
        sample_height: The height in latents that the position embedding is made for.
        sample_frames: The number of video frames that the position embedding is made for.
        patch_size: The patch size in height and width, in latents.
        patch_size_t: The patch size in time, in latents; None in version 1.0, which has no temporal patch.
        temporal_compression_ratio: The number of frames per latent frame.
        max_text_seq_length: The greatest length of the text embedding in tokens.
        activation_fn: The activation of the feed-forward.
        timestep_activation_fn: The activation of the timestep embedding.
        norm_elementwise_affine: The norms have weights and biases.
        norm_eps: The epsilon of the norms.
        spatial_interpolation_scale: The scale of the position embedding in height and width.
        temporal_interpolation_scale: The scale of the position embedding in time.
        use_rotary_positional_embeddings: The positions are rotary instead of added.
        use_learned_positional_embeddings: The added positions are learned.
        patch_bias: The patch embedding has a bias.
    """

    num_attention_heads: Channels = 30
    attention_head_dim: Channels = 64
    in_channels: Channels = 16
    out_channels: Channels = 16
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    time_embed_dim: Channels = 512
    ofs_embed_dim: Annotated[int, Field(ge=0, le=MOST_CHANNELS)] | None = None
    text_embed_dim: Channels = 4096
    num_layers: Count = 30
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    attention_bias: bool = True
    sample_width: Tokens = 90
    sample_height: Tokens = 60
    sample_frames: Tokens = 49
    patch_size: Patch = 2
    patch_size_t: Patch | None = None
    temporal_compression_ratio: Patch = 4
    max_text_seq_length: Tokens = 226
    activation_fn: FeedForward = "gelu-approximate"
    timestep_activation_fn: Activation = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: Epsilon = 1e-5
    spatial_interpolation_scale: Scale = 1.875
    temporal_interpolation_scale: Scale = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def check(self) -> None:
        """Bound the patch, the text embedding, and the table of positions, fp32 [text tokens + patches, channels].

        Raises:
            PydanticCustomError: One of them is too large.
        """
        self._check_patch(self.patch_size_t or 1, self.patch_size, self.patch_size)
        if self.max_text_seq_length * self.text_embed_dim > MOST_TEXT:
            raise _problem(
                f"max_text_seq_length {self.max_text_seq_length} × text_embed_dim {self.text_embed_dim} is "
                f"{self.max_text_seq_length * self.text_embed_dim}",
                f"at most {MOST_TEXT}",
            )
        if self.use_rotary_positional_embeddings and not self.use_learned_positional_embeddings:
            return
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        patches = frames * (self.sample_height // self.patch_size) * (self.sample_width // self.patch_size)
        what = (
            f"sample_frames {self.sample_frames}, sample_height {self.sample_height}, sample_width {self.sample_width} "
            f"and max_text_seq_length {self.max_text_seq_length} × {self.inner_dim} channels"
        )
        self._check_table(what, 4 * (patches + self.max_text_seq_length) * self.inner_dim, POSITION_TABLE)


class LTXVideoConfig(TransformerConfig):
    """The config of ``LTXVideoTransformer3DModel``, with the fields of its diffusers constructor.

    Attributes:
        in_channels: The channels of the input latents.
        out_channels: The channels of the output latents; None means those of the input.
        patch_size: The patch size in height and width, in latents.
        patch_size_t: The patch size in time, in latents.
        num_attention_heads: The number of attention heads.
        attention_head_dim: The number of channels of a head.
        cross_attention_dim: The channels of the text as the cross-attention gets it.
        num_layers: The number of blocks.
        activation_fn: The activation of the feed-forward.
        qk_norm: The norm of queries and keys.
        norm_elementwise_affine: The norms have weights and biases.
        norm_eps: The epsilon of the norms.
        caption_channels: The channels of the text embedding that the pipeline gives.
        attention_bias: The attention projections have a bias.
        attention_out_bias: The output projections of the attention have a bias.
    """

    in_channels: Channels = 128
    out_channels: Channels | None = 128
    patch_size: Patch = 1
    patch_size_t: Patch = 1
    num_attention_heads: Channels = 32
    attention_head_dim: Channels = 64
    cross_attention_dim: Channels = 2048
    num_layers: Count = 28
    activation_fn: FeedForward = "gelu-approximate"
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: Epsilon = 1e-6
    caption_channels: Channels = 4096
    attention_bias: bool = True
    attention_out_bias: bool = True

    def check(self) -> None:
        """Bound the patch.

        Raises:
            PydanticCustomError: It is too large.
        """
        self._check_patch(self.patch_size_t, self.patch_size, self.patch_size)


class PipelineFacts(BaseModel):
    """The facts that the pipeline around a transformer decides about its inputs; None if it does not say.

    Args:
        vae_scale: Frames or pixels per latent: time, height, width.
        timestep_per_token: True if the pipeline gives a timestep for every token (``expand_timesteps``).
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    vae_scale: Annotated[list[Patch], BeforeValidator(_as_list), Field(min_length=3, max_length=3)] | None = None
    timestep_per_token: bool | None = None


def read_config(record: type[TransformerConfig], config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a config and return it complete.

    Args:
        record: The record of the config's class.
        config: The content of a ``config.json``.

    Returns:
        The fields that ``record`` has, with its defaults for missing ones, the class name, and the stored facts of the
        pipeline.

    Raises:
        CheckpointError: A value has another type, is out of bounds, or does not go with the others; the error names the
            field.
    """
    class_name = str(config["_class_name"])
    try:
        fields = record.model_validate(dict(config)).model_dump()
        facts = PipelineFacts.model_validate(dict(config[PIPELINE])) if config.get(PIPELINE) else None
    except (ValidationError, TypeError, ValueError) as error:
        raise refused(f"config.json of {class_name}", error) from error
    stored = {} if facts is None else {PIPELINE: facts.model_dump(exclude_none=True)}
    return {"_class_name": class_name, **fields, **stored}


def refused(what: str, error: Exception, fix: str = FIX) -> CheckpointError:
    """Return the first finding of a validation as an error: the field, its value, and the values that it may have.

    Args:
        what: The file, such as ``config.json of WanTransformer3DModel``.
        error: The error of pydantic, or another error of the reading.
        fix: The advice.
    """
    if not isinstance(error, ValidationError):
        return CheckpointError(f"{what} cannot be used: {error!s:.200}", fix=fix)
    found = error.errors(include_url=False)[0]
    if found["type"] == "product":
        return CheckpointError(f"{what}: {found['ctx']['text']}", available=found["ctx"]["available"], fix=fix)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).strip(".")
    if found["type"] == "missing":
        return CheckpointError(f"{what} lacks {field:.100}", fix=fix)
    return CheckpointError(
        f"{what}: {field:.100} is {_shortened(found['input'])}",
        available=found["msg"].removeprefix("Input should be "),
        fix=fix,
    )


def _shortened(value: Any) -> str:
    """Return the text of a value, which may be a number of thousands of digits."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    return f"{value!r:.100}"
