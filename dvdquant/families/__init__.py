"""The model families dvdquant knows, by the diffusers class in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedError
from .base import Axis, Family, InputSpec, Sizes
from .cogvideox import CogVideoX
from .hunyuan_video import HunyuanVideo
from .ltx import LTXVideo
from .wan import Wan

__all__ = ["FAMILIES", "Axis", "Family", "InputSpec", "Sizes", "get_family"]

FAMILIES: tuple[type[Family], ...] = (Wan, HunyuanVideo, CogVideoX, LTXVideo)


def get_family(config: Mapping[str, Any]) -> Family:
    """The family of a transformer's ``config.json``; UnsupportedError lists the classes there are."""
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if class_name in family.class_names:
            return family(config)
    raise UnsupportedError(
        f"transformer class {class_name!r:.100} is not supported",
        available=[name for family in FAMILIES for name in family.class_names],
        fix="point at the folder of one of these transformers",
    )
