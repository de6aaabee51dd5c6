"""The names of an export folder's own bookkeeping: the manifest, the lock, unfinished work, a decided commit."""

from __future__ import annotations

import re

__all__ = ["COMMIT", "LOCK", "MANIFEST", "OWNER", "STAGE", "TREE"]

MANIFEST = "manifest.json"
LOCK = ".lock"
COMMIT = ".commit"
TREE = "tree"
OWNER = "owner.json"
STAGE = re.compile(r"\.tmp-[0-9a-f]{16}")
