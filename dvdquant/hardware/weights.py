"""How a GPU may hold quantized weights, and the two figures of a GPU that decide what packed ones cost. No PyTorch."""

from __future__ import annotations

from typing import Literal

from dvdquant.errors import UnsupportedError

__all__ = ["COST_LIMIT", "OPERATIONS_PER_BYTE", "WEIGHTS", "WeightForm", "WeightPolicy", "check_policy"]

WeightForm = Literal["packed", "expanded"]
WeightPolicy = Literal["auto", "packed", "expanded"]
WEIGHTS: tuple[WeightPolicy, ...] = ("auto", "packed", "expanded")
# The share of a step that `auto` lets packed weights cost.
COST_LIMIT = 0.02
# Dense INT8 operations a second over bytes a second of memory, of the card of each SM that has the most of them for a byte:
# the one on which expanding costs the largest share. From memory of data sheets,
# unverified, rounded up; a real product reaches less than its peak.
OPERATIONS_PER_BYTE = {
    80: 410,  # A100 40GB: 624 TOPS, 1555 GB/s
    86: 440,  # A40: 299 TOPS, 696 GB/s
    87: 420,  # AGX Orin: 85 TOPS, 205 GB/s
    89: 850,  # L40S: 733 TOPS, 864 GB/s; an RTX 4090 has 655
    90: 760,  # H100 PCIe: 1513 TOPS, 2000 GB/s; the SXM card has 590
    100: 570,  # B200: 4500 TOPS, 8000 GB/s
    103: 570,
    110: 1900,  # Thor: 517 TOPS, 273 GB/s
    120: 570,  # RTX PRO 6000: 1007 TOPS, 1792 GB/s
    121: 920,  # GB10: 250 TOPS, 273 GB/s
}


def check_policy(policy: str) -> WeightPolicy:
    """Return a policy, one of :data:`WEIGHTS`.

    Args:
        policy: What was asked for.

    Raises:
        UnsupportedError: There is no such policy.
    """
    for known in WEIGHTS:
        if policy == known:
            return known
    raise UnsupportedError(f"unknown weights {policy!r:.100}", available=WEIGHTS, fix="pick one of these")
