"""Open a file of an export as its manifest vouches for it: in its place, of its size and with its SHA-256."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dvdquant.errors import OutputError
from dvdquant.system.files import FileEntry, open_regular

__all__ = ["LINKED", "NO_LINKS", "ListedFileError", "open_listed", "require_digest"]

LINKED = "is reached through a symbolic link"
# A cache of the hub holds links alone.
NO_LINKS = (
    "an export is read without links, and a cache of the hub is made of them: "
    "hf download ORG/NAME --local-dir FOLDER, or cp -rL THIS FOLDER, then give FOLDER"
)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class ListedFileError(OutputError):
    """Say that a listed file is not what its manifest vouches for, or cannot be read.

    Args:
        path: The file.
        reason: A predicate such as "is missing", for a list of several files.
        fix: What to do about it.
        readable: Whether it could be read, and so be compared with the manifest.
    """

    def __init__(self, path: Path, reason: str, fix: str = "export again", readable: bool = True) -> None:
        self.reason = reason
        super().__init__(
            f"{path} does not match its manifest: it {reason}" if readable else f"{path} {reason}", fix=fix
        )


@contextlib.contextmanager
def open_listed(root: Path, name: str, entry: FileEntry) -> Iterator[int]:
    """Open a file that a manifest lists and yield its descriptor, which is closed after the block.

    The block hashes the very bytes that it uses and gives their digest to :func:`require_digest`: a second open could meet
    another file. An OSError or a ValueError of the block leaves as the error of this file, like those of the open.

    Args:
        root: The export folder.
        name: The path of the file in the folder.
        entry: The size in bytes and the SHA-256 of the file, as the manifest gives them.

    Raises:
        ListedFileError: The file is missing, of another size, changed, reached through a link, or cannot be read.
    """
    path = root / name
    try:
        if os.path.realpath(path) != os.path.join(os.path.realpath(root), name):
            raise ListedFileError(path, LINKED, fix=NO_LINKS)
        descriptor, size = open_regular(path)
        try:
            if size != entry["bytes"]:
                raise ValueError(f"has {size} bytes instead of {entry['bytes']}")
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _GONE:
            raise ListedFileError(path, "is missing") from error
        reason = f"cannot be read: {error.strerror or error}"
        raise ListedFileError(path, reason, fix="mend that, then try again", readable=False) from error
    except ValueError as error:
        raise ListedFileError(path, str(error)) from error


def require_digest(found: str, entry: FileEntry) -> None:
    """Refuse bytes whose SHA-256 is not the one that the manifest gives.

    Args:
        found: The SHA-256 of the bytes that were read, 64 lower-case hex digits.
        entry: The size in bytes and the SHA-256 of the file, as the manifest gives them.

    Raises:
        ValueError: The digests differ. In the block of :func:`open_listed` it becomes the error of the file.
    """
    if found != entry["sha256"]:
        raise ValueError("was changed (its SHA-256 differs)")
