"""HunyuanVideo."""

from __future__ import annotations

from dvdquant.model.families.base import Family, InputSpec, Sizes
from dvdquant.model.families.configs import HunyuanVideoConfig

__all__ = ["HunyuanVideo"]


class HunyuanVideo(Family):
    """The family of ``HunyuanVideoTransformer3DModel``.

    Latents are [B, C, F, H, W]. The text is an embedding with its mask, and a pooled embedding.
    """

    name = "hunyuan-video"
    class_names = ("HunyuanVideoTransformer3DModel",)
    record = HunyuanVideoConfig
    # context_embedder is the token refiner, which embeds the text.
    keep = ("x_embedder*", "context_embedder*", "time_text_embed*", "norm_out*", "proj_out")
    modulation = ("*blocks.*.norm.linear", "*blocks.*.norm1.linear", "*blocks.*.norm1_context.linear")
    steady = (
        "transformer_blocks.*.attn.to_q",
        "transformer_blocks.*.ff.net.*",
        "single_transformer_blocks.*.attn.to_q",
        "single_transformer_blocks.*.proj_mlp",
    )
    default_video = (61, 720, 1280)
    default_text_tokens = 256

    def patch(self) -> tuple[int, int, int]:
        """Return the patch size (time, height, width) of the config."""
        return self.config["patch_size_t"], self.config["patch_size"], self.config["patch_size"]

    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """Return the graph's inputs, in forward order.

        They are hidden_states, timestep, text embedding and mask, pooled text, and guidance if it is distilled into the
        model.

        Args:
            sizes: The sizes of the export.
        """
        batch, config = sizes.batch, self.config
        specs = [
            InputSpec("hidden_states", (batch, config["in_channels"], "frames", "height", "width"), "latent"),
            InputSpec("timestep", (batch,), "timestep", "float32"),
            InputSpec("encoder_hidden_states", (batch, sizes.text_tokens, config["text_embed_dim"]), "embedding"),
            InputSpec("encoder_attention_mask", (batch, sizes.text_tokens), "mask", "int64"),
            InputSpec("pooled_projections", (batch, config["pooled_projection_dim"]), "embedding"),
        ]
        if config["guidance_embeds"]:
            specs.append(InputSpec("guidance", (batch,), "timestep", "float32"))
        return tuple(specs)
