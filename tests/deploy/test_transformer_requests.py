"""Several requests on one transformer: each one's decisions, history and trace are as if it ran alone, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import EngineError, UnsupportedError
from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import Exported, arguments, build_pipeline

STEPS = 6
# Outputs of these random weights change by .4 to 1.2 a step: both engines run.
RULE = {"delta": 1.4, "last_high": 0, "weighting": "none"}
PROMPTS = ("a red cat runs in the rain", "the dog sits in snow")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return tiny.exported(tmp_path_factory, "wan")


@pytest.fixture
def transformer(wan: Exported) -> Any:
    return wan.open("pytorch", **RULE)


def call_of(which: int, **more: Any) -> dict[str, Any]:
    """Another prompt and another noise for each."""
    generator = torch.Generator().manual_seed(which)
    return arguments("wan", steps=STEPS, prompt=PROMPTS[which], generator=generator, **more)


Run = tuple[Tensor, list[tuple[int, str, int | None, float | None]]]


def run(transformer: Any, which: int, pipe: Any = None, **more: Any) -> Run:
    """The latents of a request, and what its trace says."""
    latents = (pipe or build_pipeline("wan", transformer))(**call_of(which, **more)).frames
    return latents, decisions(transformer)


def decisions(transformer: Any) -> list[tuple[int, str, int | None, float | None]]:
    return [(r.step, r.branch, r.bits, r.accumulated) for r in transformer.trace]


def alone(wan: Exported) -> list[Run]:
    """Both requests, each on a transformer of its own."""
    runs = [run(wan.open("pytorch", **RULE), which) for which in (0, 1)]
    assert {bits for _, trace in runs for _, _, bits, _ in trace} == {4, 8}
    assert [row[2] for row in runs[0][1]] != [row[2] for row in runs[1][1]]
    return runs


@pytest.fixture(scope="module")
def expected(wan: Exported) -> list[Run]:
    return alone(wan)


def same(found: Run, wanted: Run) -> None:
    assert found[1] == wanted[1]
    assert torch.equal(found[0], wanted[0])


def waits(barrier: threading.Barrier) -> Callable[..., dict[str, Any]]:
    """A callback that lets no request run ahead of the other by more than a step."""

    def callback(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(60)
        return values

    return callback


# ---------------------------------------------------------------------------------------------------------- pipelines


def test_two_pipelines_in_two_threads(transformer: Any, expected: list[Run]) -> None:
    """Step by step beside each other; and the second round in the same threads."""
    pipes = [build_pipeline("wan", transformer) for _ in range(2)]
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            futures = [
                pool.submit(run, transformer, which, pipes[which], callback_on_step_end=waits(barrier))
                for which in (0, 1)
            ]
            for future, wanted in zip(futures, expected):
                same(future.result(120), wanted)
    assert len(transformer.trace) == 2 * STEPS  # of the last one, for a thread that had none


def test_a_step_cache_is_a_requests_own(wan: Exported) -> None:
    """What one request skips is reused from its own output."""
    options = {"mode": "a8", "cache": StepCachePolicy(1e6, max_skips=1)}
    wanted = [run(wan.open("pytorch", **options), which) for which in (0, 1)]
    assert None in [row[2] for row in wanted[0][1]]
    shared, barrier = wan.open("pytorch", **options), threading.Barrier(2)
    pipes = [build_pipeline("wan", shared) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(run, shared, which, pipes[which], callback_on_step_end=waits(barrier)) for which in (0, 1)
        ]
        for future, one in zip(futures, wanted):
            same(future.result(120), one)


def test_a_pipeline_inside_the_callback_of_another(transformer: Any, expected: list[Run]) -> None:
    outer, inner = (build_pipeline("wan", transformer) for _ in range(2))
    found: list[Run] = []

    def callback(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 3):
            found.append(run(transformer, 1, inner))
        return values

    result = run(transformer, 0, outer, callback_on_step_end=callback)
    same(result, expected[0])
    for one in found:
        same(one, expected[1])


@pytest.mark.parametrize("at", [0, 3])
def test_after_a_request_that_was_aborted(transformer: Any, expected: list[Run], at: int) -> None:
    """In the same pipeline, in another one, and beside the aborted one in another thread."""

    def fail(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise RuntimeError("disconnected")
        return values

    pipes = [build_pipeline("wan", transformer) for _ in range(2)]
    for which in (0, 1):
        with pytest.raises(RuntimeError, match="disconnected"):
            run(transformer, 0, pipes[0], callback_on_step_end=fail)
        same(run(transformer, which, pipes[which]), expected[which])
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="disconnected"):
            run(transformer, 0, pipes[0], callback_on_step_end=fail)
        same(pool.submit(run, transformer, 1, pipes[1]).result(120), expected[1])
        same(run(transformer, 0, pipes[0]), expected[0])


def test_an_engine_that_fails_in_one_request_only(
    transformer: Any, expected: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other request goes on; the failed one starts anew."""
    session, real, broken = transformer.session, transformer.session.run, threading.local()

    def failing(inputs: Any, bits: int) -> Tensor:
        output = real(inputs, bits)
        return output * float("nan") if getattr(broken, "now", False) else output

    monkeypatch.setattr(session, "run", failing)
    barrier = threading.Barrier(2)
    pipes = [build_pipeline("wan", transformer) for _ in range(2)]

    def first() -> Run:
        def callback(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            barrier.wait(60)
            broken.now = step == 2
            return values

        with pytest.raises(EngineError, match="step 3"):
            run(transformer, 0, pipes[0], callback_on_step_end=callback)
        barrier.abort()
        broken.now = False
        return run(transformer, 0, pipes[0])

    def second() -> Run:
        def callback(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(60)
            return values

        return run(transformer, 1, pipes[1], callback_on_step_end=callback)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(first), pool.submit(second)]
        for future, wanted in zip(futures, expected):
            same(future.result(120), wanted)


def test_a_callback_of_one_thread_gets_no_step_of_another(transformer: Any) -> None:
    barrier, seen = threading.Barrier(2), {}
    pipes = [build_pipeline("wan", transformer) for _ in range(2)]

    def work(which: int) -> None:
        records: list[Any] = []
        transformer.runner.on_step = records.append
        run(transformer, which, pipes[which], callback_on_step_end=waits(barrier))
        assert records == transformer.trace
        assert transformer.runner.summary()["calls"] == 2 * STEPS
        seen[which] = records

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, which) for which in (0, 1)]:
            future.result(120)
    assert seen[0] is not seen[1]


def test_another_controller_leaves_running_requests_alone(transformer: Any, expected: list[Run]) -> None:
    """It is for the requests that come."""
    pipe, middle, go = build_pipeline("wan", transformer), threading.Event(), threading.Event()

    def callback(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            middle.set()
            assert go.wait(60)
        return values

    def work() -> tuple[Run, Run]:
        return run(transformer, 0, pipe, callback_on_step_end=callback), run(transformer, 0, pipe)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        assert middle.wait(60)
        transformer.use(StepController("fixed", bits=4))
        go.set()
        running, coming = future.result(120)
    same(running, expected[0])
    assert {row[2] for row in coming[1]} == {4}


def test_number_of_steps_announced_in_each_thread(wan: Exported) -> None:
    """By the thread that runs the request, as of a pipeline that keeps the number to itself."""
    transformer = wan.open("pytorch", delta=1e9, last_high=1, weighting="none")
    barrier = threading.Barrier(2)

    def work(steps: int) -> list[int]:
        transformer.begin_request(steps)
        barrier.wait(60)
        for _ in steps_of(transformer, seed=steps, steps=steps):
            pass
        return [r.bits for r in transformer.trace]

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, steps) for steps in (4, 6)]
        assert [future.result(60) for future in futures] == [[8, 8, 4, 8], [8, 8, 4, 4, 4, 8]]


# --------------------------------------------------------------------------------- loops that call the transformer itself


def time_of(seed: int, step: int) -> Tensor:
    """The second loop takes smaller steps, so that the two decide otherwise."""
    return torch.tensor([1000.0 - (40 if seed == 1 else 150) * step])


def steps_of(transformer: Any, seed: int, steps: int = STEPS, text: Tensor | None = None) -> Iterator[Tensor]:
    """A denoising loop of one's own: the latents after every step."""
    inputs = transformer.session.family.sample(transformer.session.sizes, transformer.dtype, seed)
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"] if text is None else text
    for step in range(steps):
        timestep = time_of(seed, step)
        with transformer.cache_context("cond"):
            output = transformer(latents, timestep, text).sample
        latents = latents - 0.15 * output
        yield latents


@pytest.fixture(scope="module")
def loops(wan: Exported) -> list[list[Tensor]]:
    """Two loops, each on a transformer of its own."""
    opened = [wan.open("pytorch", delta=0.9, last_high=0, weighting="none") for _ in range(2)]
    found = [list(steps_of(transformer, seed)) for seed, transformer in enumerate(opened)]
    assert [r.bits for r in opened[0].trace] != [r.bits for r in opened[1].trace]
    return found


@pytest.fixture
def looping(wan: Exported) -> Any:
    return wan.open("pytorch", delta=0.9, last_high=0, weighting="none")


@pytest.mark.parametrize("ahead", [0, 2])
def test_two_generators_that_take_turns(looping: Any, loops: list[list[Tensor]], ahead: int) -> None:
    first, second = steps_of(looping, 0), steps_of(looping, 1)
    found: list[list[Tensor]] = [[next(first) for _ in range(ahead)], []]
    for _ in range(STEPS):
        for latents, generator in zip(found, (first, second)):
            latents += [value for value in [next(generator, None)] if value is not None]
    for latents, wanted in zip(found, loops):
        assert all(torch.equal(one, other) for one, other in zip(latents, wanted, strict=True))


def test_a_generator_that_is_stepped_in_one_thread_after_the_other(looping: Any, loops: list[list[Tensor]]) -> None:
    """As web servers iterate over one; another request runs in the threads beside it."""
    generators = [steps_of(looping, seed) for seed in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for step in range(STEPS):
            pools = (one, two) if step % 2 else (two, one)
            for index, pool in enumerate(pools):
                found[index].append(pool.submit(next, generators[index]).result(60))
    for latents, wanted in zip(found, loops):
        assert all(torch.equal(one, other) for one, other in zip(latents, wanted, strict=True))


def test_asyncio_tasks(looping: Any, loops: list[list[Tensor]]) -> None:
    async def work(seed: int) -> list[Tensor]:
        found = []
        # The embedding is another tensor at every step: only the task tells the two apart.
        inputs = looping.session.family.sample(looping.session.sizes, looping.dtype, seed)
        latents = inputs["hidden_states"]
        for step in range(STEPS):
            with looping.cache_context("cond"):
                await asyncio.sleep(0)
                text = inputs["encoder_hidden_states"].clone()
                output = looping(latents, time_of(seed, step), text).sample
            latents = latents - 0.15 * output
            found.append(latents)
        return found

    async def both() -> list[list[Tensor]]:
        return list(await asyncio.gather(work(0), work(1)))

    for latents, wanted in zip(asyncio.run(both()), loops):
        assert all(torch.equal(one, other) for one, other in zip(latents, wanted, strict=True))


def test_loops_in_threads_that_share_the_embedding(looping: Any) -> None:
    """The same tensor in both: the thread tells them apart, and a start is not taken for a step of the other."""
    text = looping.session.family.sample(looping.session.sizes, looping.dtype, 7)["encoder_hidden_states"]
    wanted = []
    for seed in (0, 1):
        looping.begin_request()
        wanted.append(list(steps_of(looping, seed, text=text)))
    barrier = threading.Barrier(2)

    def work(seed: int) -> list[Tensor]:
        found = []
        for latents in steps_of(looping, seed, text=text):
            found.append(latents)
            barrier.wait(60)
        return found

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, seed) for seed in (0, 1)]
        for future, expected in zip(futures, wanted):
            assert all(torch.equal(one, other) for one, other in zip(future.result(60), expected, strict=True))


def test_two_calls_of_one_request_at_once(looping: Any) -> None:
    """A callback that calls the transformer within a step."""
    refused = []

    def again(_record: Any) -> None:
        looping.runner.on_step = None
        inputs = looping.session.family.sample(looping.session.sizes, looping.dtype, 0)
        with pytest.raises(UnsupportedError, match="at once") as caught:
            looping(inputs["hidden_states"], torch.tensor([900.0]), text)
        refused.append(caught.value.fix)

    text = looping.session.family.sample(looping.session.sizes, looping.dtype, 7)["encoder_hidden_states"]
    looping.runner.on_step = again
    list(steps_of(looping, 0, steps=2, text=text))
    assert "DvdqTransformer(transformer.session, controller)" in refused[0]


# ----------------------------------------------------------------------------------------------------- copies and memory


def test_a_deep_copy_shares_the_engines_and_nothing_else(transformer: Any, expected: list[Run]) -> None:
    """Also of a whole pipeline, which is how to get one for every thread."""
    pipe = build_pipeline("wan", transformer)
    twin = copy.deepcopy(pipe)
    assert twin.transformer is not transformer
    assert twin.transformer.session is transformer.session
    assert copy.copy(transformer).session is transformer.session
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        pairs = [(transformer, pipe), (twin.transformer, twin)]
        futures = [
            pool.submit(run, model, which, own, callback_on_step_end=waits(barrier))
            for which, (model, own) in enumerate(pairs)
        ]
        for future, wanted in zip(futures, expected):
            same(future.result(120), wanted)


def test_a_request_that_is_over_holds_no_outputs(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the thread or the pipeline of one that is gone."""
    held: list[weakref.ref[Tensor]] = []
    real = transformer.session.run

    def watched(inputs: Any, bits: int) -> Tensor:
        output = real(inputs, bits)
        monkeypatch.setattr(torch.Tensor, "clone", cloning)
        return output

    clone = torch.Tensor.clone

    def cloning(tensor: Tensor, **how: Any) -> Tensor:
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        copied = clone(tensor, **how)
        held.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(transformer.session, "run", watched)
    worker = threading.Thread(target=lambda: list(steps_of(transformer, 1)))
    worker.start()
    worker.join(60)
    run(transformer, 0)
    gc.collect()
    assert len(held) == 3 * STEPS
    assert [ref() for ref in held if ref() is not None] == []
