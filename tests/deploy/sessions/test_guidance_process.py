"""Guidance on two sessions, the second in a process of its own: clips of one session; a process that dies is an error."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.faults import fault_of
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.generator import Generator
from dvdquant.deploy.sessions import open_session, other_process
from dvdquant.deploy.sessions.base import EngineSession
from dvdquant.deploy.sessions.guidance_pair import GuidancePair
from dvdquant.deploy.sessions.other_process import ProcessSession
from dvdquant.errors import ChoiceError, EngineError, ResourceError, ShapeError, UnsupportedError
from dvdquant.ops.attention import ladder
from tests.support.forked_processes import forked_process
from tests.support.guided_clips import FailingLow, same
from tests.support.running import PROMPT, short_wan_export
from tests.support.session_exports import weights_export

OPTIONS: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu"}
FAILING: set[float] = set()
COMMAND = other_process.COMMAND


def _breakable(session: EngineSession) -> EngineSession:
    """The first session, whose low engine fails at the timesteps in FAILING."""
    if not isinstance(session, GuidancePair):
        return FailingLow(session, FAILING)
    session.inner = FailingLow(session.inner, FAILING)
    return session


@pytest.fixture(scope="module")
def plain() -> Iterator[Generator]:
    """One session."""
    with open_generator(Artifact.open(short_wan_export()), wrap_session=_breakable, **OPTIONS) as generator:
        yield generator


@pytest.fixture(scope="module")
def double() -> Iterator[Generator]:
    """Two, the second in another process: a fork, for its command is started by the test of errors."""
    options: dict[str, Any] = {**OPTIONS, "wrap_session": _breakable, "cfg_parallel": "process:cpu"}
    with (
        mock.patch.object(other_process, "COMMAND", forked_process("session")),
        open_generator(Artifact.open(short_wan_export()), **options) as generator,
    ):
        generator.prepare(GenerateRequest(PROMPT, steps=2))
        yield generator
        peer = _pair(generator).peer
        child = psutil.Process(peer.pid)  # type: ignore[attr-defined]
    assert not child.is_running()
    with pytest.raises(EngineError, match="is closed"):
        peer.set_loras([])
    assert peer.pid is None, "a closed session has started a process again"  # type: ignore[attr-defined]


def _pair(generator: Generator) -> GuidancePair:
    pair = generator.sessions()["transformer"]
    assert isinstance(pair, GuidancePair)
    return pair


@pytest.mark.parametrize(
    "fields",
    [
        # Two sessions in one process are judged on these.
        pytest.param({"delta": 0.3}, marks=pytest.mark.stress),
        pytest.param({"mode": "a8", "cache": 0.4}, marks=pytest.mark.stress),
        {"mode": "a4", "fails": (0, 2, 3)},
    ],
)
def test_a_clip_is_that_of_one_session(fields: dict[str, Any], plain: Generator, double: Generator) -> None:
    """Switched, with skipped steps, and with steps that run again after the low engine failed."""
    fields = dict(fields)
    fails = fields.pop("fails", ())
    request = GenerateRequest(PROMPT, steps=6, seed=4, **fields)
    if fails:
        FAILING.update(round(record.timestep) for record in plain.generate(request).trace if record.step in fails)
    try:
        expected = plain.generate(request)
        found = double.generate(request)
    finally:
        FAILING.clear()
    same(found, expected)
    pair = _pair(double)
    assert pair.paired >= 5 - (5 if "cache" in fields else 0)
    if fails:
        assert [record.retried for record in found.trace if record.step in fails] == [True, False] * 3
        assert pair.wasted >= 2  # begun at 4 bits and dropped, and begun again at 8
    if "cache" in fields:
        assert any(record.bits is None for record in found.trace)


def test_a_partner_that_dies_is_an_error_of_the_clip_and_not_of_the_step(plain: Generator, double: Generator) -> None:
    """A step that ran again at other bits would hide it: another clip for the same request. The job's next attempt is right."""
    request = GenerateRequest(PROMPT, steps=4, seed=9, mode="a4")
    pair = _pair(double)
    peer = pair.peer
    assert isinstance(peer, ProcessSession)
    first = peer.pid
    assert first is not None

    def kill(record: Any) -> None:
        if record.step == 1:
            os.kill(first, signal.SIGKILL)

    with pytest.raises(ResourceError, match="signal 9") as caught:
        double.generate(request, kill)
    assert fault_of(caught.value) == "once"
    same(double.generate(request), plain.generate(request))
    assert peer.pid not in (None, first)


def test_errors_of_the_other_process_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its command starts, which is no fork here."""
    monkeypatch.setattr(other_process, "COMMAND", COMMAND)
    artifact = Artifact.open(short_wan_export())
    with pytest.raises(UnsupportedError, match="unknown device"):
        open_session(artifact, device="process:gpu")
    with pytest.raises(UnsupportedError, match="does not take compile"):
        open_session(artifact, device="process:cpu", backend="onnxruntime", compile=True)


# The process of a session, in which the toy model's sequences are long.
_SHORT = """
import sys
from dvdquant.ops.attention import ladder
ladder.MIN_TOKENS = 16
from dvdquant.deploy.sessions.engine_process import main
sys.exit(main())
"""


@pytest.mark.slow
def test_attention_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process computes by what this one has chosen, refuses where it cannot, and tells what it did."""
    monkeypatch.setattr(other_process, "COMMAND", (sys.executable, "-c", _SHORT))
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    artifact = Artifact.open(weights_export("wan", ranges=False))
    options: dict[str, Any] = {"backend": "pytorch", "attention": "int8", "attention_backend": "reference"}
    with (
        open_session(artifact, device="process:cpu", bits=[8], **options) as other,
        open_session(artifact, device="cpu", bits=[8], **options) as one,
        open_session(artifact, device="cpu", bits=[8], backend="pytorch") as plain,
    ):
        inputs = one.family.sample(one.sizes, one.dtype, 0)
        assert other.attention is not None
        assert (other.fused, other.attention.wanted, other.attention.choice) == (False, "int8", None)
        for choice, session in (("reference", one), ("16", plain)):
            other.follow_attention(choice)
            assert torch.equal(other.run(inputs, 8), session.run(inputs, 8))
            assert other.attention.choice == choice
        assert other.attention.to_json()["library"] is None
        other.follow_attention("another")
        with pytest.raises(ChoiceError, match="another is none of its libraries"):
            other.run(inputs, 8)


def test_a_session_by_itself(double: Generator) -> None:
    session = _pair(double).peer
    assert (session.backend, session.device.type) == ("onnxruntime", "cpu")
    assert session.weights == _pair(double).inner.weights
    assert session.resident_bytes() == _pair(double).inner.resident_bytes()
    inputs = session.family.sample(session.sizes, session.dtype, 0)
    with pytest.raises(ShapeError, match="outside the profile"):
        session.run({**inputs, "hidden_states": inputs["hidden_states"][:, :, :, :3]}, 4)
    with pytest.raises(EngineError, match="16-bit"):
        session.run(inputs, 16)
    with pytest.raises(UnsupportedError, match="its graph"):
        session.set_loras([object()])  # type: ignore[list-item]
