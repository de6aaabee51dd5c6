"""The controller alone: modes, branch policies, the step cache's forecast, and what it refuses."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.planning.planner import plan
from dvdquant.deploy.switching.controller import (
    PUBLISHED_COST,
    Decision,
    StepController,
    StepInfo,
    StepRecord,
    relative_cost,
)
from dvdquant.deploy.switching.defaults import LAST_HIGH, WEIGHTINGS
from dvdquant.deploy.switching.forecasts import ChangeForecast
from dvdquant.deploy.switching.gbs import switch_bits
from dvdquant.deploy.switching.step_cache import StepCachePolicy, keep, reuse
from dvdquant.errors import UnsupportedError
from tests.support.literal_gbs import literal


def published(delta: float, **more: Any) -> StepController:
    """The rule as published, unless ``more`` says otherwise."""
    return StepController("switch", delta=delta, **{"last_high": 0, "weighting": "none", **more})


CHANGES = st.lists(st.floats(0, 1), min_size=1, max_size=50)


def drive(
    controller: StepController, changes: list[float], branches: tuple[str, ...] = ("cond",), spacing: float = 20.0
) -> list[list[Decision]]:
    """Decisions per step and branch, had every output changed by ``changes`` (of the first branch; others get none)."""
    controller.reset(len(changes) + 1)
    rows = []
    for step in range(len(changes) + 1):
        timestep = 1000 - spacing * step
        row = []
        for index, branch in enumerate(branches):
            if index == 0 or controller.branch_policy == "separate":
                row.append(controller.decide(branch, step, timestep))
        for index, branch in enumerate(branches):
            change = changes[step - 1] if step and not index else None if not step else 1e9
            controller.ran(branch, step, timestep, row[min(index, len(row) - 1)].bits, change)
        rows.append(row)
    return rows


@settings(max_examples=150, deadline=None)
@given(CHANGES, st.floats(0, 3))
def test_switch_is_the_offline_rule(changes: list[float], delta: float) -> None:
    rows = drive(published(delta), changes, ("cond", "uncond"))
    assert [row[0].bits for row in rows] == switch_bits(changes, delta)


def test_every_switch_decision_gives_its_sum_and_delta() -> None:
    rows = drive(published(0.15), [0.083, 0.04, 0.05, 0.01])
    assert [(row[0].bits, row[0].reason) for row in rows] == [
        (8, "no history"),
        (8, "no history"),
        (4, "change 0.083 < 0.15"),
        (4, "change 0.123 < 0.15"),
        (8, "change 0.173 ≥ 0.15"),
    ]
    assert rows[0][0].accumulated is None
    assert rows[4][0].accumulated == pytest.approx(0.173)


def test_separate_branches_have_histories_of_their_own() -> None:
    """ "uncond" changes by 1e9 a step: it stays high, while "cond" goes by its own changes."""
    changes = [0.1] * 11
    rows = drive(published(0.35, branch_policy="separate"), changes, ("cond", "uncond"))
    assert [row[0].bits for row in rows] == literal(changes, 0.35)
    assert [row[1].bits for row in rows] == [8] * 12
    shared = drive(published(0.35), changes, ("cond", "uncond"))
    assert [row[0].bits for row in shared] == literal(changes, 0.35)


def test_a_branch_that_stops_is_followed_by_the_next_one_called() -> None:
    """Guidance is switched off after step 3; the history of "uncond", called first so far, ends there."""
    controller = published(100.0)
    for step in range(4):
        decision = controller.decide("uncond", step, 1000 - step)
        for branch in ("uncond", "cond"):
            controller.ran(branch, step, 1000 - step, decision.bits, 0.1 if step else None)
    assert decision.bits == 4
    seen = []
    for step in range(4, 8):
        decision = controller.decide("cond", step, 1000 - step)
        controller.ran("cond", step, 1000 - step, decision.bits, 1000.0 if step > 4 else 0.1)
        seen.append(decision.bits)
    # Step 4 is still decided by "uncond", which took part in step 3; from step 5 on it is "cond".
    assert seen == [4, 4, 8, 8]


def test_fixed_planned_and_callback() -> None:
    assert [r[0].bits for r in drive(StepController("fixed", bits=4), [0.1] * 3)] == [4] * 4
    assert [r[0].bits for r in drive(StepController("fixed"), [0.1] * 3)] == [8] * 4
    rows = drive(StepController("planned", schedule=[8, 4, None, 8]), [0.1] * 3)
    assert [(r[0].bits, r[0].reason) for r in rows] == [(b, "planned") for b in (8, 4, None, 8)]
    asked: list[StepInfo] = []

    def callback(info: StepInfo) -> int | Decision | None:
        asked.append(info)
        if info.step == 1:
            return Decision(4, "because")
        return None if info.step == 2 else 8

    rows = drive(StepController("callback", callback=callback), [0.1, 0.2, 0.3])
    assert [(r[0].bits, r[0].reason) for r in rows] == [
        (8, "callback"),
        (4, "because"),
        (None, "callback"),
        (8, "callback"),
    ]
    assert [i.can_skip for i in asked] == [False, True, True, True]
    assert asked[2] == StepInfo(2, 4, 960.0, "cond", (0.1,), 0.1, True)


def test_a_callback_that_raises_or_skips_too_early_is_heard() -> None:
    def broken(info: StepInfo) -> int:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        drive(StepController("callback", callback=broken), [0.1])
    with pytest.raises(UnsupportedError, match="skips step 0"):
        drive(StepController("callback", callback=lambda info: None), [0.1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "fast"}, "unknown mode"),
        ({"mode": "switch"}, "needs delta"),
        ({"mode": "switch", "delta": -0.1}, "δ is -0.1"),
        ({"mode": "switch", "delta": math.nan}, "δ is nan"),
        ({"mode": "planned"}, "needs schedule"),
        ({"mode": "callback"}, "needs callback"),
        ({"mode": "fixed", "branch_policy": "both"}, "branch policy"),
        ({"mode": "fixed", "low": 8, "high": 4}, "low is 8"),
        ({"mode": "planned", "schedule": [8], "cache": StepCachePolicy(0.1)}, "which steps are skipped"),
    ],
)
def test_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        StepController(**arguments)
    assert said in str(caught.value)
    assert caught.value.fix or caught.value.available


def test_a_schedule_of_another_length_is_refused() -> None:
    controller = StepController("planned", schedule=[8, 4, 4])
    with pytest.raises(UnsupportedError, match="3 steps and the request 4"):
        controller.reset(4)
    with pytest.raises(UnsupportedError, match="step 3 is beyond"):
        controller.decide("cond", 3, 1.0)


# ---------------------------------------------------------------------------------------------------------- step cache


def test_forecast_by_hand() -> None:
    forecast = ChangeForecast()
    assert forecast.predict(1000.0) is None
    forecast.ran(1000.0, None)
    assert forecast.predict(980.0) is None
    forecast.ran(980.0, 0.04)  # 0.002 per unit
    assert forecast.predict(970.0) == pytest.approx(0.02)
    forecast.ran(970.0, 0.03)  # 0.003 per unit, 1.5 times the rate before
    assert forecast.predict(960.0) == pytest.approx(0.045)
    assert forecast.skipped(960.0) == pytest.approx(0.045)
    assert forecast.skipped(950.0) == pytest.approx(0.045)
    assert (forecast.skips, forecast.pending) == (2, pytest.approx(0.09))
    forecast.ran(940.0, 0.06)  # over 30 units: 0.002; a falling rate is taken as it is
    assert (forecast.skips, forecast.pending) == (0, 0.0)
    assert forecast.predict(930.0) == pytest.approx(0.02)
    # The same timestep again: as far as the last distance.
    forecast.ran(930.0, 0.02)
    assert forecast.predict(930.0) == pytest.approx(0.02)


@settings(max_examples=200, deadline=None)
@given(CHANGES, st.floats(0, 1), st.integers(1, 4), st.sampled_from(["switch", "fixed"]))
def test_cache_never_skips_the_ends_nor_too_long(changes: list[float], threshold: float, most: int, mode: Any) -> None:
    cache = StepCachePolicy(threshold, max_skips=most)
    rows = drive(StepController(mode, delta=0.3, cache=cache, last_high=0, weighting="none"), changes)
    bits = [row[0].bits for row in rows]
    assert None not in bits[:2]
    assert bits[-1] is not None
    runs = "".join("s" if b is None else "." for b in bits).split(".")
    assert max(map(len, runs)) <= most
    for row in rows:
        if row[0].bits is None:
            _, _, numbers = row[0].reason.partition("predicted change ")
            predicted, _, limit = numbers.partition(",")[0].partition(" < ")
            assert float(limit) == pytest.approx(threshold, rel=1e-3)
            assert float(predicted) <= float(limit)
    if threshold == 0:
        assert None not in bits


def test_skipped_steps_count_for_delta_until_they_are_measured() -> None:
    """L1 = .1 a step, cache threshold .25, δ = .25: steps 2 and 3 are skipped, for which .1 each stands in."""
    controller = published(0.25, cache=StepCachePolicy(0.25))
    decisions = drive(controller, [0.1, math.nan, math.nan, 0.3, 0.1])
    assert [row[0].bits for row in decisions[:5]] == [8, 8, None, None, 8]
    assert decisions[4][0].accumulated == pytest.approx(0.3)  # .1 measured + .2 predicted
    assert decisions[4][0].reason == "change 0.3 ≥ 0.25"
    # The step after: t_p is step 4, whose L1 against step 1 was .3.
    assert decisions[5][0].accumulated == pytest.approx(0.3)


def test_low_steps_are_those_whose_output_would_not_be_reused() -> None:
    """δ = 1, threshold .25. (change from the last computed step, from the last high one) where a step is computed."""
    changes = [
        (None, None), (0.1, None), None, None, (0.3, None), None, None,
        # .3 a step, three times the rate before: .9 would be added by skipping step 8.
        (0.9, None), (2.0, None),
        # The last two high steps are two steps apart and differ by .6: .3 a step.
        (0.05, 0.6), (0.2, None), (0.9, None), (0.05, 0.4), None,
        # A step ten times as long, and one that could be skipped if the step before had run on the high engine.
        (0.3, None), (0.1, None),
    ]  # fmt: skip
    timesteps = [*(1000.0 - 20 * step for step in range(14)), 540.0, 520.0]
    controller = published(1.0, cache=StepCachePolicy(0.25, max_skips=2))
    controller.reset(30)
    decisions = []
    for step, (known, timestep) in enumerate(zip(changes, timesteps)):
        decision = controller.decide("cond", step, timestep)
        assert (decision.bits is None) == (known is None)
        change, reused_change = known or (None, None)
        controller.ran("cond", step, timestep, decision.bits, change, reused_change=reused_change)
        decisions.append(decision)
    assert [d.bits for d in decisions] == [8, 8, None, None, 8, None, None, 8, 4, 8, 4, 4, 8, None, 4, 8]
    reasons = [d.reason.partition(" ")[0] for d in decisions]
    assert reasons == ["no", "no", *["cache:"] * 6, *["change"] * 5, "cache:", "change", "cache:"]


def test_residuals() -> None:
    generator = torch.Generator().manual_seed(0)
    output, x, later = (torch.randn(1, 4, 2, 4, 4, generator=generator) for _ in range(3))
    assert torch.equal(reuse(keep(output, x, "output", 900.0, 8), later, 800.0), output)
    torch.testing.assert_close(reuse(keep(output, x, "latent", 900.0, 8), later, 800.0), output - x + later)
    # Image to video: the latent carries condition channels behind the ones it is denoised in.
    wide_x, wide_later = (torch.cat((t, torch.full_like(t, 7)), dim=1) for t in (x, later))
    found = reuse(keep(output, wide_x, "latent", 900.0, 8), wide_later, 800.0)
    torch.testing.assert_close(found, output - x + later)
    for residual in ("output", "line"):  # what is returned may be changed in place
        kept = keep(output, x, residual, 900.0, 8)  # type: ignore[arg-type]
        reuse(kept, later, 800.0).zero_()
        assert torch.equal(kept.tensor, output)


def test_a_line_goes_through_the_last_two_outputs() -> None:
    """Outputs that are whole multiples of a power of two, so that every sum is exact."""
    base, way = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([4.0, 1.0, -8.0])

    def at(timestep: float) -> torch.Tensor:
        return base + way * timestep / 1024

    jump = keep(-at(1024), base, "line", 1280.0, 8)
    assert torch.equal(reuse(jump, base, 512.0), -at(1024))  # one output makes no line
    first = keep(at(1024), base, "line", 1024.0, 8, jump)
    assert torch.equal(reuse(first, base, 512.0), at(1024))  # nor does the first output of a request with the second
    second = keep(at(768), base, "line", 768.0, 8, first)
    for timestep in (768.0, 704.0, 640.0, 512.0):
        assert torch.equal(reuse(second, base, timestep), at(timestep))
    assert torch.equal(reuse(second, base, 256.0), at(512))  # no farther than from the one to the other
    assert torch.equal(reuse(second, base, 896.0), at(768))  # and never back
    third = keep(at(704), base, "line", 704.0, 8, second)
    assert torch.equal(reuse(third, base, 672.0), at(672))
    again = keep(at(600), base, "line", 704.0, 8, third)  # the same timestep twice: no line
    assert torch.equal(reuse(again, base, 672.0), at(600))
    for bits, before in ((4, 8), (8, 4), (4, 4)):
        last = keep(at(1024), base, "line", 1024.0, before, jump)
        assert torch.equal(reuse(keep(at(768), base, "line", 768.0, bits, last), base, 512.0), at(768))
    other = keep(at(1024)[:2], base, "line", 1024.0, 8)  # of another size: a first output again
    fresh = keep(at(1024), base, "line", 1024.0, 8, other)
    assert fresh.first
    assert torch.equal(reuse(keep(at(768), base, "line", 768.0, 8, fresh), base, 512.0), at(768))
    for dtype in (torch.float16, torch.bfloat16):
        last = keep(at(1024).to(dtype), base, "line", 1024.0, 8, keep(base.to(dtype), base, "line", 1280.0, 8))
        found = reuse(keep(at(768).to(dtype), base, "line", 768.0, 8, last), base, 512.0)
        assert found.dtype == dtype
        assert torch.equal(found, at(512).to(dtype))


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": -1.0},
        {"threshold": math.inf},
        {"threshold": 0.1, "residual": "x"},
        {"threshold": 0.1, "max_skips": 0},
    ],
)
def test_cache_policy_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        StepCachePolicy(**arguments)


def test_family_policy_keeps_all_but_the_threshold() -> None:
    policy = StepCachePolicy.for_family("wan")
    assert policy.threshold > 0
    changed = StepCachePolicy.for_family("wan", 0.5)
    assert (changed.threshold, changed.residual, changed.max_skips) == (0.5, policy.residual, policy.max_skips)
    assert StepCachePolicy.for_family("no such family").threshold > 0


# --------------------------------------------------------------------------------------------------------- the records


def _record(bits: int | None, retried: bool = False, change: float | None = 0.1) -> StepRecord:
    return StepRecord(0, "cond", 1.0, bits, "x", change, 0.1, 0.01, retried)


def test_relative_cost_by_hand() -> None:
    low = 1.75 / 2.12
    records = [_record(8), _record(4), _record(None), _record(8, retried=True)]
    assert relative_cost(records, 8, 4, PUBLISHED_COST) == pytest.approx((1 + low + 0 + 1 + low) / 4)
    assert relative_cost(records, 8, 4, {8: 2.0, 4: 1.0}) == pytest.approx((2 + 1 + 0 + 2 + 1) / 8)


def test_records_are_strict_json() -> None:
    text = json.dumps(_record(8, change=math.inf).to_json(), allow_nan=False)
    assert json.loads(text)["change"] is None
    assert json.loads(text)["bits"] == 8


def test_the_last_steps_can_be_kept_high() -> None:
    cache = StepCachePolicy(10.0)
    for more in ({}, {"cache": cache}):
        rows = drive(published(1e9, last_high=3, **more), [0.01] * 9)
        assert [row[0].bits for row in rows[-3:]] == [8] * 3
        assert rows[-1][0].reason == "one of the last 3 steps"
    assert [row[0].bits for row in drive(published(1e9), [0.01] * 9)] == [8, 8, *[4] * 8]


def test_weighting_counts_how_far_a_step_moves() -> None:
    """Steps of 20, 20, 40 and 80: of 50 steps the mean is 20."""
    timesteps, changes = [1000.0, 980.0, 960.0, 920.0, 840.0], [0.1, 0.1, 0.1, 0.1]
    sums = {}
    for weighting in ("none", "step"):
        controller = published(9.0, weighting=weighting)
        controller.reset(50)
        found = []
        for step, timestep in enumerate(timesteps):
            decision = controller.decide("cond", step, timestep)
            controller.ran("cond", step, timestep, decision.bits, changes[step - 1] if step else None)
            found.append(decision.accumulated)
        sums[weighting] = [*found[2:], controller.decide("cond", 5, 800.0).accumulated]
    assert sums["none"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert sums["step"] == pytest.approx([0.1, 0.2, 0.4, 0.8])


@settings(max_examples=80, deadline=None)
@given(CHANGES, st.floats(0, 3))
def test_weighting_is_the_published_rule_on_even_steps_and_without_a_number_of_steps(
    changes: list[float], delta: float
) -> None:
    even = 1000 / (len(changes) + 1)
    plain = [row[0].bits for row in drive(published(delta), changes)]
    # A δ apart from every sum, which the weights change in their last bits.
    if all(abs(total - delta) > 1e-6 for total in partial_sums(changes)):
        weighted = drive(published(delta, weighting="step"), changes, spacing=even)
        assert [row[0].bits for row in weighted] == plain
    controller = published(delta, weighting="step")
    controller.reset(None)
    bits = []
    for step in range(len(changes) + 1):
        decision = controller.decide("cond", step, 1000.0 - 7 * step)
        controller.ran("cond", step, 1000.0 - 7 * step, decision.bits, changes[step - 1] if step else None)
        bits.append(decision.bits)
    assert bits == plain


def partial_sums(changes: list[float]) -> list[float]:
    """Of all runs of adjacent changes."""
    return [sum(changes[i:j]) for i in range(len(changes)) for j in range(i + 1, len(changes) + 1)]


def test_steps_that_were_skipped_weigh_their_mean() -> None:
    """Long steps, two of them skipped: their predicted changes count as often as a measured one of their length would."""
    cache = StepCachePolicy(0.25, max_skips=2)
    # Only the first five steps may be skipped, so that δ decides the fifth.
    controller = StepController("switch", delta=9.0, weighting="step", cache=cache, last_high=5)
    controller.reset(10)
    accumulated = []
    for step in range(5):
        timestep = 1000.0 - 200 * step
        decision = controller.decide("cond", step, timestep)
        accumulated.append((decision.bits, decision.accumulated))
        change = None if step == 0 or decision.bits is None else 0.1 if step < 3 else 0.3
        controller.ran("cond", step, timestep, decision.bits, change)
    # Every step is twice as long as the mean of ten.
    assert [bits for bits, _ in accumulated] == [8, 8, None, None, 4]
    assert accumulated[-1][1] == pytest.approx(2 * (0.1 + 0.2))
    assert controller.decide("cond", 5, 10.0).accumulated == pytest.approx(2 * (0.1 + 0.3))


def test_the_rule_of_the_commands_is_the_default_of_switching() -> None:
    """Two last steps high, and changes weighted; the other modes have neither."""
    for mode, options in (("switch", {"delta": 1e9}), ("fixed", {}), ("planned", {"schedule": [8, 4]})):
        controller = StepController(mode, **options)  # type: ignore[arg-type]
        rule = (controller.last_high, controller.weighting)
        assert rule == ((LAST_HIGH, WEIGHTINGS[0]) if mode == "switch" else (0, "none"))
    rows = drive(StepController("switch", delta=1e9), [0.01] * 9)
    assert [row[0].bits for row in rows] == [8, 8, 4, 4, 4, 4, 4, 4, 8, 8]
    for signature in (GenerateRequest, plan):
        parameters = inspect.signature(signature).parameters
        assert (parameters["last_high"].default, parameters["weighting"].default) == (LAST_HIGH, WEIGHTINGS[0])


def test_a_fresh_controller_has_the_rule_and_no_history() -> None:
    controller = published(0.35)
    expected = [row[0].bits for row in drive(controller, [0.1, 0.2, 0.3, 0.1])]
    fresh = controller.fresh()
    assert fresh.steps is None
    assert fresh.decide("cond", 0, 1000.0).reason == "no history"
    assert [row[0].bits for row in drive(fresh, [0.1, 0.2, 0.3, 0.1])] == expected
    assert controller.decide("cond", 5, 500.0).reason != "no history"


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="weighting"):
        StepController("switch", delta=0.1, weighting="sigma")  # type: ignore[arg-type]
