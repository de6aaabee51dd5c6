"""The one way into a folder that may come from anybody: no name, link, pipe or device in it leads out of it or blocks.

A file is opened component by component from a folder that is allowed, and no component may be a link at that moment. So
a link that somebody puts there between the check and the open is refused, not followed. Only regular files are read.

A library may read a folder by path itself (diffusers, transformers). :meth:`UntrustedFolder.check_tree` looks at every
entry before. A change between that check and the library's own open is not seen: a person who can write to the folder
at that moment decides what the library reads. Weights of a transformer are compared again after such a load.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvdquant.errors import CheckpointError
from dvdquant.system.files import read_all, strict_json
from dvdquant.system.recognize import SNIFFED, recognize_bytes
from dvdquant.text import shown

__all__ = ["MAX_ENTRIES", "MAX_JSON", "FileIdentity", "UntrustedFolder", "few", "fix_of", "reason_of"]

MAX_ENTRIES = 100_000
"""Entries a folder of a model may have: a real one has some dozens."""
MAX_JSON = 1 << 20
"""The most bytes of a JSON file of a pipeline, or of JSON text in a header: real ones have some kilobytes."""
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True)
class FileIdentity:
    """The properties by which a file is recognized as the one that was checked.

    Every ordinary write, truncation or replacement changes one of them. A store through a shared mapping may not. A new mode,
    owner or name changes ``changed_ns`` alone, and so does a writer that sets the time of its write back.

    Args:
        device: The number of the device.
        inode: The number of the inode.
        nbytes: The size in bytes.
        modified_ns: The time of the last change of the content, in nanoseconds.
        changed_ns: The time of the last change of the inode, in nanoseconds.
    """

    device: int
    inode: int
    nbytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """Return the identity of an open file.

        Args:
            fd: The descriptor of the file.
        """
        info = os.fstat(fd)
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    def may_hold_the_same(self, other: FileIdentity) -> bool:
        """Return whether the two differ in ``changed_ns`` at most: nothing but the content itself tells more.

        Args:
            other: The identity of the other file.
        """
        return replace(self, changed_ns=other.changed_ns) == other


@dataclass(frozen=True)
class UntrustedFolder:
    """A folder of a model, and the real folders that its files may lie in. It holds no descriptor and can be pickled.

    Args:
        root: The real path of the folder.
        allowed: The real folders that links may lead into.
    """

    root: Path
    allowed: tuple[Path, ...]

    @classmethod
    def at(cls, path: str | Path) -> UntrustedFolder:
        """Return the folder at ``path``; links on the way to it are the user's own and are followed.

        Files may come from the folder itself and, in a cache of the Hugging Face hub, from the blobs of its repository. A
        repository that was moved elsewhere, under whatever name, and is reached by a link in the cache is one, too: that
        link is on the way to the folder.

        Args:
            path: The path of the folder; ``~`` is the user's home.
        """
        given = Path(os.path.expanduser(path))
        root = Path(os.path.realpath(given))
        for place in (root, *root.parents, *_above(given)):
            if _is_snapshot(place):
                repository = Path(os.path.realpath(place.parent.parent))
                blobs = repository / "blobs"
                inside = repository / "snapshots" in root.parents
                if inside and os.path.isdir(blobs) and not os.path.islink(blobs):
                    return cls(root, (root, blobs))
        return cls(root, (root,))

    def sub(self, name: str) -> UntrustedFolder:
        """Return a folder inside this one, with the same places allowed.

        Args:
            name: The path of the folder, relative to this one.

        Raises:
            CheckpointError: It is a link that leaves the allowed folders.
        """
        return UntrustedFolder(self.locate(name), self.allowed)

    def locate(self, name: str) -> Path:
        """Return the real path of an entry, which need not exist.

        Args:
            name: The path of the entry, relative to this folder.

        Raises:
            CheckpointError: It leaves the allowed folders.
        """
        real = Path(os.path.realpath(self.root / name))
        if self._base(real) is None:
            fix = "copy what it leads to into it"
            if any(place.parent.name == "snapshots" for place in (self.root, *self.root.parents)):
                fix = (
                    "in a cache of the hub, move its folder models--ORG--NAME as a whole and put one link in its place, "
                    "or set HF_HUB_CACHE; or take a folder without links: hf download ORG/NAME --local-dir FOLDER"
                )
            raise CheckpointError(f"{self.root / name} is a link that reads outside the folder", fix=fix)
        return real

    def _base(self, real: Path) -> Path | None:
        """Return the allowed folder that holds a real path, or None if there is none."""
        return next((folder for folder in self.allowed if folder in (real, *real.parents)), None)

    def open(self, name: str) -> int:
        """Return a descriptor of a regular file, opened for reading; no link is followed once its place was checked.

        Args:
            name: The path of the file, relative to this folder.

        Raises:
            CheckpointError: It is a link that leaves the allowed folders.
            OSError: It cannot be opened.
            ValueError: It is a folder, a pipe or a device.
        """
        real = self.locate(name)
        base = self._base(real)
        assert base is not None
        parts = real.relative_to(base).parts
        if not parts:
            raise ValueError("not a regular file")
        folder = os.open(base, _FOLDER)
        try:
            for part in parts[:-1]:
                inner = os.open(part, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            # Opening a device has effects, so the entry is looked at before. The check of the descriptor below decides.
            _require_regular(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False))
            fd = os.open(parts[-1], _FILE, dir_fd=folder)
        except OSError as error:
            error.filename = str(self.root / name)
            raise
        finally:
            os.close(folder)
        try:
            _require_regular(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes.

        Args:
            name: The path of the file, relative to this folder.
            limit: The greatest size in bytes.

        Raises:
            CheckpointError: It is a link that leaves the allowed folders.
            OSError: It cannot be read.
            ValueError: It is longer than ``limit``, or is a folder, a pipe or a device.
        """
        return read_all(self.open(name), limit)

    def json(self, name: str, limit: int, fix: str = "download the model again") -> dict[str, Any]:
        """Return the JSON object in a file.

        Args:
            name: The path of the file, relative to this folder.
            limit: The greatest size in bytes.
            fix: The advice in an error for which no better one is known.

        Raises:
            CheckpointError: The file is missing, cannot be read, or holds no JSON object; the error names it.
        """
        raw = b""
        try:
            raw = self.read(name, limit)
            value = strict_json(raw)
        except FileNotFoundError:
            folder = self.sub(os.path.dirname(name)) if os.path.dirname(name) else self
            raise CheckpointError(f"{self.root / name} is missing", available=folder.listing(), fix=fix) from None
        except (OSError, ValueError) as error:
            found = recognize_bytes(raw[:SNIFFED]) if raw else None
            reason = f"it is {found.what}" if found else reason_of(error)
            raise CheckpointError(
                f"{self.root / name} cannot be used: {reason}", fix=found.fix if found else fix_of(error, fix)
            ) from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.root / name} is not a JSON object but {type(value).__name__}", fix=fix)
        return value

    def names(self) -> list[str]:
        """Return the sorted names of the entries.

        Raises:
            CheckpointError: The folder cannot be listed, or has more than ``MAX_ENTRIES`` entries.
        """
        found = []
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) > MAX_ENTRIES:
                        raise CheckpointError(
                            f"{self.root} has more than {MAX_ENTRIES} entries", fix="give the folder of one model"
                        )
        except OSError as error:
            raise CheckpointError(
                f"{self.root} cannot be read: {reason_of(error)}", fix=fix_of(error, "give a folder that you may read")
            ) from error
        return sorted(found)

    def has(self, name: str) -> bool:
        """Return whether there is a regular file at ``name``; a link is followed to look, but nothing is opened.

        Args:
            name: The path of the file, relative to this folder.
        """
        try:
            return (self.root / name).is_file()
        except (OSError, ValueError):
            return False

    def has_folder(self, name: str) -> bool:
        """Return whether there is a folder at ``name``; a link is followed to look, but nothing is opened.

        Args:
            name: The path of the folder, relative to this one.
        """
        try:
            return (self.root / name).is_dir()
        except (OSError, ValueError):
            return False

    def listing(self, count: int = 10) -> str:
        """Return the first names in words, for an error; folders end in a slash.

        Args:
            count: The number of names that are listed.
        """
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name + "/" * _is_folder(entry) for _, entry in zip(range(MAX_ENTRIES), entries)]
        except (OSError, ValueError) as error:
            return reason_of(error)
        first = ", ".join(f"{name!r:.200}" for name in heapq.nsmallest(count, names))
        return first + f" and {len(names) - count} more" * (len(names) > count) or "nothing"

    def check_tree(self) -> None:
        """Check every entry below, as far as links inside lead, before a library reads the folder by path.

        Raises:
            CheckpointError: There is a link that leaves the allowed folders, a pipe, a device, a socket, or too many
                entries, or a folder cannot be read.
        """
        left, seen, count = [self.root], set(), 0
        while left:
            folder = left.pop()
            try:
                for path in _children(folder):
                    count += 1
                    if count > MAX_ENTRIES:
                        raise CheckpointError(
                            f"{self.root} has more than {MAX_ENTRIES} entries", fix="give the folder of one model"
                        )
                    real = self.locate(str(path))
                    try:
                        info = os.lstat(real)
                    except FileNotFoundError:
                        continue  # a link to nothing inside the folder; the library reports it
                    if stat.S_ISDIR(info.st_mode):
                        if (info.st_dev, info.st_ino) not in seen:
                            seen.add((info.st_dev, info.st_ino))
                            left.append(real)
                    elif not stat.S_ISREG(info.st_mode):
                        raise CheckpointError(
                            f"{path} is not a regular file", fix="remove it, or download the model again"
                        )
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or folder} cannot be read: {reason_of(error)}",
                    fix=fix_of(error, "give a folder that you may read"),
                ) from error


def _above(given: Path) -> Iterator[Path]:
    """Yield a path as it was given, made absolute, and all that it lies in; its links are not followed."""
    with contextlib.suppress(OSError):  # the working directory was deleted
        place = Path(os.path.join(os.getcwd(), given))
        yield from (place, *place.parents)


def _is_snapshot(place: Path) -> bool:
    """Return whether a folder is a snapshot in a cache of the hub, by its name."""
    return place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")


def _children(folder: Path) -> Iterator[Path]:
    """Yield the path of every entry of a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or leads to one; False if it cannot be looked at."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _require_regular(info: os.stat_result) -> None:
    """Check that an entry is a regular file.

    Raises:
        OSError: It is a link.
        ValueError: It is a folder, a pipe, a socket or a device.
    """
    if stat.S_ISLNK(info.st_mode):
        raise OSError(errno.ELOOP, "too many symbolic links, or it became one while it was opened")
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a regular file")


def reason_of(error: Exception) -> str:
    """Return why something failed, without the path that an OSError repeats.

    Args:
        error: The error. Its text may hold names from strangers; it is made safe to print and cut to 500 characters.
    """
    return shown((error.strerror if isinstance(error, OSError) else None) or error, 500)


_WAYS = {
    errno.EACCES: "make it readable for you (chmod u+rX), or run as the user who owns it",
    errno.EPERM: "make it readable for you (chmod u+rX), or run as the user who owns it",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENFILE: "close programs: the machine has too many open files",
    errno.EIO: "the disk fails to read it: copy the model from elsewhere to another disk",
    errno.ESTALE: "the network disk lost it: mount it again",
    errno.ENAMETOOLONG: "check the name: it is longer than a file's name can be",
}


def fix_of(error: Exception, otherwise: str) -> str:
    """Return the advice against a failed read, by the errno of the error.

    Args:
        error: The error.
        otherwise: The result if the error has no errno, or one without advice of its own.
    """
    return _WAYS.get(error.errno or 0, otherwise) if isinstance(error, OSError) else otherwise


def few(names: Iterable[object], count: int = 8) -> list[str]:
    """Return the first names, each cut to 100 characters, so that a list in an error stays short whatever a file says.

    Args:
        names: The names.
        count: The number of names that are kept.
    """
    return [shown(name, 100) for name, _ in zip(names, range(count))]
