"""StepRunner with a real session: requests, steps and branches, and engines that fail."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.gbs import relative_change, switch_bits
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import EngineError, ShapeError, UnsupportedError
from dvdquant.model.layers import QuantLinear
from dvdquant.ops.cuda.errors import KernelError
from tests.support.bounds import UNIT
from tests.support.session_exports import family_export, recipe_export, weights_export
from tests.support.step_sessions import FAULTS, TIMESTEPS, FaultySession, inputs_at, poison, walk

# Of this random model L1 is 0.5 to 1.8 a step: δ = 3 gives runs of one to five low steps.
DELTA = 3.0


@pytest.fixture(scope="module")
def opened() -> Iterator[FaultySession]:
    with FaultySession(recipe_export("w4a4")) as session:
        yield session


@pytest.fixture
def session(opened: FaultySession) -> FaultySession:
    opened.faults.clear()
    opened.calls.clear()
    return opened


def switch(session: FaultySession, delta: float = DELTA, **more: object) -> StepRunner:
    """The published rule, unless ``more`` says otherwise."""
    rule = {"last_high": 0, "weighting": "none", **more}
    return StepRunner(session, StepController("switch", delta=delta, **rule))  # type: ignore[arg-type]


def bits_of(runner: StepRunner, branch: str = "cond") -> list[int | None]:
    return [r.bits for r in runner.trace if r.branch == branch]


# ----------------------------------------------------------------------------------------------------- δ-GBS end to end


def test_switching_is_the_rule_on_the_outputs_it_returned(session: FaultySession) -> None:
    runner, outputs = switch(session), []
    for step, inputs in walk(session, 30):
        outputs.append(runner.run(inputs, step=step, steps=30))
        runner.run(inputs, branch="uncond", step=step, steps=30)
    changes = [relative_change(b, a) for a, b in itertools.pairwise(outputs)]
    assert bits_of(runner) == switch_bits(changes, DELTA) == bits_of(runner, "uncond")
    assert {4, 8} == set(bits_of(runner))
    records = [r for r in runner.trace if r.branch == "cond"]
    assert [r.change for r in records[1:]] == pytest.approx(changes)
    # Each output is the engine's own for the bits the trace names.
    for step in (0, 7, 29):
        assert torch.equal(outputs[step], session.run(inputs_at(session, step), int(records[step].bits or 0)))
    json.dumps([r.to_json() for r in runner.trace], allow_nan=False)


def test_limits_of_delta(session: FaultySession) -> None:
    for delta, expected in ((0.0, [8] * 6), (math.inf, [8, 8, 4, 4, 4, 4])):
        runner = switch(session, delta)
        for step, inputs in walk(session, 6):
            runner.run(inputs, step=step)
        assert bits_of(runner) == expected


def test_steps_are_told_by_the_timestep_alone(session: FaultySession) -> None:
    with_steps, without = switch(session), switch(session)
    for step, inputs in walk(session, 12):
        for branch in ("cond", "uncond"):
            with_steps.run(inputs, branch=branch, step=step, steps=12)
            without.run(inputs, branch=branch)
    assert [(r.step, r.branch, r.bits) for r in without.trace] == [(r.step, r.branch, r.bits) for r in with_steps.trace]


def test_batch_slices_decide_as_the_whole_batch(session: FaultySession) -> None:
    """Two slices against the rule on the two of them joined; alone, the slices would decide otherwise."""
    runner, joined = switch(session), []
    slices: list[list[Tensor]] = [[], []]
    for step in range(30):
        for index in (0, 1):
            inputs = inputs_at(session, step, 10 * index, 0.02 + 0.2 * index)
            slices[index].append(runner.run(inputs, branch=f"cond_uncond/{index}", step=step))
        joined.append(torch.cat((slices[0][-1], slices[1][-1])))
    for index in (0, 1):
        assert bits_of(runner, f"cond_uncond/{index}") == switch_bits(
            [relative_change(b, a) for a, b in itertools.pairwise(joined)], DELTA
        )
    alone = [switch_bits([relative_change(b, a) for a, b in itertools.pairwise(s)], DELTA) for s in slices]
    assert alone[0] != alone[1]


def test_slices_under_one_name(session: FaultySession) -> None:
    named, unnamed = switch(session), switch(session)
    for step in range(12):
        for index in (0, 1):
            inputs = inputs_at(session, step, 10 * index, 0.02 + 0.2 * index)
            named.run(inputs, branch=f"cond/{index}", step=step)
            unnamed.run(inputs, branch="cond", step=step)
    assert [r.bits for r in unnamed.trace] == [r.bits for r in named.trace]
    assert [r.change for r in unnamed.trace] == [r.change for r in named.trace]


def test_separate_branches(session: FaultySession) -> None:
    runner = switch(session, branch_policy="separate")
    outputs: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    for step in range(30):
        for index, branch in enumerate(outputs):
            outputs[branch].append(
                runner.run(inputs_at(session, step, 10 * index, 0.02 + 0.2 * index), branch=branch, step=step)
            )
    for branch, seen in outputs.items():
        assert bits_of(runner, branch) == switch_bits(
            [relative_change(b, a) for a, b in itertools.pairwise(seen)], DELTA
        )
    assert bits_of(runner) != bits_of(runner, "uncond")


def test_working_on_an_output_in_place_changes_no_history(session: FaultySession) -> None:
    clean, spoiled = switch(session), switch(session)
    for step, inputs in walk(session, 10):
        clean.run(inputs, step=step)
        spoiled.run(inputs, step=step).mul_(1000).add_(5)
    assert bits_of(spoiled) == bits_of(clean)


# ------------------------------------------------------------------------------------------------------------- requests


def resized(inputs: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """The second request's inputs: of another height, where that is the only sign."""
    return {**inputs, "hidden_states": inputs["hidden_states"][:, :, :, :6]} if how == "shape" else inputs


@pytest.fixture
def ranged() -> Iterator[FaultySession]:
    """A session of other graphs, which take several heights."""
    with FaultySession(family_export("wan")) as session:
        yield session


@pytest.mark.parametrize("how", ["explicit", "step 0", "timestep", "shape"])
def test_a_new_request_forgets_the_last(request: pytest.FixtureRequest, how: str) -> None:
    session = request.getfixturevalue("ranged" if how == "shape" else "session")
    fresh, runner = switch(session, 1e9), switch(session, 1e9)
    for step, inputs in walk(session, 6):
        runner.run(inputs, step=step if how == "step 0" else None)
    assert bits_of(runner) == [8, 8, 4, 4, 4, 4]
    if how == "explicit":
        runner.begin_request(6)
    offset = 6 if how in ("explicit", "shape") else 0  # then the timestep goes on falling
    for step in range(6):
        runner.run(resized(inputs_at(session, step + offset), how), step=step if how == "step 0" else None)
    for step in range(6):
        fresh.run(resized(inputs_at(session, step + offset), how), step=step)
    assert bits_of(runner) == [8, 8, 4, 4, 4, 4]
    assert [(r.step, r.change) for r in runner.trace] == [(r.step, r.change) for r in fresh.trace]


def test_the_second_transformer_of_a_pipeline_begins_in_the_middle(session: FaultySession) -> None:
    """Wan 2.2: the low-noise transformer sees steps 20 to 25, clip after clip."""
    runner = switch(session, 1e9)
    for _clip in range(2):
        for step in range(20, 26):
            runner.run(inputs_at(session, step), step=step, steps=26)
        assert [r.step for r in runner.trace] == list(range(20, 26))
        assert bits_of(runner) == [8, 8, 4, 4, 4, 4]


def test_summary_counts(session: FaultySession) -> None:
    runner = switch(session, cache=None)
    seen: list[int] = []
    runner.on_step = lambda record: seen.append(record.step)
    for step, inputs in walk(session, 20):
        runner.run(inputs, step=step, steps=20)
    summary = runner.summary()
    bits = [b for b in bits_of(runner) if b is not None]
    assert seen == list(range(20))
    assert summary["average_bits"] == pytest.approx(sum(bits) / 20)
    assert summary["calls_at"] == {"4": bits.count(4), "8": bits.count(8)}
    assert (summary["skipped"], summary["retries"], summary["steps"], summary["calls"]) == (0, 0, 20, 20)
    low = 1.75 / 2.12
    assert summary["relative_cost"] == pytest.approx((bits.count(8) + low * bits.count(4)) / 20)
    assert "assumed" in summary["cost_basis"]
    assert runner.summary({8: 1.0, 4: 0.5})["relative_cost"] == pytest.approx((bits.count(8) + bits.count(4) / 2) / 20)
    assert summary["controller_seconds"] > 0
    json.dumps(summary, allow_nan=False)


def test_a_session_without_the_engine_is_refused(session: FaultySession) -> None:
    for controller in (
        StepController("fixed", bits=6),
        StepController("switch", delta=1.0, high=16),
        StepController("planned", schedule=[8, 6]),
    ):
        with pytest.raises(UnsupportedError, match="no engine with"):
            StepRunner(session, controller)
    runner = StepRunner(session, StepController("callback", callback=lambda info: 6))
    with pytest.raises(UnsupportedError, match="asks for 6-bit"):
        runner.run(inputs_at(session, 0))


def test_inputs_outside_the_profile_are_no_engine_failure(session: FaultySession) -> None:
    runner = switch(session, math.inf)
    for step, inputs in walk(session, 3):
        runner.run(inputs, step=step)
    wrong = inputs_at(session, 3)
    wrong["encoder_hidden_states"] = wrong["encoder_hidden_states"][:, :2]
    session.calls.clear()
    with pytest.raises(ShapeError):
        runner.run(wrong, step=3)
    assert len(session.calls) == 1


# ----------------------------------------------------------------------------------------------------------- step cache


@pytest.mark.parametrize("residual", ["output", "latent", "line"])
def test_skipped_steps_reuse_what_was_computed(session: FaultySession, residual: str) -> None:
    cache = StepCachePolicy(3.0, residual=residual, max_skips=2)  # type: ignore[arg-type]
    runner, asked, lines = switch(session, 2.0, cache=cache), 0, 0
    # Output, latent, timestep and bits of the computed steps.
    computed: list[tuple[Tensor, Tensor, float, int]] = []
    for step, inputs in walk(session, 20):
        for branch in ("cond", "uncond"):
            output = runner.run(inputs, branch=branch, step=step, steps=20)
            record = runner.trace[-1]
            if record.bits is None:
                last, latent, time, bits = computed[-1]
                assert bits == 8
                terms = [last]
                if residual == "latent":
                    terms += [-latent, inputs["hidden_states"]]
                elif residual == "line" and len(high := [each for each in computed if each[3] == 8]) > 2:
                    before, _, began, _ = high[-2]
                    reach = min(1.0, (record.timestep - time) / (time - began))
                    terms += [reach * last.double(), -reach * before.double()]
                    lines += 1
                exact = sum(term.double() for term in terms)
                # Three terms, of which each sum is rounded to the dtype of the outputs at most once.
                size = sum(term.double().abs() for term in (*terms, exact))
                assert bool(((output.double() - exact).abs() <= UNIT[output.dtype] * 2 * size).all())
                assert record.reason.startswith("cache: predicted change")
                asked += branch == "cond"
            elif branch == "cond":
                kept = (output, inputs["hidden_states"], record.timestep, record.bits)
        if bits_of(runner)[-1] is not None:
            computed.append(kept)
    assert bits_of(runner) == bits_of(runner, "uncond")
    assert runner.summary()["skipped"] == 2 * asked > 0
    assert len(session.calls) == 2 * (20 - asked)
    assert (lines > 0) == (residual == "line")


def test_a_planned_skip(session: FaultySession) -> None:
    runner = StepRunner(session, StepController("planned", schedule=[8, 4, None, None, 8, None]))
    outputs = [runner.run(inputs, step=step, steps=6) for step, inputs in walk(session, 6)]
    assert bits_of(runner) == [8, 4, None, None, 8, None]
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[4], outputs[5])
    # The other branch only joins at a skipped step: there is nothing to reuse for it, so it is computed.
    runner.begin_request(6)
    for step, inputs in walk(session, 3):
        runner.run(inputs, step=step)
    runner.run(inputs, branch="uncond", step=2)
    assert (runner.trace[-1].bits, runner.trace[-1].reason) == (8, "no output to reuse; planned")


# ------------------------------------------------------------------------------------------------------ failing engines


def fail_at(session: FaultySession, step: int, fault: str, *bits: int) -> None:
    session.faults = {(TIMESTEPS[step], b): FAULTS[fault] for b in bits}


# Both ends of a request, and its middle.
SOME_STEPS = (0, 1, 2, 3, 25, 48, 49)
POSITIONS = [
    pytest.param(SOME_STEPS, id="some"),
    pytest.param(tuple(range(50)), id="all", marks=pytest.mark.stress),
]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_low_step_is_retried_on_the_high_engine(
    session: FaultySession, fault: str, positions: tuple[int, ...]
) -> None:
    """Three steps before, the last of them low, then the low engine fails, then two steps after."""
    for position in positions:
        runner, steps = switch(session, math.inf), range(max(0, position - 3), min(position + 3, 50))
        fail_at(session, position, fault, 4)
        session.calls.clear()
        outputs = [runner.run(inputs_at(session, step), step=step, steps=50) for step in steps]
        low = position - steps[0] >= 2
        assert bits_of(runner) == [8 if n < 2 or step == position else 4 for n, step in enumerate(steps)]
        record, output = next((r, o) for r, o in zip(runner.trace, outputs) if r.step == position)
        assert record.retried == low
        assert runner.summary()["retries"] == int(low)
        assert all(torch.isfinite(o).all() for o in outputs)
        assert all(r.change is None or math.isfinite(r.change) for r in runner.trace)
        if low:
            assert record.reason.startswith("retry after ")
            assert "change" in record.reason
            first = position - steps[0]
            assert session.calls[first : first + 2] == [(TIMESTEPS[position], 4), (TIMESTEPS[position], 8)]
            assert torch.equal(output, session.run(inputs_at(session, position), 8))


@pytest.mark.parametrize("text", ["no kernel for this layer", "CUDA error: out of memory"])
def test_an_error_of_the_kernels_is_one_of_the_engine(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of the low engine runs again on the high one; there it is an EngineError, which says what the kernels said."""
    failing = [4]
    forward = QuantLinear.forward

    def failing_forward(layer: QuantLinear, x: Tensor) -> Tensor:
        if layer.act_bits in failing:
            raise KernelError(text, fix="another GPU", out_of_memory="memory" in text)
        return forward(layer, x)

    with PyTorchSession(Artifact.open(weights_export("wan", ranges=False))) as session:
        inputs = session.family.sample(session.sizes, session.dtype)
        eight = session.run(inputs, 8)
        monkeypatch.setattr(QuantLinear, "forward", failing_forward)
        runner = StepRunner(session, StepController("fixed", bits=4))
        assert torch.equal(runner.run(inputs, step=0), eight)
        assert runner.summary()["retries"] == 1
        with pytest.raises(EngineError, match=text) as caught:
            session.run(inputs, 4)
        assert isinstance(caught.value.__cause__, KernelError)
        assert caught.value.fix is not None
        assert ("smaller size" if "memory" in text else "another GPU") in caught.value.fix
        failing.append(8)
        with pytest.raises(EngineError, match="on the 8-bit engine"):
            runner.run(inputs, step=1)


def test_a_low_engine_that_never_works(session: FaultySession) -> None:
    """All 48 low steps of a request fail; the clip is the high engine's, and the trace says so at every step."""
    runner = switch(session, math.inf)
    session.faults = {(timestep, 4): FAULTS[fault] for timestep, fault in zip(TIMESTEPS, 13 * [*FAULTS])}
    for step, inputs in walk(session, 50):
        assert torch.isfinite(runner.run(inputs, step=step, steps=50)).all()
    assert bits_of(runner) == [8] * 50
    assert [r.retried for r in runner.trace] == [False] * 2 + [True] * 48
    assert runner.summary()["relative_cost"] == pytest.approx((50 + 48 * 1.75 / 2.12) / 50)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("delta", [0.0, math.inf])
def test_a_fault_of_the_high_engine_is_an_error_at_any_step(
    session: FaultySession, fault: str, delta: float, positions: tuple[int, ...]
) -> None:
    for position in positions:
        runner = switch(session, delta)
        fail_at(session, position, fault, 4, 8)
        runner.begin_request(50)
        for step in range(max(0, position - 3), position):
            runner.run(inputs_at(session, step), step=step, steps=50)
        with pytest.raises(EngineError) as caught:
            runner.run(inputs_at(session, position), step=position, steps=50)
        assert f"step {position}, branch cond" in str(caught.value)
        assert {"NaN": "NaN", "infinity": "infinity", "exception": "the engine stopped"}.get(fault, "memory") in str(
            caught.value
        )
        assert caught.value.fix
        assert len(runner.trace) == min(position, 3)
        low_failed = math.isinf(delta) and len(runner.trace) >= 2
        assert ("retry after" in str(caught.value)) == low_failed


def test_a_failed_step_is_a_high_step_for_delta(session: FaultySession) -> None:
    """By hand: after the retry at step 4 the sum starts over, with L1 of the output the high engine gave."""
    runner, outputs = switch(session, 1e6), []
    fail_at(session, 4, "NaN", 4)
    for step, inputs in walk(session, 7):
        outputs.append(runner.run(inputs, step=step))
    changes = [relative_change(b, a) for a, b in itertools.pairwise(outputs)]
    sums = [r.accumulated for r in runner.trace]
    assert sums[4] == pytest.approx(sum(changes[:3]))
    assert sums[5] == pytest.approx(changes[3])
    assert sums[6] == pytest.approx(changes[3] + changes[4])


def test_after_a_retry_the_other_branches_of_the_step_are_high_too(session: FaultySession) -> None:
    runner = switch(session, math.inf)
    fail_at(session, 3, "NaN", 4)
    for step, inputs in walk(session, 5):
        for branch in ("cond", "uncond"):
            runner.run(inputs, branch=branch, step=step)
    assert bits_of(runner) == bits_of(runner, "uncond") == [8, 8, 4, 8, 4]
    uncond = [r for r in runner.trace if r.branch == "uncond"]
    assert uncond[3].reason == "retry after NaN on the 4-bit engine in another call of this step"
    assert not uncond[3].retried
    assert session.calls.count((TIMESTEPS[3], 4)) == 1


@pytest.mark.parametrize("mode", ["fixed", "planned", "callback"])
def test_other_modes_retry_too(session: FaultySession, mode: str) -> None:
    more = {"fixed": {"bits": 4}, "planned": {"schedule": [4] * 4}, "callback": {"callback": lambda info: 4}}[mode]
    runner = StepRunner(session, StepController(mode, **more))  # type: ignore[arg-type]
    fail_at(session, 0, "NaN", 4)
    for step, inputs in walk(session, 4):
        runner.run(inputs, step=step)
    assert bits_of(runner) == [8, 4, 4, 4]
    assert runner.trace[0].retried


def test_a_request_can_go_on_after_an_error(session: FaultySession) -> None:
    """The step that failed may be asked again; what it failed with has left no trace in the history."""
    runner, clean = switch(session), switch(session)
    outputs = []
    for step, inputs in walk(session, 12):
        if step == 6:
            fail_at(session, 6, "NaN", 4, 8)
            with pytest.raises(EngineError):
                runner.run(inputs, step=step)
            session.faults.clear()
        outputs.append(runner.run(inputs, step=step))
        clean.run(inputs, step=step)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert bits_of(runner)[:6] == bits_of(clean)[:6]
    assert len(runner.trace) == 12


def test_one_spoiled_value_anywhere_is_seen(session: FaultySession) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        session.faults = {(TIMESTEPS[0], 8): poison(bad)}
        with pytest.raises(EngineError, match="step 0"):
            switch(session).run(inputs_at(session, 0), step=0)


@pytest.mark.gpu
def test_history_stays_on_the_gpu_and_a_nan_there_is_seen() -> None:
    """The same reduction on a CUDA device, against float64 on the CPU."""
    from dvdquant.deploy.switching.gbs import change_sums

    generator = torch.Generator().manual_seed(3)
    current, previous = (torch.randn(1, 16, 9, 60, 104, generator=generator).bfloat16() for _ in range(2))
    sums = change_sums(current.cuda(), previous.cuda())
    assert sums.is_cuda
    expected = change_sums(current, previous)
    assert sums.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    current[0, 3, 4, 5, 6] = math.nan
    assert math.isnan(change_sums(current.cuda(), previous.cuda())[2])
