"""The one place that turns the options of a user into a step controller."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from dvdquant.deploy.switching.controller import StepController, StepInfo
from dvdquant.deploy.switching.defaults import DEFAULT_DELTA, CachePolicy
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import UnsupportedError
from dvdquant.system.records import brief

__all__ = ["make_controller"]

log = logging.getLogger(__name__)


def make_controller(
    mode: str,
    *,
    component: str,
    family: str,
    bits: Sequence[int],
    delta: float | None = None,
    schedule: Schedule | Sequence[int | None] | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    cache: StepCachePolicy | float | None = None,
    cache_policy: CachePolicy | None = None,
    **more: Any,
) -> StepController:
    """Return the controller for one transformer.

    Args:
        mode: ``switch``, ``planned``, ``callback``, or ``a`` with the bits of one engine, such as ``a8``. With a
            schedule or a callback, ``switch`` stands for ``planned`` or ``callback``.
        component: The name of the transformer, for messages.
        family: The name of the model family.
        bits: The activation bits of the engines, in ascending order.
        delta: δ of ``switch``. The default is :data:`dvdquant.deploy.switching.defaults.DEFAULT_DELTA`.
        schedule: The bits of each step, for ``planned``.
        callback: The rule of ``callback``.
        cache: The settings of the step cache. A number is a threshold for the policy.
        cache_policy: The name of the policy. It switches the cache on, with the policy's own threshold if ``cache`` is None.
        **more: ``branch_policy``, ``last_high`` and ``weighting`` of :class:`StepController`.

    Raises:
        UnsupportedError: The mode is unknown, or needs a graph that the export lacks.
    """
    low, high = bits[0], bits[-1]
    if not isinstance(mode, str):
        raise UnsupportedError(f"the mode is {brief(mode)}", available=[*(f"a{width}" for width in bits), "switch"])
    if mode == "switch" and (schedule is not None or callback is not None):
        mode = "planned" if schedule is not None else "callback"
    if isinstance(cache, StepCachePolicy):
        if cache_policy not in (None, cache.policy):
            raise UnsupportedError(
                f"the cache is of the policy {cache.policy}, and cache_policy is {brief(cache_policy)}",
                fix="leave cache_policy out, or give a threshold as cache",
            )
    elif cache is not None or cache_policy is not None:
        cache = StepCachePolicy.for_family(family, cache, cache_policy)
    common: dict[str, Any] = {"low": low, "high": high, "cache": cache, **more}
    fixed = re.fullmatch(r"a([0-9]{1,4})", mode)  # int() refuses thousands of digits with an error of its own
    if mode == "switch" and low == high:
        log.info("%s was exported with %d-bit activations only: nothing to switch", component, low)
        return StepController("fixed", bits=low, **common)
    if fixed is not None:
        if int(fixed[1]) not in bits:
            raise UnsupportedError(
                f"mode {mode} needs a graph the export lacks",
                available=[*(f"a{width}" for width in bits), "switch"],
                fix="pick one of these, or export with a recipe that has it",
            )
        return StepController("fixed", bits=int(fixed[1]), **common)
    if mode not in ("switch", "planned", "callback"):
        modes = [*(f"a{width}" for width in bits), "switch", "planned", "callback"]
        raise UnsupportedError(f"unknown mode {mode!r:.40}", available=modes)
    if mode == "switch":
        delta = DEFAULT_DELTA if delta is None else delta
    return StepController(mode, delta=delta, schedule=schedule, callback=callback, **common)  # type: ignore[arg-type]
