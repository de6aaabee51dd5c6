"""Take a file over into another folder: as a copy that shares blocks, or as a second name."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

__all__ = ["copy_file", "link_file"]


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, without its times and mode; the kernel shares the blocks where the file system can.

    Args:
        source: A file.
        target: The path of the copy; what is there goes.

    Raises:
        OSError: It cannot be read, or there is no room.
    """
    target.unlink(missing_ok=True)
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            left = os.fstat(reader.fileno()).st_size
            while left > 0 and (count := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= count
        if left:
            raise OSError(errno.EINVAL, "the kernel copied a part only")
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        shutil.copyfile(source, target)


def link_file(source: Path, target: Path) -> None:
    """Make a hard link where the file system has them, else a copy.

    A file that has other names already is copied, too: its mode and bytes do not belong to its folder alone.

    Args:
        source: A file.
        target: The path of the link; what is there goes.

    Raises:
        OSError: It cannot be read, or there is no room.
    """
    target.unlink(missing_ok=True)
    try:
        if source.stat().st_nlink == 1:
            os.link(source, target)
            return
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # a copy would fail as well
    shutil.copy2(source, target)
