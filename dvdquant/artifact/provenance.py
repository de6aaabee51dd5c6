"""Where the weights of an export come from, by name and in words, and the defaults of the runtime that it brings along."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dvdquant.artifact.entries import LoraEntry, Sampling, Source
from dvdquant.text import shown

__all__ = ["lora_room", "lora_text", "model_name", "source_of", "sampling_sentence", "sampling_text", "source_text"]


def source_text(source: Source) -> str:
    """Return the format and the precision of the weights an export was made from, "" where its manifest does not say.

    Args:
        source: What the manifest records of the source.
    """
    return ", ".join(shown(part, 400) for part in (source.get("format"), source.get("precision")) if part)


def sampling_text(sampling: Sampling) -> str:
    """Return the steps and the guidance that are recorded.

    Args:
        sampling: What the manifest records of steps and guidance.
    """
    words = []
    if "steps" in sampling:
        words.append(f"{sampling['steps']} steps")
    if "guidance" in sampling:
        words.append(f"guidance {sampling['guidance']:g}")
    return ", ".join(words)


def sampling_sentence(sampling: Sampling) -> str:
    """Return whose defaults the recorded steps and guidance are, and what they are.

    Args:
        sampling: What the manifest records of steps and guidance.
    """
    return f"defaults of dvdq-run and dvdq-plan: {sampling_text(sampling)}"


def lora_room(rank: int) -> list[str]:
    """Return in words that graphs and engines take LoRAs at run time; nothing where they do not.

    Args:
        rank: The rank that is reserved, as the manifest records it.
    """
    return [f"room for LoRAs at run time: up to rank {rank} in every quantized layer (dvdq-run --lora)"] if rank else []


def lora_text(entries: Sequence[LoraEntry]) -> list[str]:
    """Return a line for each LoRA: file, scale, transformer, what was found of it, and the start of its SHA-256.

    Args:
        entries: The LoRAs as the manifest records them.
    """
    return [
        f"LoRA {shown(os.path.basename(entry['path']))} at scale {entry['scale']:g} in {entry['component']}: "
        f"{entry['layers']} layers, {shown(entry['format'])} names, SHA-256 {entry['sha256'][:16]}…"
        for entry in entries
    ]


def source_of(source: Source, component: str) -> tuple[str, str]:
    """Return (MODEL, the component to open in it) of a transformer of an export.

    Args:
        source: What the manifest records of the source.
        component: The name of the transformer.
    """
    if component == "transformer_2" and "transformer_2" in source:
        return source["transformer_2"], "transformer"
    return source["model"], component


def model_name(model: str) -> str:
    """Return the last two parts of a hub id or path.

    Args:
        model: The hub id or path, with "/" or backslashes.
    """
    parts = [part for part in model.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts[-2:]) or model
