"""Putting a finished export in place so that a kill at any instant leaves the old export or the new one.

Two ways, tried in this order:

1. Exchange. The new tree moves beside OUT and the two directories swap names in one system call. Used when OUT already
   holds an export. Not possible when OUT is a mount point, the parent is not writable, the file system cannot, or the
   process itself runs inside OUT (its working directory would turn into the old tree).
2. Roll forward. A record ``OUT/.commit`` names what to install and what to remove; renaming it into place decides for
   the new export. The old manifest goes first and the new one comes last, so at no time does a manifest stand beside
   files of another export; :func:`recover` finishes what a kill interrupted.

States a kill can leave, and what the next run makes of them:

* ``OUT/.tmp-<id>``: unfinished work; swept, or adopted by ``--resume``.
* ``.<OUT>.dvdquant-<id>`` beside OUT, while ``OUT/.tmp-<id>`` exists: killed before the exchange; moved back.
* the same without ``OUT/.tmp-<id>``: killed after the exchange, it is the replaced export; deleted.
* ``OUT/.commit``: decided, perhaps half installed; rolled forward.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import OutputError
from .files import disk_error, read_limited, strict_json, write_all
from .manifest import MANIFEST, Manifest, check_relpath

__all__ = [
    "COMMIT",
    "LOCK",
    "STAGE",
    "TREE",
    "FolderLock",
    "install",
    "recover",
    "recover_locked",
    "sweep",
    "sync_path",
]

LOCK = ".lock"
COMMIT = ".commit"
TREE = "tree"
OWNER = "owner.json"
STAGE = re.compile(r"\.tmp-[0-9a-f]{16}")
MAX_RECORD = 64 << 20
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100

logger = logging.getLogger(__name__)


class FolderLock:
    """An exclusive lock on a folder, held by ``flock`` on its ``.lock`` and gone with the process.

    Raises:
        OutputError: another process holds it; names its pid. FileNotFoundError: the folder vanished.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
                os.close(self._fd)
                raise OutputError(
                    f"{folder} is being written by another export ({holder!r:.200})",
                    fix="wait for it to end or pick another -o",
                ) from None
            except BaseException:
                os.close(self._fd)
                raise
            if self._is_current():
                break
            os.close(self._fd)  # the holder before us removed or swapped this file: lock the one that is there now
        try:
            os.ftruncate(self._fd, 0)
            write_all(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def _is_current(self) -> bool:
        try:
            there, mine = os.stat(self.path, follow_symlinks=False), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        """Remove the lock file, then let go: whoever opened it meanwhile notices and opens a new one."""
        if self._fd >= 0:
            if self._is_current():
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


# ------------------------------------------------------------------------------------------------- files and folders


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: Path, data: bytes) -> None:
    """Write a small file whole, fsynced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def walk_files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of everything under ``root`` that is no directory, links to directories included."""
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _raise(error: OSError) -> None:
    raise error


def _is_bookkeeping(name: str) -> bool:
    top = name.split("/", 1)[0]
    return top in (LOCK, COMMIT) or STAGE.fullmatch(top) is not None


def remove_tree(path: Path) -> None:
    """Delete a stage, its owner first: half deleted, it must not look like work that can be resumed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        (path / OWNER).unlink(missing_ok=True)
        shutil.rmtree(path)


def sweep(out: Path, keep: Path | None = None) -> None:
    """Delete the unfinished work of dead processes; the caller holds the lock, so nobody alive owns any."""
    for entry in sorted(out.iterdir()):
        if STAGE.fullmatch(entry.name) and entry != keep:
            logger.info("removing the unfinished work of an earlier run: %s", entry)
            remove_tree(entry)


# ----------------------------------------------------------------------------------------------------------- exchange


def install(out: Path, stage: Path, new: Iterable[str], old: Manifest | None, lock: FolderLock) -> FolderLock:
    """Make ``stage/tree`` (files ``new`` and a manifest, all fsynced) the content of ``out``, in place of ``old``.

    Files of ``out`` that the old manifest does not list stay, unless the new export has one of the same path. Returns
    the lock that is held afterwards. OSError and OutputError leave ``out`` as it was, or decided and recoverable.
    """
    listed = set(old.files) if old is not None else set()
    if old is not None and not _works_inside(out) and (swapped := _swap(out, stage, listed)) is not None:
        lock.release()
        return swapped
    _decide(out, stage, sorted(new), sorted(listed - set(new)))
    _roll_forward(out)
    return lock


def _works_inside(out: Path) -> bool:
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:  # the working directory was deleted
        return False
    return out in (here, *here.parents)


def _sibling(out: Path, stage_name: str) -> Path:
    return out.parent / f".{out.name}.dvdquant-{stage_name.removeprefix('.tmp-')}"


def exchange(a: Path, b: Path) -> None:
    """Swap two directories in one step (renameat2). OSError when the kernel, the library or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a))


def _swap(out: Path, stage: Path, listed: set[str]) -> FolderLock | None:
    """Way 1; None, with everything as before, where it is not possible."""
    sibling, tree = _sibling(out, stage.name), stage / TREE
    lock: FolderLock | None = None
    try:
        os.rename(tree, sibling)
    except OSError as error:
        logger.debug("no exchange of %s: %s", out, error)
        return None
    try:
        lock = FolderLock(sibling)  # whoever finds the new folder finds it locked
        _carry(out, sibling, listed)
        shutil.copymode(out, sibling)
        sync_path(sibling)
        exchange(sibling, out)
    except BaseException as error:
        if not stage.exists():  # interrupted just after the exchange: the next run deletes the replaced tree
            raise
        if lock is not None:
            lock.release()
        os.rename(sibling, tree)
        if not isinstance(error, OSError):
            raise
        logger.debug("no exchange of %s: %s", out, error)
        return None
    lock.path = out / LOCK
    try:
        sync_path(out.parent)
        _retire(out, sibling, stage.name, listed)
    except OSError as error:
        logger.warning("the export is in place, but the one it replaces is left at %s: %s", sibling, error)
    return lock


def _carry(source: Path, target: Path, listed: set[str]) -> None:
    """Hard-link what ``source`` holds besides an export into ``target``, where it has nothing of that name."""
    for folder, folders, files in os.walk(source, onerror=_raise):
        if not folders and not files and folder != str(source):
            (target / os.path.relpath(folder, source)).mkdir(parents=True, exist_ok=True)
        if folder == str(source):
            folders[:] = [name for name in folders if not _is_bookkeeping(name)]
    for name in walk_files(source):
        if name in listed or name == MANIFEST or _is_bookkeeping(name) or os.path.lexists(target / name):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source / name, target / name, follow_symlinks=False)


def _retire(out: Path, sibling: Path, stage_name: str, listed: set[str]) -> None:
    _carry(sibling, out, listed)  # what somebody put into the old folder since the first time
    os.rename(sibling, out / stage_name)
    shutil.rmtree(out / stage_name)


def _recover_siblings(out: Path) -> None:
    pattern = re.compile(re.escape(f".{out.name}.dvdquant-") + "[0-9a-f]{16}")
    try:
        found = sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))
    except PermissionError:
        return  # a parent that cannot be listed: no exchange ever left anything that we could see or delete
    for sibling in found:
        stage = out / f".tmp-{sibling.name[-16:]}"
        if sibling.is_symlink() or not sibling.is_dir():
            continue
        if stage.is_dir() and not (stage / TREE).exists():
            os.rename(sibling, stage / TREE)
        elif not stage.exists() and (sibling / MANIFEST).is_file():
            try:
                listed = set(Manifest.from_json(read_limited(sibling / MANIFEST, MAX_RECORD)).files)
            except (ValueError, OutputError) as error:
                logger.warning("%s looks like a replaced export but is not readable, left alone: %s", sibling, error)
                continue
            _retire(out, sibling, stage.name, listed)


# ------------------------------------------------------------------------------------------------------- roll forward


def _decide(out: Path, stage: Path, new: list[str], remove: list[str]) -> None:
    """Way 2, first half: refuse what cannot be installed, then write the record that decides for the new export."""
    for name in new:
        if (out / name).is_dir() or not _parent_is_inside(out, name):
            raise OutputError(
                f"{out / name} cannot be written: a folder, file or link is in its way", fix="move it away"
            )
    record = {"stage": stage.name, "install": new, "remove": remove}
    write_durable(stage / "commit.json", json.dumps(record).encode())
    sync_path(stage)
    os.rename(stage / "commit.json", out / COMMIT)
    sync_path(out)


def _parent_is_inside(out: Path, name: str) -> bool:
    """Whether every existing parent of ``out/name`` is a real folder, so that no link leads a rename elsewhere."""
    place = out
    for part in name.split("/")[:-1]:
        place = place / part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            return False
    return True


def _roll_forward(out: Path) -> None:
    """Way 2, second half; every step may be repeated, so a run killed in it is finished by the next."""
    try:
        record = strict_json(read_limited(out / COMMIT, MAX_RECORD))
        stage, names, remove = record["stage"], list(record["install"]), list(record["remove"])
        usable = STAGE.fullmatch(stage) and all(_parent_is_inside(out, check_relpath(n)) for n in (*names, *remove))
    except (ValueError, TypeError, KeyError, OutputError) as error:
        raise _damaged(out, str(error)) from error
    tree = out / stage / TREE
    if not usable or (out / stage).is_symlink() or tree.is_symlink():
        raise _damaged(out, "its paths leave the folder")
    if (tree / MANIFEST).exists():
        if missing := [n for n in names if not os.path.lexists(tree / n) and not os.path.lexists(out / n)]:
            raise _damaged(out, f"{missing[0]!r:.200} is lost")
        (out / MANIFEST).unlink(missing_ok=True)
        sync_path(out)
        for name in remove:
            _unlink_pruned(out, name)
        for name in names:
            if os.path.lexists(tree / name):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(tree / name, out / name)
        for folder in {parent for name in names for parent in (out / name).parents if out in (parent, *parent.parents)}:
            sync_path(folder)
        os.replace(tree / MANIFEST, out / MANIFEST)
        sync_path(out)
    if (out / MANIFEST).exists():
        (out / stage / OWNER).unlink(missing_ok=True)
        (out / COMMIT).unlink()
        remove_tree(out / stage)
        return
    raise _damaged(out, "its manifest is lost")


def _unlink_pruned(out: Path, name: str) -> None:
    path = out / name
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == out or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


def _damaged(out: Path, why: str) -> OutputError:
    return OutputError(
        f"{out} holds an export that was interrupted while being put in place and cannot be completed: {why}",
        fix="empty the folder and export again",
    )


def recover_locked(out: Path) -> bool:
    """Bring ``out`` to the old or the new export; the caller holds its lock. True if a decided commit was completed."""
    _recover_siblings(out)
    if not os.path.lexists(out / COMMIT):
        return False
    _roll_forward(out)
    return True


def recover(out: Path) -> bool:
    """As :func:`recover_locked`, taking the lock. OutputError if an export is running or ``out`` cannot be written."""
    out = Path(os.path.realpath(out))
    try:
        lock = FolderLock(out)
        try:
            return recover_locked(out)
        finally:
            lock.release()
    except OSError as error:
        raise disk_error(error, out) from error
