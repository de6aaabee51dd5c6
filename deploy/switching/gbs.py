"""The mathematics of δ-guided bit switching (δ-GBS), without engines and without tensors kept between calls.

F_t is the transformer's output at step t. The relative change of adjacent outputs is

    L1(t) = ‖F_t − F_{t−1}‖₁ / ‖F_{t−1}‖₁

With t_p the last step on the high engine, step i runs on

    low   if  Σ_{t=t_p}^{i−1} L1(t) < δ
    high  otherwise, and then t_p = i.

Steps 0 and 1 have no L1 before them and run on the high engine. δ = 0 is all high; δ = ∞ is all low from step 2.

Two things are additions of this project and not in the published rule:

``weighting`` "step" multiplies L1(t) by how far the step moves, w(t) = (τ_{t−1} − τ_t)·n/1000, with timesteps τ from
1000 to 0 in n steps. The error of a step enters the latent in proportion to the step's length. Schedules with a shift
(flow matching at video sizes) end in steps that are several times as long as their first steps. On even steps this is
the published rule.

``last_high`` steps at the end of a request run on the high engine, whatever the sum says. No later step can correct the
error of a last step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from dvdquant.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BitSwitch",
    "PairChanges",
    "Stair",
    "Weighting",
    "change_from_sums",
    "change_sums",
    "delta_for_average_bits",
    "delta_of_stair",
    "free_steps",
    "relative_change",
    "staircase",
    "switch_bits",
    "step_weight",
    "switch_pairs",
    "weighted_changes",
]

# (bits of the step before, bits of the step) -> L1(1), L1(2), …, as if those two steps had run at those bits.
PairChanges = Mapping[tuple[int, int], Sequence[float]]
Weighting = Literal["none", "step"]
# The timesteps of every supported family count down from this number.
_TIMESTEPS = 1000.0


def change_sums(current: Tensor, previous: Tensor | None) -> Tensor:
    """Compute ‖current − previous‖₁, ‖previous‖₁ and ‖current‖₁.

    Nothing is read back, so the caller pays one transfer for all three. A finite tensor of up to 32 bits cannot
    overflow a float64 sum: ‖current‖₁ is finite exactly if every value is.

    Args:
        current: The output of this step, any shape and floating dtype.
        previous: The output of the step before, in the same shape, or None. The difference is taken in at least
            float32.

    Returns:
        The three sums in this order, float64 [3], on the device of ``current``. Without ``previous`` the first two are
        0.
    """
    import torch  # here, because a request is checked without torch

    norm = current.abs().sum(dtype=torch.float64)
    if previous is None:
        zero = torch.zeros_like(norm)
        return torch.stack((zero, zero, norm))
    wide = torch.promote_types(current.dtype, torch.float32)
    difference = (current.to(wide) - previous.to(wide)).abs().sum(dtype=torch.float64)
    return torch.stack((difference, previous.abs().sum(dtype=torch.float64), norm))


def change_from_sums(difference: float, norm: float) -> float:
    """Return L1 from its two sums.

    If the output before is all zero, L1 is infinity for any difference, and 0 without a difference.

    Args:
        difference: ‖F_t − F_{t−1}‖₁.
        norm: ‖F_{t−1}‖₁.
    """
    if norm > 0.0:
        return difference / norm
    return math.inf if difference > 0.0 else 0.0


def relative_change(current: Tensor, previous: Tensor) -> float:
    """Return L1(t) = ‖F_t − F_{t−1}‖₁ / ‖F_{t−1}‖₁ with float64 sums; infinity if F_{t−1} is zero and F_t is not.

    Args:
        current: F_t, any floating dtype.
        previous: F_{t−1}, in the shape of ``current``.
    """
    difference, norm, _ = change_sums(current, previous).tolist()
    return change_from_sums(difference, norm)


def free_steps(steps: int, last_high: int, transformers: int = 1) -> int:
    """Return how many steps of a request are left to δ.

    The first two of each transformer, which have no change before them, and the last ones run on the high engine. With two
    transformers it is the number where each runs two steps or more.

    Args:
        steps: The number of steps of the request.
        last_high: The number of last steps that stay on the high engine.
        transformers: The number of transformers that share the steps.
    """
    return max(0, steps - 2 * transformers - last_high)


def step_weight(moved: float, steps: int) -> float:
    """Return the weight of a step, w = max(0, moved) · steps / 1000, which is 1 for a step of mean length.

    Args:
        moved: How far the timestep fell in this step. Timesteps count down from 1000 to 0.
        steps: The number of steps of the request.
    """
    return max(0.0, moved) * steps / _TIMESTEPS


def weighted_changes(changes: PairChanges, timesteps: Sequence[float], steps: int, weighting: Weighting) -> PairChanges:
    """Return L1(1), L1(2), … of every pair of engines, each times w of its step if ``weighting`` is "step".

    Args:
        changes: The recorded changes of every pair of engines.
        timesteps: The timesteps of the recorded steps, one more than there are changes.
        steps: The number of steps of the whole request. It is larger than the recorded steps if two transformers share
            one request.
        weighting: ``step`` or ``none``.
    """
    if weighting == "none":
        return changes
    weights = [step_weight(before - after, steps) for before, after in pairwise(timesteps)]
    return {pair: [w * value for w, value in zip(weights, values)] for pair, values in changes.items()}


@dataclass
class BitSwitch:
    """The rule, one step at a time: ``decide`` before a step, and ``ran`` and ``observe`` with its result after it.

    Args:
        delta: δ ≥ 0, or infinity.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        accumulated: Σ L1(t) since t_p, with step t_p itself.
        known: True if any L1 is known since the start.
    """

    delta: float
    low: int = 4
    high: int = 8
    accumulated: float = 0.0
    known: bool = False

    def decide(self, pending: float = 0.0) -> int:
        """Return the bits of the next step, and change nothing.

        The bits that then really ran go into :meth:`ran`.

        Args:
            pending: The change that a step cache predicts for the steps it skipped, until a computed step measures it.
        """
        return self.low if self.known and self.accumulated + pending < self.delta else self.high

    def ran(self, bits: int | None) -> None:
        """Note the bits that the step runs on.

        Args:
            bits: Activation bits. With those of the high engine, the step becomes t_p. None (a reused output) leaves
                t_p.
        """
        if bits == self.high:
            self.accumulated = 0.0

    def observe(self, change: float) -> None:
        """Add L1(t) of the step that ran.

        Args:
            change: L1(t), possibly weighted.
        """
        self.accumulated += change
        self.known = True


def switch_bits(
    changes: Sequence[float], delta: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> list[int]:
    """Apply the rule to recorded changes.

    Args:
        changes: L1(1), …, L1(n−1) of n steps. The last change decides nothing.
        delta: δ ≥ 0, or infinity.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        last_high: The number of steps at the end that are high in any case.

    Returns:
        The bit-widths of the n steps.
    """
    pairs = {(a, b): changes for a in (low, high) for b in (low, high)}
    return switch_pairs(pairs, delta, low, high, last_high=last_high)[0]


def switch_pairs(
    changes: PairChanges, delta: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> tuple[list[int], float]:
    """Apply the rule to changes that were recorded for every pair of engines.

    Between a 4-bit and an 8-bit output there is quantization noise in addition to the change from step to step, and
    δ-GBS sees both. So L1(t) is taken from the pair of engines that steps t−1 and t are decided to run on.

    Args:
        changes: L1(1), …, L1(n−1) of n steps, for every pair of engines.
        delta: δ ≥ 0, or infinity.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        last_high: The number of steps at the end that are high in any case.

    Returns:
        The n bit-widths, and the smallest sum that was not below δ. Every δ from here up to and including that sum
        decides the same.
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
    """A range of δ in which every δ decides the same.

    Args:
        above: The lower end, which is not in the range.
        upto: The upper end, which is in the range.
        average_bits: The average bits over all recorded steps.
    """

    above: float
    upto: float
    average_bits: float


def staircase(recordings: Sequence[PairChanges], low: int = 4, high: int = 8, *, last_high: int = 0) -> list[Stair]:
    """Compute the average bits as an exact function of δ: a staircase from all high to all low.

    It starts at the smallest δ. Each run of the rule says up to which δ nothing changes.

    Args:
        recordings: The changes of each generated clip and transformer. Every step counts equally.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        last_high: The number of steps at the end that are high in any case.

    Returns:
        The stairs in ascending order of δ. They cover all δ above 0.
    """
    curves = [_stairs_of_one(recording, low, high, last_high) for recording in recordings]
    edges = sorted({stair.upto for curve in curves for stair in curve})
    weights = [len(recording[high, high]) + 1 for recording in recordings]
    places, above = [0] * len(curves), 0.0  # places: by recording, the index of the stair that contains the edge
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
    """Return a δ inside the stair, far from both edges.

    It is the middle, or a quarter above the lower edge if there is no upper edge.

    Args:
        stair: A range of δ.
    """
    if math.isinf(stair.upto):
        return 1.25 * stair.above or 1.0
    middle = (stair.above + stair.upto) / 2
    return middle if middle > stair.above else stair.upto


def delta_for_average_bits(
    recordings: Sequence[PairChanges], average: float, low: int = 4, high: int = 8, *, last_high: int = 0
) -> tuple[float, float]:
    """Find the δ whose average bits are nearest to a wanted average.

    Of equally near stairs it takes the widest, whose δ has the most room for other prompts.

    Args:
        recordings: The changes of each generated clip and transformer.
        average: The wanted average of the activation bits.
        low: Activation bits of the low engine.
        high: Activation bits of the high engine.
        last_high: The number of steps at the end that are high in any case.

    Returns:
        δ, and its average bits over the recordings.

    Raises:
        UnsupportedError: No δ reaches the average. The error gives the range. The first two steps are always high, so
            the range does not contain all low.
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
