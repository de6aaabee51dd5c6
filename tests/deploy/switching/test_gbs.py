"""δ-GBS against a literal reading of its definition, and the inversion of δ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdquant.deploy.switching.gbs import (
    BitSwitch,
    PairChanges,
    change_sums,
    delta_for_average_bits,
    delta_of_stair,
    relative_change,
    staircase,
    switch_bits,
    switch_pairs,
    weighted_changes,
)
from dvdquant.errors import UnsupportedError
from tests.support.literal_gbs import literal

CHANGES = st.lists(st.floats(0, 2, allow_nan=False) | st.sampled_from([0.0, 1e-12, 0.05, 0.1]), max_size=60)
DELTAS = st.floats(0, 5, allow_nan=False) | st.sampled_from([0.0, 0.05, 0.1, 0.15, math.inf])


# ------------------------------------------------------------------------------------------------------------------ L1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_relative_change_is_the_quotient_in_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    previous = torch.randn(2, 16, 5, 12, 10, generator=generator, dtype=torch.float64).to(dtype)
    current = (previous.double() + 0.05 * torch.randn(previous.shape, generator=generator, dtype=torch.float64)).to(
        dtype
    )
    a, b = current.double(), previous.double()
    exact = float((a - b).abs().sum() / b.abs().sum())
    # The difference is rounded once per value: to float32 for 16-bit tensors, to the own precision otherwise.
    assert relative_change(current, previous) == pytest.approx(exact, rel=2.0**-24)


def test_relative_change_of_large_tensors_does_not_lose_its_sum() -> None:
    # 2²⁰ equal values: a bf16 or fp16 running sum would stop growing at 256 or 2048.
    previous = torch.ones(1 << 20, dtype=torch.float16)
    assert relative_change(previous * 1.5, previous) == 0.5


def test_relative_change_from_zero() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert relative_change(one, zero) == math.inf
    assert relative_change(zero, zero) == 0.0
    assert relative_change(zero, one) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_is_finite_exactly_if_every_value_is(bad: float, dtype: torch.dtype) -> None:
    largest = torch.full((1 << 16,), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(change_sums(largest, None)[2])
    for place in (0, 1234, -1):
        spoiled = largest.clone()
        spoiled[place] = bad
        assert not math.isfinite(change_sums(spoiled, None)[2])
    opposed = largest.clone()
    opposed[0], opposed[1] = math.inf, -math.inf
    assert not math.isfinite(change_sums(opposed, largest)[2])


# ------------------------------------------------------------------------------------------------------------ the rule


@settings(max_examples=400, deadline=None)
@given(CHANGES, DELTAS)
def test_rule_follows_the_definition(changes: list[float], delta: float) -> None:
    if any(math.isclose(sum(changes[a:b]), delta, rel_tol=1e-9) for a in range(60) for b in range(a + 1, 61)):
        return  # a tie: the order of float additions would decide
    assert switch_bits(changes, delta) == literal(changes, delta)


def test_ties_are_high() -> None:
    """ "< δ" is strict."""
    assert switch_bits([0.25, 0.25, 0.25, 0.25], 0.25) == [8, 8, 8, 8, 8]
    assert switch_bits([0.25, 0.25, 0.25, 0.25], 0.5) == [8, 8, 4, 8, 4]
    assert switch_bits([0.0, 0.0, 0.0], 0.0) == [8, 8, 8, 8]


@given(CHANGES)
def test_limits(changes: list[float]) -> None:
    steps = len(changes) + 1
    assert switch_bits(changes, 0.0) == [8] * steps
    assert switch_bits(changes, math.inf) == [8, 8, *[4] * steps][:steps]


@given(CHANGES, DELTAS, DELTAS)
def test_a_larger_delta_never_takes_more_high_steps(changes: list[float], first: float, second: float) -> None:
    small, large = sorted((first, second))
    assert switch_bits(changes, large).count(8) <= switch_bits(changes, small).count(8)


@given(CHANGES, st.floats(1e-3, 2), st.floats(0.5, 4))
def test_only_the_ratio_of_changes_and_delta_matters(changes: list[float], delta: float, factor: float) -> None:
    factor = 2.0 ** round(math.log2(factor))  # exact in floating point, but for denormals
    normal = [c if c > 1e-200 else 0.0 for c in changes]
    assert switch_bits([c * factor for c in normal], delta * factor) == switch_bits(normal, delta)


def test_pairs_are_followed_along_the_decided_path() -> None:
    """Hand-made: L1 is .1 between two high outputs, .2 across engines, .3 between two low ones; δ = .45."""
    changes = {(8, 8): [0.1] * 7, (8, 4): [0.2] * 7, (4, 8): [0.2] * 7, (4, 4): [0.3] * 7}
    #  step 2: .1 → low; 3: .1 + .2 → low; 4: .3 + .3 ≥ .45 → high; 5: .2 → low; 6: .4 → low; 7: .7 → high
    assert switch_pairs(changes, 0.45)[0] == [8, 8, 4, 4, 8, 4, 4, 8]


def test_bits_of_your_own_and_skips() -> None:
    rule = BitSwitch(0.3, low=6, high=16)
    assert rule.decide() == 16
    rule.ran(16)
    rule.observe(0.2)
    assert (rule.decide(), rule.decide(pending=0.09), rule.decide(pending=0.2)) == (6, 6, 16)
    rule.ran(None)
    assert rule.accumulated == 0.2


# ----------------------------------------------------------------------------------------------------------- inversion


def _pairs(changes: Sequence[float], noise: float = 0.0) -> PairChanges:
    both = [c + noise for c in changes]
    return {(8, 8): changes, (8, 4): both, (4, 8): both, (4, 4): [c + 1.4 * noise for c in changes]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.001, 1), min_size=8, max_size=8), min_size=1, max_size=3), st.floats(0, 0.3), DELTAS
)
def test_staircase_holds_for_every_delta(recordings: list[list[float]], noise: float, delta: float) -> None:
    pairs = [_pairs(r, noise) for r in recordings]
    stairs = staircase(pairs)
    assert stairs[0].above == 0.0
    assert math.isinf(stairs[-1].upto)
    assert all(a.upto == b.above for a, b in itertools.pairwise(stairs))
    if delta > 0:
        (stair,) = [s for s in stairs if s.above < delta <= s.upto]
        bits = [b for p in pairs for b in switch_pairs(p, delta)[0]]
        assert stair.average_bits == pytest.approx(sum(bits) / len(bits))
    for stair in stairs:
        for inside in (stair.upto, delta_of_stair(stair)):
            bits = [b for p in pairs for b in switch_pairs(p, inside)[0]]
            assert stair.average_bits == pytest.approx(sum(bits) / len(bits))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=20, max_size=40), st.floats(4.5, 8))
def test_delta_for_average_bits_is_the_nearest_there_is(changes: list[float], wanted: float) -> None:
    delta, promised = delta_for_average_bits([_pairs(changes)], wanted)
    bits = switch_bits(changes, delta)
    assert sum(bits) / len(bits) == pytest.approx(promised)
    tried = [switch_bits(changes, d / 200) for d in range(1, 200)]
    assert abs(promised - wanted) <= min(abs(sum(b) / len(b) - wanted) for b in tried) + 1e-12


def test_unreachable_average_names_the_range() -> None:
    pairs = [_pairs([0.1] * 49)]
    for wanted in (4.0, 4.15, 8.01, 16):
        with pytest.raises(UnsupportedError) as caught:
            delta_for_average_bits(pairs, wanted)
        assert "4.16 to 8" in str(caught.value)
        assert "50 steps" in str(caught.value)
    assert delta_for_average_bits(pairs, 4.16)[1] == pytest.approx(4.16)
    assert delta_for_average_bits(pairs, 8.0)[1] == 8.0


@given(CHANGES, DELTAS, st.integers(0, 5))
def test_last_high_only_changes_the_end(changes: list[float], delta: float, last_high: int) -> None:
    plain, protected = switch_bits(changes, delta), switch_bits(changes, delta, last_high=last_high)
    end = max(0, len(plain) - last_high)
    assert protected[:end] == plain[:end]
    assert protected[end:] == [8] * (len(plain) - end)
    pairs = [_pairs(changes)]
    assert staircase(pairs, last_high=last_high)[-1].average_bits == pytest.approx(
        sum(switch_bits(changes, math.inf, last_high=last_high)) / len(plain)
    )


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=30), st.integers(1, 999))
def test_weights_of_even_steps_change_nothing(changes: list[float], last: int) -> None:
    """And those of others add up to the way that all steps go together."""
    steps = len(changes) + 1
    pairs = _pairs(changes)
    even = [1000 - 1000 * i / steps for i in range(steps)]
    for pair, values in weighted_changes(pairs, even, steps, "step").items():
        assert list(values) == pytest.approx(list(pairs[pair]))
    assert weighted_changes(pairs, even, steps, "none") == pairs
    uneven = [1000 - (1000 - last) * (i / (steps - 1)) ** 3 for i in range(steps)]
    ones = weighted_changes({(8, 8): [1.0] * (steps - 1)}, uneven, steps, "step")[8, 8]
    assert sum(ones) == pytest.approx((1000 - last) * steps / 1000)
    assert list(ones) == sorted(ones)


def test_a_shifted_schedule_has_its_high_steps_where_they_are_long() -> None:
    """Flow matching with a shift of 5: as many high steps by a δ of its own, but the most of them late."""
    steps = 50
    sigmas = [5 * s / (1 + 4 * s) for s in (1 - i / steps for i in range(steps))]
    pairs = _pairs([0.05] * (steps - 1))
    weighted = weighted_changes(pairs, [1000 * s for s in sigmas], steps, "step")
    chosen = [switch_pairs(p, delta_for_average_bits([p], 5.5)[0])[0] for p in (pairs, weighted)]
    assert abs(sum(chosen[0]) - sum(chosen[1])) <= 8
    late = [sum(bits == 8 for bits in c[30:]) for c in chosen]
    assert late[1] > 1.5 * late[0]
