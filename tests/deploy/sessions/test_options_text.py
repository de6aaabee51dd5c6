"""What is said of attention and CUDA graphs before sessions are opened: by the same rules as the sessions' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import open_session, options_text, pytorch
from dvdquant.deploy.sessions.options_text import attention_json, attention_text, graphs_text
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import UnsupportedError
from dvdquant.ops.attention import ladder
from dvdquant.ops.attention.libraries import Library
from tests.support import session_exports as made
from tests.support.commands import refused
from tests.support.running import PROMPT, drawn, run, short_wan_export

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy models have a few dozen tokens."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return Artifact.open(made.deep_export("wan"))


def on_sm(monkeypatch: pytest.MonkeyPatch, sm: int, *installed: str) -> None:
    """Let a CUDA device be one of an SM, where these libraries of attention are installed."""
    monkeypatch.setattr(pytorch, "cuda_sm", lambda device: sm)
    monkeypatch.setattr(options_text, "cuda_sm", lambda device: sm)
    monkeypatch.setattr(Library, "installed", lambda self: None if self.name in installed else "it is not installed")


def with_recipe(artifact: Artifact, attention: str, **engines: Any) -> Artifact:
    """The same export with another attention in its recipe, and engines with other fields."""
    manifest = artifact.manifest
    manifest = dataclasses.replace(
        manifest,
        recipe={**manifest.recipe, "attention": attention},
        engines=tuple({**each, **engines} for each in manifest.engines),  # type: ignore[typeddict-item]
    )
    return Artifact(artifact.root, manifest, artifact.configs)


def test_what_a_pytorch_session_will_try(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    on_sm(monkeypatch, 90, "fa3-fwd", "cudnn")
    assert attention_text(artifact, "pytorch", CUDA, None, None) is None
    assert attention_text(artifact, "pytorch", CUDA, "16", None) is None
    both = "attention of 16 tokens or more: fp8, by the first of fa3-fwd, cudnn that is right and faster than 16 bit on the "
    both += "first layer, else 16 bit; not sageattention-2: it is not installed; comfy-kitchen: it is not installed"
    assert attention_text(artifact, "pytorch", CUDA, "fp8", None) == both
    # The recipe's own needs no option, and an option replaces it.
    assert attention_text(with_recipe(artifact, "fp8"), "pytorch", CUDA, None, None) == both
    assert attention_text(with_recipe(artifact, "fp8"), "pytorch", CUDA, "16", None) == "attention: 16 bit"
    named = "attention of 16 tokens or more: fp8, by cudnn, if it is right on the first layer, else 16 bit"
    assert attention_text(artifact, "pytorch", CUDA, "fp8", "cudnn") == named


@pytest.mark.parametrize("sm", [87, 110, 121])
def test_an_sm_without_a_library_says_so(sm: int, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    on_sm(monkeypatch, sm, "comfy-kitchen", "cudnn")
    said = attention_text(artifact, "pytorch", CUDA, "int8", None)
    assert said == f"attention: 16 bit, not int8: no library has it on SM {sm / 10}"


def test_what_leaves_attention_in_16_bit(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    on_sm(monkeypatch, 103)
    assert attention_text(artifact, "pytorch", CUDA, "int8", None) == (
        "attention: 16 bit, not int8: cudnn: it is not installed"
    )
    said = str(attention_text(artifact, "pytorch", CPU, "int8", None))
    assert said.startswith(
        "attention: 16 bit, not int8: no library has it on a CPU; on a GPU SM 8.0 (A100, A30), 8.6 ("
    )
    assert "; SM 8.9 (RTX 40, RTX Ada, L4, L40S): sageattention-2, comfy-kitchen, sageattention-1; SM 9.0" in said
    said = attention_text(artifact, "onnxruntime", CPU, "int8", None)
    assert said == "attention: 16 bit, not int8: only PyTorch sessions have it"
    with pytest.raises(UnsupportedError, match="cudnn is not possible: it is not installed"):
        attention_text(artifact, "pytorch", CUDA, "int8", "cudnn")
    with pytest.raises(UnsupportedError, match="attention is in 16 bit here"):
        attention_text(artifact, "pytorch", CUDA, None, "cudnn")
    monkeypatch.setattr(ladder, "MIN_TOKENS", 2048)
    tokens = artifact.family().tokens(*artifact.sizes.at("max")) + artifact.sizes.text_tokens
    said = attention_text(artifact, "pytorch", CUDA, "int8", None)
    assert said == f"attention: 16 bit, not int8: video and text are {tokens} tokens, of 2048 that it is for"


def test_what_it_says_is_what_a_session_does(artifact: Artifact) -> None:
    """The words of the plan against the session's own record, where a library is taken and where none is."""
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    for library, words, name in ((None, "16 bit, not int8", None), ("reference", "int8, by reference", "reference")):
        assert words in str(attention_text(artifact, "pytorch", CPU, "int8", library))
        with PyTorchSession(artifact, attention="int8", attention_backend=library) as session:
            session.run(inputs, 8)
            assert attention_json(session)["library"] == name


def test_engines_have_what_they_were_built_with(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(made.engine_export())
    built = with_recipe(artifact, "int8", executes="tensor cores of this kind")
    on_sm(monkeypatch, 89)
    words = "attention: what the engines were built with: a4: tensor cores of this kind; a8: tensor cores of this kind"
    for place in (CUDA, CPU):
        assert attention_text(built, "tensorrt_rtx", place, "int8", None) == words
    on_sm(monkeypatch, 120)  # no engine is for it
    assert "tensor cores" not in str(attention_text(built, "tensorrt_rtx", CUDA, "int8", None))


def test_cuda_graphs(artifact: Artifact) -> None:
    begin = "steps repeated as CUDA graphs: "
    assert graphs_text(artifact, "pytorch", CUDA) == begin + "yes, from the second one on"
    assert graphs_text(artifact, "tensorrt", CUDA) == begin + "yes, from the second one on"
    assert graphs_text(artifact, "pytorch", CPU) == begin + "no, there is no CUDA device"
    assert graphs_text(artifact, "onnxruntime", CUDA) == begin + "no, ONNX Runtime has none"
    ranged = Artifact.open(made.weights_export("wan"))
    assert graphs_text(ranged, "pytorch", CUDA) == begin + "no, the export serves ranges of sizes"
    with open_session(artifact, backend="pytorch", device="cpu", cuda_graphs=True) as session:
        assert not session.repeats_steps


def test_the_dry_run_of_a_clip() -> None:
    out = short_wan_export()
    common = (out, "--prompt", PROMPT, "--dry-run", "--steps", 2, "--device", "cpu", "--backend", "pytorch")
    plain = drawn(*common)
    assert "attention" not in plain
    assert "CUDA graphs" not in plain
    said = drawn(*common, "--attention", "int8", "--attention-backend", "reference", "--cuda-graphs", "--fuse")
    begin = said.index("layers fused with what comes before them: no")
    assert (
        begin
        < said.index("int8, by reference, if it is right")
        < said.index("CUDA graphs: no, there is no CUDA device")
    )
    refused(run(*common, "--attention", "int8", "--attention-backend", "x"), "unknown attention library 'x'")
    refused(run(*common, "--attention", "int8", "--attention-backend", "cudnn"), "it needs a CUDA device")
