"""Which files Python opens while a test looks."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["watch_opened"]

_sink: list[str] | None = None
_installed = False


def watch_opened(sink: list[str] | None) -> None:
    """Collect every path that Python opens; an audit hook cannot be removed, only silenced.

    A name that is opened below an open folder, with no link followed, is noted as ``./name``.
    """
    global _sink, _installed
    _sink = sink

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and _sink is not None and not isinstance(args[0], int):
            path = os.fsdecode(args[0])
            plain = "/" not in path and path not in (".", "..") and args[2] & os.O_NOFOLLOW
            _sink.append(f"./{path}" if plain else path)

    if not _installed:
        sys.addaudithook(hook)
        _installed = True
