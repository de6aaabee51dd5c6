"""The modules of benchmarks/quality by their names; none is imported before a test asks for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["QUALITY", "script"]

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"


def script(name: str) -> ModuleType:
    """Import the module ``name``, in whichever folder of the package it is."""
    (path,) = QUALITY.rglob(f"{name}.py")
    return importlib.import_module(".".join(path.relative_to(QUALITY.parents[1]).with_suffix("").parts))
