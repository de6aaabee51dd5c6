"""A clip that is cancelled: before anything, in the text encoder, in the loop, in the VAE, and while it waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import cancel_inside, take_turn
from dvdquant.deploy.generation.generate import GenerateRequest, generate, open_generator
from dvdquant.deploy.switching.controller import StepController, StepRecord
from dvdquant.deploy.switching.runner import StepRunner
from dvdquant.errors import Cancelled, EngineError
from tests.support.running import PROMPT, short_wan_export, wan_pipeline
from tests.support.session_exports import recipe_export
from tests.support.tiny_pipelines import arguments, build_pipeline, exported
from tests.support.watched_lock import WatchedLock

pytestmark = pytest.mark.usefixtures("lent_sessions")


class Countdown:
    """An event that is set from its n-th question on, so that a test cancels at every place there is."""

    def __init__(self, n: int) -> None:
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def _generator(model: str) -> tuple[Any, GenerateRequest]:
    out, folder = wan_pipeline() if model == "pipeline" else (short_wan_export(), None)
    prompt = "a red cat" if model == "pipeline" else PROMPT
    opened = open_generator(Artifact.open(out), pipeline=folder, backend="onnxruntime", device="cpu")
    return opened, GenerateRequest(prompt, steps=3, seed=4, delta=1000.0, last_high=0)


@pytest.mark.parametrize("model", ["table", "pipeline"])
@pytest.mark.parametrize("mode", ["switch", "16"])
def test_cancel_at_every_place(model: str, mode: str) -> None:
    """Wherever it is cancelled, nothing comes back, at most the running call ends, and the next clip is the same."""
    opened, request = _generator(model)
    request = GenerateRequest(**{**vars(request), "mode": mode, "delta": None if mode == "16" else request.delta})
    with opened as generator:
        whole = generator.generate(request)
        never = Countdown(10**9)
        assert np.array_equal(generator.generate(request, cancel=never).frames, whole.frames)
        places = 10**9 - never.left
        assert places >= (12 if model == "table" and mode == "switch" else 40)
        calls = len(whole.trace)
        for place in {0, 1, 2, 3, 4, places - 1, *range(5, places, max(1, places // 5))}:
            heard: list[StepRecord] = []
            cancel = Countdown(place)
            with pytest.raises(Cancelled, match="cancelled before"):
                generator.generate(request, heard.append, cancel)
            assert cancel.left == -1  # nothing asked again, so nothing went on
            assert len(heard) <= calls
        after = generator.generate(request)
        assert np.array_equal(after.frames, whole.frames)
        assert [r.bits for r in after.trace] == [r.bits for r in whole.trace]


@pytest.mark.parametrize("model", ["table", "pipeline"])
def test_an_event_stops_within_one_call(model: str) -> None:
    opened, request = _generator(model)
    with opened as generator:
        for step in (0, 1):
            event, heard = threading.Event(), []

            def note(record: StepRecord, step: int = step, event: Any = event, heard: Any = heard) -> None:
                heard.append(record)
                if record.step == step:
                    event.set()

            with pytest.raises(Cancelled):
                generate(generator.artifact, request, generator=generator, on_step=note, cancel=event)
            assert [record.step for record in heard] == [*([0, 0] if step else []), step]


def test_a_request_in_the_queue_does_not_wait_for_its_turn() -> None:
    opened, request = _generator("pipeline")
    middle, go, cancel = threading.Event(), threading.Event(), threading.Event()

    def wait(record: StepRecord) -> None:
        middle.set()
        assert go.wait(60)

    with opened as generator, ThreadPoolExecutor(2) as pool:
        lock = generator._denoising = WatchedLock(generator._denoising)
        first = pool.submit(generator.generate, request, wait)
        assert middle.wait(60)
        second = pool.submit(generator.generate, request, None, cancel)
        assert lock.awaited.wait(60)
        assert not second.done()
        cancel.set()
        with pytest.raises(Cancelled):
            second.result(30)
        assert not first.done()
        go.set()
        assert len(first.result(60).trace) == 6


def test_hooks_stop_only_their_own_thread_and_are_gone_afterwards() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    event = threading.Event()
    with ThreadPoolExecutor(1) as pool, cancel_inside([module, None], event):
        module(torch.ones(1, 2))
        event.set()
        with pytest.raises(Cancelled, match="before a Sequential"):
            module(torch.ones(1, 2))
        assert pool.submit(module, torch.ones(1, 2)).result(30).shape == (1, 2)
    assert not any(part._forward_pre_hooks for part in module.modules())
    module(torch.ones(1, 2))
    lock = threading.Lock()
    with pytest.raises(Cancelled), take_turn(lock, event, "it"):
        pytest.fail("its turn came")
    assert not lock.locked()


def test_a_retry_is_not_begun_after_a_cancel() -> None:
    """The low engine fails and the request is cancelled meanwhile: the high engine is not asked."""
    from dvdquant.deploy.sessions import open_session

    with open_session(Artifact.open(recipe_export("w4a4")), backend="onnxruntime", device="cpu") as session:
        runner, event, asked = StepRunner(session, StepController("fixed", bits=4)), threading.Event(), []
        runner.cancel = event
        inputs = session.family.sample(session.sizes, session.dtype, 0)

        def fails(inputs: Any, bits: int) -> Any:
            asked.append(bits)
            event.set()
            raise EngineError("broken")

        real, session.run = session.run, fails  # type: ignore[method-assign]
        with pytest.raises(Cancelled, match="ran again"):
            runner.run(inputs)
        assert asked == [4]
        session.run = real  # type: ignore[method-assign]
        runner.cancel = None
        assert [runner.run(inputs).shape, [r.bits for r in runner.trace]] == [inputs["hidden_states"].shape, [8]]


def test_a_transformer_in_a_users_pipeline() -> None:
    transformer = exported("wan").open(mode="a8")
    pipe = build_pipeline("wan", transformer)
    expected = pipe(**arguments("wan")).frames
    event = threading.Event()
    assert transformer.cancel is None
    transformer.cancel = event
    assert transformer.runner.cancel is event
    heard: list[StepRecord] = []
    transformer.runner.on_step = heard.append  # one does not replace the other
    assert transformer.cancel is event
    assert torch.equal(pipe(**arguments("wan")).frames, expected)
    assert len(heard) == 6

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        event.set()
        return values

    heard.clear()
    with pytest.raises(Cancelled, match="a call of the transformer"):
        pipe(**arguments("wan"), callback_on_step_end=stop)
    assert len(heard) == 2
    with pytest.raises(Cancelled), cancel_inside([pipe.text_encoder], event):
        pipe(**arguments("wan"))
    transformer.cancel = None
    assert torch.equal(pipe(**arguments("wan")).frames, expected)
    assert len(heard) == 8
    with ThreadPoolExecutor(1) as pool:  # what was set here holds in this context only
        transformer.cancel = event
        transformer.cancel = None
        transformer.runner.on_step = None
        assert torch.equal(pool.submit(lambda: pipe(**arguments("wan")).frames).result(60), expected)
