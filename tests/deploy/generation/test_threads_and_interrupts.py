"""Sessions, runners and generators that threads share, that are interrupted in a step, or closed while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import from_table, original, session_options
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.request import GenerateResult
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.model.layers import QuantLinear
from tests.support.running import short_wan_export, wan_pipeline
from tests.support.session_exports import recipe_export
from tests.support.watched_lock import WatchedLock

pytestmark = pytest.mark.usefixtures("lent_sessions")

PROMPTS = ("circle red right small black", "ring blue up large grey")


@pytest.fixture(params=[PyTorchSession, OnnxRuntimeSession])
def session(request: pytest.FixtureRequest) -> Iterator[EngineSession]:
    with request.param(Artifact.open(recipe_export("w4a4"))) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_switch_of_bits_that_is_interrupted(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers are on the new grid, some on the old one: the next run of either width is right."""
    with PyTorchSession(Artifact.open(recipe_export("w4a4"))) as session:
        inputs = session.family.sample(session.sizes, session.dtype, 0)
        expected = {bits: session.run(inputs, bits) for bits in (4, 8)}
        assert not torch.equal(expected[4], expected[8])
        real, calls = QuantLinear.use, iter(range(1000))

        def interrupted(layer: QuantLinear, activation: Any) -> None:
            if next(calls) == 3:
                raise error
            real(layer, activation)

        for after in (8, 4):
            session.run(inputs, 8)
            calls = iter(range(1000))
            with monkeypatch.context() as patched:
                patched.setattr(QuantLinear, "use", interrupted)
                with pytest.raises((KeyboardInterrupt, EngineError)):
                    session.run(inputs, 4)
            assert torch.equal(session.run(inputs, after), expected[after])


def test_memory_is_asked_for_while_another_thread_closes(
    session: EngineSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.resident_bytes()["weights"] > 0
    lock = WatchedLock(session._lock)
    monkeypatch.setattr(session, "_lock", lock)
    with ThreadPoolExecutor(1) as pool:
        with session._lock:
            asked = pool.submit(session.resident_bytes)
            assert lock.awaited.wait(60)
            assert not asked.done()  # it waits: what it counts is being taken away
            session.close()
        assert asked.result(60) == {"weights": 0, "engines": 0, "workspace": 0}


def test_closing_waits_for_a_running_pass(session: EngineSession, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = session.family.sample(session.sizes, session.dtype, 0)
    expected, real = session.run(inputs, 8), session.check_inputs
    running, go = threading.Event(), threading.Event()

    def slow(given: Mapping[str, Tensor]) -> None:
        running.set()
        assert go.wait(60)
        real(given)

    lock = WatchedLock(session._lock)
    monkeypatch.setattr(session, "_lock", lock)
    monkeypatch.setattr(session, "check_inputs", slow)
    with ThreadPoolExecutor(2) as pool:
        pass_ = pool.submit(session.run, inputs, 8)
        assert running.wait(60)
        closing = pool.submit(session.close)
        assert lock.awaited.wait(60)
        assert not closing.done()
        go.set()
        assert torch.equal(pass_.result(60), expected)
        closing.result(60)
    with pytest.raises(EngineError, match="is closed"):
        session.run(inputs, 8)


def test_one_runner_in_two_threads(session: EngineSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its history is of one request. The running call is not disturbed."""
    runner = StepRunner(session, StepController("fixed", bits=8))
    inputs = {**session.family.sample(session.sizes, session.dtype, 0), "timestep": torch.tensor([900.0])}
    expected, real = session.run(inputs, 8), session.run
    running, go = threading.Event(), threading.Event()

    def slow(values: Any, bits: int) -> Tensor:
        running.set()
        assert go.wait(60)
        return real(values, bits)

    monkeypatch.setattr(session, "run", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(runner.run, inputs)
        assert running.wait(60)
        with pytest.raises(UnsupportedError, match="at once") as caught:
            runner.run(inputs)
        assert "own" in str(caught.value.fix)
        go.set()
        assert torch.equal(first.result(60), expected)
    assert len(runner.trace) == 1
    runner.run(inputs)  # and it can be used again


# ----------------------------------------------------------------------------------------------------------- generators


def same(found: GenerateResult, wanted: GenerateResult) -> None:
    assert np.array_equal(found.frames, wanted.frames)
    assert [(r.step, r.branch, r.bits, r.change) for r in found.trace] == [
        (r.step, r.branch, r.bits, r.change) for r in wanted.trace
    ]


@pytest.mark.parametrize("mode", ["switch", "16"])
def test_threads_that_share_a_generator(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they need is loaded once, and each clip is as of a generator of its own."""
    artifact = Artifact.open(short_wan_export())
    requests = [GenerateRequest(prompt, steps=4, mode=mode, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    opened: list[Any] = []
    for module, name in ((session_options, "open_session"), (from_table, "load_original")):
        real = getattr(module, name)

        def slow(*arguments: Any, real: Any = real, **options: Any) -> Any:
            assert lock.awaited.wait(60)  # the other thread stands before the lock that this one holds
            opened.append(real(*arguments, **options))
            return opened[-1]

        monkeypatch.setattr(module, name, slow)
    threads = torch.get_num_threads()
    with open_generator(artifact, backend="onnxruntime") as generator, ThreadPoolExecutor(2) as pool:
        lock = generator._loading = WatchedLock(generator._loading)  # type: ignore[attr-defined]
        found = [future.result(120) for future in [pool.submit(generator.generate, r) for r in requests]]
        assert len(opened) == 1
        for result, request in zip(found, requests):
            same(result, generator.generate(request))
        seen = {future.result(60) for future in [pool.submit(torch.get_num_threads) for _ in range(4)]}
    assert torch.get_num_threads() == threads
    assert seen == {threads}


def test_two_generators_that_load_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers changes torch.nn.Module while it loads: two at once would leave every later module on the meta device."""
    import diffusers

    artifact, request = Artifact.open(short_wan_export()), GenerateRequest(PROMPTS[0], mode="16")
    real, loading, most = diffusers.WanTransformer3DModel.from_pretrained, [], []

    def slow(*arguments: Any, **options: Any) -> Any:
        loading.append(1)
        most.append(len(loading))
        assert lock.awaited.wait(60)  # another thread stands before the lock that this one holds
        try:
            return real(*arguments, **options)
        finally:
            loading.pop()

    lock = WatchedLock(original.LOADING)
    monkeypatch.setattr(original, "LOADING", lock)
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "from_pretrained", slow)
    generators = [open_generator(artifact, backend="onnxruntime") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(generator.prepare, request) for generator in generators]:
            future.result(60)
    assert most == [1, 1, 1]
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


def test_a_generator_that_is_closed_during_a_clip() -> None:
    """The clip ends with an error that says so; the generator can be used again."""
    artifact = Artifact.open(short_wan_export())
    request = GenerateRequest(PROMPTS[0], steps=4, mode="a8")
    middle, go = threading.Event(), threading.Event()

    def wait(record: Any) -> None:
        if record.step == 1:
            middle.set()
            assert go.wait(60)

    with open_generator(artifact, backend="onnxruntime") as generator, ThreadPoolExecutor(1) as pool:
        clip = pool.submit(generator.generate, request, wait)
        assert middle.wait(60)
        generator.close()
        go.set()
        with pytest.raises(EngineError, match="is closed"):
            clip.result(60)
        assert len(generator.generate(request).trace) == 8


def test_threads_that_share_a_pipeline_generator() -> None:
    """diffusers keeps the state of a call in the pipeline, so one clip is drawn after the other."""
    out, folder = wan_pipeline()
    requests = [GenerateRequest(prompt, steps=2, delta=0.5, seed=3) for prompt in ("a red cat", "the dog")]
    heard: list[list[Any]] = [[], []]
    with open_generator(Artifact.open(out), pipeline=folder, backend="onnxruntime") as generator:
        with ThreadPoolExecutor(2) as pool:
            work = [pool.submit(generator.generate, r, h.append) for r, h in zip(requests, heard)]
            found = [future.result(120) for future in work]
        for result, request, records in zip(found, requests, heard):
            assert records == result.trace
            same(result, generator.generate(request))


def test_a_wrapper_that_fails_leaves_no_session_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[EngineSession] = []
    real = session_options.open_session

    def noted(*arguments: Any, **options: Any) -> EngineSession:
        opened.append(real(*arguments, **options))
        return opened[-1]

    def fails(_session: EngineSession) -> EngineSession:
        raise RuntimeError("no wrapper")

    monkeypatch.setattr(session_options, "open_session", noted)
    generator = open_generator(Artifact.open(short_wan_export()), backend="onnxruntime", wrap_session=fails)
    with pytest.raises(RuntimeError, match="no wrapper"), generator:
        generator.prepare(GenerateRequest(PROMPTS[0], mode="a8"))
    assert [session.closed for session in opened] == [True]
