"""benchmarks/quality/caches.py: settings, the table, and that clips are skipped in it as the runtime skips."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.quality.caches import ALONG, SETTINGS, controller_of, kept_a8, table_of
from benchmarks.quality.toy.clips import Bench, Recording, bench_prompts, generate, record, skips_along
from benchmarks.quality.work import plan
from dvdquant.checkpoint.prompt_table import EMPTY_WORD
from dvdquant.deploy.switching.runner import StepRunner
from tests.support.exporting import TINY_WAN

STEPS = 10


def test_settings_are_what_they_say() -> None:
    for setting in (*SETTINGS, *ALONG):
        mode, *words = setting.split()
        controller = controller_of(setting)
        assert controller.mode == ("switch" if mode.startswith("switch") else "fixed")
        cache = controller.cache
        found = [] if cache is None else [cache.policy, cache.threshold, cache.residual, cache.max_skips, cache.warm_up]
        assert [str(value) for value in found] == [*words[:4], *(str(float(word)) for word in words[4:5])]
        assert cache is None or cache.weighting == (words[5] if len(words) > 5 else "none")
    assert controller_of("switch=0.5").delta == 0.5


def test_table() -> None:
    def row(setting: str, seed: int, psnr: float, skipped: float, low: float) -> dict[str, Any]:
        base = {"model": "m", "setting": setting, "prompt": "p", "seed": seed, "psnr": psnr}
        return {**base, "right": seed > 0, "skipped": skipped, "low": low}

    rows = [row("a8", seed, 30.0 + seed, 0.0, 0.0) for seed in range(4)]
    rows += [row("switch", seed, 29.0 + seed, 0.5, 0.25) for seed in range(4)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(rows, SETTINGS).splitlines()[2:]]
    assert lines == [
        ["m", "a8", "0%", "0%", "31.50", "–", "75%"],
        ["m", "switch", "50%", "75%", "30.50", "-1.00 [-1.00, -1.00], 4 clips", "75%"],
    ]


def test_the_kept_clips_of_a8() -> None:
    clips = plan(Bench.open(TINY_WAN), 64, 2)[:3]
    rows = kept_a8("tiny-wan", clips)
    assert [(row["prompt"], row["seed"]) for row in rows] == [(" ".join(prompt), seed) for prompt, seed in clips]
    assert all(row["psnr"] > 15 and row["setting"] == "a8" and row["right"] in (True, False) for row in rows)


def test_what_skips_do_to_recorded_clips() -> None:
    """Outputs on a line leave no error behind a line; a held one brings in what it lags behind, times the step's length."""
    bench = replace(Bench.open(TINY_WAN), steps=STEPS)
    scheduler = copy.deepcopy(bench.scheduler)
    scheduler.set_timesteps(STEPS)
    draw = torch.Generator().manual_seed(0)
    base, way, noise = (torch.randn(2, 3, 2, 4, 4, generator=draw) for _ in range(3))  # with the prompt and without it
    latents = torch.randn(STEPS + 1, 3, 2, 4, 4, generator=draw)
    outputs = torch.stack([base + way * float(sigma) for sigma in scheduler.sigmas[:-1]])
    recording = Recording(latents, outputs, outputs - noise)
    steps = torch.diff(scheduler.sigmas.double())

    def guided(output: Tensor) -> Tensor:
        return ((1 - bench.guidance) * output[1] + bench.guidance * output[0]).double()

    def size(error: Tensor) -> float:
        return float(error.norm() / latents[-1].double().norm())

    bits, added, whole = skips_along(bench, recording, controller_of("a8 forecast 1e9 output 1 0"))
    assert bits == [8, 8, *([None, 8] * 4)]
    lagging = sum(float(steps[step]) * -float(steps[step - 1]) for step in (2, 4, 6, 8))
    held = size(lagging * guided(way))
    assert added == pytest.approx(held, rel=1e-4)
    assert whole == pytest.approx(size(lagging * guided(way) + float(steps.sum()) * guided(noise)), rel=1e-4)
    # Lines through steps that are one apart would end before the skipped one, as steps grow. These span two.
    bits, added, whole = skips_along(bench, recording, controller_of("a8 line 1e9 line 1 0.4"))
    assert bits == [8, 8, 8, 8, None, 8, None, 8, None, 8]
    assert added < 0.1 * held
    # A branch that jumps behind its first output: no line goes on with the jump.
    outputs[0, 1] += 100
    for setting in ("a8 line 1e9 line 1 0", "a8 line 1e9 output 1 0"):
        bits, added, whole = skips_along(bench, recording, controller_of(setting))
        assert bits[2] is None
        assert added < 1.01 * held


def test_a_recording_has_what_both_models_give() -> None:
    bench = replace(Bench.open(TINY_WAN), steps=3)
    prompt = bench_prompts(bench.table, 1, seed=3)[0]
    clip = generate(bench, {8: bench.model}, [prompt], [7], keep_trajectory=True)
    twice = copy.deepcopy(bench.model)
    twice.proj_out.weight *= 2
    twice.proj_out.bias *= 2
    recording = record(bench, bench.model, twice, prompt, 7)
    assert torch.equal(recording.latents[:-1], torch.cat([x for x, _ in clip.trajectory]))
    assert torch.equal(recording.latents[-1:], clip.latents)
    assert torch.equal(recording.outputs[:, 0], torch.cat([output for _, output in clip.trajectory]))
    assert not torch.equal(recording.outputs[:, 0], recording.outputs[:, 1])
    torch.testing.assert_close(recording.exact, 2 * recording.outputs)


class _Session:
    """The toy model in the place of a session."""

    bits = (8,)

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def run(self, inputs: dict[str, Tensor], bits: int) -> Tensor:
        found: Tensor = self.model(
            inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"], return_dict=False
        )[0]
        return found


@pytest.mark.parametrize(
    "policy",
    [
        "line 0.3 line 3 0 step",
        pytest.param("easycache 0.2 output 2 0", marks=pytest.mark.stress),
        "magcache 0.4 latent 2 0",
    ],
)
def test_clips_are_skipped_as_the_runtime_skips(policy: str) -> None:
    bench = replace(Bench.open(TINY_WAN), steps=STEPS)
    prompt = bench_prompts(bench.table, 1, seed=3)[0]
    clips = generate(bench, {8: bench.model}, [prompt], [7], lambda _: controller_of(f"a8 {policy}"))
    runner = StepRunner(_Session(bench.model), controller_of(f"a8 {policy}"))  # type: ignore[arg-type]
    scheduler = copy.deepcopy(bench.scheduler)
    scheduler.set_timesteps(STEPS)
    x, texts = bench.noise([7]), [bench.words([prompt]), bench.words([(EMPTY_WORD,) * len(prompt)])]
    with torch.inference_mode():
        for step, timestep in enumerate(scheduler.timesteps):
            found = []
            for branch, text in zip(("cond", "uncond"), texts):
                given = {"hidden_states": x, "timestep": timestep[None], "encoder_hidden_states": text}
                found.append(runner.run(given, branch=branch, step=step, steps=STEPS))
            guided = found[1] + bench.guidance * (found[0] - found[1])
            x = scheduler.step(guided, timestep, x, return_dict=False)[0]
    bits = [record.bits for record in runner.trace if record.branch == "cond"]
    assert clips.bits == [bits]
    assert 2 <= bits.count(None) <= STEPS - 3
    torch.testing.assert_close(clips.latents, x, rtol=1e-3, atol=1e-3)
