"""The files of an export as its manifest vouches for them: compared all together, or one read and hashed at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from dvdquant.artifact.listed_file import LINKED, NO_LINKS, ListedFileError, open_listed, require_digest
from dvdquant.artifact.manifest import Manifest, check_relpath
from dvdquant.errors import OutputError, ResourceError
from dvdquant.system.files import FileEntry, hash_descriptor, read_all
from dvdquant.system.memory import memory_limit
from dvdquant.text import amount, first_of

__all__ = ["intact_files", "read_verified", "verify_files"]


def verify_files(
    out: str | Path,
    manifest: Manifest,
    only: Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compare the files of an export with the SHA-256 of the manifest.

    Args:
        out: The export folder.
        manifest: Its manifest.
        only: The paths of the files to compare; None means all of them.
        progress: A function that gets the size in bytes of every block read.

    Raises:
        OutputError: Files are missing, of another size, changed, or reached through a link. The error names up to five.
    """
    names = list(manifest.files) if only is None else list(only)
    found: list[tuple[str, ListedFileError]] = []
    for name in names:
        entry = _entry(manifest, name)
        try:
            with open_listed(Path(out), check_relpath(name), entry) as descriptor:
                require_digest(hash_descriptor(descriptor, progress)["sha256"], entry)
        except ListedFileError as error:
            found.append((name, error))
    if found:
        problems = [f"{name} {error.reason}" for name, error in found]
        linked = all(error.reason == LINKED for _, error in found)
        raise OutputError(
            f"{out} does not match its manifest: {first_of(problems)}",
            fix=NO_LINKS if linked else "export again",
        )


def intact_files(
    out: str | Path,
    manifest: Manifest,
    names: Iterable[str],
    progress: Callable[[int], None] | None = None,
    damaged: Callable[[str, OutputError], None] = lambda name, error: None,
) -> list[str]:
    """Return those of some files of an export that are as its manifest says.

    Args:
        out: The export folder.
        manifest: Its manifest.
        names: The paths of the files.
        progress: A function that gets the size in bytes of every block read.
        damaged: A function that gets each of the others, and what is wrong with it.
    """
    intact = []
    for name in names:
        try:
            verify_files(out, manifest, [name], progress)
            intact.append(name)
        except OutputError as error:
            damaged(name, error)
    return intact


def _entry(manifest: Manifest, name: str) -> FileEntry:
    """Return the manifest's entry of a file.

    Raises:
        OutputError: The manifest does not list it.
    """
    if name not in manifest.files:
        raise OutputError(f"the manifest does not list {name!r:.200}", available=sorted(manifest.files)[:8])
    return manifest.files[name]


def read_verified(out: str | Path, manifest: Manifest, name: str) -> bytes:
    """Return the content of one file, hashed *as read*.

    The manifest vouches for exactly the bytes that are returned: there is no second open before which the file could be
    swapped. It is for engines, whose deserialization runs code.

    Args:
        out: The export folder.
        manifest: Its manifest.
        name: The path of the file in the export.

    Raises:
        OutputError: The file is missing, of another size, changed, or reached through a link.
        ResourceError: The file is larger than the free memory.
    """
    entry, path = _entry(manifest, name), Path(out) / check_relpath(name)
    if entry["bytes"] > (free := memory_limit()):
        raise ResourceError(
            f"{path} is to be read into memory: {amount(entry['bytes'])}",
            available=f"{amount(free)} are free",
            fix="free memory, or use a machine with more",
        )
    with open_listed(Path(out), name, entry) as descriptor:
        raw = read_all(os.dup(descriptor), entry["bytes"])
        require_digest(hashlib.sha256(raw).hexdigest(), entry)
    return raw
