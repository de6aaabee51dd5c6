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

__all__ = [
    "FileEntry",
    "disk_error",
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
    """What a manifest says of one file: SHA-256 as 64 lower-case hex digits, and the size in bytes."""

    sha256: str
    bytes: int


def strict_json(raw: bytes, max_depth: int = 64) -> Any:
    """Parse UTF-8 JSON; ValueError on duplicate keys, NaN and infinities, lone surrogates, or more than ``max_depth``
    levels or a million items."""
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
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError, a ValueError, on a lone surrogate
    return value


def _children(node: Any) -> Iterable[Any]:
    children = node.values() if isinstance(node, dict) else node
    return [child for child in children if isinstance(child, (dict, list))] if isinstance(node, (dict, list)) else ()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.200} appears twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, size) of a regular file. OSError, or ValueError for a device, a pipe or a folder.

    O_NONBLOCK keeps a pipe planted in a model folder from blocking the open for ever.
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
    """The content of a regular file of at most ``limit`` bytes; OSError or ValueError otherwise."""
    return read_all(open_regular(path)[0], limit)


def read_all(fd: int, limit: int) -> bytes:
    """Return what an open regular file of at most ``limit`` bytes holds, and close it; OSError or ValueError otherwise."""
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, more than the {limit} allowed")
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"grew past the {limit} bytes allowed")
    return raw


# What helps against a failed write, besides picking another place.
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
    """Return the error for a failed write at ``path``: ResourceError when the disk, a quota or the number of open files is
    at its limit, else OutputError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"no room left while writing {path}: {error.strerror}", fix="free disk space or write elsewhere, then retry"
        )
    fix = _FIXES.get(error.errno or 0, "pick a place you may write to")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{path} cannot be opened: {error.strerror}", fix=fix)
    return OutputError(f"cannot write {path}: {error.strerror or error}", fix=fix)


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """pwrite until everything is written: one call may write less, and never more than 2 GB."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def hash_file(path: str | Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """SHA-256 and size of a regular file, streamed; ``progress`` gets the size of every block read.

    OutputError if the file cannot be read.
    """
    try:
        fd, _ = open_regular(Path(path))
        try:
            return hash_descriptor(fd, progress)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error


def hash_descriptor(fd: int, progress: Callable[[int], None] | None = None) -> FileEntry:
    """SHA-256 and size of an open file from its position on; as :func:`hash_file`, with OSError."""
    digest, total, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 22))
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            total += count
            if progress is not None:
                progress(count)
    return {"sha256": digest.hexdigest(), "bytes": total}


def require_disk(path: str | Path, nbytes: int, what: str) -> None:
    """ResourceError, with need and free space, unless ``nbytes`` fit on the file system ``path`` is or will be on."""
    try:
        place = Path(path).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        info = os.statvfs(place)
    except OSError as error:
        raise disk_error(error, path) from error
    free = info.f_bavail * info.f_frsize
    if nbytes > free:
        raise ResourceError(
            f"{what} needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {place}",
            fix=f"free {(nbytes - free) / 1e9:.2f} GB there or pick another -o",
        )
