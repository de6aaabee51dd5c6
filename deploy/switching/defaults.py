"""How δ-GBS switches engines where nobody says otherwise, in the commands, in the reports and in Python; apart, so that
``--help`` imports nothing for it.

The rule as published has 0 last steps and the weighting "none": ``last_high=0, weighting="none"``. On tiny-wan at 5 bits on
average the two here together keep 1.7 dB more (benchmarks/quality, δ-GBS).
"""

from __future__ import annotations

from typing import Literal

__all__ = ["DEFAULT_DELTA", "LAST_HIGH", "WEIGHTINGS"]

# The middle of the range .06 to .18 that the paper reports; dvdq-plan finds one for a model.
DEFAULT_DELTA = 0.12
# Nothing after the last steps removes their noise.
LAST_HIGH = 2
# The default first; see deploy/switching/gbs.py.
WEIGHTINGS: tuple[Literal["step"], Literal["none"]] = ("step", "none")
