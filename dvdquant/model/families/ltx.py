"""LTX-Video."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvdquant.model.families.base import Family, InputSpec, Sizes
from dvdquant.model.families.configs import LTXVideoConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LTXVideo"]


class LTXVideo(Family):
    """The family of ``LTXVideoTransformer3DModel``.

    Latents are packed [B, tokens, C], with their coordinates [B, 3, tokens]. The coordinates (frame, row, column of
    each token, in seconds·fps and pixels) are an input, so that one graph serves every size. diffusers'
    ``rope._prepare_video_coords`` times the base sizes gives them.
    """

    name = "ltx-video"
    class_names = ("LTXVideoTransformer3DModel",)
    record = LTXVideoConfig
    keep = ("proj_in", "time_embed*", "caption_projection*", "norm_out*", "proj_out")
    steady = ("transformer_blocks.*.attn1.to_q", "transformer_blocks.*.ff.net.*")
    default_video = (161, 512, 704)
    default_text_tokens = 128
    vae_scale = (8, 32, 32)

    def patch(self) -> tuple[int, int, int]:
        """Return the patch size (time, height, width) of the config."""
        return self.config["patch_size_t"], self.config["patch_size"], self.config["patch_size"]

    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """Return the graph's inputs, in forward order.

        They are hidden_states, encoder_hidden_states, timestep, encoder_attention_mask and video_coords.

        Args:
            sizes: The sizes of the export.
        """
        batch, config = sizes.batch, self.config
        # The pipeline feeds the caption projection, whose width is not that of the cross-attention.
        return (
            InputSpec("hidden_states", (batch, "tokens", config["in_channels"]), "latent"),
            InputSpec("encoder_hidden_states", (batch, sizes.text_tokens, config["caption_channels"]), "embedding"),
            InputSpec("timestep", (batch,), "timestep", "float32"),
            InputSpec("encoder_attention_mask", (batch, sizes.text_tokens), "mask", "int64"),
            InputSpec("video_coords", (batch, 3, "tokens"), "coords", "float32"),
        )

    def draw(self, spec: InputSpec, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Draw one random input; coordinates are spread over the ranges that real videos use.

        Args:
            spec: The input.
            shape: Its shape.
            dtype: The dtype of the model, used if the spec has none.
            generator: The source of random numbers, on the CPU.
        """
        if spec.kind != "coords":
            return super().draw(spec, shape, dtype, generator)
        import torch

        coords = torch.rand(shape, generator=generator)
        return coords * torch.tensor([20.0, 704.0, 512.0])[None, :, None]
