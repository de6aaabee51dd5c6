"""The weight files that sessions open while a test looks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from dvdquant.deploy.sessions.weights import WeightFiles

__all__ = ["watch_weight_files"]


def watch_weight_files(monkeypatch: pytest.MonkeyPatch, *backends: ModuleType) -> list[WeightFiles]:
    """Return a list that gets the weight files of every session of these modules, in the order of their opening."""
    opened: list[WeightFiles] = []

    def note(*arguments: Any) -> WeightFiles:
        opened.append(WeightFiles(*arguments))
        return opened[-1]

    for module in backends:
        monkeypatch.setattr(module, "WeightFiles", note)
    return opened
