"""How the commands and reports switch engines where nobody says otherwise; apart, so that ``--help`` imports nothing for it.

The rule as published has 0 and "none", which are the defaults in Python. On tiny-wan at 5 bits on average the two here together
keep 1.7 dB more (benchmarks/quality, δ-GBS).
"""

from __future__ import annotations

__all__ = ["LAST_HIGH", "WEIGHTINGS"]

# Nothing after the last steps removes their noise.
LAST_HIGH = 2
# The default first; see dvdquant/gbs.py.
WEIGHTINGS = ("step", "none")
