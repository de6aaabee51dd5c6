"""The last step of an export: it is put in place so that a kill at any instant leaves the old export or the new one.

Two ways, tried in this order:

1. Exchange. The new tree moves beside OUT and the two directories swap names in one system call. It is used if OUT
   already holds an export. It is not possible if OUT is a mount point, the parent is not writable, the file system
   cannot do it, or the process itself runs inside OUT (its working directory would turn into the old tree).
2. Roll forward. A record ``OUT/.commit`` names the files to install and the files to remove; renaming it into place
   decides for the new export. The old manifest goes first and the new one comes last, so at no time is a manifest
   beside files of another export. :func:`recover` finishes what a kill interrupted.

A kill can leave these states, and the next export into the folder handles them (a reader changes nothing):

* ``OUT/.tmp-<id>``: unfinished work; it is deleted, or adopted by ``--resume``.
* ``.<OUT>.dvdquant-<id>`` beside OUT, while ``OUT/.tmp-<id>`` exists: the kill came before the exchange; the tree is
  moved back.
* the same without ``OUT/.tmp-<id>``: the kill came after the exchange, and this is the replaced export; it is deleted.
* ``OUT/.commit``: the commit is decided and perhaps half installed; it is rolled forward.

The folder may come from a stranger, with all of these prepared. So everything here works on open folders
(:class:`Folder`). A link, in whichever place and put there at whatever time, is refused or deleted as the link it is.
Nothing outside OUT and its own folders beside it is moved, read, written or deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import StrictStr, TypeAdapter

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import COMMIT, MANIFEST, OWNER, STAGE, TREE, is_bookkeeping
from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.manifest import MAX_MANIFEST, Manifest, check_relpath
from dvdquant.errors import OutputError
from dvdquant.system.files import disk_error, strict_json

__all__ = [
    "install",
    "recover",
    "recover_locked",
    "remove_stage",
    "roll_forward",
    "sweep",
    "walk_files",
]

MAX_RECORD = 4 << 20  # some ten thousand files
_RENAME_EXCHANGE = 2

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- files and folders


def walk_files(root: Path) -> Iterator[str]:
    """Yield the relative POSIX paths of everything under ``root`` that is no directory, links to directories included.

    Args:
        root: The folder, which is no link.

    Raises:
        OSError: A folder cannot be read.
    """
    with Folder.open(root) as folder:
        yield from [entry.path for entry in folder.walk() if not entry.is_folder]


def is_trusted(info: os.stat_result, out: Folder) -> bool:
    """Return whether a file or folder belongs to this user, or to the owner of the output folder.

    Args:
        info: The status of the file or folder.
        out: The output folder.
    """
    return info.st_uid in (os.geteuid(), out.own().st_uid)


def remove_stage(folder: Folder, name: str) -> None:
    """Delete a stage, its owner file first: half deleted, it must not look like work that can be resumed.

    Args:
        folder: The output folder.
        name: The name of the stage in it.

    Raises:
        OSError: Something cannot be deleted.
    """
    if folder.has_folder(name):
        with folder.child(name) as stage:
            if not stage.has_folder(OWNER):
                stage.unlink(OWNER)
    folder.remove(name)


def sweep(folder: Folder, keep: str | None = None) -> None:
    """Delete the unfinished work of dead processes.

    The caller holds the lock, so no living process owns any of it.

    Args:
        folder: The output folder.
        keep: The name of a stage that stays.

    Raises:
        OSError: Something cannot be deleted.
    """
    for name in folder.names():
        if STAGE.fullmatch(name) and name != keep:
            logger.info("removing the unfinished work of an earlier run: %s", folder.path / name)
            remove_stage(folder, name)


# ----------------------------------------------------------------------------------------------------------- exchange


def install(lock: FolderLock, stage: Folder, new: Iterable[str], old: Manifest | None) -> FolderLock:
    """Make ``stage/tree`` the content of the locked folder, in place of the old export.

    Files of the folder that the old manifest does not list stay, unless the new export has one of the same path. An
    OSError or an OutputError leaves the folder unchanged, or decided and recoverable.

    Args:
        lock: The lock of the output folder.
        stage: The stage. Its tree holds the files ``new`` and a manifest, all fsynced.
        new: The relative POSIX paths of the new export's files.
        old: The manifest of the export that is replaced, or None if there is none.

    Returns:
        The lock that is held afterwards.

    Raises:
        OSError: A file system call fails.
        OutputError: Something is in the way of a new file, there are too many files to replace one by one, or the
            folder was changed meanwhile.
    """
    listed = set(old.files) if old is not None else set()
    if old is not None and not _works_inside(lock.folder.path):
        swapped = _swap(lock, stage, listed)
        if swapped is not None:
            lock.release()
            return swapped
    _decide(lock.folder, stage, sorted(new), sorted(listed - set(new)))
    roll_forward(lock.folder)
    return lock


def _works_inside(out: Path) -> bool:
    """Return whether the working directory of this process is in the output folder, or may be."""
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:  # the working directory was deleted
        return False
    except OSError:  # it is below a folder that may not be read, so it may be in the output folder
        return True
    return out in (here, *here.parents)


def _sibling(out: Path, stage_name: str) -> str:
    """Return the name beside the output folder that the new tree has for the exchange."""
    return f".{out.name}.dvdquant-{stage_name.removeprefix('.tmp-')}"


def exchange(parent: Folder, one: str, other: str) -> None:
    """Swap two folders in one step (renameat2).

    Args:
        parent: The folder that holds both.
        one: The name of one of them.
        other: The name of the other.

    Raises:
        OSError: The kernel, the library or the file system cannot do it.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if function(parent.fd, os.fsencode(one), parent.fd, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(parent.path / one))


def _swap(lock: FolderLock, stage: Folder, listed: set[str]) -> FolderLock | None:
    """Put the new tree in place by way 1; return None, with everything as before, if it is not possible.

    Args:
        lock: The lock of the output folder.
        stage: The stage that holds the new tree.
        listed: The paths of the old export's files.

    Returns:
        The lock of the new folder, or None.
    """
    old, out, sibling = lock.folder, lock.folder.path, _sibling(lock.folder.path, stage.path.name)
    # 1. Move the new tree beside the output folder.
    try:
        parent = Folder.open(out.parent)
    except OSError as error:
        logger.debug("no exchange of %s: %s", out, error)
        return None
    with parent:
        try:
            if parent.has(sibling):
                raise OSError(errno.EEXIST, "there already", str(parent.path / sibling))
            tree = stage.info(TREE)
            stage.rename(TREE, parent, sibling)
        except OSError as error:
            logger.debug("no exchange of %s: %s", out, error)
            return None
        # 2. Lock it, carry over the files that are not of the old export, and exchange the two folders.
        swapped: FolderLock | None = None
        try:
            swapped = FolderLock(out.parent / sibling)  # whoever finds the new folder finds it locked
            there = parent.info(out.name)
            if (
                tree is None
                or there is None
                or not os.path.samestat(swapped.folder.own(), tree)
                or not os.path.samestat(there, old.own())
            ):
                raise OSError(errno.ESTALE, "a folder was replaced meanwhile", str(out))
            _carry(old, swapped.folder, listed)
            os.fchmod(swapped.folder.fd, stat.S_IMODE(old.own().st_mode))
            swapped.folder.sync()
            exchange(parent, sibling, out.name)
        except BaseException as error:
            if tree is not None and _is_at(parent, out.name, tree):
                raise  # interrupted just after the exchange: the next run deletes the replaced tree
            # The exchange did not happen: put the tree back.
            if swapped is not None:
                swapped.release()
            parent.rename(sibling, stage, TREE)
            if not isinstance(error, OSError | OutputError):
                raise
            logger.debug("no exchange of %s: %s", out, error)
            return None
        # 3. Delete the replaced export, which has the name beside the output folder now.
        swapped.folder.path = out
        try:
            parent.sync()
            _retire(parent, sibling, old, swapped.folder, stage.path.name, listed)
        except OSError as error:
            logger.warning(
                "the export is in place, but the one it replaces is left at %s: %s", out.parent / sibling, error
            )
    return swapped


def _is_at(folder: Folder, name: str, what: os.stat_result) -> bool:
    """Return whether ``name`` in the folder is the file or folder with the status ``what``."""
    with contextlib.suppress(OSError):
        there = folder.info(name)
        return there is not None and os.path.samestat(there, what)
    return False


def _carry(source: Folder, target: Folder, listed: set[str]) -> None:
    """Hard-link everything in ``source`` but its export into ``target``, unless the name is taken there.

    Args:
        source: The old folder.
        target: The new folder.
        listed: The paths of the files of the export in ``source``.
    """
    for entry in source.walk(is_bookkeeping):
        if entry.is_folder:
            if entry.empty:
                target.reach(entry.path.split("/"), make=True).close()
            continue
        if entry.path in listed or entry.path == MANIFEST:
            continue
        *parents, name = entry.path.split("/")
        with target.reach(parents, make=True) as there, source.reach(parents) as here:
            if not there.has(name):
                here.link(name, there, name)


def _retire(parent: Folder, sibling: str, old: Folder, new: Folder, stage_name: str, listed: set[str]) -> None:
    """Delete the replaced export beside the output folder, after carrying over what is not of the export.

    Args:
        parent: The folder that holds both.
        sibling: The name of the replaced folder in it.
        old: The replaced folder.
        new: The output folder.
        stage_name: The name in the output folder under which the replaced folder is deleted.
        listed: The paths of the replaced export's files.
    """
    _carry(old, new, listed)  # files that somebody put into the old folder since the first time
    parent.rename(sibling, new, stage_name)
    new.remove(stage_name)


def _recover_siblings(folder: Folder) -> None:
    """Put back, or delete, the folders that an interrupted exchange left beside the output folder."""
    out = folder.path
    pattern = re.compile(re.escape(f".{out.name}.dvdquant-") + "[0-9a-f]{16}")
    try:
        with Folder.open(out.parent) as parent:
            for name in parent.names():
                if pattern.fullmatch(name):
                    _recover_sibling(folder, parent, name)
    except PermissionError:
        return  # the parent cannot be listed, so nothing that an exchange left can be seen or deleted


def _recover_sibling(folder: Folder, parent: Folder, name: str) -> None:
    """Put back the folder ``name`` beside the output folder, or delete it if it is the replaced export.

    A folder that is neither, or of somebody else, is left alone.

    Args:
        folder: The output folder.
        parent: Its parent.
        name: The name of the folder beside it.
    """
    place, stage_name = parent.path / name, f".tmp-{name[-16:]}"
    try:
        info = parent.info(name)
        if info is None or not stat.S_ISDIR(info.st_mode) or not is_trusted(info, folder):
            return
        with parent.child(name) as sibling:
            if folder.has_folder(stage_name):
                with folder.child(stage_name) as stage:
                    if not stage.has(TREE):
                        parent.rename(name, stage, TREE)
            elif not folder.has(stage_name) and sibling.has_file(MANIFEST):
                listed = set(Manifest.from_json(sibling.read(MANIFEST, MAX_MANIFEST)).files)
                _retire(parent, name, sibling, folder, stage_name, listed)
    except (OSError, ValueError, OutputError) as error:
        logger.warning("%s looks like what an interrupted export replaced, and is left alone: %s", place, error)


# ------------------------------------------------------------------------------------------------------- roll forward


@dataclass(frozen=True)
class Record:
    """The content of ``OUT/.commit``.

    Args:
        stage: The name of the stage whose tree is installed.
        install: The paths of its files.
        remove: The paths of the old export's files that are deleted.
    """

    stage: StrictStr
    install: list[StrictStr]
    remove: list[StrictStr]


_RECORD = TypeAdapter(Record)


def _decide(folder: Folder, stage: Folder, new: list[str], remove: list[str]) -> None:
    """Refuse what cannot be installed, then write the record that decides for the new export (way 2, first half).

    Args:
        folder: The output folder.
        stage: The stage that holds the new tree.
        new: The paths of the new export's files.
        remove: The paths of the old export's files that the new one does not have.

    Raises:
        OutputError: Something is in the way of a new file, or there are too many files.
    """
    for name in new:
        if reason := _obstacle(folder, name):
            raise OutputError(f"{folder.path / name} cannot be written: {reason} is in its way", fix="move it away")
    gone = [name for name in remove if _state(folder, name) in ("file", "link")]
    record = json.dumps({"stage": stage.path.name, "install": new, "remove": gone}).encode()
    if len(record) > MAX_RECORD:
        raise OutputError(
            f"{folder.path} and the new export have {len(new) + len(gone)} files, too many to replace one by one",
            fix="pick another -o",
        )
    stage.write("commit.json", record)
    stage.sync()
    stage.rename("commit.json", folder, COMMIT)
    folder.sync()


def _state(folder: Folder, name: str) -> str:
    """Return what is at ``name`` below the folder.

    Args:
        folder: The folder.
        name: A path relative to it, with "/".

    Returns:
        "nothing", "file", "folder", "link" (a pipe or a device too), or "other" if a parent is no real folder.
    """
    *parents, last = name.split("/")
    try:
        with folder.reach(parents) as place:
            info = place.info(last)
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            return "other"
        raise
    if info is None:
        return "nothing"
    return "file" if stat.S_ISREG(info.st_mode) else "folder" if stat.S_ISDIR(info.st_mode) else "link"


def _obstacle(folder: Folder, name: str) -> str | None:
    """Return what keeps a file from being renamed to ``name``, or None.

    A link of that very name is no obstacle: it is replaced.
    """
    return {"folder": "a folder", "other": "a file or link"}.get(_state(folder, name))


def roll_forward(folder: Folder) -> None:
    """Install the tree of the record (way 2, second half).

    Every step may be repeated, so the next run finishes the work of a killed one. Nothing is changed before the whole
    record was compared with both trees. A link that somebody puts there meanwhile ends the work with an OSError: no
    step goes through a link.

    Args:
        folder: The locked output folder, which holds a record.

    Raises:
        OutputError: The record or the trees are damaged.
        OSError: A file system call fails.
    """
    record = _read_record(folder)
    if folder.has_folder(record.stage):
        with folder.child(record.stage) as stage:
            if stage.has_folder(TREE):
                with stage.child(TREE) as tree:
                    if tree.has(MANIFEST):
                        _check_trees(folder, tree, record)
                        _install_files(folder, tree, record)
    elif folder.has(record.stage):
        raise _damaged(folder, f"{record.stage} is no folder")
    if not folder.has_file(MANIFEST):
        raise _damaged(folder, "its manifest is lost")
    try:
        if folder.has_folder(record.stage):
            with folder.child(record.stage) as stage:
                stage.unlink(OWNER)
        folder.unlink(COMMIT)
        remove_stage(folder, record.stage)
    except OSError as error:
        logger.warning("the export is in place, but %s is left of its making: %s", error.filename, error.strerror)


def _read_record(folder: Folder) -> Record:
    """Return the checked record of the folder.

    Raises:
        OutputError: It is out of form.
    """
    try:
        record = _RECORD.validate_python(strict_json(folder.read(COMMIT, MAX_RECORD)))
        if not STAGE.fullmatch(record.stage):
            raise ValueError(f"{record.stage!r:.100} is no stage of an export")
        for name in (*record.install, *record.remove):
            check_relpath(name)
    except (ValueError, OutputError) as error:
        raise _damaged(folder, f"{COMMIT}: {_first_line(error)}") from error
    return record


def _first_line(error: Exception) -> str:
    """Return the text of an error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _check_trees(folder: Folder, tree: Folder, record: Record) -> None:
    """Check that every file of the record is where it can be taken from, and can go where it belongs.

    Args:
        folder: The output folder.
        tree: The tree of the stage.
        record: The decided commit.

    Raises:
        OutputError: A file is lost, or something is in its way.
    """
    try:
        manifest = Manifest.from_json(tree.read(MANIFEST, MAX_MANIFEST))
    except (ValueError, OutputError) as error:
        raise _damaged(folder, f"its manifest: {_first_line(error)}") from error
    if set(manifest.files) != set(record.install):
        raise _damaged(folder, f"{COMMIT} and its manifest list other files")
    if folder.has_folder(MANIFEST):
        raise _damaged(folder, f"a folder is in the way of {MANIFEST}")
    for name in record.install:
        here, there = _state(tree, name), _state(folder, name)
        if here not in ("file", "nothing"):
            raise _damaged(folder, f"{name!r:.200} is no regular file, or is reached through a link")
        if there not in ("file", "nothing", "link") or (there == "link" and here == "nothing"):
            raise _damaged(folder, f"a folder, file or link is in the way of {name!r:.200}")
        if here == there == "nothing":
            raise _damaged(folder, f"{name!r:.200} is lost")
    for name in record.remove:
        if _state(folder, name) == "other":
            raise _damaged(folder, f"{name!r:.200} is reached through a link")


def _install_files(folder: Folder, tree: Folder, record: Record) -> None:
    """Remove the old manifest and files, move the new files, and move the new manifest last.

    Args:
        folder: The output folder.
        tree: The tree of the stage.
        record: The decided commit.
    """
    folder.unlink(MANIFEST)
    folder.sync()
    for name in record.remove:
        _unlink_pruned(folder, name)
    touched: set[tuple[str, ...]] = set()
    for name in record.install:
        *parents, last = name.split("/")
        with contextlib.suppress(FileNotFoundError), tree.reach(parents) as source:
            if source.has_file(last):
                with folder.reach(parents, make=True) as target:
                    source.rename(last, target, last)
        touched |= {tuple(parents[:depth]) for depth in range(len(parents) + 1)}
    for place in sorted(touched, reverse=True):
        with folder.reach(list(place)) as target:
            target.sync()
    tree.rename(MANIFEST, folder, MANIFEST)
    folder.sync()


def _unlink_pruned(folder: Folder, name: str) -> None:
    """Delete a file, and the folders that it leaves empty.

    Args:
        folder: The output folder.
        name: The path of the file in it.
    """
    *parents, last = name.split("/")
    if _state(folder, name) in ("folder", "other"):
        return
    with contextlib.suppress(FileNotFoundError), folder.reach(parents) as place:
        place.unlink(last)
    while parents:
        *parents, last = parents
        try:
            with folder.reach(parents) as place:
                place.remove_folder(last)
        except OSError:
            return  # it is not empty, or not there


def _damaged(folder: Folder, why: str) -> OutputError:
    """Return the error for a commit that cannot be completed."""
    return OutputError(
        f"{folder.path} holds an export that was interrupted while being put in place and cannot be completed: {why}",
        fix="empty the folder and export again, or pick another -o",
    )


def recover_locked(folder: Folder) -> bool:
    """Bring the folder to the old or the new export; the caller holds its lock.

    Args:
        folder: The output folder.

    Returns:
        True if a commit was completed.

    Raises:
        OutputError: A decided commit cannot be completed.
        OSError: A file system call fails.
    """
    _recover_siblings(folder)
    if not folder.has(COMMIT):
        return False
    roll_forward(folder)
    return True


def recover(out: Path) -> bool:
    """Lock the folder, and bring it to the old or the new export.

    Args:
        out: The output folder.

    Returns:
        True if a commit was completed.

    Raises:
        OutputError: An export is running, ``out`` cannot be written, or a decided commit cannot be completed.
        ResourceError: The disk is full, or too many files are open.
    """
    out = Path(os.path.realpath(out))
    try:
        lock = FolderLock(out)
        try:
            return recover_locked(lock.folder)
        finally:
            lock.release()
    except OSError as error:
        raise disk_error(error, error.filename or out) from error
