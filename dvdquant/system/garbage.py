"""How often Python looks for garbage among its objects."""

from __future__ import annotations

import gc

__all__ = ["collect_less_often"]

# Objects that are new, and how often younger generations are looked at before the next older one. Python's own are 700, 10, 10.
_THRESHOLDS = (10_000, 10, 10)


def collect_less_often() -> None:
    """Let this process look for garbage less often than Python does; it only raises the thresholds that are set.

    PyTorch and diffusers make very many objects while they are imported, and nearly all of them live, so that looking among
    them again and again is time lost. A process that has turned the collector off keeps it off.
    """
    now = gc.get_threshold()
    if now[0]:
        gc.set_threshold(*map(max, now, _THRESHOLDS))
