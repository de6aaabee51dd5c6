"""Which exports hold what a layout of others can hold; everything else is refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from dvdquant.errors import UnsupportedError
from dvdquant.export.layouts.comfy import BLOCKS, GROUP, comfy_names
from dvdquant.model.plan import ModelPlan
from dvdquant.text import shown

__all__ = ["check_layouts"]


def check_layouts(layouts: Sequence[str], plans: Sequence[ModelPlan]) -> None:
    """Refuse layouts that cannot hold these models, before any work. What a recipe decides, the options have checked.

    Args:
        layouts: The layouts, such as ``comfy``.
        plans: The plans of the transformers.

    Raises:
        UnsupportedError: A layer has other blocks than ComfyUI's kernels, or the family no names there.
    """
    if not layouts:
        return
    for plan in plans:
        comfy_names(plan)
        for spec in plan.layers:
            if spec.rotation.block not in BLOCKS or spec.features % GROUP:
                raise UnsupportedError(
                    f"--also-write {layouts[0]}: layer {shown(spec.members[0])} has {spec.features} input channels, which "
                    f"rotate in blocks of {spec.rotation.block}",
                    available=f"multiples of {GROUP} channels, in blocks of {', '.join(map(str, BLOCKS))}",
                    fix="keep such layers in 16 bit with --keep GLOB, or leave --also-write out",
                )
