"""dvdq-plan on tiny-wan: recording, prediction against real runs, schedules, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from dvdquant.artifact.manifest import load_manifest
from dvdquant.cli.plan import main as plan_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import from_table, session_options
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.request import GenerateRequest, check_request
from dvdquant.deploy.planning.planner import Goal, Plan, delta_for_seconds, plan
from dvdquant.deploy.planning.plot import draw_plan
from dvdquant.deploy.planning.recording import RecordingSession
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.switching.defaults import LAST_HIGH
from dvdquant.deploy.switching.gbs import Stair, relative_change, switch_bits
from dvdquant.deploy.switching.schedule import Schedule
from dvdquant.errors import CheckpointError, OutputError, UnsupportedError
from tests.support.commands import refused
from tests.support.exporting import TINY_WAN
from tests.support.running import short_wan_export
from tests.support.session_exports import recipe_export
from tests.support.step_sessions import FaultySession, inputs_at, walk

pytestmark = pytest.mark.usefixtures("lent_sessions")

PROMPTS = ["circle red right small black", "ring blue up large grey"]
STEPS = 10


@pytest.fixture(scope="module")
def out() -> Path:
    return short_wan_export()


@pytest.fixture(scope="module")
def planned(out: Path, lent_sessions: None) -> Plan:
    return plan(Artifact.open(out), PROMPTS, Goal(average_bits=6.0), steps=STEPS, backend="onnxruntime")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(plan_main, [str(a) for a in arguments])


# ----------------------------------------------------------------------------------------------------------- recording


def test_a_recording_holds_every_pair_of_engines() -> None:
    """Against outputs computed here, engine by engine, at the same inputs."""
    with FaultySession(recipe_export("w4a4")) as inner:
        session = RecordingSession(inner, 4, 8)
        session.begin("a", 3)
        for _, inputs in walk(inner, 6):
            for branch in range(2):
                given = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * (1 - branch)}
                assert torch.equal(session.run(given, 8), inner.run(given, 8))
        clip = session.end()
        assert clip is not None
        outputs = {b: [inner.run(inputs_at(inner, step), b) for step in range(6)] for b in (4, 8)}
    for before in (4, 8):
        for after in (4, 8):
            pairs = zip(outputs[before], outputs[after][1:])
            assert clip.changes[before, after] == pytest.approx([relative_change(b, a) for a, b in pairs])
    assert clip.changes[8, 8] != clip.changes[4, 4]
    assert (clip.calls, len(clip.seconds[8]), len(clip.seconds[4])) == (12, 12, 6)
    assert clip.timesteps == sorted(clip.timesteps, reverse=True)


def test_outside_a_recording_the_session_is_itself() -> None:
    with FaultySession(recipe_export("w4a4")) as inner:
        session = RecordingSession(inner, 4, 8)
        inner.calls.clear()
        session.run(inputs_at(inner, 0), 8)
        assert len(inner.calls) == 1
        assert session.end() is None
        assert session.resident_bytes() == inner.resident_bytes()
        session.close()
        assert inner.closed


def test_recording_leaves_the_clip_as_it_is(out: Path) -> None:
    """The recorded clip is the high engine's to the last bit."""
    sessions: list[RecordingSession] = []

    def wrap(session: EngineSession) -> EngineSession:
        sessions.append(RecordingSession(session, 4, 8))
        sessions[-1].begin("x", 0)
        return sessions[-1]

    request = GenerateRequest(PROMPTS[0], steps=3, mode="a8")
    clips = []
    for wrapper in (None, wrap):
        with open_generator(Artifact.open(out), backend="onnxruntime", wrap_session=wrapper) as generator:
            clips.append(generator.generate(request).latents)
    assert torch.equal(*clips)
    recorded = sessions[0].end()
    assert recorded is not None
    assert len(recorded.changes[4, 4]) == 2


# ------------------------------------------------------------------------------------------------------------ planning


def test_prediction_against_a_real_run(planned: Plan) -> None:
    """A switched run leaves the recorded trajectory, so that single steps may differ: by two steps of ten at most."""
    assert planned.predicted_bits == pytest.approx(6.0, abs=0.2)
    assert abs(planned.measured_bits - planned.predicted_clip_bits) <= 2 * 4 / STEPS
    assert planned.measured_retries == 0
    assert planned.calls == 2 * STEPS
    stair = next(s for s in planned.stairs if s.above < planned.delta <= s.upto)
    assert stair.average_bits == planned.predicted_bits
    assert planned.stairs[0].average_bits == 8.0
    high = 2 + LAST_HIGH  # steps without history, and the last ones
    assert planned.stairs[-1].average_bits == (high * 8 + 4 * (STEPS - high)) / STEPS


def test_noise_between_engines_is_in_the_prediction(planned: Plan) -> None:
    """What the recording of pairs is for: from the high engine's changes alone the same δ promises fewer bits."""
    clean = [b for clip in planned.clips for b in switch_bits(clip.changes[8, 8], planned.delta)]
    assert sum(clean) / len(clean) < planned.predicted_bits
    for clip in planned.clips:
        assert np.median(clip.changes[4, 4]) > np.median(clip.changes[8, 8])


def test_time_follows_from_bits_and_measured_seconds(planned: Plan) -> None:
    per_call = planned.seconds_per_call
    assert planned.seconds_at(8) == pytest.approx(planned.calls * per_call[8])
    assert planned.seconds_at(4) == pytest.approx(planned.calls * per_call[4])
    assert planned.seconds_at(6) == pytest.approx((planned.seconds_at(4) + planned.seconds_at(8)) / 2)
    assert planned.predicted_seconds == pytest.approx(planned.seconds_at(planned.predicted_bits))


def test_time_budget_takes_the_smallest_delta_that_fits() -> None:
    stairs = [Stair(0.0, 0.1, 8.0), Stair(0.1, 0.2, 6.0), Stair(0.2, math.inf, 4.5)]
    assert delta_for_seconds(stairs, 10.0, lambda bits: bits) == (0.05, 8.0)
    assert delta_for_seconds(stairs, 7.0, lambda bits: bits) == (pytest.approx(0.15), 6.0)
    assert delta_for_seconds(stairs, 4.5, lambda bits: bits) == (0.25, 4.5)
    with pytest.raises(UnsupportedError) as caught:
        delta_for_seconds(stairs, 4.4, lambda bits: bits)
    assert "4.5 s to 8 s" in str(caught.value)


def test_schedule_is_for_this_export_and_can_be_run(planned: Plan, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    planned.schedule.save(path)
    loaded = Schedule.load(path, load_manifest(out), STEPS)
    assert loaded == planned.schedule
    assert loaded.average_bits == pytest.approx(6.0, abs=0.5)
    assert loaded.bits[:2] == (8, 8)
    request = GenerateRequest(PROMPTS[1], steps=STEPS, seed=5, mode="planned", schedule=loaded)
    with open_generator(Artifact.open(out), backend="onnxruntime") as generator:
        trace = generator.generate(request).trace
    assert tuple(r.bits for r in trace if r.branch == "cond") == loaded.bits
    assert {r.reason for r in trace} == {"planned"}


def test_last_high_is_planned_and_run(out: Path) -> None:
    found = plan(Artifact.open(out), PROMPTS[:1], Goal(average_bits=6.5), steps=8, last_high=3, backend="onnxruntime")
    assert found.schedule.bits[-3:] == (8, 8, 8)
    assert abs(found.measured_bits - found.predicted_clip_bits) <= 2 * 4 / 8
    assert found.schedule.details["last_high"] == 3
    with pytest.raises(UnsupportedError, match="no δ gives 5"):
        plan(Artifact.open(out), PROMPTS[:1], Goal(average_bits=5.9), steps=10, last_high=3, backend="onnxruntime")


@pytest.mark.stress
def test_a_weighted_rule_is_planned_as_it_runs(out: Path) -> None:
    """The schedule of tiny-wan has a shift: weighed, other steps are high, and the prediction still fits the run."""
    artifact, goal = Artifact.open(out), Goal(average_bits=6.0)
    plans = {
        w: plan(artifact, PROMPTS[:1], goal, steps=10, weighting=w, backend="onnxruntime") for w in ("none", "step")
    }
    for weighting, found in plans.items():
        assert found.schedule.details["weighting"] == weighting
        assert abs(found.measured_bits - found.predicted_clip_bits) <= 2 * 4 / 10
    assert plans["none"].delta != plans["step"].delta
    assert plans["none"].stairs != plans["step"].stairs


def test_goals() -> None:
    for given in ({}, {"average_bits": 6.0, "delta": 0.1}, {"delta": math.nan}, {"seconds": -1.0}):
        with pytest.raises(UnsupportedError):
            Goal(**given)


# ------------------------------------------------------------------------------------------------------------ schedules


def manifest_of(out: Path, **source: str) -> Any:
    manifest = load_manifest(out)
    return replace(manifest, source={**manifest.source, **source})


def test_a_schedule_of_another_model_recipe_or_step_count(planned: Plan, out: Path) -> None:
    schedule = planned.schedule
    schedule.check(load_manifest(out), STEPS)
    with pytest.raises(OutputError, match="another model"):
        schedule.check(manifest_of(out, fingerprint="0" * 64))
    with pytest.raises(OutputError, match="recipe other"):
        replace(schedule, recipe="other").check(load_manifest(out))
    with pytest.raises(OutputError, match="6-bit"):
        replace(schedule, bits=(8, 6)).check(load_manifest(out))
    with pytest.raises(OutputError, match="transformer_2"):
        replace(schedule, components=("transformer", "transformer_2")).check(load_manifest(out))
    with pytest.raises(OutputError, match=f"planned for {STEPS} steps, and 50"):
        schedule.check(load_manifest(out), 50)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format 2"),
        ({"format_version": None}, "format_version"),
        ({"steps": 3}, "3 steps but bits for 10"),
        ({"bits": []}, "field bits"),
        ({"bits": [None] * 10}, "field bits"),
        ({"bits": [8] * 9 + [5]}, "field bits"),
        ({"delta": -1}, "field delta"),
        ({"prompts": "all"}, "field prompts"),
        ({"more": 1}, "unknown field 'more'"),
        ({"steps": True}, "field steps is True"),
        ({"steps": 10**30}, "field steps is 1000"),
        ({"average_bits": 1e300}, "field average_bits"),
        ({"seeds": ["0"]}, r"field seeds\[0\] is '0'"),
        ({"components": [None]}, r"field components\[0\] is None"),
        ({"details": []}, r"field details is \[\]"),
        ({"details": {"stairs": [[0.0, None]]}}, r"field details.stairs\[0\]\[2\] is missing"),
        ({"details": {"stairs": [["a", None, 6]]}}, r"field details.stairs\[0\]\[0\] is 'a'"),
        ({"details": {"last_high": "2"}}, "field details.last_high is '2'"),
        ({"details": {"weighting": "all"}}, "field details.weighting is 'all'"),
    ],
)
def test_a_schedule_out_of_form(planned: Plan, tmp_path: Path, change: Mapping[str, Any], said: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({**planned.schedule.to_json(), **change}))
    with pytest.raises(OutputError, match=said):
        Schedule.load(path)


def test_a_schedule_that_is_no_file_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be read"):
        Schedule.load(tmp_path / "nothing.json")
    (tmp_path / "cut.json").write_text('{"format_version": 1, ')
    with pytest.raises(OutputError, match="not valid JSON"):
        Schedule.load(tmp_path / "cut.json")


def test_saving_is_whole_or_not_at_all(planned: Plan, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    planned.schedule.save(path)
    before = path.read_bytes()
    broken = replace(planned.schedule, details={"x": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.save(path)
    assert path.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        planned.schedule.save(tmp_path / "file" / "schedule.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "schedule.json"]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_plans_writes_and_draws(out: Path, tmp_path: Path) -> None:
    result = run(
        out, "--prompt", PROMPTS[0], "--steps", 6, "--average-bits", 6, "--reference", "--backend", "onnxruntime",
        "--last-high", 0, "-o", tmp_path / "s.json", "--plot", tmp_path / "plan.png",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    schedule = Schedule.load(tmp_path / "s.json", load_manifest(out), 6)
    assert schedule.prompts == (PROMPTS[0],)
    assert f"δ {schedule.delta:.4g}" in result.output
    quality = schedule.details["quality"]
    assert [q["delta"] for q in quality] == sorted(q["delta"] for q in quality)
    assert quality[0]["average_bits"] == 8.0
    assert quality[0]["psnr"] > quality[-1]["psnr"] > 10
    assert schedule.details["stairs"][0][0] == 0.0
    assert schedule.details["stairs"][-1][1] is None
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 800
        # A picture with curves in it: the colours of the staircase and of the quality curve.
        colours = {c for _, c in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0x1F, 0x5F, 0xA8), (0x2A, 0x7F, 0x62), (0xC1, 0x12, 0x1F)} <= colours
    checked = run(out, "--check", tmp_path / "s.json", "--steps", 6)
    assert checked.exit_code == 0, checked.output
    assert "6 steps" in checked.output


@pytest.mark.parametrize("delta", [0.0, 0.02, 0.3])
def test_no_line_of_the_picture_crosses_the_note(
    delta: float, planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a backend where 4 bits are no faster, wherever δ is."""
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    same = dict.fromkeys(planned.seconds_per_call, 0.036)
    draw_plan(replace(planned, delta=delta, seconds_per_call=same), tmp_path / "plan.png")
    monkeypatch.undo()
    (figure,) = figures
    axis, renderer = figure.axes[0], figure.canvas.get_renderer()
    (note,) = figure.findobj(lambda artist: "s per clip at every δ" in getattr(artist, "get_text", str)())
    place = note.get_window_extent(renderer)
    assert place.width > 100
    assert not [line for line in axis.lines if line.get_window_extent(renderer).overlaps(place)]
    plt.close(figure)


def test_default_output_keeps_the_export_valid(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    result = run(
        copy, "--prompt", PROMPTS[0], "--steps", 4, "--delta", "0.1", "--backend", "onnxruntime", "--seeds", "3"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    schedule = Schedule.load(copy / "schedule.json", load_manifest(copy))
    assert (schedule.delta, schedule.seeds) == (0.1, (3,))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no prompt"),
        (("--prompt", " "), "empty"),
        (("--prompt", "circle purple right small black"), "purple"),
        (("--prompt", PROMPTS[0], "--average-bits", "3", "--steps", "4"), "3 bits on average"),
        (("--prompt", PROMPTS[0], "--time-budget", "0.0001", "--steps", "4"), "0.0001 s"),
        (("--prompt", PROMPTS[0], "--average-bits", "6", "--delta", "0.1"), "more than one goal"),
        (("--prompt", PROMPTS[0], "--steps", "2"), "2 steps"),
        (("--prompt", PROMPTS[0], "--steps", "0"), "--steps is 0"),
        (("--prompt", PROMPTS[0], "--seeds", "1,x"), "--seeds"),
        (("--prompt", PROMPTS[0], "--last-high", "-1"), "last-high"),
        (("--prompt", PROMPTS[0], "-o", "/no/such/folder/s.json"), "/no/such/folder"),
        (("--prompt", PROMPTS[0], "--plot", "."), "is a folder"),
        (("--prompts", "/no/such/prompts.txt"), "prompts.txt"),
        (("--check", "s.json"), "--check records nothing, so --backend does not apply"),
        (
            ("--check", "s.json", "--prompt", "x", "-o", "t.json", "--steps", "4"),
            "so --prompt, --output, --backend do not",
        ),
    ],
)
def test_bad_input_is_refused(out: Path, arguments: tuple[str, ...], said: str) -> None:
    refused(run(out, "--backend", "onnxruntime", *arguments), said)
    assert not (out / "schedule.json").exists()


def test_an_empty_prompt_file_a_wrong_model_and_no_export(out: Path, tmp_path: Path, planned: Plan) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(run(out, "--prompts", tmp_path / "empty.txt"), "prompt")
    refused(run(tmp_path, "--prompt", PROMPTS[0]), "not a dvdquant export")
    refused(run(out, "--check", "/no/such/schedule.json"), "schedule.json")
    planned.schedule.save(tmp_path / "s.json")
    refused(run(recipe_export("w4a4"), "--check", tmp_path / "s.json"), "another model")
    refused(run(out, "--check", tmp_path / "s.json", "--steps", "11"), f"planned for {STEPS} steps, and 11")


# ------------------------------------------------------------------------------- what every generation checks before it loads


def test_the_scheduler_of_a_prompt_table_is_tried_before_anything_is_loaded(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the generator that the commands use; once for a number of steps."""

    def loads(*_args: Any, **_options: Any) -> None:
        raise AssertionError("something was loaded")

    for module, name in ((session_options, "open_session"), (from_table, "load_original")):
        monkeypatch.setattr(module, name, loads)
    shutil.copytree(TINY_WAN, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    good = json.loads(path.read_text())
    artifact = Artifact.open(out)
    prompt = PROMPTS[0]
    for change, text in (({"num_train_timesteps": 0}, "num_train_timesteps"), ({"use_dynamic_shifting": True}, "mu")):
        path.write_text(json.dumps({**good, **change}))
        for mode in ("a8", "16"):
            with (
                open_generator(artifact, pipeline=tmp_path / "model") as generator,
                pytest.raises(CheckpointError, match=text),
            ):
                generator.prepare(GenerateRequest(prompt, steps=3, mode=mode))
    path.write_text(json.dumps(good))
    with open_generator(artifact, pipeline=tmp_path / "model") as generator:
        assert generator.check(GenerateRequest(prompt, steps=3, mode="a8")).steps == 3
        path.unlink()
        generator.check(GenerateRequest(prompt, steps=3, mode="a4"))


def test_fields_of_a_request_that_contradict_each_other(out: Path) -> None:
    """As the commands refuse the options."""
    artifact = Artifact.open(out)
    schedule = Schedule("f", "w4a4", 3, 0.1, (8, 4, 4), 5.3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "a8", "delta": 0.1}, "delta"),
        ({"mode": "a4", "delta": 0.0}, "delta"),
        ({"mode": "planned", "schedule": schedule, "delta": 0.1}, "delta"),
        ({"mode": "switch", "schedule": schedule}, "schedule"),
        ({"mode": "a8", "schedule": schedule}, "schedule"),
        ({"mode": "planned", "schedule": schedule, "cache": 0.1}, "cache"),
        ({"mode": "16", "cache": 0.1}, "cache"),
        ({"mode": "planned", "schedule": schedule, "cache_policy": "easycache"}, "cache_policy"),
    ]
    for fields, text in cases:
        with pytest.raises(UnsupportedError, match=text) as caught:
            check_request(GenerateRequest("a", **fields), artifact)
        assert caught.value.fix
    for fields in (
        {"delta": 0.1},
        {"mode": "planned", "schedule": schedule},
        {"mode": "a8", "cache": 0.1},
        {"mode": "16"},
    ):
        check_request(GenerateRequest("a", **fields), artifact)  # type: ignore[arg-type]
