"""Files and folders that appear whole or not at all: they are written beside their place and then renamed.

The unfinished file is called ``.NAME.dvdq-XXXXXXXXXXXX.SUFFIX`` and is locked (``flock``) as long as its writer lives, so
that the next one can tell what nobody will finish. An unfinished folder lies beside such a file, which has its lock, and has
its name with ``.new`` behind. The first six digits tell the machine: where a disk of a network keeps
locks to one machine, a file of another one is swept only when nobody has written to it for a day.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dvdquant.errors import OutputError
from dvdquant.system.files import disk_error
from dvdquant.system.network_disk import LIVE_SECONDS, Heartbeat, locks_stay_here

__all__ = ["atomic_folder", "atomic_path", "check_replaceable", "check_writable", "sweep_unfinished", "write_whole"]

UNFINISHED = re.compile(r"\..*\.dvdq-[0-9a-f]{12}(\.[^.]{0,12})?", re.DOTALL)
_LONGEST_STEM = 40  # characters of the name that the unfinished file's name keeps; a name may have 255 bytes


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, of the same suffix, that replaces ``path`` if the block ends well.

    Otherwise the temporary file is deleted, and the file at ``path`` stays. Missing folders are made. The files that
    killed writers left in the folder are deleted first.

    Args:
        path: The file to write.

    Raises:
        OutputError: The folder refuses, or ``path`` is a folder or a device.
        ResourceError: The disk or a quota is full, or too many files are open.
    """
    unfinished = _UnfinishedFile(path)
    try:  # before the file is made: Ctrl-C or SIGTERM may come between any two lines
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(path.parent)
        temporary = unfinished.create()
        yield temporary
        # The file is opened again, because a writer may have put another file under the name.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # an encoder was interrupted and then failed
            raise KeyboardInterrupt from error
        raise disk_error(error, path) from error
    finally:
        unfinished.remove()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` if the block ends well, and is deleted otherwise.

    A folder that is there by then, and not empty, stays: another writer was first. Missing folders above are made. What
    killed writers left there is deleted first.

    Args:
        path: The folder to make.

    Raises:
        OutputError: The folder above refuses, or ``path`` is a file.
        ResourceError: The disk or a quota is full, or too many files are open.
    """
    unfinished = _UnfinishedFile(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(path.parent)
        folder = _folder_of(unfinished.create())
        folder.mkdir()
        yield folder
        try:
            folder.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        unfinished.remove()


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all.

    Args:
        path: The file to write.
        data: Its new content.

    Raises:
        OutputError: The folder refuses, or ``path`` is a folder or a device.
        ResourceError: The disk or a quota is full, or too many files are open.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def check_replaceable(path: Path) -> None:
    """Refuse a path where something else than a file is.

    That is a folder, or a device such as /dev/null: a rename would replace it.

    Args:
        path: The path to check; links are followed.

    Raises:
        OutputError: Something else is there; the error names it.
        OSError: The path cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputError(f"{path} is {kind}, and no file that could be replaced", fix="pick another name")


def check_writable(path: Path, *, make_folder: bool = True) -> None:
    """Refuse a path that :func:`atomic_path` would refuse, before hours of work, without making anything.

    Args:
        path: The file that will be written.
        make_folder: Accept a missing folder, because it will be made. If False, the folder must exist.

    Raises:
        OutputError: A folder or a device is in the place of the file, or its folder takes no files.
        ResourceError: The disk or a quota is full, or too many files are open.
    """
    try:
        check_replaceable(path)
        place = path.absolute().parent
        if not make_folder and not place.is_dir():
            raise OutputError(f"there is no folder {place}", fix="make it, or pick another path")
        while not place.exists() and place != place.parent:
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise disk_error(error, path) from error
    sweep_unfinished(path.parent)


def sweep_unfinished(folder: Path) -> None:
    """Delete the files of this module's own names in ``folder`` that no living process locks, and the folders beside them.

    Args:
        folder: The folder that killed writers may have left something in. Errors are ignored.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if UNFINISHED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    """Delete an unfinished file, and before it the folder beside it, if nobody holds its lock.

    Raises:
        OSError: Its writer lives (BlockingIOError), or one of them cannot be opened or deleted.
    """
    # The file is opened for writing, because NFS gives an exclusive lock only to such a descriptor.
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        foreign = f".dvdq-{_machine()}" not in os.path.basename(path) and locks_stay_here(descriptor)
        if not foreign or time.time() - os.fstat(descriptor).st_mtime >= LIVE_SECONDS:
            if os.path.lexists(folder := _folder_of(Path(path))):
                shutil.rmtree(folder)
            os.unlink(path)
    finally:
        os.close(descriptor)


def _folder_of(temporary: Path) -> Path:
    """Return the place of the unfinished folder that has its lock from an unfinished file."""
    return temporary.with_name(f"{temporary.name}.new")


def _machine() -> str:
    """Return six hex digits of this machine's name."""
    return hashlib.sha256(socket.gethostname().encode(errors="surrogateescape")).hexdigest()[:6]


class _UnfinishedFile:
    """The locked file beside a path that its writer fills, with the permissions that the umask allows.

    Args:
        path: The file that it will become.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Each is set before or as soon as there is something to remove, so that a stop at any time leaves nothing.
        self._temporary: Path | None = None
        self._descriptor: int | None = None
        self._heartbeat: Heartbeat | None = None

    def create(self) -> Path:
        """Make the file, lock it and keep its time new.

        Returns:
            Its path.

        Raises:
            OSError: The folder or the disk refuses.
        """
        suffix = self._path.suffix if len(self._path.suffix) <= 12 else ""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            number = _machine() + secrets.token_hex(3)
            temporary = self._path.with_name(f".{self._path.stem[:_LONGEST_STEM]}.dvdq-{number}{suffix}")
            self._temporary = temporary
            try:
                self._descriptor = os.open(temporary, flags, 0o666)
            except FileExistsError:
                self._temporary = None  # another writer's
                raise
            _lock(self._descriptor)
            if _is_at(self._descriptor, temporary):
                self._heartbeat = Heartbeat(self._descriptor)
                return temporary
            self.remove()  # a sweep deleted it before it was locked

    def remove(self) -> None:
        """Delete the file, and the folder beside it, if they are there, and let go of the lock. Do nothing the second time."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._temporary is not None:
            shutil.rmtree(_folder_of(self._temporary), ignore_errors=True)
            with contextlib.suppress(OSError):  # the cause is being reported already
                self._temporary.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._heartbeat = self._temporary = self._descriptor = None


def _lock(descriptor: int) -> None:
    """Lock the open file for its writer; do nothing on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # on a file system without locks, a sweep gets no lock either, and deletes nothing
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one at ``path``."""
    try:
        there, mine = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, mine)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable if the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
