"""Where a transformer's text encoder, VAE and scheduler are found: the repository of the whole diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["known_pipeline"]


def known_pipeline(family: str, config: Mapping[str, Any], transformers: int) -> str | None:
    """Return the hub id of the diffusers pipeline that a transformer of a published size belongs to.

    Text encoder, VAE and scheduler are the same for fine-tunes and for files in other formats.

    The ids were written from memory. Those of Wan also stand in diffusers' documentation; none was downloaded here.

    Args:
        family: The name of the family.
        config: The config of the transformer.
        transformers: The number of transformers of the model.

    Returns:
        The hub id, or None for a model of another size.
    """
    layers, inside = config.get("num_layers"), config.get("in_channels")
    if family == "wan" and config.get("text_dim") == 4096:
        if config.get("image_dim"):
            last_image = config.get("pos_embed_seq_len")
            return "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers" if last_image else "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
        return {
            (40, 16, 1): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            (30, 16, 1): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            (40, 16, 2): "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            (40, 36, 2): "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            (30, 48, 1): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        }.get((layers or 0, inside or 0, transformers))
    if family == "hunyuan-video" and layers == 20:
        image = config.get("image_condition_type") is not None
        return "hunyuanvideo-community/HunyuanVideo" + ("-I2V" if image else "")
    if family == "ltx-video" and layers == 28:
        return "Lightricks/LTX-Video"
    return None
