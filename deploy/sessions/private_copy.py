"""Private copies of an export's files: exactly the hashed bytes run, whatever happens to the files afterwards.

A map of the file itself would show later writes to it. A file that is cut short ends the process that maps it (SIGBUS).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import tempfile
import threading
import time
import weakref
from pathlib import Path

from dvdquant.artifact.listed_file import open_listed, require_digest
from dvdquant.checkpoint.untrusted import FileIdentity
from dvdquant.errors import ResourceError
from dvdquant.system.files import FileEntry, free_bytes, hash_descriptor, write_all
from dvdquant.system.memory import memory_limit
from dvdquant.system.mounts import is_in_memory
from dvdquant.text import amount

__all__ = ["PrivateCopy", "bytes_beside", "fits_in_memory", "private_copy"]

log = logging.getLogger(__name__)

_BLOCK = 4 << 20  # bytes that are copied at a time
SEAL_PAUSE = 0.1
"""The seconds between two attempts to seal a file in memory."""
_SEAL_ATTEMPTS = 50
# The share of free memory that copies may fill. The session, and the pipeline's text encoder and VAE, need the rest.
_SHARE = 0.5

_Key = tuple[FileIdentity, str]
_copies: weakref.WeakValueDictionary[_Key, PrivateCopy] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held the old lock


os.register_at_fork(after_in_child=_after_fork)


def _map(fd: int, size: int) -> mmap.mmap:
    """Return a private map of a whole file, for which the system sets no memory aside before it is written to.

    Raises:
        ResourceError: The system refuses the map.
    """
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0), prot=protection)
    except OSError as error:
        raise ResourceError(
            f"{amount(size)} of weights cannot be mapped: {error.strerror}", fix="free memory, then try again"
        ) from error


class PrivateCopy:
    """The bytes of one file, in a place where nobody else writes.

    Args:
        fd: The descriptor that holds the bytes. The copy owns it, and every map has a descriptor of its own.
        size: The number of bytes.
        in_memory: True if the bytes are in sealed memory, False if they are in a temporary file.
    """

    def __init__(self, fd: int, size: int, in_memory: bool) -> None:
        self.size, self.in_memory = size, in_memory
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def fileno(self) -> int:
        """Return the descriptor that holds the bytes; it is closed with the copy."""
        return self._fd

    def map(self) -> mmap.mmap:
        """Return a private map of all bytes, which outlives the copy.

        PyTorch and ONNX Runtime ask for a writable map. Only the holder of the map sees what is written to it.
        """
        return _map(self._fd, self.size)


def fits_in_memory(nbytes: int, shared: bool = False) -> bool:
    """Return whether copies are to be taken into memory: they fill at most half of the free memory.

    Where a GPU shares the memory, it holds the weights there already, so that a disk with room comes first.

    Args:
        nbytes: The size of all copies together, in bytes.
        shared: Whether a GPU that shares the host's memory holds the weights, too.
    """
    if shared and _disk_has_room(nbytes):
        return False
    return hasattr(os, "memfd_create") and nbytes <= _SHARE * memory_limit()


def bytes_beside(nbytes: int) -> int:
    """Return the bytes of memory that copies would hold beside the weights of a GPU that shares it: 0 where a disk has room.

    Args:
        nbytes: The size of all copies together, in bytes.
    """
    return 0 if _disk_has_room(nbytes) else nbytes


def _disk_has_room(nbytes: int) -> bool:
    """Return whether the folder of temporary files has room for copies, and lies on a disk and not in memory."""
    try:
        folder = Path(_folder())
        return free_bytes(folder) >= nbytes and not is_in_memory(folder)
    except OSError:
        return False


def private_copy(root: Path, name: str, entry: FileEntry, in_memory: bool) -> PrivateCopy:
    """Return a copy of one file of an export that has the size and the SHA-256 of the manifest.

    1. The file is copied into memory of the kernel (memfd), which is then sealed: no process can change its bytes or
       its size any more. If there is no room, the copy is a temporary file without a name, which no other process can
       open. The system may drop the pages of that file and read them again.
    2. The copy is hashed, not the file. It is used only if the hash is right.
    3. Sessions of one process share the copy while one of them lives and the file is the same by device, inode, size
       and times. Wrong times do no harm, because the copy is what was hashed. Every other process makes a copy of its
       own.

    Args:
        root: The export folder.
        name: The path of the file in the folder. The file has at least one byte.
        entry: The size in bytes and the SHA-256 of the file, as the manifest gives them.
        in_memory: True to try memory first, see :func:`fits_in_memory`.

    Raises:
        OutputError: The file is missing, cut, changed, or reached through a link.
        ResourceError: Neither memory nor the disk of temporary files has room.
    """
    with open_listed(root, name, entry) as source:
        key = (FileIdentity.of(source), entry["sha256"])
        with _lock:
            copy = _copies.get(key)
            if copy is None:
                copy = _copies[key] = _copy_and_hash(source, Path(name).name, entry, in_memory)
        return copy


def _seal(fd: int) -> None:
    """Forbid every change of a file in memory. The kernel may hold pages for a moment, to move them, and says so (EBUSY)."""
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    for left in reversed(range(_SEAL_ATTEMPTS)):
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not left:
                raise
            time.sleep(SEAL_PAUSE)


def _copy_and_hash(source: int, name: str, entry: FileEntry, in_memory: bool) -> PrivateCopy:
    size = entry["bytes"]
    fd = _memory_file(name, size) if in_memory else None
    sealed = fd is not None
    if fd is None:
        fd = _unnamed_file(name, size)
    copy = PrivateCopy(fd, size, sealed)
    block, offset = memoryview(bytearray(_BLOCK)), 0
    while offset < size:
        count = os.preadv(source, [block[: size - offset]], offset)
        if not count:
            raise ValueError(f"ends after {offset} bytes")
        write_all(fd, block[:count], offset)
        offset += count
    if sealed:
        # From here on the bytes cannot change, so the hash is that of the bytes that will run.
        _seal(fd)
    require_digest(hash_descriptor(fd)["sha256"], entry)
    return copy


def _memory_file(name: str, size: int) -> int | None:
    """Make an anonymous file in memory and reserve all of its room at once.

    Returns:
        The descriptor, or None if the system has no such files or no room.
    """
    try:
        fd = os.memfd_create(f"dvdq:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        log.info("no anonymous memory for %s: %s", name, error.strerror)
        return None
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        log.info("no room in memory for %s: %s", name, error.strerror)
        return None
    return fd


def _unnamed_file(name: str, size: int) -> int:
    """Make a temporary file without a name, reserve all of its room at once, and return its descriptor.

    Raises:
        ResourceError: There is no room for the file, or it cannot be made.
    """
    folder = "the folder of temporary files"
    try:
        folder = _folder()
        with tempfile.TemporaryFile(dir=folder, prefix="dvdq-") as file:
            fd = os.dup(file.fileno())
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        free = 0
        with contextlib.suppress(OSError):
            free = free_bytes(Path(folder))
        why = "" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f" ({error.strerror})"
        raise ResourceError(
            f"there is no room for a private copy of {name}: it takes {amount(size)}{why}",
            available=f"{amount(memory_limit())} of memory, of which it may fill half, and {amount(free)} in {folder}",
            fix="free memory, or set TMPDIR to a folder on a disk with room",
        ) from error
    return fd


def _folder() -> str:
    """Return the folder of temporary files: TMPDIR if it is set, else a folder on a disk.

    /tmp is memory on many systems, so /var/tmp comes first.
    """
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):
        return "/var/tmp"
    return tempfile.gettempdir()
