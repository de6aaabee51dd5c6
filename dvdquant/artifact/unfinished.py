"""Words about an export that was begun and not finished, for a reader of its folder and for a user who resumes it."""

from __future__ import annotations

import fcntl
import os
import shlex
from pathlib import Path
from typing import Any

from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import COMMIT, LOCK, STAGE
from dvdquant.errors import OutputError

__all__ = ["differences", "unfinished_export"]

_SHORT = 40  # characters of a value that is shown


def unfinished_export(out: Path) -> OutputError | None:
    """Return the error for a folder that holds the work of an export and no export yet, or None for any other folder.

    The function only looks: it makes and changes no file, and keeps no lock.

    Args:
        out: The folder without a manifest.
    """
    try:
        with Folder.open(out, follow=True) as folder:
            stages = [name for name in folder.names() if STAGE.fullmatch(name) and folder.has_folder(name)]
            decided, running = folder.has(COMMIT), _is_locked(folder)
    except (OSError, ValueError):
        return None
    again = f"dvdq-export MODEL -o {shlex.quote(str(out))} ... --resume"
    if running and (stages or decided):
        return OutputError(
            f"the export into {out} is still running", available=stages, fix="wait until dvdq-export has ended"
        )
    if decided:
        return OutputError(
            f"the export into {out} was interrupted while it was put in place, there is no manifest.json yet",
            available=f"{COMMIT}, which says what is to be moved, and {', '.join(stages) or 'nothing to move'}",
            fix=f"complete it by the same line and --resume: {again}; any other dvdq-export into it completes it first, too",
        )
    if stages:
        return OutputError(
            f"the export into {out} was interrupted, there is no manifest.json yet",
            available=f"its unfinished work in {', '.join(stages)}",
            fix=f"go on with it by the same line and --resume: {again}",
        )
    return None


def _is_locked(folder: Folder) -> bool:
    """Return whether a process writes to the folder; a killed one leaves its lock file, but no lock."""
    try:
        fd = folder.open_file(LOCK)
    except (OSError, ValueError):
        return False
    try:
        # The lock is shared and held for an instant: an export that begins just then waits for it.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def differences(then: Any, now: Any, most: int = 6) -> str:
    """Return in words where two keys of exports differ: names first, then short values, then fields with long values.

    Args:
        then: The key of the earlier export, as JSON.
        now: The key of this export, as JSON.
        most: The greatest number of differences that are named.
    """
    short, long = [], []
    for name, before, after in sorted(_fields(then, now), key=lambda field: not field[0].endswith(".name")):
        texts = _text(before), _text(after)
        if None in texts:
            long.append(f"other {name}")
        else:
            short.append(f"{name}: {texts[0]} before, {texts[1]} now")
    found = [*short, *long]
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def _fields(then: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return ``(field, before, after)`` of every field that differs, at any depth."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted({*then, *now})
        return [each for name in names for each in _fields(then.get(name), now.get(name), f"{prefix}.{name}")]
    return [] if then == now else [(prefix.lstrip(".") or "key", then, now)]


def _text(value: Any) -> str | None:
    """Return a scalar or a list of scalars as text, or None if it is long or nested."""
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value):
            return None
        text = f"[{', '.join(str(item) for item in value)}]"
    elif isinstance(value, dict):
        return None
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= _SHORT and text.isprintable() else None
