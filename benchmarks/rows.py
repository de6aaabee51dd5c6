"""Rows that a benchmark keeps as it goes, one JSON object a line, so that it goes on where it was killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["append_rows", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of earlier runs, without lines that a kill tore; one at the end is cut off the file.

    Args:
        path: The file; it need not exist.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    # What is complete ends with a newline. The next row has to begin a line of its own.
    complete = whole.rfind(b"\n") + 1
    if complete < len(whole):
        os.truncate(path, complete)
    rows = []
    for line in whole[:complete].split(b"\n"):
        with contextlib.suppress(ValueError):  # a line that was torn, and written on by a run of an older version
            rows.append(json.loads(line))
    return rows


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows behind those of a file, all or none, in one call, so that lines of two processes do not mix.

    Args:
        path: The file; it need not exist.
        rows: The rows.

    Raises:
        OSError: They cannot be written: the disk is full, for instance.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        start, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            # Some of the rows would look like all of them. What another process wrote meanwhile stays.
            if file.seek(0, os.SEEK_END) == start + written:
                file.truncate(start)
            raise
