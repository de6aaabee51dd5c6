"""How a GPU may hold quantized weights, and the two figures of a GPU that decide what packed ones cost. No PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dvdquant.errors import UnsupportedError

__all__ = [
    "COST_LIMIT",
    "OPERATIONS_PER_BYTE",
    "RATES",
    "WEIGHTS",
    "HeldForm",
    "Rates",
    "WeightForm",
    "WeightPolicy",
    "check_policy",
]

WeightForm = Literal["packed", "expanded"]
HeldForm = Literal["packed", "mixed", "expanded"]
WeightPolicy = Literal["auto", "packed", "expanded"]
WEIGHTS: tuple[WeightPolicy, ...] = ("auto", "packed", "expanded")
# The share of a step that `auto` lets packed weights cost, at most.
COST_LIMIT = 0.02


@dataclass(frozen=True)
class Rates:
    """What a card can do at most, by its maker or by those who report it; a real product reaches less than its peak.

    Args:
        card: The card.
        operations: Dense INT8 operations, in 10^12 a second.
        bandwidth: Of its memory, in 10^9 bytes a second.
        source: Where both figures were found, or which of them was not.
    """

    card: str
    operations: float
    bandwidth: float
    source: str

    @property
    def per_byte(self) -> int:
        """Return operations for each byte, rounded up to ten."""
        return 10 * math.ceil(100 * self.operations / self.bandwidth)


_A100 = "[a summary of NVIDIA's data sheet](https://glennklockwood.com/garden/processors/A100)"
_A40 = (
    "comparisons of cards: [operations](https://hmc-tech.com/gpu/nvidia-l40-vs-nvidia-a40), "
    "[bandwidth](https://cpu-gpu.alldbin.com/graphics-card-comparison/A40-PCIe-and-L40G-comparison.html)"
)
_ORIN = (
    "half of the 170 sparse that [a summary of NVIDIA's technical brief](http://mzph.cn/web/30785.shtml) has; "
    "bandwidth unsourced"
)
_L40S = (
    "[a comparison of cards](https://hmc-tech.com/gpu/nvidia-l40s-vs-nvidia-t40), "
    "[a vendor](https://www.itcreations.com/nvidia-gpu/nvidia-l40s-gpu-accelerator)"
)
_BLACKWELL = (
    "[a table after NVIDIA's Blackwell brief]"
    "(https://datacrunch.io/blog/nvidia-b300-vs-b200-complete-gpu-comparison-to-date)"
)
_THOR = (
    "a quarter of the sparse FP4 rate of [a computation from clocks](https://torring.dev/blog/2026/rtx-spark-throttling/), "
    "INT8 taken for FP8; bandwidth unsourced"
)
_GB10 = (
    "a quarter of the sparse FP4 rate of [a list of hardware](https://dgx-spark.warehack.ing/hardware/), "
    "INT8 taken for FP8; bandwidth unsourced"
)
RATES: dict[int, Rates] = {
    80: Rates("A100 40GB", 624, 1555, _A100),
    86: Rates("A40", 299, 696, _A40),
    87: Rates("AGX Orin", 85, 205, _ORIN),
    89: Rates("L40S", 733, 864, _L40S),
    90: Rates("H100 PCIe", 1513, 2000, "unsourced"),
    100: Rates("B200", 4500, 7700, _BLACKWELL),
    103: Rates("B300", 150, 8000, _BLACKWELL),
    110: Rates("Thor", 517, 273, _THOR),
    120: Rates("RTX PRO 6000", 1007, 1792, "unsourced"),
    121: Rates("GB10", 250, 273, _GB10),
}
"""SM -> the card of it that has most operations for a byte, on which expanding costs the largest share."""

OPERATIONS_PER_BYTE = {sm: rates.per_byte for sm, rates in RATES.items()}
"""Dense INT8 operations a second over bytes a second of memory, by SM."""


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
