"""The commit that a figure was measured at."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit"]

ROOT = Path(__file__).resolve().parents[1]


def commit(root: Path = ROOT) -> str:
    """Return the commit of a checkout, with ``-dirty`` where tracked files differ from it; empty outside of one.

    Args:
        root: The top of the checkout.
    """
    # In a container the checkout may belong to somebody else. A tag says less than the commit.
    command = ["git", "-c", "safe.directory=*", "-C", str(root)]
    command += ["describe", "--always", "--exclude=*", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
