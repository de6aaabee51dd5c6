"""A folder held open: its content is reached through its descriptor, one name at a time and never through a link.

A path is looked up again at every use, and a link that somebody put on the way leads it elsewhere. The output folder of
an export may come from a stranger. So every move, replacement and deletion in it goes through :class:`Folder`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from dvdquant.system.files import read_all, write_all

__all__ = ["MAX_DEPTH", "Entry", "Folder"]

# Levels of folders below an export. check_relpath allows longer paths, which no export has.
MAX_DEPTH = 64
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Entry:
    """One entry below a folder, as :meth:`Folder.walk` finds it.

    Args:
        path: The path relative to that folder, with "/".
        info: The ``lstat`` of the entry.
        empty: True for a folder with nothing in it.
    """

    def __init__(self, path: str, info: os.stat_result, empty: bool) -> None:
        self.path, self.info, self.empty = path, info, empty

    @property
    def is_folder(self) -> bool:
        """Return whether the entry is a folder; a link to one is not."""
        return stat.S_ISDIR(self.info.st_mode)

    @property
    def is_file(self) -> bool:
        """Return whether the entry is a regular file; a link to one is not."""
        return stat.S_ISREG(self.info.st_mode)


class Folder:
    """An open folder. Every ``name`` that a method takes is one entry of it, and a link of that name is not followed.

    An OSError of a method names the whole path. Close the folder, or use it as a context manager.

    Args:
        fd: The descriptor, owned by this object from now on.
        path: The name of the folder in errors.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    @classmethod
    def open(cls, path: Path, *, follow: bool = False) -> Folder:
        """Open the folder at ``path``.

        Args:
            path: The path of the folder.
            follow: Allow that the last part of the path is a link.

        Raises:
            OSError: There is no folder, or its last part is a link and ``follow`` is False.
        """
        return cls(os.open(path, _OPEN & ~os.O_NOFOLLOW if follow else _OPEN), path)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):  # a folder has nothing left to write, and it is closed in any case
                os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Give an OSError of the block the whole path, because the error of a call by descriptor has the name alone."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.path / name)) from error

    # ------------------------------------------------------------------------------------------------------- looking

    def names(self) -> list[str]:
        """Return the sorted names of all entries."""
        with self._named(""):
            return sorted(os.listdir(self.fd))

    def info(self, name: str) -> os.stat_result | None:
        """Return the ``lstat`` of an entry, or None if there is none.

        Args:
            name: The name of the entry.
        """
        try:
            with self._named(name):
                return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def own(self) -> os.stat_result:
        """Return the ``fstat`` of the folder itself."""
        with self._named(""):
            return os.fstat(self.fd)

    def has(self, name: str) -> bool:
        """Return whether there is an entry of that name, even a link that leads nowhere.

        Args:
            name: The name of the entry.
        """
        return self.info(name) is not None

    def has_folder(self, name: str) -> bool:
        """Return whether the entry is a folder, and no link to one.

        Args:
            name: The name of the entry.
        """
        info = self.info(name)
        return info is not None and stat.S_ISDIR(info.st_mode)

    def has_file(self, name: str) -> bool:
        """Return whether the entry is a regular file, and no link to one.

        Args:
            name: The name of the entry.
        """
        info = self.info(name)
        return info is not None and stat.S_ISREG(info.st_mode)

    def walk(self, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Entry]:
        """Yield every entry below, folders before their content; links are entries and are not followed.

        Args:
            skip: A function of a name. If it returns True for an entry of this folder itself, that entry is left out
                with all below it.

        Raises:
            OSError: A folder cannot be read, or more than :data:`MAX_DEPTH` folders are in each other.
        """
        waiting = [""]
        while waiting:
            relative = waiting.pop()
            parts = relative.split("/") if relative else []
            if len(parts) > MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} folders in each other", str(self.path))
            below = []
            with self.reach(parts) as folder:
                for name in folder.names():
                    if not relative and skip(name):
                        continue
                    if (info := folder.info(name)) is None:
                        continue  # it was deleted since the listing
                    path = f"{relative}/{name}" if relative else name
                    empty = False
                    if stat.S_ISDIR(info.st_mode):
                        below.append(path)
                        with folder.child(name) as inner:
                            empty = not inner.names()
                    yield Entry(path, info, empty)
            waiting += reversed(below)

    # ------------------------------------------------------------------------------------------------------- folders

    def child(self, name: str) -> Folder:
        """Open a folder in this one.

        Args:
            name: The name of the folder.

        Raises:
            OSError: It is missing, or a file or a link is in its place.
        """
        with self._named(name):
            return Folder(os.open(name, _OPEN, dir_fd=self.fd), self.path / name)

    def make(self, name: str, mode: int = 0o777) -> None:
        """Make a folder in this one.

        Args:
            name: The name of the folder.
            mode: Its permissions, from which the umask takes some away.

        Raises:
            FileExistsError: Something of that name is there.
        """
        with self._named(name):
            os.mkdir(name, mode, dir_fd=self.fd)

    def reach(self, parts: list[str], *, make: bool = False) -> Folder:
        """Open the folder at the end of ``parts``; without parts, open this one again with a new descriptor.

        Args:
            parts: The names of the folders on the way.
            make: Make the folders that are missing.

        Raises:
            OSError: A part is missing, or is no folder.
        """
        folder = Folder(os.dup(self.fd), self.path)
        for part in parts:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        folder.make(part)
                inner = folder.child(part)
            finally:
                folder.close()
            folder = inner
        return folder

    def remove_folder(self, name: str) -> None:
        """Delete an empty folder.

        Args:
            name: The name of the folder.

        Raises:
            OSError: It is missing, no folder, or not empty.
        """
        with self._named(name):
            os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make the names in the folder durable."""
        with self._named(""):
            os.fsync(self.fd)

    # --------------------------------------------------------------------------------------------------------- files

    def open_file(self, name: str) -> int:
        """Return a descriptor of a regular file, opened for reading.

        Args:
            name: The name of the file.

        Raises:
            OSError: It cannot be opened.
            ValueError: It is a link, a pipe, a folder or a device.
        """
        info = self.info(name)
        if info is not None and not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{name} is {_kind(info.st_mode)}, not a regular file")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._named(name):
            fd = os.open(name, flags, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # it was replaced since the first look
                raise ValueError(f"{name} is not a regular file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most ``limit`` bytes.

        Args:
            name: The name of the file.
            limit: The greatest size in bytes.

        Raises:
            OSError: It cannot be read.
            ValueError: It is longer than ``limit``, or is a link, a pipe, a folder or a device.
        """
        with self._named(name):
            return read_all(self.open_file(name), limit)

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Write a small file, whole and durable, in place of the file or link of that name.

        The file is always a new one: an existing one may be a link, or a second name of a file elsewhere.

        Args:
            name: The name of the file.
            data: Its content.
            mode: Its permissions, from which the umask takes some away.

        Raises:
            OSError: It cannot be written, or a folder has its name.
        """
        self.unlink(name)
        with self._named(name):
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self.fd
            )
            try:
                write_all(fd, data, 0)
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_file(self, name: str) -> None:
        """Make the content of a regular file durable.

        Args:
            name: The name of the file.

        Raises:
            OSError: It cannot be opened or synced.
            ValueError: It is a link, a pipe, a folder or a device.
        """
        fd = self.open_file(name)
        try:
            with self._named(name):
                os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, name: str) -> None:
        """Delete a file or a link, if it is there.

        Args:
            name: The name of the entry.

        Raises:
            OSError: It is a folder, or cannot be deleted.
        """
        with contextlib.suppress(FileNotFoundError), self._named(name):
            os.unlink(name, dir_fd=self.fd)

    def rename(self, name: str, target: Folder, new: str) -> None:
        """Move an entry, or a link itself, into another folder, in place of the file or link ``new``.

        Args:
            name: The name of the entry in this folder.
            target: The folder that it goes into, on the same file system.
            new: Its name there.
        """
        with self._named(name):
            os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=target.fd)

    def link(self, name: str, target: Folder, new: str) -> None:
        """Give an entry a second name in another folder; a link gets a second name itself.

        Args:
            name: The name of the entry in this folder.
            target: The folder of the second name, on the same file system.
            new: The name there.
        """
        with target._named(new):
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=target.fd, follow_symlinks=False)

    # ------------------------------------------------------------------------------------------------------ deleting

    def remove(self, name: str) -> None:
        """Delete an entry with all below it, if it is there; links are deleted, not followed.

        However deep its folders are, at most two are open: folders that lie deeper are first moved up.

        Args:
            name: The name of the entry.

        Raises:
            OSError: Something cannot be deleted, or another file system is mounted below.
        """
        if not self.has_folder(name):
            self.unlink(name)
            return
        with self._child_to_delete(name) as top:
            device = top.own().st_dev
            while names := top.names():
                for inner in names:
                    top._remove_shallow(inner, device)
        self.remove_folder(name)

    def _remove_shallow(self, name: str, device: int) -> None:
        """Delete an entry, after moving the folders in it up into this one.

        Args:
            name: The name of the entry.
            device: The number of the device that everything deleted is on.

        Raises:
            OSError: Something cannot be deleted, or another file system is mounted there.
        """
        if not self.has_folder(name):
            self.unlink(name)
            return
        with contextlib.suppress(OSError):
            self.remove_folder(name)  # an empty folder can be deleted without the right to read it
            return
        with self._child_to_delete(name) as folder:
            if folder.own().st_dev != device:
                raise OSError(errno.EXDEV, "another file system is mounted there", str(folder.path))
            for inner in folder.names():
                if folder.has_folder(inner):
                    folder._child_to_delete(inner).close()
                    folder.rename(inner, self, f".{secrets.token_hex(16)}")
                else:
                    folder.unlink(inner)
        self.remove_folder(name)

    def _child_to_delete(self, name: str) -> Folder:
        """Open a folder in this one that is to be deleted; a write-protected one is made writable."""
        folder = self.child(name)
        with contextlib.suppress(OSError):  # it belongs to another user; deleting in it may be allowed all the same
            if folder.own().st_mode & 0o700 != 0o700:
                os.fchmod(folder.fd, 0o700)
        return folder


def _kind(mode: int) -> str:
    """Return the name of a kind of entry other than a regular file, by its ``st_mode``."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
