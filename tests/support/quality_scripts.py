"""The modules of benchmarks/quality, which are scripts beside each other and import each other by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["QUALITY", "script"]

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"

_NAMES = [path.stem for path in QUALITY.glob("*.py")]
_loaded: dict[str, ModuleType] = {}


def script(name: str) -> ModuleType:
    """The module ``name``, and nothing left behind: other folders of scripts have a ``report`` and ``peers`` of their own."""
    hidden = {other: sys.modules.pop(other) for other in _NAMES if other in sys.modules}
    sys.modules.update(_loaded)
    sys.path.insert(0, str(QUALITY))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(QUALITY))
        for other in _NAMES:
            if other in sys.modules:
                _loaded[other] = sys.modules.pop(other)
        sys.modules.update(hidden)
