"""A loop is known by its latents: with diffusers' own solvers, in bf16 and fp32, with guidance, conditions and fresh noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dvdquant.deploy.pipelines.continuity import BETTER, ROUNDING, Path

SHAPE = (1, 16, 3, 24, 24)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0}),
    "dpm": ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "dpm-3": ("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 3}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm-cogvideox": ("CogVideoXDPMScheduler", {}),
    "sde": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
}
ADDS_NOISE = {"dpm-cogvideox", "sde", "lcm", "ancestral"}


def calls(solver: str, seed: int, dtype: torch.dtype, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A loop with guidance: latents and both outputs of every step, of a model that is a smooth function of both."""
    name, config = SOLVERS[solver]
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(99)) / 4
    older = None
    for index, time in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
        given = scaled.to(dtype)
        mixed = torch.einsum("bcfhw,cd->bdfhw", given.float(), mixing)
        uncond, cond = (torch.tanh(mixed * (0.5 + factor * float(time) / 1000)).to(dtype) for factor in (0.4, 0.8))
        yield given, uncond, cond
        velocity = (uncond + 5 * (cond - uncond)).float()
        if solver == "dpm-cogvideox":
            back = scheduler.timesteps[index - 1] if index else None
            latents, older = scheduler.step(
                velocity, older, time, back, latents, generator=generator, return_dict=False
            )
        else:
            more = {} if solver in ("unipc", "ddim") else {"generator": generator}
            latents = scheduler.step(velocity, time, latents, return_dict=False, **more)[0]


@pytest.mark.parametrize(
    ("solver", "dtype"), [*((solver, torch.bfloat16) for solver in SOLVERS), ("unipc", torch.float32)]
)
def test_every_step_follows_from_those_before_and_no_step_of_another_loop_does(solver: str, dtype: torch.dtype) -> None:
    """Two loops from other noise. Of solvers without noise, weights explain a step but for rounding."""
    paths, before = (Path(), Path()), 0
    for step, pair in enumerate(zip(calls(solver, 0, dtype, 6), calls(solver, 1, dtype, 6))):
        for number, (latents, *_) in enumerate(pair):
            own, other = paths[number].fit(latents), paths[1 - number].fit(latents)
            assert (own is None) == (step == 0)
            if own is not None and other is not None:
                before += 1
                assert own.dependent
                assert not own.first
                assert solver in ADDS_NOISE or own.residual < ROUNDING
                assert own.residual < BETTER * other.residual or not other.dependent
                assert not paths[number].foreign_last(own)
            elif other is not None:  # the start of the second loop
                assert not other.dependent
        for number, (latents, uncond, cond) in enumerate(pair):
            paths[number].note(latents, uncond)
            assert paths[number].fit(latents) is not None
            paths[number].note(latents, cond)
    assert before >= 10


def test_the_call_of_another_loop_shows_when_the_first_goes_on() -> None:
    """Also where the foreign start was made from a picture of the loop."""
    path, noise = Path(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    for step, (latents, uncond, cond) in enumerate(calls("unipc", 0, torch.bfloat16, 12)):
        fit = path.fit(latents)
        if step == 7:
            assert fit is not None
            assert path.foreign_last(fit)
            break
        path.note(latents, uncond)
        path.note(latents, cond)
        if step == 6:
            start = (0.5 * latents.float() + 0.5 * noise).bfloat16()
            found = path.fit(start)
            assert found is not None
            assert found.dependent
            path.note(start, noise.bfloat16())


def test_conditions_behind_the_latents_and_values_that_stay_say_nothing() -> None:
    """36 channels go in and 16 come out; the first frame of both loops is the same picture."""
    condition = torch.randn(1, 20, *SHAPE[2:], generator=torch.Generator().manual_seed(8))
    path = Path()
    loops = [calls("euler", seed, torch.float32, 6) for seed in (0, 1)]
    for step, pair in enumerate(zip(*loops)):
        first, second = (torch.cat([latents, condition], dim=1) for latents, _, _ in pair)
        for whole in (first, second):
            whole[:, :, 0] = condition[:, :1, 0]
        if step:
            own, other = path.fit(first), path.fit(second)
            assert own is not None
            assert other is not None
            assert own.residual < ROUNDING < 0.5 < other.residual
        path.note(first, pair[0][1])
        path.note(first, pair[0][2])
    assert path.fit(first[:, :, :2]) is not None
    assert not path.fit(first[:, :, :2]).dependent  # type: ignore[union-attr]  # of another size


def test_both_halves_of_a_guided_batch_belong_to_one_sample() -> None:
    path = Path()
    for latents, uncond, cond in calls("euler", 3, torch.float32, 5):
        fit = path.fit(torch.cat([latents] * 2))
        assert fit is None or fit.residual < 1e-3
        path.note(torch.cat([latents] * 2), torch.cat([uncond, cond]))


def test_unrelated_noise_is_not_taken_for_a_loops_next_step() -> None:
    """Five hundred starts of other loops, of as many values as a short clip in few pixels has: none by chance."""
    generator = torch.Generator().manual_seed(11)
    path, shape = Path(), (1, 16, 3, 16, 16)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    latents = draw()
    path.note(latents, draw())
    path.note(latents, draw())
    fits = [path.fit(draw()) for _ in range(500)]
    assert not any(fit is None or fit.dependent for fit in fits)
    tenth = path.fit(0.3 * latents + draw())  # 8 % of the square
    assert tenth is not None
    assert tenth.dependent


@pytest.mark.stress
@pytest.mark.parametrize("solver", ["sde", "lcm", "ancestral", "unipc"])
def test_latents_of_a_published_size(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """480p and 81 frames of Wan: every step is its own loop's by far, and chance explains next to nothing."""
    monkeypatch.setattr("tests.deploy.pipelines.test_continuity.SHAPE", (1, 16, 21, 60, 104))
    paths = (Path(), Path())
    for step, pair in enumerate(zip(calls(solver, 0, torch.bfloat16, 4), calls(solver, 1, torch.bfloat16, 4))):
        for number, (latents, *_) in enumerate(pair):
            own, other = paths[number].fit(latents), paths[1 - number].fit(latents)
            if step and own is not None and other is not None:
                assert own.dependent
                assert not other.dependent
                assert own.residual < BETTER < 0.999 < other.residual
        for number, (latents, uncond, cond) in enumerate(pair):
            paths[number].note(latents, uncond)
            paths[number].note(latents, cond)
