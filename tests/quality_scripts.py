"""The modules of benchmarks/quality, which are scripts beside each other and import each other by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["QUALITY", "script"]

QUALITY = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"


def script(name: str) -> ModuleType:
    """The module ``name``."""
    if str(QUALITY) not in sys.path:
        sys.path.insert(0, str(QUALITY))
    return importlib.import_module(name)
