"""Guidance on two sessions: real sessions, outputs and decisions those of one, wherever a step is skipped or runs again."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.deploy import DvdqTransformer
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.executed import executed_session
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.sessions.base import EngineSession, WrappedSession
from dvdquant.deploy.sessions.guidance_pair import GuidancePair
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import EngineError, ShapeError, UnsupportedError
from dvdquant.ops.attention import ladder
from dvdquant.ops.attention.libraries import REFERENCE
from tests.support.commands import refused
from tests.support.guided_clips import FailingLow, same
from tests.support.running import PROMPT, run, short_wan_export, wan_pipeline
from tests.support.session_exports import recipe_export, weights_export
from tests.support.tiny_pipelines import arguments, build_pipeline, exported

pytestmark = pytest.mark.usefixtures("lent_sessions")


@pytest.mark.parametrize(
    "fields", [{"delta": 0.3}, {"mode": "a8", "cache": 0.4, "cache_policy": "easycache"}, {"mode": "a4"}]
)
def test_a_clip_is_that_of_one_session(fields: dict[str, Any]) -> None:
    """Of N steps, the second session answers every second branch but that of the first step."""
    request = GenerateRequest(PROMPT, **{"steps": 6, "seed": 4, **fields})
    artifact = Artifact.open(short_wan_export())
    with open_generator(artifact, backend="onnxruntime", device="cpu") as generator:
        expected = generator.generate(request)
    with open_generator(artifact, backend="onnxruntime", device="cpu", cfg_parallel="cpu") as generator:
        same(generator.generate(request), expected)
        pair = generator.sessions()["transformer"]
        assert isinstance(pair, GuidancePair)
        computed = sum(record.bits is not None for record in expected.trace) // 2
        if "cache" in fields:
            assert computed < 6
        assert (pair.paired, pair.wasted) == (computed - 1, 0)
        same(generator.generate(dataclasses.replace(request, seed=4)), expected)
        assert pair.paired == 2 * computed - 1  # the second clip knows the order of the branches from the start
        with pytest.raises(UnsupportedError, match="guidance of 1"):
            generator.generate(dataclasses.replace(request, guidance=1.0))
        with pytest.raises(UnsupportedError, match="one device"):
            generator.check(GenerateRequest(PROMPT, mode="16"))


def test_a_step_that_runs_again_is_that_of_one_session() -> None:
    """The low engine fails in the first branch: what the second session had begun is dropped, and begun on the high engine."""
    request = GenerateRequest(PROMPT, steps=6, seed=4, mode="a4")
    artifact = Artifact.open(short_wan_export())
    with open_generator(artifact, backend="onnxruntime", device="cpu") as plain:
        failing = {round(record.timestep) for record in plain.generate(request).trace if record.step in (0, 2, 3)}
    found = []
    for second in (None, "cpu"):
        options: Any = {"backend": "onnxruntime", "device": "cpu", "cfg_parallel": second}

        def broken(session: EngineSession) -> EngineSession:
            if not isinstance(session, GuidancePair):
                return FailingLow(session, failing)
            inner, peer = (FailingLow(one, failing) for one in (session.inner, session.peer))
            return GuidancePair(inner, peer)

        with open_generator(artifact, wrap_session=broken, **options) as generator:
            found.append(generator.generate(request))
            if second:
                pair = generator.sessions()["transformer"]
                assert pair.paired == 5
                assert pair.wasted == 2
    same(*found)
    assert [record.retried for record in found[0].trace if record.step in (2, 3)] == [True, False] * 2
    assert [record.bits for record in found[0].trace] == [8, 8, 4, 4, 8, 8, 8, 8, 4, 4, 4, 4]


def test_a_transformer_in_pipelines() -> None:
    """Wan calls the branches one after the other; CogVideoX both in one call, which is run in slices."""
    for kind in ("wan", "cogvideox"):
        made = exported(kind)
        expected = build_pipeline(kind, made.open(delta=0.2))(**arguments(kind, steps=4)).frames
        transformer = DvdqTransformer.from_pretrained(made.out, backend="onnxruntime", delta=0.2, cfg_parallel="cpu")
        assert torch.equal(build_pipeline(kind, transformer)(**arguments(kind, steps=4)).frames, expected)
        pair = transformer.session
        assert isinstance(pair, GuidancePair)
        assert (pair.paired, pair.wasted) == (3, 0)
        transformer.close()
        assert pair.peer.closed


def test_both_run_at_the_same_time_and_changed_inputs_are_noticed() -> None:
    """The second branch is begun while the first runs, with copies; a call that is another one runs by itself."""
    artifact, meeting = Artifact.open(recipe_export("w4a4")), threading.Barrier(2)
    meets = threading.Event()

    class Meeting(WrappedSession):
        def run(self, inputs: Any, bits: int) -> Tensor:
            if meets.is_set():
                meeting.wait(60)  # broken unless the other session is in a call at the same time
            return self.inner.run(inputs, bits)

    def opened() -> EngineSession:
        return open_session(artifact, backend="onnxruntime", device="cpu")

    with GuidancePair(Meeting(opened()), Meeting(opened())) as pair, opened() as alone:
        first, second = (pair.family.sample(pair.sizes, pair.dtype, seed) for seed in (0, 1))
        second = {**first, "encoder_hidden_states": second["encoder_hidden_states"]}
        expected = [alone.run(one, 8) for one in (first, second)]
        assert all(torch.equal(pair.run(one, 8), out) for one, out in zip((first, second), expected))
        # The next step: another timestep, the same order.
        first, second = ({**one, "timestep": one["timestep"] / 2} for one in (first, second))
        expected = [alone.run(one, 8) for one in (first, second)]
        meets.set()
        assert torch.equal(pair.run(first, 8), expected[0])
        meets.clear()
        assert torch.equal(pair.run(second, 8), expected[1])
        assert (pair.paired, pair.wasted) == (1, 0)
        # The caller changes its latents in place between the branches.
        pair.run(first, 8)
        second["hidden_states"].mul_(0.5)
        assert torch.equal(pair.run(second, 8), alone.run(second, 8))
        assert (pair.paired, pair.wasted) == (1, 1)
        # Another thread has a loop of its own.
        with ThreadPoolExecutor(1) as pool:
            pair.run(first, 8)
            assert torch.equal(pool.submit(pair.run, second, 8).result(60), alone.run(second, 8))
        assert pair.resident_bytes()["weights"] == 2 * alone.resident_bytes()["weights"]
        with pytest.raises(UnsupportedError, match="may differ"):
            GuidancePair(alone, alone)
        with open_session(artifact, backend="pytorch", device="cpu") as other, pytest.raises(UnsupportedError):
            GuidancePair(alone, other)
    with pytest.raises(EngineError, match="is closed"):
        pair.run(first, 8)
    assert pair.peer.closed


def _attends(artifact: Artifact, fast: bool = True, there: bool = True) -> PyTorchSession:
    """A session whose only library is fast, slow or not there: the definition."""
    session = PyTorchSession(artifact, bits=[8], attention="int8", attention_backend="reference")
    assert session.attention is not None
    session.attention.must_be_faster = not fast
    session.attention.rungs = (REFERENCE["int8"],) if there else ()
    return session


@pytest.mark.parametrize(
    ("first", "second", "choice", "pairs"),
    [
        ({}, {"fast": False}, "reference", True),
        ({"fast": False}, {}, "16", True),
        ({}, {"there": False}, "reference", False),
    ],
    ids=["slow on the second", "slow on the first", "missing on the second"],
)
def test_attention_is_what_the_first_session_has_chosen(
    first: dict[str, bool],
    second: dict[str, bool],
    choice: str,
    pairs: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The self-test of the second session ends otherwise. Where it cannot follow, the first runs both branches."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    monkeypatch.setattr(ladder, "seconds", lambda call, device: 1.0)  # no library is faster than 16 bit
    artifact = Artifact.open(weights_export("wan", ranges=False))
    steps = _branches(artifact, 4)
    with _attends(artifact, **first) as alone:
        expected = [[alone.run(branch, 8) for branch in step] for step in steps]
    with _attends(artifact, **second) as other:
        other.run(steps[0][0], 8)
        assert other.attention is not None
        assert other.attention.choice not in (None, choice)
    with GuidancePair(_attends(artifact, **first), _attends(artifact, **second)) as pair:
        for step, outputs in zip(steps, expected):
            assert all(torch.equal(pair.run(branch, 8), output) for branch, output in zip(step, outputs))
        assert (pair.paired, pair.wasted) == ((3, 0) if pairs else (0, 1))
        said = executed_session(pair)
        assert said["attention"]["library"] == (None if choice == "16" else choice)
        assert said["second"]["attention"]["decided"] == pairs
        assert not pairs or said["second"]["attention"]["library"] == said["attention"]["library"]
    assert caplog.text.count("both branches of guidance run on cpu") == int(not pairs)


def test_attention_that_fails_on_the_first_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls to 16 bit in the middle of a clip, and what the second session has begun is not used."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    artifact, failing = Artifact.open(weights_export("wan", ranges=False)), threading.Event()
    definition = REFERENCE["int8"].load()

    def kernel(*operands: Any) -> Tensor:
        if failing.is_set():
            raise RuntimeError("no plan")
        return definition(*operands)

    steps = _branches(artifact, 4)
    with PyTorchSession(artifact, bits=[8]) as plain, _attends(artifact) as alone:
        expected = [[(plain if i > 1 else alone).run(branch, 8) for branch in step] for i, step in enumerate(steps)]
    with GuidancePair(_attends(artifact), _attends(artifact)) as pair:
        pair.inner.attention.rungs = (dataclasses.replace(REFERENCE["int8"], load=lambda: kernel),)  # type: ignore[union-attr]
        for i, (step, outputs) in enumerate(zip(steps, expected)):
            if i == 2:
                failing.set()
            assert all(torch.equal(pair.run(branch, 8), output) for branch, output in zip(step, outputs))
        assert (pair.paired, pair.wasted) == (2, 1)
        assert pair.peer.attention.choice == "16"  # type: ignore[union-attr]


def _branches(artifact: Artifact, steps: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The inputs of both branches, step by step."""
    one, two = (artifact.family().sample(artifact.sizes, artifact.dtype, seed) for seed in (0, 1))
    two = {**one, "encoder_hidden_states": two["encoder_hidden_states"]}
    return [tuple({**each, "timestep": each["timestep"] / 2**i} for each in (one, two)) for i in range(steps)]  # type: ignore[misc]


def test_sessions_of_which_one_fuses_layers_are_refused() -> None:
    artifact = Artifact.open(weights_export("wan", ranges=False))
    with PyTorchSession(artifact, bits=[8]) as one, PyTorchSession(artifact, bits=[8]) as two:
        two.fused = True
        with pytest.raises(UnsupportedError, match="may differ") as caught:
            GuidancePair(one, two)
        assert "--no-fuse" in str(caught.value)


def test_what_the_second_session_raises_reaches_its_branch() -> None:
    artifact = Artifact.open(recipe_export("w4a4"))

    class Broken(WrappedSession):
        def run(self, inputs: Any, bits: int) -> Tensor:
            raise EngineError("the second device failed")

    one, two = (open_session(artifact, backend="onnxruntime", device="cpu") for _ in range(2))
    with GuidancePair(one, Broken(two)) as pair:
        first, second = (pair.family.sample(pair.sizes, pair.dtype, seed) for seed in (0, 1))
        second = {**first, "encoder_hidden_states": second["encoder_hidden_states"]}
        pair.run(first, 4)
        pair.run(second, 4)
        first, second = ({**one, "timestep": one["timestep"] / 2} for one in (first, second))
        pair.run(first, 4)
        with pytest.raises(EngineError, match="the second device"):
            pair.run(second, 4)
        with pytest.raises(ShapeError):
            pair.run({**first, "hidden_states": first["hidden_states"][:, :, :, :3]}, 4)


def test_the_command(tmp_path: Path) -> None:
    out, pipeline = wan_pipeline()
    common = (
        out,
        "--pipeline",
        pipeline,
        "--steps",
        3,
        "--backend",
        "onnxruntime",
        "--device",
        "cpu",
        "--prompt",
        "a cat",
    )
    for name, more in (("one.gif", ()), ("two.gif", ("--cfg-parallel", "cpu"))):
        done = run(*common, "-o", tmp_path / name, *more)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
    for wrong, said in (
        (("--guidance", 1), "two branches"),
        (("--compare",), "--compare"),
        (("--mode", "16", "--backend", "auto"), "one device"),
    ):
        refused(run(*common, "-o", tmp_path / "no.gif", "--cfg-parallel", "cpu", *wrong), said)
    refused(run(*common, "-o", tmp_path / "no.gif", "--cfg-parallel", "gpu"), "unknown device")
