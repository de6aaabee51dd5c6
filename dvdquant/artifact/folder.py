"""A folder held open: what is in it is reached through its descriptor, one name at a time and never through a link.

A path is looked up again at every use, and a link that somebody put on the way leads it elsewhere. The output folder of an
export may come from a stranger, so all that moves, replaces or deletes files in it goes through :class:`Folder`.
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
    """One thing below a folder, as :meth:`Folder.walk` finds it.

    Args:
        path: relative, with "/".
        info: its ``lstat``.
        empty: whether it is a folder with nothing in it.
    """

    def __init__(self, path: str, info: os.stat_result, empty: bool) -> None:
        self.path, self.info, self.empty = path, info, empty

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder; a link to one is not."""
        return stat.S_ISDIR(self.info.st_mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file; a link to one is not."""
        return stat.S_ISREG(self.info.st_mode)


class Folder:
    """An open folder. Every method that takes a ``name`` means one entry of it, and does not follow a link of that name.

    An OSError of a method names the whole path. Close it, or use it as a context manager.

    Args:
        fd: its descriptor, owned from now on.
        path: what it is called in errors.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    @classmethod
    def open(cls, path: Path, *, follow: bool = False) -> Folder:
        """Open the folder ``path``; ``follow`` allows that its last part is a link. OSError where it is none."""
        return cls(os.open(path, _OPEN & ~os.O_NOFOLLOW if follow else _OPEN), path)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):  # of a folder nothing is left to write, and it is closed in any case
                os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Give an OSError the whole path: that of a call by descriptor has the name alone."""
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
        """Return the ``lstat`` of an entry, None where there is none."""
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
        """Return whether there is an entry of that name, be it a link that leads nowhere."""
        return self.info(name) is not None

    def has_folder(self, name: str) -> bool:
        """Return whether the entry is a folder, and no link to one."""
        info = self.info(name)
        return info is not None and stat.S_ISDIR(info.st_mode)

    def has_file(self, name: str) -> bool:
        """Return whether the entry is a regular file, and no link to one."""
        info = self.info(name)
        return info is not None and stat.S_ISREG(info.st_mode)

    def walk(self, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Entry]:
        """Yield every entry below, folders before what is in them; links are entries, whatever they lead to.

        Args:
            skip: says of an entry of this folder itself that it is left out, with all below it.

        Raises:
            OSError: a folder that cannot be read, or more than :data:`MAX_DEPTH` of them in each other.
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
                        continue  # gone since the listing
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
        """Open a folder in this one. OSError where it is missing, or a file or a link is in its place."""
        with self._named(name):
            return Folder(os.open(name, _OPEN, dir_fd=self.fd), self.path / name)

    def make(self, name: str, mode: int = 0o777) -> None:
        """Make a folder. FileExistsError where there is anything of that name."""
        with self._named(name):
            os.mkdir(name, mode, dir_fd=self.fd)

    def reach(self, parts: list[str], *, make: bool = False) -> Folder:
        """Open the folder at the end of ``parts``, a new descriptor of this one if there are none.

        Args:
            make: make what is missing.

        Raises:
            OSError: a part is missing, or is no folder.
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
        """Delete an empty folder."""
        with self._named(name):
            os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make the names in the folder durable."""
        with self._named(""):
            os.fsync(self.fd)

    # --------------------------------------------------------------------------------------------------------- files

    def open_file(self, name: str) -> int:
        """Return a descriptor for reading a regular file.

        Raises:
            OSError: it cannot be opened. ValueError: it is a link, a pipe, a folder or a device.
        """
        info = self.info(name)
        if info is not None and not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{name} is {_kind(info.st_mode)}, not a regular file")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._named(name):
            fd = os.open(name, flags, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # swapped in between
                raise ValueError(f"{name} is not a regular file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a regular file of at most ``limit`` bytes. As :meth:`open_file`, ValueError if longer."""
        with self._named(name):
            return read_all(self.open_file(name), limit)

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Write a small file whole and durable, in place of whatever had its name.

        The file is always a new one: one that is there may be a link, or a second name of a file elsewhere.
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
        """Make the content of a regular file durable. As :meth:`open_file`."""
        fd = self.open_file(name)
        try:
            with self._named(name):
                os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, name: str) -> None:
        """Delete a name that is no folder, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._named(name):
            os.unlink(name, dir_fd=self.fd)

    def rename(self, name: str, target: Folder, new: str) -> None:
        """Move an entry, be it a link, into ``target`` in place of the file ``new``."""
        with self._named(name):
            os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=target.fd)

    def link(self, name: str, target: Folder, new: str) -> None:
        """Give an entry a second name in ``target``; of a link, the link itself."""
        with target._named(new):
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=target.fd, follow_symlinks=False)

    # ------------------------------------------------------------------------------------------------------ deleting

    def remove(self, name: str) -> None:
        """Delete an entry with all below it, if it is there; of links, the links.

        However deep its folders are, no more than two are open: what lies deeper is first moved up.

        Raises:
            OSError: something cannot be deleted, or another file system is mounted below.
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
        """Delete an entry, after moving the folders in it up into this one."""
        if not self.has_folder(name):
            self.unlink(name)
            return
        with contextlib.suppress(OSError):
            self.remove_folder(name)  # an empty one goes without the right to look into it
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
        """As :meth:`child`, of a folder that is to go: one that is write-protected is made writable."""
        folder = self.child(name)
        with contextlib.suppress(OSError):  # not of this user, who perhaps may delete in it all the same
            if folder.own().st_mode & 0o700 != 0o700:
                os.fchmod(folder.fd, 0o700)
        return folder


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
