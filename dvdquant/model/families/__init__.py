"""The model families that dvdquant knows, by the diffusers class in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvdquant.errors import UnsupportedError
from dvdquant.model.families.base import Axis, Family, ImageInputs, InputSpec, Sizes
from dvdquant.model.families.cogvideox import CogVideoX
from dvdquant.model.families.configs import read_config
from dvdquant.model.families.hunyuan_video import HunyuanVideo
from dvdquant.model.families.ltx import LTXVideo
from dvdquant.model.families.wan import Wan

__all__ = ["FAMILIES", "Axis", "Family", "ImageInputs", "InputSpec", "Sizes", "get_family"]

FAMILIES: tuple[type[Family], ...] = (Wan, HunyuanVideo, CogVideoX, LTXVideo)


def get_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a transformer, with its config checked and completed.

    Every field is checked, and missing fields get diffusers' defaults.

    Args:
        config: The content of the transformer's ``config.json``.

    Raises:
        UnsupportedError: The class is another one; the error lists the supported classes.
        CheckpointError: No model of the class has such a value of a field.
    """
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if class_name in family.class_names:
            return family(read_config(family.record, config))
    raise UnsupportedError(
        f"transformer class {class_name!r:.200} is not supported",
        available=[name for family in FAMILIES for name in family.class_names],
        fix="point at the folder of one of these transformers",
    )
