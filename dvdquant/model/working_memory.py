"""The memory that a stage of a clip works in beside the weights: one step of the transformer, the VAE, the text encoder.

The figures are bytes of live tensors, counted by running the published modules on tensors without data
(``benchmarks/working_memory.py``; a test counts some of them again). What libraries take for themselves (cuDNN's and cuBLAS's
workspaces, what an allocator cannot give back) comes on top. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dvdquant.model.families import Family, Sizes

__all__ = ["TEXT_BYTES", "decode_bytes", "step_bytes", "step_bytes_at", "vae_name"]

TEXT_BYTES = 256 << 20
"""What a text encoder works in: less than this at 512 tokens for UMT5-XXL, T5-XXL and Llama-3-8B."""

# Tensors of a token's width, in 16 bit, that a block holds at once beside those of its feed-forward, which holds two.
_WIDE = {"wan": 8, "hunyuan-video": 11, "cogvideox": 8, "ltx-video": 8}
# A timestep for every token brings six modulation vectors a token, in fp32 and once more in 16 bit.
_PER_TOKEN = {"wan": 18, "ltx-video": 2}


@dataclass(frozen=True)
class _Decoder:
    """The memory of a video VAE that decodes.

    Args:
        fixed: Bytes for every pixel of a frame, of what is decoded at once.
        each: Bytes for every pixel of every frame, of what is decoded at once.
        out: Bytes for every pixel of every frame of the clip: what was decoded before.
        tile: Pixels of a tile.
    """

    fixed: float
    each: float
    out: float
    tile: int

    def bytes(self, frames: int, area: int, tiled: bool) -> int:
        once = min(area, self.tile) if tiled else area
        return int(once * (self.fixed + self.each * frames) + area * frames * self.out)


_DECODERS = {
    # Four frames at a time, with two frames before them kept for every convolution; fp32.
    "wan": _Decoder(19_500, 0, 17.3, 256 * 256),
    "wan-48": _Decoder(21_500, 0, 17.3, 256 * 256),
    # Sixteen frames at a time.
    "hunyuan-video": _Decoder(39_200, 0, 8.7, 256 * 256),
    # Two latent frames at a time.
    "cogvideox": _Decoder(45_800, 0, 7, 240 * 360),
    # All frames at once.
    "ltx-video": _Decoder(0, 95, 6, 512 * 512),
}


def step_bytes(family: Family, tokens: int, batch: int = 1) -> int:
    """Return the bytes that one call of the transformer works in.

    Args:
        family: The family of the transformer.
        tokens: The number of tokens of a sample, those of the text included.
        batch: The number of samples of a call.
    """
    config = family.config
    hidden = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    ratio = int(config.get("ffn_dim") or 4 * hidden) / hidden
    wide = _WIDE[family.name] + (_PER_TOKEN[family.name] if getattr(family, "per_token_timestep", False) else 0)
    return int(batch * tokens * hidden * (wide + 2 * ratio) * 2)


def step_bytes_at(family: Family, sizes: Sizes, latent: tuple[int, int, int]) -> int:
    """Return the bytes that one call of the transformer works in, at a size of an export.

    Args:
        family: The family of the transformer.
        sizes: The sizes of the export, for text and batch.
        latent: Frames, height and width in latents.
    """
    return step_bytes(family, family.tokens(*latent) + sizes.text_tokens, sizes.batch)


def vae_name(family: Family) -> str:
    """Return the name of a family's VAE: the family's own, or ``wan-48`` of Wan with 48 latent channels.

    Args:
        family: The family of the transformer.
    """
    return "wan-48" if family.name == "wan" and family.vae_scale[1] == 16 else family.name


def decode_bytes(family: Family, frames: int, height: int, width: int, *, tiled: bool = False) -> int:
    """Return the bytes that the VAE works in while it decodes a clip, the clip included.

    Args:
        family: The family of the transformer, whose VAE it is.
        frames: Frames of the clip.
        height: Its height in pixels.
        width: Its width in pixels.
        tiled: Whether it decodes in tiles of its own size.
    """
    return _DECODERS[vae_name(family)].bytes(frames, height * width, tiled)
