"""The LoRAs of an export, found again: by their SHA-256, where they were or where a user says they are now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dvdquant.artifact.manifest import LoraEntry
from dvdquant.checkpoint.lora.file import LoraFile
from dvdquant.checkpoint.lora.fuse import with_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.text import shown

__all__ = ["check_given", "with_recorded"]


def with_recorded(
    checkpoint: Checkpoint, entries: Sequence[LoraEntry], component: str, given: Sequence[LoraSpec] = ()
) -> Checkpoint:
    """Return the checkpoint with the LoRAs that an export has in ``component``, at the scales they were exported with.

    Args:
        entries: of the export's manifest.
        given: files that the user names, for those that no longer lie where they were.

    Raises:
        CheckpointError: a LoRA is neither given nor where it was, or the file there is another one: says which is needed.
    """
    wanted = [entry for entry in entries if entry["component"] == component]
    if not wanted:
        return checkpoint
    places = {LoraFile.open(spec.path).digest(): spec.path for spec in given}
    specs = [LoraSpec(_place(entry, places), entry["scale"], component) for entry in wanted]
    fused = with_loras(checkpoint, specs)
    assert fused.lora is not None
    for entry, lora in zip(wanted, fused.lora.fused):
        if lora.sha256 != entry["sha256"]:
            raise _missing(entry, f"{shown(lora.spec.path)} is another file by now (SHA-256 {lora.sha256[:16]}…)")
    return fused


def check_given(entries: Sequence[LoraEntry], given: Sequence[LoraSpec]) -> None:
    """Refuse files that are no LoRA of the export, and scales that it was not made with.

    Raises:
        UnsupportedError: names the file and what the export has.
    """
    known: dict[str, list[LoraEntry]] = {}
    for entry in entries:
        known.setdefault(entry["sha256"], []).append(entry)
    for spec in given:
        digest = LoraFile.open(spec.path).digest()
        if digest not in known:
            raise UnsupportedError(
                f"the export was made without the LoRA {shown(spec.path)} (SHA-256 {digest[:16]}…)",
                available=[f"{shown(Path(e['path']).name)} (SHA-256 {e['sha256'][:16]}…)" for e in entries]
                or "no LoRA",
                fix=f"export again with --lora {shown(spec.path)}; LoRAs are in the weights of an export",
            )
        scales = [entry["scale"] for entry in known[digest]]
        if spec.scale != 1 and spec.scale not in scales:
            raise UnsupportedError(
                f"{shown(spec.path)} is in the export at scale {scales[0]:g}, and {spec.scale:g} was asked for",
                fix="leave the scale out; for another one, export again",
            )


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
