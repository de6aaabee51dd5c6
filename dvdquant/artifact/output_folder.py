"""Checks that a folder may become an export, as far as they are possible without writing to it."""

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

# Names that file systems and desktops put into an otherwise empty folder.
_FOREIGN = {"lost+found", ".DS_Store"}
# The bytes that a path may have on Linux, and those kept for the folders and files that an export makes below its own.
_PATH_MAX, _BELOW = 4096, 512


def real_path(out: str | Path) -> Path:
    """Return ``out`` with links and ``~`` resolved.

    Args:
        out: The output folder, which need not exist.

    Raises:
        OutputError: It is no usable path, or it is relative and the working directory was deleted.
    """
    try:
        return Path(os.path.realpath(Path(out).expanduser()))
    except FileNotFoundError as error:
        raise OutputError(
            f"{shown(out)} is relative, and the working directory was deleted", fix="change to a folder that exists"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{str(out)!r:.200} is no usable path: {error}", fix="pick another -o") from error


def check_path(folder: Path) -> None:
    """Refuse a resolved path that an export would fail at later.

    Args:
        folder: The output folder without links.

    Raises:
        OutputError: The path is too long, or holds bytes that are not UTF-8.
    """
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


def check_output(out: str | Path) -> Manifest | None:
    """Check that an export into ``out`` would be accepted, without making anything, so that a dry run can ask too.

    Args:
        out: The output folder, which need not exist.

    Returns:
        The manifest of the finished export in it, or None.

    Raises:
        OutputError: The path is no usable one, the folder cannot be written, or it holds something else than an export.
        ResourceError: The number of open files is at its limit.
    """
    folder = real_path(out)
    check_path(folder)
    try:
        there = _deepest(folder)
        # File systems such as /proc let root write by their permissions, but hold no files: they have no blocks.
        if not os.access(there, os.W_OK | os.X_OK) or not os.statvfs(there).f_blocks:
            raise OutputError(f"cannot write {folder}: {there} takes no files", fix="pick an -o you may write to")
        # The next export puts in order what a killed commit left, so it is no reason to refuse.
        if there == folder and not os.path.lexists(folder / COMMIT):
            with Folder.open(folder) as opened:
                return previous_export(opened)
    except OSError as error:
        raise disk_error(error, error.filename or folder) from error
    return None


def _deepest(folder: Path) -> Path:
    """Return the deepest of ``folder`` and its parents that exists.

    Raises:
        OutputError: It is no folder.
        OSError: A name in the path is too long or cannot be looked at.
    """
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
    """Return the manifest of the export in ``out``, or None for an empty folder.

    Args:
        out: The open folder. The lock file, unfinished work, and the files that file systems and desktops make do not
            count.

    Raises:
        OutputError: The folder holds something else, or an invalid manifest.
    """
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
