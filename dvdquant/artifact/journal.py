"""The journal of an unfinished export: the steps that are finished, a line each, on disk before the next one begins."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import StrictStr, TypeAdapter

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.manifest import check_relpath
from dvdquant.errors import OutputError
from dvdquant.system.files import strict_json

__all__ = ["JOURNAL", "Journal", "read_journal"]

JOURNAL = "journal.jsonl"
MAX_JOURNAL = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One line of a journal.

    Args:
        step: The step that is finished; None for a line that only names files.
        data: The data of the step, as JSON.
        files: The paths of its files.
    """

    step: StrictStr | None
    data: Any
    files: list[StrictStr]


_LINE = TypeAdapter(Line)


class Journal:
    """An append-only list of finished steps, each line on disk before ``add`` returns.

    A line torn by a kill or a power cut ends the journal: it and all that follows are dropped. So is a line whose data
    are not in the form that the exporter writes.

    Args:
        stage: The folder that the journal lies in.
        name: Its name there.
        accept: A function of a step and its data, which come from a file. It says if the work can go on from them.

    Attributes:
        done: The data of every finished step, in order.
        files: The paths of the files that lines name.

    Raises:
        OSError: The file cannot be read or written.
        ValueError: The file cannot be a journal of this stage.
    """

    def __init__(
        self, stage: Folder, name: str = JOURNAL, accept: Callable[[str, Any], bool] = lambda step, data: True
    ) -> None:
        self.done: dict[str, Any] = {}
        self.files: set[str] = set()
        self._accept = accept
        raw = b""
        if stage.has(name):
            raw = read_journal(stage, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._fd = os.open(name, flags, 0o644, dir_fd=stage.fd)
        try:
            self._end = 0
            for line in raw.splitlines(keepends=True):
                if not self._load(line):
                    place = stage.path / name
                    logger.warning("%s: dropped what follows byte %d, a line that is not whole", place, self._end)
                    break
                self._end += len(line)
            os.ftruncate(self._fd, self._end)
        except BaseException:
            self.close()
            raise

    def _load(self, line: bytes) -> bool:
        """Take one line of the file; return False if it is not whole, out of form or not accepted."""
        if not line.endswith(b"\n"):
            return False
        try:
            entry = _LINE.validate_python(strict_json(line))
            files = {check_relpath(name) for name in entry.files}
        except (ValueError, OutputError):
            return False
        if entry.step is not None:
            if not self._accept(entry.step, entry.data):
                return False
            self.done[entry.step] = entry.data
        self.files |= files
        return True

    def add(self, step: str | None, data: Any, files: Iterable[str]) -> None:
        """Append one line and force it to the disk.

        Args:
            step: The step that is finished; None for a line that only names files.
            data: The result of the step, as values that JSON can hold.
            files: The paths of its files.

        Raises:
            OSError: The line cannot be written.
            ValueError: The data hold NaN or infinities.
        """
        entry = {"step": step, "data": data, "files": sorted(files)}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
            os.fdatasync(self._fd)
        except OSError:
            # A full disk may have taken half a line, which would end the journal.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(line)
        if step is not None:
            self.done[step] = json.loads(line)["data"]
        self.files |= set(entry["files"])

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # every line was synced, or its failure was raised
                os.close(fd)


def read_journal(stage: Folder, name: str) -> bytes:
    """Return the content of a journal.

    Args:
        stage: The folder that the journal lies in.
        name: Its name there.

    Raises:
        ValueError: It cannot be a journal of this stage, or the file has other names too.
        OSError: It cannot be read.
    """
    raw = stage.read(name, MAX_JOURNAL)
    info = stage.info(name)
    if info is None or info.st_nlink != 1:
        raise ValueError(f"{name} has several names")
    return raw
