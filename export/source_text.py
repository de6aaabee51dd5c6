"""What was recognised of a model, in words: for the dry run and the log of an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint
    from dvdquant.model.families import Family

__all__ = ["source_facts", "source_lines", "variant"]


def variant(family: str, config: Mapping[str, Any]) -> str:
    """Return what a transformer draws from: text, an image, a last image too.

    Args:
        family: The name of the family.
        config: The config of the family, with every field there.
    """
    inside, outside = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if family == "wan":
        if config.get("image_dim"):
            last = " and last" if config.get("pos_embed_seq_len") else ""
            return f"image to video (first{last} image, Wan 2.1)"
        if inside == 2 * outside + 4:
            return "image to video (Wan 2.2)"
        if inside == outside == 48:
            return "text and image to video (TI2V)"
    if family == "hunyuan-video":
        kind = config.get("image_condition_type")
        if kind is not None:
            return f"image to video ({kind})"
        if inside == 2 * outside:
            return "image to video (SkyReels-V1)"
    if family == "ltx-video":
        return "text and image to video"
    if inside == outside:
        return "text to video"
    if inside == 2 * outside:
        return "image to video"
    return f"video with {inside - outside} channels of conditions"


def source_facts(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Return what was recognised, for JSON.

    Args:
        checkpoint: The opened checkpoint.
        family: The model family.
    """
    source = checkpoint.source
    return {
        "format": source.layout,
        "precision": source.precision,
        "file": source.file,
        "variant": variant(family.name, family.config),
        "images": dataclasses.asdict(family.images()),
        "vae_scale": list(family.vae_scale),
        "notes": list(source.notes),
    }


def source_lines(component: str, checkpoint: Checkpoint, family: Family) -> list[str]:
    """Return what was recognised as lines of text.

    Args:
        component: The name of the transformer.
        checkpoint: The opened checkpoint.
        family: The model family.
    """
    facts = source_facts(checkpoint, family)
    scale = "×".join(map(str, facts["vae_scale"]))
    file = f" {shown(facts['file'])}" if facts["file"] else ""
    first = f"{component}: {facts['format']}{file}, {facts['precision']}; {facts['variant']}, VAE {scale}"
    images = family.images()
    if images.first != "none":
        first += f"; takes {images}"
    return [first, *(f"{component}: {shown(note, 400)}" for note in facts["notes"])]
