"""The configs of published transformers in ``configs``, by the names of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent / "configs"


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a published transformer.

    Args:
        name: The name of a file in ``configs``.
    """
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config
