"""PyTorch sessions on a GPU as people run them: compiled, fused, with 8-bit attention, and with captured steps.

They need a CUDA device and have run on none yet; with ``DEVICE`` as the CPU the same lines run without captures.
"""

from __future__ import annotations

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import open_session, replay
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.ops.attention import ladder
from tests.support import session_exports as made

pytestmark = pytest.mark.slow
DEVICE = "cuda"
# Roundings of a compiler's or a library's own, beside those of plain PyTorch in the same dtype.
FACTOR, ATOL = 3.0, 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_compiled_session_is_as_near_to_the_exact_model_as_an_eager_one(fuse: bool) -> None:
    artifact = Artifact.open(made.family_export("wan"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    torch._dynamo.reset()
    with open_session(artifact, backend="pytorch", device=DEVICE, compile=True, fuse=fuse) as session:
        for bits in (8, 4, 8):
            same, exact = made.reference(artifact, "transformer", bits, inputs)
            error = made.relative(session.run(inputs, bits).cpu(), exact)
            assert error <= FACTOR * made.relative(same, exact) + ATOL


@pytest.mark.gpu
def test_a_session_with_8_bit_attention_is_near_the_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition, which needs no library; in HunyuanVideo, whose mask has to be gone first."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    artifact = Artifact.open(made.deep_export("hunyuan-video"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    with open_session(artifact, backend="pytorch", device=DEVICE) as session:
        sixteen = session.run(inputs, 8)
    with open_session(
        artifact, backend="pytorch", device=DEVICE, attention="fp8", attention_backend="reference"
    ) as session:
        eight = session.run(inputs, 8)
        assert isinstance(session, PyTorchSession)
        assert session.attention is not None
        assert session.attention.taken is not None
    assert 1e-4 < made.relative(eight.cpu(), sixteen.cpu()) < ladder.MAX_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_captured_step_gives_what_a_plain_one_gives(compile: bool) -> None:
    """With switches between the widths, and with other inputs than those it was captured with."""
    artifact = Artifact.open(made.family_export("wan"))
    drawn = [artifact.family().sample(artifact.sizes, artifact.dtype, seed) for seed in (0, 1)]
    torch._dynamo.reset()
    with open_session(artifact, backend="pytorch", device=DEVICE, compile=compile) as session:
        wanted = {(bits, i): session.run(drawn[i], bits) for bits in (8, 4) for i in (0, 1)}
        plain = session.resident_bytes()["workspace"]
    torch._dynamo.reset()
    with open_session(artifact, backend="pytorch", device=DEVICE, compile=compile, cuda_graphs=True) as session:
        assert isinstance(session, PyTorchSession)
        for i in (0, 0, 0, 1, 0):
            for bits in (8, 4):
                change = made.relative(session.run(drawn[i], bits).cpu(), wanted[bits, i].cpu())
                assert change <= replay.MAX_CHANGE
        if DEVICE == "cuda":
            assert session.repeats_steps
            assert session.resident_bytes()["workspace"] > plain


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_as_usual() -> None:
    """The host reads a value in the middle of it. The stream is the caller's again, and another step can be captured."""
    device = torch.device(DEVICE)
    before = torch.cuda.current_stream() if DEVICE == "cuda" else None
    for read in (True, False):
        graphs = replay.GraphReplay(
            lambda inputs, read=read: inputs["x"] * (float(inputs["x"].sum()) if read else inputs["x"].sum()),
            "transformer",
            device,
        )
        for i in range(4):
            x = torch.full((8,), float(i), device=device)
            assert torch.equal(graphs({"x": x}, 8), 8 * x * x)
        assert (graphs.failed is not None) is (read or DEVICE == "cpu")
    if DEVICE == "cuda":
        assert torch.cuda.current_stream() == before
