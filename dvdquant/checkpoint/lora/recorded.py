"""The LoRAs of an export, found again: by their SHA-256, where they were or where a user says they are now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvdquant.artifact.entries import LoraEntry
from dvdquant.checkpoint.lora.file import LoraFile
from dvdquant.checkpoint.lora.fuse import with_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.text import shown

__all__ = ["split_given", "with_recorded"]


def with_recorded(
    checkpoint: Checkpoint,
    entries: Sequence[LoraEntry],
    component: str,
    given: Sequence[LoraSpec] = (),
    beside: Sequence[LoraSpec] = (),
) -> Checkpoint:
    """Return the checkpoint with the LoRAs that an export has in ``component``, at the scales they were exported with.

    Args:
        checkpoint: The transformer.
        entries: The LoRAs of the export's manifest.
        component: The name of the transformer.
        given: Files that the user names, for those that no longer lie where they were.
        beside: LoRAs of this component that the export does not have, fused after them.

    Raises:
        CheckpointError: A LoRA is neither given nor where it was, or the file there is another one. The error says which one
            is needed.
    """
    wanted = [entry for entry in entries if entry["component"] == component]
    if not wanted:
        return with_loras(checkpoint, beside)
    places = {LoraFile.open(spec.path).digest(): spec.path for spec in given}
    specs = [LoraSpec(_place(entry, places), entry["scale"], component) for entry in wanted]
    fused = with_loras(checkpoint, [*specs, *beside])
    assert fused.lora is not None
    for entry, lora in zip(wanted, fused.lora.fused):
        if lora.sha256 != entry["sha256"]:
            raise _missing(entry, f"{shown(lora.spec.path)} is another file by now (SHA-256 {lora.sha256[:16]}…)")
    return fused


def split_given(
    entries: Sequence[LoraEntry], given: Sequence[LoraSpec]
) -> tuple[tuple[LoraSpec, ...], tuple[LoraSpec, ...]]:
    """Return the files that are LoRAs of the export, and those that it was made without, which run beside its weights.

    Args:
        entries: What the manifest records of the LoRAs.
        given: The LoRAs that were given with the request.

    Raises:
        UnsupportedError: A LoRA of the export is given with another scale than the export was made with.
    """
    known: dict[str, list[LoraEntry]] = {}
    for entry in entries:
        known.setdefault(entry["sha256"], []).append(entry)
    own: list[LoraSpec] = []
    beside: list[LoraSpec] = []
    for spec in given:
        found = known.get(LoraFile.open(spec.path).digest(), [])
        (own if found else beside).append(spec)
        scales = [entry["scale"] for entry in found]
        if found and spec.scale != 1 and spec.scale not in scales:
            raise UnsupportedError(
                f"{shown(spec.path)} is in the export at scale {scales[0]:g}, and {spec.scale:g} was asked for",
                fix="leave the scale out; for another one, export again",
            )
    return tuple(own), tuple(beside)


def _place(entry: LoraEntry, places: dict[str, Path]) -> Path:
    place = places.get(entry["sha256"], Path(entry["path"]))
    if not place.is_file():
        raise _missing(entry, f"{shown(place)} is no longer there")
    return place


def _missing(entry: LoraEntry, why: str) -> CheckpointError:
    return CheckpointError(
        f"the model of this export has a LoRA in {entry['component']}, and {why}",
        available=f"needed: {shown(Path(entry['path']).name)}, SHA-256 {entry['sha256']}",
        fix="say where that file is now: --lora FILE",
    )
