"""CogVideoX 2B, 5B and 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dvdquant.errors import ShapeError
from dvdquant.model.families.base import Family, ImageInputs, InputSpec, Sizes
from dvdquant.model.families.configs import CogVideoXConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CogVideoX"]


class CogVideoX(Family):
    """The family of ``CogVideoXTransformer3DModel``.

    Latents are [B, F, C, H, W]. The rotary tables are inputs, as in its pipeline.
    """

    name = "cogvideox"
    class_names = ("CogVideoXTransformer3DModel",)
    record = CogVideoXConfig
    keep = ("patch_embed*", "time_embedding*", "ofs_embedding*", "norm_out*", "proj_out")
    modulation = ("*.norm1.linear", "*.norm2.linear")
    # There are no steady layers: words and video are one sequence, each with a modulation of its own, and a synthetic
    # run has them in another proportion.
    default_video = (49, 480, 720)
    default_text_tokens = 226
    schedule = "diffusion"

    def patch(self) -> tuple[int, int, int]:
        """Return the patch size (time, height, width) of the config; version 1.0 has no temporal patch."""
        return self.config.get("patch_size_t") or 1, self.config["patch_size"], self.config["patch_size"]

    def images(self) -> ImageInputs:
        """Return what images the transformer draws from: the first, if its latents are among the input channels."""
        return ImageInputs("required" if self.config["in_channels"] == 2 * self.latent_channels() else "none")

    def inputs(self, sizes: Sizes) -> tuple[InputSpec, ...]:
        """Return the graph's inputs, in forward order.

        They are hidden_states, encoder_hidden_states, timestep, ofs (version 1.5 image to video), and the rotary
        cosines and sines [tokens, head_dim].

        Args:
            sizes: The sizes of the export.
        """
        batch, config = sizes.batch, self.config
        specs = [
            InputSpec("hidden_states", (batch, "frames", config["in_channels"], "height", "width"), "latent"),
            InputSpec("encoder_hidden_states", (batch, sizes.text_tokens, config["text_embed_dim"]), "embedding"),
            InputSpec("timestep", (batch,), "timestep", "float32"),
        ]
        if config.get("ofs_embed_dim"):
            specs.append(InputSpec("ofs", (1,), "timestep", "float32"))
        if config["use_rotary_positional_embeddings"]:
            for name in ("rotary_cos", "rotary_sin"):
                specs.append(InputSpec(name, ("tokens", config["attention_head_dim"]), "rotary", "float32"))
        return tuple(specs)

    def probe(self) -> tuple[int, int, int]:
        """Return small latent sizes (frames, height, width) that the model runs at.

        Learned position embeddings fix the height and the width.
        """
        time, height, width = super().probe()
        if self.config.get("use_learned_positional_embeddings"):
            return time, self.config["sample_height"], self.config["sample_width"]
        return time, height, width

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames of a video.

        Version 1.5 pads the latents in front to a multiple of its temporal patch, as its pipeline does.

        Args:
            frames: The number of frames of the video, at least 1.
        """
        latents, patch = super().latent_frames(frames), self.patch()[0]
        return latents + -latents % patch

    def forward_kwargs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the graph inputs with the two rotary tables as a pair, as the diffusers forward takes them.

        Args:
            inputs: The inputs of the graph by name.
        """
        kwargs: dict[str, Any] = dict(inputs)
        if "rotary_cos" in kwargs:
            kwargs["image_rotary_emb"] = (kwargs.pop("rotary_cos"), kwargs.pop("rotary_sin"))
        return kwargs

    def check(self, sizes: Sizes) -> None:
        """Check that the model can run at these sizes.

        CogVideoX-2B computes a sine table for its exact size on the host, so its graph has fixed sizes.

        Args:
            sizes: The sizes of an export.

        Raises:
            ShapeError: An axis is no multiple of the patch, or sizes or text length do not fit the position embeddings.
        """
        super().check(sizes)
        config = self.config
        if sizes.dynamic and not config["use_rotary_positional_embeddings"]:
            raise ShapeError(
                "this CogVideoX has additive position embeddings, which are computed for one size",
                fix="give one --num-frames, --height and --width instead of ranges",
            )
        if config.get("use_learned_positional_embeddings"):
            learned = (config["sample_height"], config["sample_width"])
            if (sizes.height.opt, sizes.width.opt) != learned or sizes.dynamic:
                raise ShapeError(
                    f"this CogVideoX has learned position embeddings for latents of {learned[0]}×{learned[1]} only",
                    fix="export it at that size",
                )
        if sizes.text_tokens != config["max_text_seq_length"] and not config["use_rotary_positional_embeddings"]:
            raise ShapeError(
                f"{sizes.text_tokens} text tokens, but this model's position table holds {config['max_text_seq_length']}",
                fix=f"--text-tokens {config['max_text_seq_length']}",
            )

    def draw(self, spec: InputSpec, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Draw one random input; rotary tables are cosines and sines of the same angles.

        Args:
            spec: The input.
            shape: Its shape.
            dtype: The dtype of the model, used if the spec has none.
            generator: The source of random numbers, on the CPU.
        """
        if spec.kind != "rotary":
            return super().draw(spec, shape, dtype, generator)
        tokens, dim = shape
        import torch

        angles = torch.arange(tokens)[:, None] * 0.37 ** torch.arange(dim // 2)[None]
        table = angles.cos() if spec.name == "rotary_cos" else angles.sin()
        return table.repeat_interleave(2, dim=1).float()
