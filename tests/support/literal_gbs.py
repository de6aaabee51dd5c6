"""δ-GBS as its definition says it, without any state that a faster form keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["literal"]


def literal(changes: Sequence[float], delta: float) -> list[int]:
    """The definition word by word: at every step i the whole sum from t_p to i − 1 is taken anew, and nothing is kept
    but t_p. L1 of step t is ``changes[t − 1]``; step 0 has none."""
    bits, t_p = [], 0
    for i in range(len(changes) + 1):
        terms = [changes[t - 1] for t in range(t_p, i) if t >= 1]
        if i >= 2 and math.fsum(terms) < delta:
            bits.append(4)
        else:
            bits.append(8)
            t_p = i
    return bits
