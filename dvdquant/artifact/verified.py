"""The result of ``--verify`` in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.artifact.entries import Verified

__all__ = ["verified_text"]


def verified_text(verified: Verified | None) -> str:
    """Return one line about the manifest's field ``verified``; its texts are untrusted and made safe to print.

    Args:
        verified: The field, or None if the export was not verified.
    """
    if verified is None:
        return "not verified against the checkpoint (dvdq-export with --verify does it)"
    return (
        f"verified by dvdquant {shown(verified['dvdquant'], 40)}: {verified['rows']} rows of {verified['layers']} layers and "
        f"{verified['kept']} tensors in 16 bit against the checkpoint, {len(verified['graphs'])} graphs against float64"
    )
