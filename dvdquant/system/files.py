"""Files as an export needs them: bounded reads, strict JSON, whole writes, hashes, and disk errors in plain words."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

from dvdquant.errors import DvdquantError, OutputError, ResourceError
from dvdquant.text import amount

__all__ = [
    "FileEntry",
    "disk_error",
    "free_bytes",
    "hash_descriptor",
    "hash_file",
    "open_regular",
    "read_all",
    "read_limited",
    "require_disk",
    "strict_json",
    "write_all",
]

MAX_JSON_ITEMS = 1_000_000
"""What JSON may hold: Python takes up to 600 bytes for each of them, and an index has one for each tensor."""


class FileEntry(TypedDict):
    """The entry of one file in a manifest.

    Attributes:
        sha256: The SHA-256 as 64 lower-case hex digits.
        bytes: The size in bytes.
    """

    sha256: str
    bytes: int


def strict_json(raw: bytes, max_depth: int = 64) -> Any:
    """Parse UTF-8 JSON and refuse what a stranger could misuse.

    Args:
        raw: The JSON text as bytes.
        max_depth: The greatest number of nested levels.

    Raises:
        ValueError: The text is not JSON, or has duplicate keys, NaN, infinities, lone surrogates, more than
            ``max_depth`` levels or more than about a million items.
    """
    items = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if items > MAX_JSON_ITEMS:
        raise ValueError(f"about {items} values, more than {MAX_JSON_ITEMS}")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {max_depth} levels") from None
    level = [value]
    for _ in range(max_depth):
        level = [child for node in level for child in _children(node)]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {max_depth} levels")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        # A lone surrogate raises UnicodeEncodeError, which is a ValueError.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _children(node: Any) -> Iterable[Any]:
    """Return the lists and dictionaries that ``node`` holds directly."""
    children = node.values() if isinstance(node, dict) else node
    return [child for child in children if isinstance(child, (dict, list))] if isinstance(node, (dict, list)) else ()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of a JSON object.

    Raises:
        ValueError: A key appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.200} appears twice")
    return result


def _finite(text: str) -> float:
    """Return the number that ``text`` stands for.

    Raises:
        ValueError: It is NaN or infinite.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading and return its descriptor and its size in bytes.

    O_NONBLOCK keeps a pipe that somebody put into a model folder from blocking the open for ever.

    Args:
        path: The path of the file; links are followed.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is a device, a pipe or a folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Args:
        path: The path of the file; links are followed.
        limit: The greatest size in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no regular file, or it is larger than ``limit``.
    """
    return read_all(open_regular(path)[0], limit)


def read_all(fd: int, limit: int) -> bytes:
    """Return the content of an open regular file of at most ``limit`` bytes, and close the file.

    Args:
        fd: The descriptor of a regular file, opened for reading; it is closed.
        limit: The greatest size in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is larger than ``limit``.
    """
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, more than the {limit} allowed")
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"grew past the {limit} bytes allowed")
    return raw


# The way out of a failed write by errno, where another place alone does not help.
_FIXES = {
    errno.EIO: "the disk or its connection is faulty: check it (the kernel's log says more), then retry",
    errno.EROFS: "the file system is read-only: pick a place on another one, or mount it for writing",
    errno.EMFILE: "too few files may be open in this process: raise the limit (ulimit -n), then retry",
    errno.ENFILE: "too many files are open on this machine: end other programs, then retry",
    errno.ENAMETOOLONG: "pick a shorter path",
    errno.ELOOP: "a symbolic link is in the place of a file or folder: delete it, or pick another place",
    errno.ENOMEM: "free memory, then retry",
}


def disk_error(error: OSError, path: Path | str) -> DvdquantError:
    """Return the error that tells a user of a failed write.

    Args:
        error: The error of the operating system.
        path: The file or folder that was written.

    Returns:
        ResourceError if the disk, a quota or the number of open files is at its limit, else OutputError.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"no room left while writing {path}: {error.strerror}", fix="free disk space or write elsewhere, then retry"
        )
    fix = _FIXES.get(error.errno or 0, "pick a place you may write to")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{path} cannot be opened: {error.strerror}", fix=fix)
    return OutputError(f"cannot write {path}: {error.strerror or error}", fix=fix)


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` with as many calls as needed: one call may write less, and never more than 2 GB.

    Args:
        fd: The descriptor, opened for writing.
        data: The bytes to write.
        offset: The position in the file, in bytes.

    Raises:
        OSError: A write fails.
    """
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def hash_file(path: str | Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Return the SHA-256 and the size of a regular file, read block by block.

    Args:
        path: The path of the file.
        progress: A function that gets the size in bytes of every block read.

    Raises:
        OutputError: The file cannot be read.
    """
    try:
        fd, _ = open_regular(Path(path))
        try:
            return hash_descriptor(fd, progress)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} cannot be read: {error}", fix="check that it is an ordinary file and that you may read it"
        ) from error


def hash_descriptor(fd: int, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Return the SHA-256 and the size of an open file, from its position to its end.

    Args:
        fd: The descriptor, opened for reading. It stays open.
        progress: A function that gets the size in bytes of every block read.

    Raises:
        OSError: The file cannot be read.
    """
    digest, total, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 22))
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            total += count
            if progress is not None:
                progress(count)
    return {"sha256": digest.hexdigest(), "bytes": total}


def free_bytes(place: Path) -> int:
    """Return the space on a file system that this user may fill, in bytes.

    Args:
        place: A file or folder on it.

    Raises:
        OSError: The place cannot be looked at.
    """
    info = os.statvfs(place)
    return info.f_bavail * info.f_frsize


def require_disk(path: str | Path, nbytes: int, what: str) -> None:
    """Check that ``nbytes`` fit on the file system that ``path`` is or will be on.

    Args:
        path: A file or folder, which need not exist.
        nbytes: The space needed, in bytes.
        what: The thing that needs the space, as the subject of the error message.

    Raises:
        ResourceError: The free space is too small; the error gives both numbers.
        OutputError: The place cannot be looked at.
    """
    try:
        place = Path(path).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        free = free_bytes(place)
    except OSError as error:
        raise disk_error(error, path) from error
    if nbytes > free:
        raise ResourceError(
            f"{what} needs {amount(nbytes)}, {amount(free)} are free at {place}",
            fix=f"free {amount(nbytes - free)} there or pick another -o",
        )
