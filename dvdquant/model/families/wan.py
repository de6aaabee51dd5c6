"""Wan 2.1 and 2.2 (text to video, image to video, TI2V-5B)."""

from __future__ import annotations

from dvdquant.model.families.base import Config, Family, ImageInputs, InputSpec, Sizes
from dvdquant.model.families.configs import WanConfig

__all__ = ["Wan"]


class Wan(Family):
    """The family of ``WanTransformer3DModel``.

    Latents are [B, C, F, H, W]. The timestep is one per sample, or one per token on TI2V.

    The VAE decides the scale of the latents. If the pipeline beside the transformer does not tell it, the output
    channels of the model do: 48 with the VAE of Wan 2.2 and 16 with the older one. The input channels do not tell it,
    because they hold conditions too.

    Args:
        config: The checked content of the transformer's ``config.json``.

    Attributes:
        per_token_timestep: True if the graph has a timestep for every token.
    """

    name = "wan"
    class_names = ("WanTransformer3DModel",)
    record = WanConfig
    keep = ("patch_embedding", "condition_embedder*", "norm_out*", "proj_out")
    steady = ("blocks.*.attn1.to_q", "blocks.*.attn2.to_q", "blocks.*.ffn.net.*")
    default_video = (81, 480, 832)
    default_text_tokens = 512

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        of_wan_22 = self.latent_channels() == 48
        scale = self.facts.vae_scale or ([4, 16, 16] if of_wan_22 else [4, 8, 8])
        self.vae_scale = (scale[0], scale[1], scale[2])
        if self.vae_scale[1] == 16:
            self.default_video = (121, 704, 1280)
        # The tokens of a given first frame have timestep 0. A graph with a timestep per token also serves a pipeline
        # with one per sample, so Wan 2.2 gets such a graph if the pipeline does not tell.
        per_token = self.facts.timestep_per_token
        self.per_token_timestep = of_wan_22 if per_token is None else per_token

    def patch(self) -> tuple[int, int, int]:
        """Return the patch size (time, height, width) of the config."""
        time, height, width = self.config["patch_size"]
        return time, height, width

    def images(self) -> ImageInputs:
        """Return what images the transformer draws from, as its channels and its image embedding tell.

        Beside the noise, image to video has four channels of a mask and the latents of the images. TI2V has the first
        image in the place of the first latents, and a timestep per token says so.
        """
        inside, outside = self.config["in_channels"], self.latent_channels()
        if self.config.get("image_dim"):
            return ImageInputs("required", "required" if self.config.get("pos_embed_seq_len") else "none")
        if inside == 2 * outside + 4:
            return ImageInputs("required", "optional")
        return ImageInputs("optional") if self.per_token_timestep and inside == outside else ImageInputs()

    def longest_axis(self) -> int | None:
        """Return the length of the rotary table in patches."""
        return int(self.config.get("rope_max_seq_len", 1024))

    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """Return the graph's inputs, in forward order.

        They are hidden_states, timestep, encoder_hidden_states and, for image-to-video 2.1, the image embedding.

        Args:
            sizes: The sizes of the export.
        """
        batch, config = sizes.batch, self.config
        specs = [
            InputSpec("hidden_states", (batch, config["in_channels"], "frames", "height", "width"), "latent"),
            InputSpec("timestep", (batch, "tokens") if self.per_token_timestep else (batch,), "timestep", "float32"),
            InputSpec("encoder_hidden_states", (batch, sizes.text_tokens, config["text_dim"]), "embedding"),
        ]
        if config.get("image_dim"):
            # CLIP vision tokens, 257 an image. With a last frame (pos_embed_seq_len 514) two images follow each other
            # on the batch axis, and the model joins them.
            both = config.get("pos_embed_seq_len")
            images, tokens = (2 * batch, both // 2) if both else (batch, 257)
            specs.append(InputSpec("encoder_hidden_states_image", (images, tokens, config["image_dim"]), "embedding"))
        return tuple(specs)
