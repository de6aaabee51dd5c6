"""Whether a folder may become an export, as far as that shows without writing to it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import COMMIT, LOCK, MANIFEST, STAGE
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest
from dvdquant.errors import OutputError
from dvdquant.system.files import disk_error
from dvdquant.text import shown

__all__ = ["check_output", "check_path", "previous_export", "real_path"]

# What file systems and desktops put into an otherwise empty folder.
_FOREIGN = {"lost+found", ".DS_Store"}
# Bytes of a path that Linux takes, and what is left for the folders and files that an export makes below its own.
_PATH_MAX, _BELOW = 4096, 512


def real_path(out: str | Path) -> Path:
    """``out`` without links and ``~``; OutputError for what is no path."""
    try:
        return Path(os.path.realpath(Path(out).expanduser()))
    except FileNotFoundError as error:
        raise OutputError(
            f"{shown(out)} is relative, and the working directory was deleted", fix="change to a folder that exists"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{str(out)!r:.200} is no usable path: {error}", fix="pick another -o") from error


def check_path(folder: Path) -> None:
    """OutputError for a resolved path that an export would fail at later: too long, or not to be written as text."""
    try:
        length = len(str(folder).encode())
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{shown(folder)} holds bytes that are not UTF-8: the libraries that write graphs and engines take no such path",
            fix="pick another -o, or rename that folder",
        ) from error
    if length > _PATH_MAX - _BELOW:
        raise OutputError(
            f"the path {shown(folder, 60)} has {length} bytes",
            available=f"at most {_PATH_MAX - _BELOW}, which leaves room for the files below it",
            fix="pick a shorter -o",
        )


def check_output(out: str | Path) -> None:
    """OutputError where an export into ``out`` would be refused; nothing is made, so that a dry run can ask too."""
    folder = real_path(out)
    check_path(folder)
    try:
        there = _deepest(folder)
        # /proc and its like let root write by their permissions and hold no files: they have no blocks.
        if not os.access(there, os.W_OK | os.X_OK) or not os.statvfs(there).f_blocks:
            raise OutputError(f"cannot write {folder}: {there} takes no files", fix="pick an -o you may write to")
        # What a killed commit left is put in order by the next export.
        if there == folder and not os.path.lexists(folder / COMMIT):
            with Folder.open(folder) as opened:
                previous_export(opened)
    except OSError as error:
        raise disk_error(error, error.filename or folder) from error


def _deepest(folder: Path) -> Path:
    """The deepest of ``folder`` and its parents that exists. OutputError if that is no folder, OSError for a bad name."""
    there = folder
    for place in reversed((folder, *folder.parents)):
        try:
            place.lstat()
        except FileNotFoundError:
            break
        if not place.is_dir():
            raise OutputError(f"{place} is not a folder", fix="pick another -o")
        there = place
    for name in folder.relative_to(there).parts:
        with contextlib.suppress(FileNotFoundError):
            (there / name).lstat()  # a name that is too long shows only where its parent exists
    return there


def previous_export(out: Folder) -> Manifest | None:
    """The manifest of the export in ``out``, None for an empty folder; OutputError for anything else."""
    names = set(out.names()) - _FOREIGN - {LOCK}
    names = {name for name in names if not STAGE.fullmatch(name)}
    if MANIFEST in names:
        try:
            return Manifest.from_json(out.read(MANIFEST, MAX_MANIFEST))
        except (ValueError, OutputError) as error:
            reason = error.what if isinstance(error, OutputError) else str(error)
            raise OutputError(
                f"{out.path} holds a {MANIFEST} that is not a valid one of dvdquant: {reason}",
                fix="pick another -o, or empty the folder",
            ) from error
    if names:
        raise OutputError(
            f"{out.path} is not empty and not a dvdquant export",
            available=sorted(names)[:8],
            fix="pick another -o or empty it",
        )
    return None
