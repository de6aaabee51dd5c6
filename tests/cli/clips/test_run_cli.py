"""``dvdq-run`` end to end: real engines, real clips, and every way to get it wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.checkpoint.prompt_table import PromptTable, frames_from_latents
from dvdquant.cli.clips.run_text import summary_text
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import GenerateRequest, Generator, generate, open_generator
from dvdquant.deploy.pipelines.schedulers import open_table_scheduler
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.defaults import CachePolicy
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.deploy.switching.schedule import Schedule
from tests.support.commands import refused
from tests.support.exporting import TINY_WAN
from tests.support.running import (
    PROMPT,
    call,
    decode,
    drawn,
    run,
    short_wan,
    short_wan_export,
    tiny_wan_export,
    tiny_wan_weights,
)

pytestmark = pytest.mark.usefixtures("lent_sessions")


@pytest.fixture(scope="module")
def out() -> Path:
    return short_wan_export()


def schedule(out: Path, *bits: int | None, **changes: Any) -> Schedule:
    manifest = Artifact.open(out).manifest
    fields = {"fingerprint": manifest.source["fingerprint"], "recipe": manifest.recipe["name"], "average_bits": 6.0}
    return Schedule(**{**fields, "steps": len(bits), "delta": 0.2, "bits": bits, **changes})


def test_the_last_steps_run_on_a8_unless_asked_otherwise(out: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    drawn(*call(out, "--prompt", PROMPT, "-o", tmp_path / "c.mp4", "--trace", trace, "--delta", "inf", "--steps", 5))
    (clip,) = json.loads(trace.read_text())["clips"]
    assert clip["blocks"] == "██▄██"


def test_clip_gif_strip_and_trace(out: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("clip.mp4", "clip.gif", "strip.png", "trace.json")}
    text = drawn(
        *call(out, "--prompt", PROMPT, "-o", paths["clip.mp4"], "--gif", paths["clip.gif"]),
        *("--strip", paths["strip.png"], "--trace", paths["trace.json"], "--delta", "inf", "--last-high", 0),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(paths)
    for path in paths.values():
        assert str(path) in text
    assert decode(paths["clip.mp4"]).shape == decode(paths["clip.gif"]).shape == (8, 192, 192, 3)
    (clip,) = json.loads(paths["trace.json"].read_text())["clips"]
    names = {"clip": "clip.mp4", "gif": "clip.gif", "strip": "strip.png"}
    assert clip["outputs"] == {kind: str(paths[name]) for kind, name in names.items()}
    # Step 0 and 1 have no change before them; an infinite delta then never switches back.
    assert [r["bits"] for r in clip["records"] if r["branch"] == "cond"] == [8, 8, 4, 4]
    assert clip["blocks"] == "██▄▄"
    assert "██▄▄" in text
    assert "onnxruntime on cpu" in text
    assert clip["request"]["seed"] == 0
    assert clip["executed"]["backend"] == "onnxruntime"
    assert all(record["seconds"] > 0 for record in clip["records"])


def test_trace_is_what_the_runner_recorded(out: Path) -> None:
    seen: list[Any] = []
    request = GenerateRequest(PROMPT, steps=4, seed=5, delta=0.05)
    with open_generator(Artifact.open(out), pipeline=short_wan(), backend="onnxruntime") as generator:
        result = generate(generator.artifact, request, generator=generator, on_step=seen.append)
    assert result.trace == seen
    assert [(r.step, r.branch) for r in seen] == [(s, b) for s in range(4) for b in ("cond", "uncond")]
    assert result.summary["calls"] == 8
    assert result.components == {"transformer": seen}


def test_clip_is_the_scheduler_on_guided_engine_outputs(out: Path) -> None:
    """The loop by hand, bit by bit: same engines, and guidance in float32 that is its definition to three roundings."""
    table, artifact = PromptTable.open(TINY_WAN), Artifact.open(out)
    scheduler = open_table_scheduler(TINY_WAN)
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 3, 8, 24, 24, generator=torch.Generator().manual_seed(11))
    with open_session(artifact, backend="onnxruntime", device="cpu") as session:
        runner = StepRunner(session, StepController("fixed", bits=8))
        for t in scheduler.timesteps:
            outputs = []
            for branch, words in (("cond", table.encode(PROMPT)), ("uncond", table.encode(None))):
                inputs = {"hidden_states": latents, "timestep": t[None].float(), "encoder_hidden_states": words}
                outputs.append(runner.run(inputs, branch=branch).float())
            velocity = outputs[1] + 2.5 * (outputs[0] - outputs[1])
            cond, uncond = (output.double() for output in outputs)
            # The difference, its product and the sum are rounded once each.
            rounded = 2.0**-24 * (uncond.abs() + 3 * 2.5 * (cond - uncond).abs()) * (1 + 2.0**-20)
            assert bool(((velocity.double() - (uncond + 2.5 * (cond - uncond))).abs() <= rounded).all())
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    request = GenerateRequest(PROMPT, steps=3, seed=11, guidance=2.5, mode="a8")
    made = generate(artifact, request, pipeline=short_wan(), backend="onnxruntime", device="cpu")
    assert torch.equal(made.latents, latents)
    assert np.array_equal(made.frames, frames_from_latents(made.latents))


def test_a_seed_gives_the_same_bits_again(out: Path) -> None:
    artifact = Artifact.open(out)
    with open_generator(artifact, pipeline=short_wan(), backend="onnxruntime", device="cpu") as generator:
        first, again, other = (
            generator.generate(GenerateRequest(PROMPT, steps=3, seed=seed, mode=mode))
            for seed, mode in ((7, "switch"), (7, "switch"), (8, "switch"))
        )
        sixteen, twice = (generator.generate(GenerateRequest(PROMPT, steps=2, mode="16")) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)
    assert torch.equal(sixteen.latents, twice.latents)


def test_guidance_of_one_asks_one_branch(out: Path) -> None:
    request = GenerateRequest(PROMPT, steps=2, guidance=1.0)
    result = generate(Artifact.open(out), request, pipeline=short_wan(), backend="onnxruntime")
    assert [r.branch for r in result.trace] == ["cond", "cond"]


def test_compare_stands_every_mode_beside_16_bit(out: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("c.mp4", "c.png", "c.json")}
    text = drawn(
        *call(out, "--prompt", PROMPT, "--compare", "--steps", 3, "-o", files["c.mp4"]),
        *("--strip", files["c.png"], "--trace", files["c.json"]),
    )
    clips = json.loads(files["c.json"].read_text())["clips"]
    assert [clip["request"]["mode"] for clip in clips] == ["16", "a8", "switch", "a4"]
    assert len({clip["request"]["seed"] for clip in clips}) == 1
    assert clips[0]["psnr_to_16_bit"] is None
    assert clips[1]["psnr_to_16_bit"] > clips[3]["psnr_to_16_bit"]
    for clip in clips[1:]:
        assert f"{clip['psnr_to_16_bit']:.1f} dB" in text
    frames, _, width, _ = decode(files["c.mp4"]).shape
    assert frames == 8
    assert width >= 4 * 192
    assert {r["bits"] for r in clips[0]["records"]} == {16}


def test_several_prompts_make_several_clips(out: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n\nsquare blue up small grey\n")
    lines = drawn(
        *call(
            out,
            "--prompts",
            tmp_path / "p.txt",
            "--prompt",
            "circle green left small black",
            "--mode",
            "a8",
            "--steps",
            2,
        ),
        *("-o", tmp_path / "clips" / "c.mp4", "--trace", tmp_path / "t.json", "--log-format", "json"),
    ).splitlines()
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == ["c-1.mp4", "c-2.mp4", "c-3.mp4"]
    clips = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert [c["request"]["prompt"] for c in clips][1:] == [PROMPT, "square blue up small grey"]
    assert [Path(c["outputs"]["clip"]).name for c in clips] == ["c-1.mp4", "c-2.mp4", "c-3.mp4"]
    events = [json.loads(line) for line in lines]
    assert sum(event["event"] == "step" for event in events) == 3 * 2 * 2
    assert len(events[-1]["files"]) == 4


def test_a_schedule_is_followed(out: Path, tmp_path: Path) -> None:
    stairs = [[0.0, 0.02, 8.0], [0.02, 0.3, 6.5], [0.3, None, 5.0]]
    planned = schedule(out, 8, 8, None, 4, 8, details={"stairs": stairs, "last_high": 1})
    planned.save(tmp_path / "s.json")
    common = (out, "--pipeline", short_wan(), "--backend", "onnxruntime", "--prompt", PROMPT, "-o", tmp_path / "c.mp4")
    drawn(*common, "--schedule", tmp_path / "s.json", "--trace", tmp_path / "t.json")
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert clip["blocks"] == "██·▄█"
    drawn(*common, "--schedule", tmp_path / "s.json", "--average-bits", 6.4, "--trace", tmp_path / "t.json")
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert (clip["request"]["mode"], clip["request"]["delta"], clip["request"]["last_high"]) == ("switch", 0.16, 1)
    assert clip["request"]["weighting"] == "none"  # a schedule from before there was another
    refused(run(*common, "--schedule", tmp_path / "s.json", "--weighting", "step"), "--weighting is for switching")
    refused(run(*common, "--mode", "a8", "--weighting", "step"), "--weighting is for switching")
    refused(run(*common, "--schedule", tmp_path / "s.json", "--average-bits", 4.2), "4.2", "5.00 to 8.00")
    refused(run(*common, "--schedule", tmp_path / "s.json", "--steps", 7), "5 steps", "7")
    schedule(out, 8, 8, fingerprint="0" * 64).save(tmp_path / "other.json")
    refused(run(*common, "--schedule", tmp_path / "other.json"), "another model")


@pytest.mark.parametrize("policy", [None, "easycache"])
def test_step_cache_skips(out: Path, policy: CachePolicy | None) -> None:
    request = GenerateRequest(PROMPT, steps=5, cache=1e6, mode="a8", cache_policy=policy)
    result = generate(Artifact.open(out), request, pipeline=short_wan(), backend="onnxruntime")
    assert result.summary["cache"]["policy"] == (policy or "forecast")
    assert f"step cache: {policy or 'forecast'} below 1e+06" in summary_text(result)
    bits = [r.bits for r in result.trace if r.branch == "cond"]
    assert None in bits
    assert bits[0] == bits[1] == bits[-1] == 8


def _shows(generator: Generator, prompt: str, seed: int, mode: str) -> None:
    """Draw a clip of 8 steps and judge it from its pixels: background, colour and size."""
    colours = {"red": (1, -0.7, -0.7), "green": (-0.7, 0.9, -0.6), "blue": (-0.6, -0.4, 1), "yellow": (1, 0.9, -0.8)}
    level = {"black": 0, "grey": 127.5}
    _, colour, _, size, background = prompt.split()
    rule: dict[str, Any] = {"delta": 0.2, "last_high": 2} if mode == "switch" else {}
    made = generator.generate(GenerateRequest(prompt, steps=8, seed=seed, mode=mode, **rule))
    if mode == "switch":
        assert {record.bits for record in made.trace} == {4, 8}
    frames = made.frames.astype(float)
    corners = frames[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert abs(np.median(corners) - level[background]) < 25, (prompt, mode)
    shape = np.abs(frames - level[background]).max(-1) > 60
    mean = frames[shape].mean(0) / 127.5 - 1
    near = min(colours, key=lambda name: float(np.abs(mean - colours[name]).sum()))
    assert near == colour, (prompt, mode, mean)
    # Radius 4 or 6.5 pixels; a ring is hollow, so its box is looked at.
    columns = shape.any(1).sum(1)
    assert (np.median(columns) > 10.5) == (size == "large"), (prompt, mode, columns)


@pytest.mark.slow
def test_a_clip_shows_what_was_asked_for() -> None:
    """The model as it was trained, switching. PyTorch reads the weights alone, and a trace of six blocks takes long."""
    with open_generator(
        Artifact.open(tiny_wan_weights()), pipeline=TINY_WAN, backend="pytorch", device="cpu"
    ) as generator:
        _shows(generator, PROMPT, 0, "switch")


@pytest.mark.stress
def test_clips_of_the_graphs_show_what_was_asked_for() -> None:
    """The same on ONNX Runtime, in 16 bit too, and another prompt."""
    with open_generator(
        Artifact.open(tiny_wan_export()), pipeline=TINY_WAN, backend="onnxruntime", device="cpu"
    ) as generator:
        _shows(generator, PROMPT, 0, "16")
        _shows(generator, PROMPT, 0, "switch")
        _shows(generator, "square blue down small grey", 1, "switch")


def test_trace_holds_no_secrets(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    drawn(
        *call(
            out,
            "--prompt",
            PROMPT,
            "-o",
            tmp_path / "c.mp4",
            "--trace",
            tmp_path / "t.json",
            "--mode",
            "a8",
            "--steps",
            1,
        )
    )
    text = (tmp_path / "t.json").read_text()
    assert "hf_not_to_be_seen" not in text
    assert os.environ["HF_TOKEN"] not in text
