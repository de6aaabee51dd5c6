"""Wan 2.1 and 2.2 (text to video, image to video, TI2V-5B)."""

from __future__ import annotations

import torch

from .base import Config, Family, InputSpec, Sizes

__all__ = ["Wan"]


class Wan(Family):
    """``WanTransformer3DModel``. Latents [B, C, F, H, W]; the timestep is one per sample, or per token on TI2V."""

    name = "wan"
    class_names = ("WanTransformer3DModel",)
    keep = ("patch_embedding", "condition_embedder*", "norm_out*", "proj_out")
    steady = ("blocks.*.attn1.to_q", "blocks.*.attn2.to_q", "blocks.*.ffn.net.*")
    default_video = (81, 480, 832)
    default_text_tokens = 512

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.per_token_timestep:
            self.vae_scale, self.default_video = (4, 16, 16), (121, 704, 1280)

    @property
    def per_token_timestep(self) -> bool:
        """TI2V-5B, known by the 48 channels of its VAE: the tokens of a given first frame have timestep 0."""
        return bool(self.config.get("in_channels") == 48)

    def patch(self) -> tuple[int, int, int]:
        """From the config."""
        time, height, width = self.config["patch_size"]
        return time, height, width

    def longest_axis(self) -> int | None:
        """The length of the rotary table."""
        return int(self.config.get("rope_max_seq_len", 1024))

    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """hidden_states, timestep, encoder_hidden_states and, for image-to-video 2.1, the image embedding."""
        batch, config = sizes.batch, self.config
        specs = [
            InputSpec("hidden_states", (batch, config["in_channels"], "frames", "height", "width"), "latent"),
            InputSpec(
                "timestep", (batch, "tokens") if self.per_token_timestep else (batch,), "timestep", torch.float32
            ),
            InputSpec("encoder_hidden_states", (batch, sizes.text_tokens, config["text_dim"]), "embedding"),
        ]
        if config.get("image_dim"):
            # CLIP vision tokens, 257 an image. With a last frame (pos_embed_seq_len 514) two images follow each other
            # on the batch axis, and the model joins them.
            both = config.get("pos_embed_seq_len")
            images, tokens = (2 * batch, both // 2) if both else (batch, 257)
            specs.append(InputSpec("encoder_hidden_states_image", (images, tokens, config["image_dim"]), "embedding"))
        return tuple(specs)
