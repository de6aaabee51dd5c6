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
    "slower_in_int8",
]

WeightForm = Literal["packed", "expanded"]
HeldForm = Literal["packed", "mixed", "expanded"]
WeightPolicy = Literal["auto", "packed", "expanded"]
WEIGHTS: tuple[WeightPolicy, ...] = ("auto", "packed", "expanded")
# The share of a step that `auto` lets packed weights cost, at most.
COST_LIMIT = 0.02


@dataclass(frozen=True)
class Rates:
    """The peak rates of a card, by its maker or by those who report them; a real product reaches less.

    Args:
        card: The card.
        operations: Dense INT8 operations, in 10^12 a second.
        bandwidth: Of its memory, in 10^9 bytes a second.
        source: Where the figures were found, or which of them was not.
        sixteen: Dense operations in 16 bit, in 10^12 a second; None is half of INT8.
    """

    card: str
    operations: float
    bandwidth: float
    source: str
    sixteen: float | None = None

    @property
    def sixteen_bit_cost(self) -> float:
        """Return how many INT8 operations take as long as one in 16 bit."""
        return 2.0 if self.sixteen is None else self.operations / self.sixteen

    @property
    def per_byte(self) -> int:
        """Return operations for each byte, rounded up to ten."""
        return 10 * math.ceil(100 * self.operations / self.bandwidth)


_A100 = "[a summary of NVIDIA's data sheet](https://glennklockwood.com/garden/processors/A100)"
_A40 = (
    "comparisons of cards: [operations](https://hmc-tech.com/gpu/nvidia-a16-vs-nvidia-a40), "
    "[bandwidth](https://cpu-gpu.alldbin.com/graphics-card-comparison/A40-PCIe-and-L40G-comparison.html)"
)
_ORIN = (
    "half of the 171 sparse that [NVIDIA](https://github.com/NVIDIA/Deep-Learning-Accelerator-SW) gives for the GPU; "
    "[bandwidth](https://docs.ultralytics.com/guides/nvidia-jetson/)"
)
_ADA = (
    "8 times the [FP32 rate](https://topcpu.net/en/gpu-c/rtx-4000-ada-generation-vs-rtx-5000-ada-generation), as in "
    "[a list of another Ada card](https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell); bandwidth "
    "of the first page"
)
_H100 = (
    "half of the sparse rate of [a vendor](https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html); bandwidth of the same "
    "page"
)
_B200 = "[a data centre's table](https://verda.com/blog/gb300-nvl72-architecture)"
_GB300 = (
    f"{_B200}, its 16 bit too; [another page](https://glennklockwood.com/garden/processors/B300) has 4500 for a B300"
)
_THOR = (
    "half of the sparse FP8 rate of [a vendor's table](https://developer.ridgerun.com/wiki/index.php/"
    "NVIDIA_Jetson_AGX_Thor/Introduction/SoM_Overview), INT8 taken for FP8; bandwidth of the same page"
)
_PRO = (
    "[188 SMs](https://technical.city/en/video/RTX-PRO-6000-Blackwell-Server-vs-RTX-PRO-4500-Blackwell) at the rate of an SM of "
    "[another card](https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell); "
    "[bandwidth](https://gpu.name/posts/nvidia-unveils-rtx-pro-6000-blackwell-gpu-with-24-064-cores-and-96gb-memory)"
)
_GB10 = (
    "a quarter of the sparse FP4 rate of [a list of hardware](https://dgx-spark.warehack.ing/hardware/), INT8 taken for FP8; "
    "[bandwidth](https://blog.kubesimplify.com/blog/day-3-the-dgx-spark-unpacked-gb10-unified-memory-sm-121-and-the-one-reason-"
    "this-hardware-exists)"
)
RATES: dict[int, Rates] = {
    80: Rates("A100 40GB", 624, 1555, _A100),
    86: Rates("A40", 299, 696, _A40),
    87: Rates("AGX Orin 64GB", 85.5, 204.8, _ORIN),
    89: Rates("RTX 5000 Ada", 522, 576, _ADA),
    90: Rates("H100 PCIe", 1513, 2000, _H100),
    100: Rates("B200", 4500, 7700, _B200),
    103: Rates("GB300", 165, 8000, _GB300, sixteen=2500),
    110: Rates("Thor T5000", 517, 273, _THOR),
    120: Rates("RTX PRO 6000", 1007, 1792, _PRO),
    121: Rates("GB10", 250, 273, _GB10),
}
"""SM -> the card of it that has most operations for a byte, on which expanding costs the largest share."""

OPERATIONS_PER_BYTE = {sm: rates.per_byte for sm, rates in RATES.items()}
"""Dense INT8 operations a second over bytes a second of memory, by SM."""


def slower_in_int8(sm: int) -> str:
    """Return how much slower a GPU multiplies 8 bits than 16, in words, or "" where it is not slower.

    Args:
        sm: The compute capability, major · 10 + minor.
    """
    rates = RATES.get(sm)
    if rates is None or rates.sixteen is None or rates.sixteen <= rates.operations:
        return ""
    return (
        f"a product in INT8 takes some {rates.sixteen / rates.operations:.0f} times as long as in bf16, by the reported rates "
        f"of a {rates.card} ({rates.operations:g} and {rates.sixteen:g} · 10^12 operations a second)"
    )


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
