"""What the manifest of an export records of the checkpoint that it was made from."""

from __future__ import annotations

from dvdquant.artifact.entries import Source
from dvdquant.checkpoint.formats.blocks import FEW_BITS
from dvdquant.checkpoint.formats.translate import DIFFUSERS_FOLDER

__all__ = ["had_few_bits", "was_diffusers_folder"]


def was_diffusers_folder(source: Source) -> bool:
    """Return whether the checkpoint was a folder whose tensors have the names of diffusers.

    Args:
        source: What the manifest records of the source.
    """
    if "diffusers_folder" in source:
        return source["diffusers_folder"]
    # Older manifests say it in words alone, the oldest not at all.
    return source.get("format", DIFFUSERS_FOLDER).startswith(DIFFUSERS_FOLDER)


def had_few_bits(source: Source) -> bool:
    """Return whether weights were stored in blocks of 4 or 5 bits, which an export takes with ``--allow-low-bits`` alone.

    Args:
        source: What the manifest records of the source.
    """
    if "few_bits" in source:
        return bool(source["few_bits"])
    return any(kind in source.get("precision", "") for kind in FEW_BITS)  # older manifests say it in words alone
