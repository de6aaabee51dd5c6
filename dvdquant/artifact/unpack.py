"""A bundle and the folder that it is unpacked into: what is there already, which engines stay, and the new export.

The format of a bundle is in :mod:`.bundle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dvdquant.artifact.bundle import Bundle
from dvdquant.artifact.entries import EngineEntry
from dvdquant.artifact.manifest import Manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.artifact.verify_files import intact_files
from dvdquant.system.files import FileEntry, require_disk

__all__ = ["holds_bundle", "kept_engines", "listed_files", "unpack_bundle", "unpacked_manifest"]

# It tells of the engines, so it is another one as soon as one is built.
_CARD = "README.md"


def holds_bundle(there: Manifest, bundle: Bundle) -> bool:
    """Return whether an export is that of a bundle, by its manifest: it may have engines, engines to build and graphs besides.

    Args:
        there: The manifest of the export.
        bundle: The open bundle.
    """
    packed = bundle.manifest
    names = (
        "source",
        "family",
        "config_sha256",
        "recipe",
        "shapes",
        "layers",
        "components",
        "lora",
        "lora_rank",
        "sampling",
    )
    return (
        all(getattr(there, name) == getattr(packed, name) for name in names)
        and all(entry in there.builds for entry in packed.builds)
        and all(there.files.get(name) == entry for name, entry in listed_files(bundle).items() if name != _CARD)
    )


def listed_files(bundle: Bundle) -> dict[str, FileEntry]:
    """Return the files that a bundle holds besides its manifest, by their paths.

    Args:
        bundle: The open bundle.
    """
    files = bundle.facts["files"][1:]
    return {member["path"]: FileEntry(sha256=member["sha256"], bytes=member["bytes"]) for member in files}


def kept_engines(there: Manifest | None, bundle: Bundle) -> tuple[EngineEntry, ...]:
    """Return the engines of an export that were built from the graphs and weights that a bundle holds.

    Args:
        there: The manifest of the export, or None.
        bundle: The open bundle.
    """
    graphs = {name: entry for name, entry in bundle.manifest.files.items() if name.startswith("onnx/")}
    if there is None or any(there.files.get(name) != entry for name, entry in graphs.items()):
        return ()
    packed = {entry["path"] for entry in bundle.manifest.engines}
    return tuple(entry for entry in there.engines if entry["path"] not in packed)


def unpacked_manifest(bundle: Bundle, there: Manifest | None) -> Manifest:
    """Return the manifest that a folder would have once a bundle was unpacked into it, if the engines that stay are intact.

    Args:
        bundle: The open bundle.
        there: The manifest of the export in the folder, or None.
    """
    engines = kept_engines(there, bundle)
    files = {} if there is None else {entry["path"]: there.files[entry["path"]] for entry in engines}
    packed = bundle.manifest
    return replace(packed, engines=(*packed.engines, *engines), files={**packed.files, **files})


def unpack_bundle(
    bundle: Bundle,
    out: Path,
    progress: Callable[[int], None] = lambda count: None,
    accept: Callable[[Manifest | None], None] = lambda previous: None,
) -> Manifest:
    """Unpack a bundle into a folder, which holds all of it afterwards, or what it held before.

    Engines that are there stay if they were built from what the bundle holds and are intact.

    Args:
        bundle: The open bundle.
        out: The folder; it may be absent, empty, or an export, which is replaced.
        progress: A function that gets the number of bytes of every block.
        accept: A function that gets the manifest of the export in the folder, or None, under its lock; it raises to keep that
            export.

    Returns:
        The manifest of the export that is there now; it lists what the bundle holds besides, too.

    Raises:
        OutputError: A byte of the bundle was changed, a member is not the one that its record lists there, or the folder
            cannot be written.
        ResourceError: The disk is too small.
    """
    files = bundle.facts["files"]
    require_disk(out, bundle.nbytes, "what the bundle holds")
    with ExportTransaction(out, key={"bundle": [member["sha256"] for member in files]}) as transaction:
        accept(transaction.previous)
        known = listed_files(bundle)
        for member in files[1:]:  # the manifest was read when the bundle was opened
            with transaction.path(member["path"]).open("xb") as target:
                bundle.copy_next(member, target, progress)
        bundle.require_end()
        engines = _keep_engines(bundle, transaction, known)
        manifest = replace(bundle.manifest, engines=(*bundle.manifest.engines, *engines))
        return transaction.commit(manifest, known, export_key=bundle.manifest.export_key)


def _keep_engines(bundle: Bundle, transaction: ExportTransaction, known: dict[str, FileEntry]) -> list[EngineEntry]:
    """Take over the engines that stay, with the card that tells of them, and return their entries.

    Args:
        bundle: The open bundle.
        transaction: The transaction, with the files of the bundle in its tree.
        known: Relative path -> hash and size of these; what is taken over is entered.

    Raises:
        OSError: A file cannot be taken over.
    """
    there = transaction.previous
    if there is None:
        return []
    engines = {entry["path"]: entry for entry in kept_engines(there, bundle)}
    kept = intact_files(transaction.out, there, engines)  # a damaged one is built again
    card = intact_files(transaction.out, there, [_CARD]) if kept else []
    for name in (*kept, *card):
        transaction.take_over(name)
        known[name] = there.files[name]
    return [engines[name] for name in kept]
