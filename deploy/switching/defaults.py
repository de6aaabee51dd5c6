"""The defaults of δ-GBS and of the step cache in the commands, in the reports and in Python.

They have a module of their own, so that ``--help`` imports nothing else for them.

The published rule has 0 last steps and the weighting "none": ``last_high=0, weighting="none"``. On tiny-wan at 5 bits
on average, the two defaults together keep 1.7 dB more (benchmarks/quality, δ-GBS).
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["CACHE_POLICIES", "CachePolicy", "DEFAULT_DELTA", "LAST_HIGH", "WEIGHTINGS"]

# The first one is the default; see deploy/switching/forecasts.py.
CachePolicy = Literal["forecast", "line", "easycache", "magcache"]
CACHE_POLICIES: tuple[CachePolicy, ...] = get_args(CachePolicy)
# The middle of the range .06 to .18 that the paper reports. dvdq-plan finds a δ for a model.
DEFAULT_DELTA = 0.12
# No step after the last steps removes their noise.
LAST_HIGH = 2
# The first one is the default; see deploy/switching/gbs.py.
WEIGHTINGS: tuple[Literal["step"], Literal["none"]] = ("step", "none")
