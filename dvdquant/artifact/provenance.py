"""The defaults of the runtime that an export brings along, in words, and the LoRAs in its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dvdquant.artifact.manifest import LoraEntry, Sampling
from dvdquant.text import shown

__all__ = ["lora_words", "sampling_words"]


def sampling_words(sampling: Sampling) -> str:
    """Return the steps and the guidance that are recorded."""
    words = []
    if "steps" in sampling:
        words.append(f"{sampling['steps']} steps")
    if "guidance" in sampling:
        words.append(f"guidance {sampling['guidance']:g}")
    return ", ".join(words)


def lora_words(entries: Sequence[LoraEntry]) -> list[str]:
    """Return a line for each LoRA: file, scale, transformer, what was found of it, and the start of its SHA-256."""
    return [
        f"LoRA {shown(os.path.basename(entry['path']))} at scale {entry['scale']:g} in {entry['component']}: "
        f"{entry['layers']} layers, {shown(entry['format'])} names, SHA-256 {entry['sha256'][:16]}…"
        for entry in entries
    ]
