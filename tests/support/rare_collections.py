"""How often processes of tests look for garbage."""

from __future__ import annotations

import gc

__all__ = ["collect_rarely"]


def collect_rarely() -> None:
    """Let this process look for garbage far less often than commands do: what imports and traces make lives."""
    gc.set_threshold(100_000, 50, 100)
