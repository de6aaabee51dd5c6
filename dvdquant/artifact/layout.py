"""The names in an export folder: the manifest, the lock, unfinished work, a decided commit, the library of a bundle."""

from __future__ import annotations

import re

__all__ = ["COMMIT", "LOCK", "MANIFEST", "OWNER", "PLUGIN_PLACE", "STAGE", "TREE"]

MANIFEST = "manifest.json"
LOCK = ".lock"
COMMIT = ".commit"
TREE = "tree"
OWNER = "owner.json"
STAGE = re.compile(r"\.tmp-[0-9a-f]{16}")
PLUGIN_PLACE = "plugins/libdvdquant_plugins.so"
"""Where a bundle holds the plugin library, and the script of trtexec looks for it."""
