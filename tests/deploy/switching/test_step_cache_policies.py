"""The forecasts of the step cache: decisions against a literal recomputation in float64, alone and in whole pipelines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, CachePolicy
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.forecasts import NOT_MOVED, EasyForecast, Growth, MagnitudeForecast, Moved, moved_since
from dvdquant.deploy.switching.gbs import Weighting
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.deploy.switching.step_cache import POLICIES, StepCachePolicy
from dvdquant.errors import EngineError, UnsupportedError
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import arguments, build_pipeline

STEPS = 24
# Thresholds at which the trajectories below skip some steps and compute others.
MIDDLE: dict[CachePolicy, float] = {"forecast": 0.25, "line": 0.25, "easycache": 0.25, "magcache": 0.06}


def norm(tensor: Tensor) -> float:
    return float(tensor.double().abs().sum())


def skips_literally(
    policy: StepCachePolicy, latents: Sequence[Tensor], outputs: Sequence[Tensor], times: Sequence[float]
) -> list[bool]:
    """What the rule skips if every step runs on one engine."""
    return [choice == "skip" for choice in choices_literally(policy, latents, outputs, times, [8] * len(times))]


def choices_literally(
    policy: StepCachePolicy,
    latents: Sequence[Tensor],
    outputs: Sequence[Tensor],
    times: Sequence[float],
    ran: Sequence[int],
) -> list[str]:
    """The rule as it is written down, from the vectors themselves: nothing is carried from step to step but the choices.

    "skip" reuses an output, "serve" computes one that the next step may reuse, "free" is left to δ. ``ran`` has the bits of
    the steps that are computed; outputs of 8 bits may be reused.
    """
    computed: list[int] = []
    errors: list[float] = []
    barred = False
    found = []
    for i, time in enumerate(times):
        error = alone = None
        if len(computed) >= 2:
            j, before = computed[-1], computed[-2]
            if policy.policy == "easycache":
                k = norm(outputs[j] - outputs[before]) / norm(latents[j] - latents[before])
                error = alone = k * norm(latents[i] - latents[i - 1]) / norm(outputs[j])
            else:
                rates = []
                for new, old in zip(computed[:0:-1], computed[-2::-1]):  # the newest first
                    if policy.policy in ("forecast", "line"):
                        rate = norm(outputs[new] - outputs[old]) / norm(outputs[old])
                    else:
                        rate = math.log(norm(outputs[new] - latents[new]) / norm(outputs[old] - latents[old]))
                    rates.append(rate / (times[old] - times[new]))
                growth = max(1.0, abs(rates[0] / rates[1])) if len(rates) > 1 else 1.0
                if policy.policy in ("forecast", "line"):
                    error = alone = rates[0] * growth * (times[i - 1] - time)
                else:
                    error = abs(1 - math.exp(rates[0] * growth * (times[j] - time)))
                    alone = abs(1 - math.exp(rates[0] * growth * (times[i - 1] - time)))
        weight = (times[i - 1] - time) * len(times) / 1000 if policy.weighting == "step" else 1.0
        first = max(2, round(policy.warm_up * len(times)))
        may = first <= i < len(times) - 1 and len(errors) < policy.max_skips and not barred
        if may and error is not None and (sum(errors) + error) * weight < policy.threshold:
            errors.append(error)
            found.append("skip")
            continue
        serves = first <= i + 1 < len(times) - 1 and alone is not None and alone * weight < policy.threshold
        found.append("serve" if serves else "free")
        barred, errors = ran[i] < 8, []
        if not barred:
            computed.append(i)
    return found


class Trajectory:
    """Outputs that depend on the step and the bits alone, in the place of a session."""

    def __init__(self, seed: int, size: tuple[int, ...] = (1, 4, 2, 4, 4), fails: Sequence[int] = ()) -> None:
        draw = torch.Generator().manual_seed(seed)
        start, way, base, turn, noise = (torch.randn(size, generator=draw) for _ in range(5))
        # Steps of a shifted schedule: long ones at the end.
        levels = torch.linspace(1.0, 0.05, STEPS)
        levels = 3 * levels / (1 + 2 * levels)
        self.times = [1000 * float(level) for level in levels]
        self.latents = [start + (1 - level) * 3 * way + 0.02 * i * noise for i, level in enumerate(levels)]
        self.outputs = {
            8: [base + torch.sin(9 * level) * turn + (1 - level) * way for level in levels],
            4: [base + torch.sin(9 * level) * turn + (1 - level) * way + 0.1 * noise.roll(i) for i, level in enumerate(levels)],
        }  # fmt: skip
        self.bits, self.fails = (4, 8), set(fails)

    def run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        step = self.times.index(min(self.times, key=lambda time: abs(time - float(inputs["timestep"].max()))))
        if bits == 4 and step in self.fails:
            raise EngineError("broken here")
        rows = inputs.get("rows")
        output = self.outputs[bits][step]
        return output if rows is None else output[rows]

    def inputs(self, step: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        latent = self.latents[step]
        given = {
            "hidden_states": latent if rows is None else latent[rows],
            "timestep": torch.tensor([self.times[step]]),
        }
        return given if rows is None else {**given, "rows": rows}


def drawn(world: Trajectory, controller: StepController, branches: Sequence[str] = ("cond",)) -> StepRunner:
    """Run a whole request."""
    runner = StepRunner(world, controller)  # type: ignore[arg-type]
    for step in range(STEPS):
        for branch in branches:
            runner.run(world.inputs(step), branch=branch, step=step, steps=STEPS)
    return runner


def skipped(runner: StepRunner, branch: str = "cond") -> list[bool]:
    return [record.bits is None for record in runner.trace if record.branch == branch]


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_decisions_are_the_equations(name: CachePolicy) -> None:
    """Of eight trajectories, at three thresholds, with and without a warm-up, on one engine."""
    shares = []
    for seed in range(8):
        world = Trajectory(seed)
        for factor in (0.5, 1.0, 2.0):
            weighting: Weighting = "step" if seed > 3 else "none"
            policy = StepCachePolicy(factor * MIDDLE[name], "line", 2 + seed % 4, name, 0.25 * (seed % 2), weighting)
            runner = drawn(world, StepController("fixed", cache=policy), ("cond", "uncond"))
            expected = skips_literally(policy, world.latents, world.outputs[8], world.times)
            assert skipped(runner) == expected == skipped(runner, "uncond")
            assert not any(expected[: max(2, 6 * (seed % 2))])
            assert not expected[-1]
            shares.append(sum(expected) / STEPS)
    assert min(shares) < 0.5 < max(shares)
    assert sum(shares) > 1


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_decisions_with_two_engines_and_steps_that_run_again(name: CachePolicy) -> None:
    """Only outputs of the high engine are compared and reused; one that the next step may reuse is computed there."""
    found, retried = [], 0
    for seed, factor in itertools.product(range(4), (0.3, 1.0, 3.0)):
        world = Trajectory(seed, fails=(4, 7, 8, 15, 16))
        policy = StepCachePolicy(factor * MIDDLE[name], POLICIES[name].residual, 3, name)
        runner = drawn(world, StepController("switch", delta=1e9, cache=policy, last_high=1, weighting="none"))
        ran = [8 if record.bits is None else record.bits for record in runner.trace]
        outputs = [world.outputs[bits][step] for step, bits in enumerate(ran)]
        choices = choices_literally(policy, world.latents, outputs, world.times, ran)
        for step, (choice, record) in enumerate(zip(choices, runner.trace)):
            if choice == "free":
                high = step < 2 or step == STEPS - 1 or step in world.fails
                assert record.bits == (8 if high else 4)
                assert record.retried == (step in world.fails and 2 <= step < STEPS - 1)
            else:
                assert record.bits == {"skip": None, "serve": 8}[choice]
                assert not record.retried
        found += [(choice, record.bits) for choice, record in zip(choices, runner.trace)]
        retried += sum(record.retried for record in runner.trace)
    assert set(found) == {("skip", None), ("serve", 8), ("free", 4), ("free", 8)}
    assert retried
    assert runner.summary()["cache"] == {
        "threshold": policy.threshold, "residual": policy.residual, "max_skips": 3, "policy": name, "warm_up": 0.0,
        "weighting": "none",
    }  # fmt: skip


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_a_batch_in_slices_is_decided_as_a_whole(name: CachePolicy) -> None:
    """Two samples that move differently, in calls of one: the decisions are those of one call with both."""
    world = Trajectory(5, (2, 4, 2, 4, 4))
    for latent in world.latents:
        latent[1] *= 3
    policy = StepCachePolicy(MIDDLE[name], "output", 3, name)
    runner = StepRunner(world, StepController("fixed", cache=policy))  # type: ignore[arg-type]
    for step in range(STEPS):
        for row in range(2):
            runner.run(
                world.inputs(step, torch.tensor([row])),
                branch=f"cond/{row}",
                step=step,
                steps=STEPS,
                latents=world.latents[step],
            )
    expected = skips_literally(policy, world.latents, world.outputs[8], world.times)
    assert skipped(runner, "cond/0") == skipped(runner, "cond/1") == expected
    assert 0 < sum(expected) < STEPS - 3


def test_a_slice_of_the_low_engine_is_not_reused_with_one_that_ran_again() -> None:
    """Step 3 fails for the second of two slices on the low engine and counts as high: step 4 may be skipped by its rule."""
    levels = [1.0, 1.1, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2]

    class Levels:
        bits = (4, 8)

        def run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
            step = 10 - int(inputs["timestep"])
            if (step, bits, int(inputs["hidden_states"][0])) == (3, 4, 1):
                raise EngineError("broken here")
            return torch.full((1, 4), levels[step])

    policy = StepCachePolicy(0.5, warm_up=0.3)
    controller = StepController("switch", delta=1e9, cache=policy, last_high=1, weighting="none")
    runner = StepRunner(Levels(), controller)  # type: ignore[arg-type]
    for step in range(5):
        for row in (0, 1):
            given = {"hidden_states": torch.tensor([float(row)]), "timestep": torch.tensor([10.0 - step])}
            runner.run(given, branch=f"cond/{row}", step=step, steps=10)
    bits = [[record.bits for record in runner.trace if record.branch == f"cond/{row}"] for row in (0, 1)]
    assert bits == [[8, 8, 8, 4, 8], [8, 8, 8, 8, None]]
    assert runner.trace[-2].reason.startswith("no output to reuse")


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_nothing_of_a_request_is_left_for_the_next(name: CachePolicy) -> None:
    world = Trajectory(1)
    policy = StepCachePolicy(MIDDLE[name], "latent", 3, name)
    runner = drawn(world, StepController("fixed", cache=policy))
    first = skipped(runner)
    for _ in range(2):  # the timestep rises: a new request, which nobody announces
        for step in range(STEPS):
            runner.run(world.inputs(step), steps=STEPS)
        assert skipped(runner) == first
    for step in range(7):
        runner.run(world.inputs(step), step=step, steps=STEPS)
    runner.begin_request(STEPS)
    for step in range(STEPS):
        runner.run(world.inputs(step), step=step, steps=STEPS)
    assert skipped(runner) == first


def test_a_first_step_in_the_middle_has_no_forecast() -> None:
    """The second of two transformers takes over: it computes two steps before it skips one."""
    for name in CACHE_POLICIES:
        controller = StepController("fixed", cache=StepCachePolicy(1e6, "output", 3, name))
        runner, world = StepRunner(Trajectory(2), controller), Trajectory(2)  # type: ignore[arg-type]
        for step in range(14, STEPS):
            runner.run(world.inputs(step), step=step, steps=STEPS)
        assert skipped(runner)[:4] == [False, False, True, True]
        assert not skipped(runner)[-1]


def test_latents_that_stand_still_or_are_not_finite_skip_nothing() -> None:
    easy = EasyForecast()
    easy.ran(900.0, 0.1, Moved(0.5, 0.0), Growth(1.0, 1.0))  # no distance that the change could be divided by
    assert easy.predict(800.0, Moved(0.1, 0.1)) is None
    easy.ran(800.0, 0.1, Moved(0.5, 0.5), Growth(2.0, 1.0))
    assert easy.predict(700.0, Moved(0.25, 0.25)) == pytest.approx(0.1 / 2 / 0.5 * 0.25)
    assert easy.predict(700.0, NOT_MOVED) is None
    controller = StepController("fixed", cache=StepCachePolicy(1e6, "output", 3, "easycache"))
    for step, change in enumerate((None, 0.1, 0.1)):
        controller.ran("cond", step, 900.0 - step, 8, change, Moved(0.5, 0.5), Growth(1.0, 1.0))
    assert controller.decide("cond", 3, 800.0, Moved(0.5, 0.5)).bits is None
    assert controller.decide("cond", 3, 800.0, Moved(math.nan, 0.5)).bits == 8
    assert controller.decide("cond", 3, 800.0, Moved(math.inf, 0.5)).bits == 8
    size = MagnitudeForecast()
    for time, growth in ((900.0, None), (800.0, 1e300), (700.0, 1e300)):
        size.ran(time, 0.1, NOT_MOVED, Growth(1.0, growth))
    assert size.predict(100.0) == math.inf
    size.ran(600.0, 0.1, NOT_MOVED, Growth(1.0, 0.0))
    assert size.predict(500.0) is None


def test_how_far_a_latent_moved() -> None:
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    assert moved_since(x, None, None) == NOT_MOVED
    assert moved_since(x, x + 1, None) == Moved(1.0, None)
    assert moved_since(x, torch.zeros(2), x.float() - 0.5) == Moved(None, 0.5)


class Straight:
    """Outputs on a straight line over the timestep, another one for each branch, in the place of a session."""

    bits = (4, 8)

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.base, self.way = (torch.randn(2, 1, 4, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))

    def at(self, branch: int, timestep: float) -> Tensor:
        return self.base[branch] + self.way[branch] * timestep / 1000

    def run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        return self.at(int(inputs["branch"]), float(inputs["timestep"]))


def test_outputs_on_a_line_are_reproduced_in_both_branches() -> None:
    """To rounding, in two requests with other steps: 0, 1, 5, 9, 13 and the last are computed."""
    world = Straight()
    runner = StepRunner(world, StepController("fixed", cache=StepCachePolicy(1e9, "line", 3)))  # type: ignore[arg-type]
    for length in (50, 30):
        runner.begin_request(16)
        times = [1000.0 - length * step for step in range(16)]
        for step, time in enumerate(times):
            for branch, name in enumerate(("cond", "uncond")):
                given = {"hidden_states": world.base[0], "timestep": torch.tensor(time), "branch": torch.tensor(branch)}
                output = runner.run(given, branch=name, step=step, steps=16)
                assert (runner.trace[-1].bits is None) == (step not in (0, 1, 5, 9, 13, 15))
                # No line goes through step 0, so step 1 is held.
                reached = times[1] if step in (2, 3, 4) else time
                torch.testing.assert_close(output, world.at(branch, reached), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ whole pipelines


# Guidance in two calls, in one call of two samples, embedded; timesteps per token (LTX-Video).
KINDS = ("wan", "cogvideox", "hunyuan-video", "ltx-video")


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_skips_by_the_equations(kind: str) -> None:
    """The calls of a whole request in diffusers' own pipeline, judged on the latents and samples that passed."""
    made = tiny.exported(kind)
    found = []
    for name, threshold in (("easycache", 2.2), ("magcache", 0.6)):
        policy = StepCachePolicy(threshold, "output", 2, name)  # type: ignore[arg-type]
        transformer = made.open("pytorch", mode="a8", cache=policy)
        calls = tiny.record_calls(transformer)
        transformer.begin_request(8)
        build_pipeline(kind, transformer)(**arguments(kind, steps=8))
        trace = transformer.trace
        first = trace[0].branch
        assert [record.step for record in trace if record.branch == first] == list(range(8))
        deciding = calls[:: len(calls) // 8]
        latents = [call.arguments["hidden_states"] for call in deciding]
        times = [float(call.arguments["timestep"].max()) for call in deciding]
        expected = skips_literally(policy, latents, [call.sample for call in deciding], times)
        for branch in {record.branch for record in trace}:
            assert [record.bits is None for record in trace if record.branch == branch] == expected
        found += expected
    assert {True, False} == set(found)


def test_wan22_skips_in_both_transformers() -> None:
    made = tiny.exported("wan")
    first, second = (
        made.open("pytorch", component=name, mode="a8", cache=1e6, cache_policy="easycache") for name in made.plans
    )
    pipe = build_pipeline("wan", first, transformer_2=second, boundary_ratio=0.7)
    for _ in range(2):
        pipe(**arguments("wan", steps=12, guidance_scale_2=2.0))
        for transformer in (first, second):
            bits = [record.bits for record in transformer.trace if record.branch == "cond"]
            assert bits[:2] == [8, 8]
            assert None in bits
        assert second.trace[-1].bits == 8


def test_two_pipelines_in_two_threads_keep_their_own_latents() -> None:
    made = tiny.exported("wan")
    options = {"mode": "a8", "cache": StepCachePolicy(2.2, "latent", 3, "easycache")}

    def run(transformer: Any, pipe: Any, seed: int, barrier: Barrier | None = None) -> tuple[list[Any], Tensor]:
        def wait(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if barrier is not None:
                barrier.wait(60)
            return values

        call = arguments("wan", steps=8, generator=torch.Generator().manual_seed(seed), callback_on_step_end=wait)
        frames = pipe(**call).frames
        return [(record.step, record.bits, record.reason) for record in transformer.trace], frames

    single = [made.open("pytorch", **options) for _ in range(2)]
    wanted = [run(each, build_pipeline("wan", each), seed) for seed, each in enumerate(single)]
    assert wanted[0][0] != wanted[1][0]
    shared, barrier = made.open("pytorch", **options), Barrier(2)
    pipes = [build_pipeline("wan", shared) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for found, expected in zip(pool.map(lambda i: run(shared, pipes[i], i, barrier), (0, 1)), wanted):
            assert found[0] == expected[0]
            assert torch.equal(found[1], expected[1])


# -------------------------------------------------------------------------------------------------------------- options


def test_a_policy_brings_its_own_settings() -> None:
    common: dict[str, Any] = {"component": "transformer", "family": "wan", "bits": (4, 8)}
    assert make_controller("a8", **common).cache is None
    for name in CACHE_POLICIES:
        assert make_controller("a8", cache_policy=name, **common).cache == POLICIES[name]
        changed = make_controller("a8", cache=0.3, cache_policy=name, **common).cache
        assert changed == replace(POLICIES[name], threshold=0.3)
        same = make_controller("a8", cache=POLICIES[name], cache_policy=name, **common)
        assert same.cache == POLICIES[name]
    assert make_controller("a8", cache=0.3, **common).cache == replace(POLICIES[CACHE_POLICIES[0]], threshold=0.3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_policy": "teacache"}, "teacache"),
        ({"cache_policy": ["easycache"]}, "unknown step cache policy"),
        ({"cache": POLICIES["magcache"], "cache_policy": "easycache"}, "of the policy magcache"),
        ({"mode": "planned", "schedule": [8, 8], "cache_policy": "easycache"}, "which steps are skipped"),
    ],
)
def test_policies_that_are_refused(options: dict[str, Any], words: str) -> None:
    common: dict[str, Any] = {"mode": "a8", "component": "transformer", "family": "wan", "bits": (4, 8)}
    with pytest.raises(UnsupportedError, match=words) as caught:
        make_controller(**{**common, **options})
    assert caught.value.fix or caught.value.available
    for field in ("residual", "weighting"):
        with pytest.raises(UnsupportedError, match=f"{field}|reuse") as caught:
            StepCachePolicy(0.1, **{field: "square"})
        assert caught.value.available
    for share in (-0.1, 1.5, "0.2", math.nan):
        with pytest.raises(UnsupportedError, match="warm_up"):
            StepCachePolicy(0.1, warm_up=share)  # type: ignore[arg-type]
