"""δ-guided bit switching (δ-GBS): the mathematics, without engines or tensors kept between calls.

F_t is the transformer's output at step t. With the relative change of adjacent outputs

    L1(t) = ‖F_t − F_{t−1}‖₁ / ‖F_{t−1}‖₁

and t_p the last step on the high engine, step i runs on

    low   if  Σ_{t=t_p}^{i−1} L1(t) < δ
    high  otherwise, and then t_p = i.

Steps 0 and 1 have no L1 before them and run on the high engine. δ = 0 is all high; δ = ∞ is all low from step 2.

Two things are ours, and not in the rule as published:

``weighting`` "step" counts L1(t) times how far the step moves, w(t) = (τ_{t−1} − τ_t)·n/1000 with timesteps τ from 1000 to 0 in
n steps. What a step gets wrong enters the latent in proportion to its length, and schedules with a shift (flow matching at
video sizes) end in steps several times as long as those they begin with. On even steps it is the published rule.

``last_high`` steps at the end of a request run on the high engine whatever the sum says: what a last step gets wrong no
later one can correct.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from dvdquant.errors import UnsupportedError

__all__ = [
    "BitSwitch",
    "PairChanges",
    "Stair",
    "Weighting",
    "change_from_sums",
    "change_sums",
    "delta_for_average_bits",
    "delta_of_stair",
    "relative_change",
    "staircase",
    "switch_bits",
    "step_weight",
    "switch_pairs",
    "weighted_changes",
]

# (bits of the step before, bits of the step) -> L1(1), L1(2), …, had those two steps run at those bits.
PairChanges = Mapping[tuple[int, int], Sequence[float]]
Weighting = Literal["none", "step"]
# What the timesteps of every supported family count down from.
_TIMESTEPS = 1000.0


def change_sums(current: Tensor, previous: Tensor | None) -> Tensor:
    """[‖current − previous‖₁, ‖previous‖₁, ‖current‖₁] as one float64 tensor [3] on the tensors' device.

    Nothing is read back, so that the caller pays one transfer for all three. Without ``previous`` the first two are 0.
    A finite tensor of up to 32 bits cannot overflow a float64 sum: ‖current‖₁ is finite exactly if every value is.

    Args:
        current, previous: outputs of one shape; any floating dtype. The difference is taken in at least float32.
    """
    norm = current.abs().sum(dtype=torch.float64)
    if previous is None:
        zero = torch.zeros_like(norm)
        return torch.stack((zero, zero, norm))
    wide = torch.promote_types(current.dtype, torch.float32)
    difference = (current.to(wide) - previous.to(wide)).abs().sum(dtype=torch.float64)
    return torch.stack((difference, previous.abs().sum(dtype=torch.float64), norm))


def change_from_sums(difference: float, norm: float) -> float:
    """L1 from its two sums. From an all-zero output every change is infinite, and none is 0."""
    if norm > 0.0:
        return difference / norm
    return math.inf if difference > 0.0 else 0.0


def relative_change(current: Tensor, previous: Tensor) -> float:
    """L1(t) = ‖F_t − F_{t−1}‖₁ / ‖F_{t−1}‖₁ with float64 sums; infinity if F_{t−1} is zero and F_t is not."""
    difference, norm, _ = change_sums(current, previous).tolist()
    return change_from_sums(difference, norm)


def step_weight(moved: float, steps: int) -> float:
    """w of a step whose timestep fell by ``moved``, in a request of ``steps`` steps; 1 for one of mean length."""
    return max(0.0, moved) * steps / _TIMESTEPS


def weighted_changes(changes: PairChanges, timesteps: Sequence[float], steps: int, weighting: Weighting) -> PairChanges:
    """L1(1), L1(2), … of every pair of engines, each times w of its step where ``weighting`` is "step".

    Args:
        timesteps: of the steps the changes are of, one more than changes. steps: of the whole request, which is more where two
            transformers share one.
    """
    if weighting == "none":
        return changes
    weights = [step_weight(before - after, steps) for before, after in pairwise(timesteps)]
    return {pair: [w * value for w, value in zip(weights, values)] for pair, values in changes.items()}


@dataclass
class BitSwitch:
    """The rule, one step at a time: ``decide`` before a step, ``observe`` with L1 of its output after it.

    Args:
        delta: δ ≥ 0, or infinity.
        accumulated: Σ L1(t) since t_p, counting step t_p itself.
        known: whether any L1 is known since the start.
    """

    delta: float
    low: int = 4
    high: int = 8
    accumulated: float = 0.0
    known: bool = False

    def decide(self, pending: float = 0.0) -> int:
        """The bits of the next step. Changes nothing: what then really ran goes into :meth:`ran`.

        Args:
            pending: what a step cache predicts for steps it skipped, until a computed step measures it.
        """
        return self.low if self.known and self.accumulated + pending < self.delta else self.high

    def ran(self, bits: int | None) -> None:
        """Tell on what the step runs: on the high engine it becomes t_p. None (a reused output) leaves t_p."""
        if bits == self.high:
            self.accumulated = 0.0

    def observe(self, change: float) -> None:
        """Add L1(t) of the step that ran."""
        self.accumulated += change
        self.known = True


def switch_bits(
    changes: Sequence[float], delta: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> list[int]:
    """The rule on recorded changes.

    Args:
        changes: L1(1), …, L1(n−1) of n steps. The last one decides nothing.
        last_high: steps at the end that are high in any case.

    Returns:
        n bit-widths.
    """
    pairs = {(a, b): changes for a in (low, high) for b in (low, high)}
    return switch_pairs(pairs, delta, low, high, last_high=last_high)[0]


def switch_pairs(
    changes: PairChanges, delta: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> tuple[list[int], float]:
    """The rule on changes recorded for every pair of engines.

    Between a 4-bit and an 8-bit output lies quantization noise on top of the change from step to step, and δ-GBS sees
    both. So L1(t) is taken from the pair of engines that steps t−1 and t are decided to run on.

    Returns:
        The n bit-widths, and the smallest sum that was not below δ: up to and including it every δ decides the same.
    """
    steps = len(changes[high, high]) + 1
    rule, bits, edge = BitSwitch(delta, low, high), [high], math.inf
    for step in range(1, steps):
        forced = step >= steps - last_high
        bits.append(high if forced else rule.decide())
        if rule.known and bits[-1] == high and not forced:
            edge = min(edge, rule.accumulated)
        rule.ran(bits[-1])
        rule.observe(changes[bits[-2], bits[-1]][step - 1])
    return bits, edge


@dataclass(frozen=True)
class Stair:
    """δ in (``above``, ``upto``] decides the same everywhere: ``average_bits`` over all recorded steps."""

    above: float
    upto: float
    average_bits: float


def staircase(recordings: Sequence[PairChanges], low: int = 4, high: int = 8, *, last_high: int = 0) -> list[Stair]:
    """Average bits as a function of δ, exactly: a staircase from all high to all low.

    Found by walking: from the smallest δ, each run of the rule says up to which δ nothing changes.

    Args:
        recordings: one per generated clip and transformer; every step counts equally.
    """
    curves = [_stairs_of_one(recording, low, high, last_high) for recording in recordings]
    edges = sorted({stair.upto for curve in curves for stair in curve})
    weights = [len(recording[high, high]) + 1 for recording in recordings]
    places, above = [0] * len(curves), 0.0
    stairs: list[Stair] = []
    for edge in edges:
        for index, curve in enumerate(curves):
            while curve[places[index]].upto < edge:
                places[index] += 1
        parts = [w * curve[place].average_bits for w, curve, place in zip(weights, curves, places)]
        average = sum(parts) / sum(weights)
        if stairs and stairs[-1].average_bits == average:
            stairs[-1] = Stair(stairs[-1].above, edge, average)
        else:
            stairs.append(Stair(above, edge, average))
        above = edge
    return stairs


def _stairs_of_one(changes: PairChanges, low: int, high: int, last_high: int) -> list[Stair]:
    stairs, above = [], 0.0
    while above < math.inf:
        bits, edge = switch_pairs(changes, math.nextafter(above, math.inf), low, high, last_high=last_high)
        stairs.append(Stair(above, edge, sum(bits) / len(bits)))
        above = edge
    return stairs


def delta_of_stair(stair: Stair) -> float:
    """A δ inside, far from both edges: the middle, or a quarter above where there is no upper edge."""
    if math.isinf(stair.upto):
        return 1.25 * stair.above or 1.0
    middle = (stair.above + stair.upto) / 2
    return middle if middle > stair.above else stair.upto


def delta_for_average_bits(
    recordings: Sequence[PairChanges], average: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> tuple[float, float]:
    """(δ, its average bits over the recordings) nearest to a wanted average; of equals the widest stair, whose δ has the
    most room for other prompts.

    Raises:
        UnsupportedError: no δ reaches it; says the range. The first two steps are always high, so all low is not within.
    """
    stairs = staircase(recordings, low, high, last_high=last_high)
    least, most = min(s.average_bits for s in stairs), max(s.average_bits for s in stairs)
    if not least <= average <= most:
        raise UnsupportedError(
            f"no δ gives {average:g} bits on average",
            available=f"{math.ceil(100 * least) / 100:g} to {math.floor(100 * most) / 100:g} "
            f"with {len(recordings[0][high, high]) + 1} steps, the first two always at {high}",
            fix="ask for an average in this range",
        )
    best = min(stairs, key=lambda s: (abs(s.average_bits - average), s.above - s.upto))
    return delta_of_stair(best), best.average_bits
