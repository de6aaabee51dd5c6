"""The names in an export folder: the manifest, the lock, unfinished work, a decided commit, the library of a bundle."""

from __future__ import annotations

import re

__all__ = ["COMMIT", "LOCK", "MANIFEST", "OWNER", "PLUGIN_PLACE", "STAGE", "TREE", "is_bookkeeping"]

MANIFEST = "manifest.json"
LOCK = ".lock"
COMMIT = ".commit"
TREE = "tree"
OWNER = "owner.json"
STAGE = re.compile(r"\.tmp-[0-9a-f]{16}")
PLUGIN_PLACE = "plugins/libdvdquant_plugins.so"
"""Where a bundle holds the plugin library, and the script of trtexec looks for it."""


def is_bookkeeping(name: str) -> bool:
    """Return whether an entry is a lock, a decided commit or a stage: work of an export that runs, or was killed.

    Args:
        name: The name of the entry.
    """
    return name in (LOCK, COMMIT) or STAGE.fullmatch(name) is not None
