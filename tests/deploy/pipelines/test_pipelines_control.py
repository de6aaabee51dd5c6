"""What a pipeline's user does besides generating: callbacks, interrupting, offloading, other schedulers, a schedule."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dvdquant.deploy.switching.controller import StepController, StepInfo
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import EngineError, UnsupportedError
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import Exported, arguments, build_pipeline

Step = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def wan() -> Exported:
    return tiny.exported("wan")


@pytest.fixture(scope="module")
def hunyuan() -> Exported:
    return tiny.exported("hunyuan-video")


@pytest.fixture
def transformer(wan: Exported) -> Any:
    """On the PyTorch backend, δ so large that every step but the first runs on 4 bits."""
    return wan.open("pytorch", delta=1e9, last_high=0)


def decisions(transformer: Any) -> list[tuple[int, str, int | None]]:
    return [(r.step, r.branch, r.bits) for r in transformer.trace]


# ---------------------------------------------------------------------------------------------------------- callbacks


def test_callback_that_changes_latents(wan: Exported) -> None:
    """What a callback returns is what the next step's engine gets; the whole run equals that of PyTorch."""
    results = []
    transformer = wan.open("pytorch", mode="a8")
    calls = tiny.record_calls(transformer)

    def halve(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * (0.5 if step == 0 else 1.0)}

    for model in (transformer, wan.reference(8)):
        results.append(build_pipeline("wan", model)(**arguments("wan"), callback_on_step_end=halve).frames)
    assert torch.equal(*results)
    plain = build_pipeline("wan", transformer)(**arguments("wan")).frames
    assert not torch.equal(results[0], plain)
    # Two calls a step: the second step of the first run starts from half of what the plain run's started from.
    assert torch.equal(calls[0].arguments["hidden_states"], calls[6].arguments["hidden_states"])
    assert not torch.equal(calls[2].arguments["hidden_states"], calls[8].arguments["hidden_states"])


@pytest.mark.parametrize("kind", ["wan", "hunyuan-video"])
@pytest.mark.parametrize("at", [0, 1])
def test_interrupted_request(wan: Exported, hunyuan: Exported, kind: str, at: int) -> None:
    """It stops within one step, and the next request is as of a transformer just opened."""
    made = wan if kind == "wan" else hunyuan
    transformer = made.open("pytorch", delta=1e9, last_high=0)
    pipe = build_pipeline(kind, transformer)
    ran = []

    def interrupt(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        ran.append(step)
        pipe._interrupt = step == at
        return values

    pipe(**arguments(kind, steps=4), callback_on_step_end=interrupt)
    assert ran == list(range(at + 1))
    assert {r.step for r in transformer.trace} == set(ran)
    again = pipe(**arguments(kind, steps=4)).frames
    fresh = made.open("pytorch", delta=1e9, last_high=0)
    expected = build_pipeline(kind, fresh)(**arguments(kind, steps=4)).frames
    assert torch.equal(again, expected)
    assert decisions(transformer) == decisions(fresh)
    assert [r.reason for r in transformer.trace] == [r.reason for r in fresh.trace]
    assert transformer.trace[0].bits == 8
    assert transformer.trace[-1].bits == 4


@pytest.mark.parametrize("kind", ["wan", "hunyuan-video"])
@pytest.mark.parametrize("at", [0, 2])
def test_request_ended_by_an_exception(wan: Exported, hunyuan: Exported, kind: str, at: int) -> None:
    """Nothing tells the transformer; a repeated first step or a risen timestep does."""
    transformer = (wan if kind == "wan" else hunyuan).open("pytorch", delta=1e9, last_high=0)
    pipe = build_pipeline(kind, transformer)

    def fail(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise RuntimeError("disconnected")
        return values

    with pytest.raises(RuntimeError, match="disconnected"):
        pipe(**arguments(kind, steps=4), callback_on_step_end=fail)
    pipe(**arguments(kind, steps=4))
    per_step = 2 if kind == "wan" else 1
    assert [r.step for r in transformer.trace] == [step for step in range(4) for _ in range(per_step)]
    assert transformer.trace[0].reason == "no history"
    assert all(r.change is None for r in transformer.trace[:per_step])


def test_progress_bar_is_the_pipelines_own(transformer: Any) -> None:
    pipe, text = build_pipeline("wan", transformer), io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=text)
    pipe(**arguments("wan"))
    assert "3/3" in text.getvalue()
    records: list[Any] = []
    transformer.runner.on_step = records.append
    pipe(**arguments("wan"))
    assert records == transformer.trace
    assert len(records) == 6


def test_failing_engine_inside_a_pipeline(wan: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN from the 4-bit engine: the step runs again on 8 bits. From both: EngineError, and the pipeline can be used
    again."""
    transformer = wan.open("pytorch", delta=1e9, last_high=0)
    pipe, session = build_pipeline("wan", transformer), transformer.session
    run, broken = session.run, {4}
    monkeypatch.setattr(
        session, "run", lambda inputs, bits: run(inputs, bits) * (float("nan") if bits in broken else 1)
    )
    result = pipe(**arguments("wan")).frames
    assert torch.isfinite(result).all()
    assert {r.bits for r in transformer.trace} == {8}
    assert any(r.retried for r in transformer.trace)
    broken.add(8)
    with pytest.raises(EngineError, match="NaN"):
        pipe(**arguments("wan"))
    broken.clear()
    pipe(**arguments("wan"))
    assert [r.bits for r in transformer.trace] == [8, 8, 8, 8, 4, 4]
    assert not any(r.retried for r in transformer.trace)


# ------------------------------------------------------------------------------------------------- modes of deciding


def test_modes(wan: Exported, transformer: Any) -> None:
    """The same transformer, one controller after the other."""
    pipe = build_pipeline("wan", transformer)
    asked: list[StepInfo] = []

    def rule(info: StepInfo) -> int | None:
        asked.append(info)
        return None if info.step == 2 else 8 if info.step == 0 else 4

    expected = {
        "fixed": [4, 4, 4, 4],
        "planned": [8, 4, None, 8],
        "callback": [8, 4, None, 4],
    }
    controllers = {
        "fixed": StepController("fixed", bits=4),
        "planned": StepController("planned", schedule=expected["planned"]),
        "callback": StepController("callback", callback=rule),
    }
    for name, controller in controllers.items():
        transformer.use(controller)
        pipe(**arguments("wan", steps=4))
        assert [r.bits for r in transformer.trace] == [bits for bits in expected[name] for _ in range(2)], name
    assert [(info.step, info.steps) for info in asked] == [(step, 4) for step in range(4)]
    transformer.use(controllers["planned"])
    with pytest.raises(UnsupportedError, match="4 steps"):
        pipe(**arguments("wan", steps=5))


def test_number_of_steps_given_by_hand(hunyuan: Exported) -> None:
    """HunyuanVideo's pipeline does not pass it; begin_request does, and the trace of that request stays whole."""
    transformer = hunyuan.open("pytorch", delta=1e9, last_high=2)
    pipe = build_pipeline("hunyuan-video", transformer)
    bits = []
    for steps in (None, 6):
        if steps is not None:
            transformer.begin_request(steps)
        pipe(**arguments("hunyuan-video", steps=6))
        assert [r.step for r in transformer.trace] == list(range(6))
        bits.append([r.bits for r in transformer.trace])
    assert bits == [[8, 8, 4, 4, 4, 4], [8, 8, 4, 4, 8, 8]]


def test_step_cache(wan: Exported) -> None:
    """A generous threshold skips, but neither the first two steps nor the last, whose number the pipeline passes."""
    transformer = wan.open("pytorch", mode="a8", cache=StepCachePolicy(1e6, max_skips=2))
    build_pipeline("wan", transformer)(**arguments("wan", steps=7))
    bits = [r.bits for r in transformer.trace if r.branch == "cond"]
    assert bits == [8, 8, None, None, 8, None, 8]
    assert transformer.runner.summary()["skipped"] == 6


# ------------------------------------------------------------------------------------------- steps the pipeline hides


def call(transformer: Any, branch: str | None, timestep: float, **where: Any) -> None:
    inputs = transformer.session.family.sample(transformer.session.sizes, transformer.dtype)
    inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
    if branch is None:
        transformer(**inputs)
    else:
        with transformer.cache_context(branch, **where):
            transformer(**inputs)


def test_solver_that_evaluates_a_timestep_twice(transformer: Any) -> None:
    """Heun: the same branch again at the same timestep is a step of its own."""
    for timestep in (900.0, 700.0, 700.0, 400.0, 400.0):
        call(transformer, "cond", timestep)
    assert [(r.step, r.timestep) for r in transformer.trace] == [(0, 900), (1, 700), (2, 700), (3, 400), (4, 400)]
    call(transformer, "cond", 900.0)
    assert len(transformer.trace) == 1


def test_caller_that_names_no_branch(transformer: Any) -> None:
    for timestep in (900.0, 900.0, 500.0, 500.0):
        call(transformer, None, timestep)
    assert [(r.step, r.branch) for r in transformer.trace] == [
        (0, "call 0"), (0, "call 1"), (1, "call 0"), (1, "call 1"),
    ]  # fmt: skip
    transformer.begin_request()
    assert transformer.trace == []
    call(transformer, None, 400.0)
    assert [(r.step, r.branch, r.reason) for r in transformer.trace] == [(0, "call 0", "no history")]


def test_announced_request_that_was_not_called(transformer: Any) -> None:
    """Wan 2.2's second transformer, in a request that was interrupted before its turn."""
    transformer.begin_request(2)
    transformer._reset_stateful_cache()
    for timestep in (900.0, 500.0):
        call(transformer, "cond", timestep)
    assert [r.step for r in transformer.trace] == [0, 1]


def test_context_is_left_after_an_error(transformer: Any) -> None:
    with pytest.raises(TypeError), transformer.cache_context("cond", step_index=3):
        transformer(hidden_states=torch.zeros(1), no_such_argument=1)
    call(transformer, None, 900.0)
    assert transformer.trace[-1].branch == "call 0"


# --------------------------------------------------------------------------------------------------------- offloading


def test_offloading(transformer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Moving to the CPU, diffusers' offloading, and what it does afterwards leave engine and results as they are."""
    pipe = build_pipeline("wan", transformer)
    expected = pipe(**arguments("wan")).frames
    pipe.to("cpu")
    assert torch.equal(pipe(**arguments("wan")).frames, expected)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe(**arguments("wan")).frames, expected)
    pipe.remove_all_hooks()
    assert torch.equal(pipe(**arguments("wan")).frames, expected)
    with pytest.raises(UnsupportedError, match=r"enable_group_offload|group"):
        transformer.enable_group_offload(onload_device=torch.device("cpu"))


def test_sequential_offloading(transformer: Any) -> None:
    """Accelerate moves parameters layer by layer; there is nothing to move here, and nothing breaks."""
    import accelerate

    pipe = build_pipeline("wan", transformer)
    expected = pipe(**arguments("wan")).frames
    accelerate.cpu_offload(transformer, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(pipe(**arguments("wan")).frames, expected)
    assert transformer.device == torch.device("cpu")
