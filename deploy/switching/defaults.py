"""How δ-GBS switches engines where nobody says otherwise, in the commands, in the reports and in Python; apart, so that
``--help`` imports nothing for it.

The rule as published has 0 last steps and the weighting "none": ``last_high=0, weighting="none"``. On tiny-wan at 5 bits on
average the two here together keep 1.7 dB more (benchmarks/quality, δ-GBS).
"""

from __future__ import annotations

from typing import Literal

__all__ = ["LAST_HIGH", "WEIGHTINGS"]

# Nothing after the last steps removes their noise.
LAST_HIGH = 2
# The default first; see deploy/switching/gbs.py.
WEIGHTINGS: tuple[Literal["step"], Literal["none"]] = ("step", "none")
