"""8-bit attention in PyTorch sessions of every family: what it takes over, eager and compiled, and what it leaves alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dvdquant.cli.inspect import summary_text
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.sessions import attention as taken_over
from dvdquant.deploy.sessions import compiled, open_session, pytorch
from dvdquant.deploy.sessions.attention import cut_padded_words, fold_norms, norm_bounds, self_attentions
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import UnsupportedError
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.attention import ladder
from dvdquant.ops.attention.libraries import REFERENCE
from tests.support import session_exports as made
from tests.support.commands import in_process, refused
from tests.support.exporting import TINY_WAN
from tests.support.running import PROMPT, call, drawn, run, short_wan_export

FAMILIES = ("wan", "hunyuan-video", "cogvideox", "ltx-video")


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy models have a few dozen tokens."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)


def sample(artifact: Artifact) -> dict[str, Tensor]:
    return artifact.family().sample(artifact.sizes, artifact.dtype)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wan", "fp8"),
        pytest.param("cogvideox", "int8", marks=pytest.mark.slow),
        pytest.param("hunyuan-video", "int8", marks=pytest.mark.slow),
        pytest.param("ltx-video", "fp8", marks=pytest.mark.slow),
    ],
)
def test_every_family_eager_and_compiled(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to 16-bit attention than the self-test asks of one layer, but not the same; compiled, bit by bit as eager."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    artifact = Artifact.open(made.deep_export(name))
    inputs = sample(artifact)
    with PyTorchSession(artifact) as session:
        assert session.attention is None
        sixteen = session.run(inputs, 8)
    with PyTorchSession(artifact, attention=kind, attention_backend="reference") as session:
        eager = session.run(inputs, 8)
        assert session.attention is not None
        assert session.attention.taken is REFERENCE[kind]
    assert 1e-4 < made.relative(eager, sixteen) < ladder.MAX_ERROR
    torch._dynamo.reset()
    counters.clear()
    with PyTorchSession(artifact, attention=kind, attention_backend="reference", compile=True) as session:
        assert torch.equal(session.run(inputs, 8), eager)
    assert not counters["graph_break"]
    classes = {type(block) for block in compiled.repeated_blocks(made.quantized_model(artifact, "transformer", 8))}
    assert counters["stats"]["unique_graphs"] <= 2 * len(classes)


@pytest.mark.parametrize(
    "name",
    ["wan", "cogvideox", *(pytest.param(name, marks=pytest.mark.stress) for name in ("hunyuan-video", "ltx-video"))],
)
def test_sessions_share_compiled_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reopened, as by a server that loads again, and two at once, as of a model with two transformers."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    artifact = Artifact.open(made.weights_export(name, ranges=False))
    inputs = sample(artifact)
    torch._dynamo.reset()
    counters.clear()
    graphs, outputs = [], []
    options: dict[str, Any] = {"bits": [8], "attention": "fp8", "attention_backend": "reference", "compile": True}
    with PyTorchSession(artifact, **options) as first:
        outputs += [first.run(inputs, 8) for _ in range(2)]
        graphs.append(counters["stats"]["unique_graphs"])
        for _ in range(2):
            with PyTorchSession(artifact, **options) as session:
                outputs.append(session.run(inputs, 8))
                assert session.attention is not None
                assert session.attention.decided
            graphs.append(counters["stats"]["unique_graphs"])
        outputs.append(first.run(inputs, 8))
    assert graphs == graphs[:1] * 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("name", [*FAMILIES[:3], pytest.param("ltx-video", marks=pytest.mark.stress)])  # built as Wan
def test_only_long_self_attention_is_taken_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer once, all of its tokens; text attention never, and nothing below the least length."""
    artifact = Artifact.open(made.deep_export(name))
    inputs = sample(artifact)
    seen: list[tuple[int, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        seen.append(tuple(q.shape))
        assert q.shape == k.shape == v.shape
        # The bounds hold for what is rounded, whatever the data.
        assert bounds is not None
        matrix = hadamard_matrix(q.shape[-1], torch.float32)
        for x, bound in zip((q, k), bounds):
            assert (x.float() @ matrix).abs().max() <= bound * 1.01  # q and k are rounded to 16 bit
        return ladder.exact(q, k, v, scale)

    watched = dataclasses.replace(REFERENCE["fp8"], load=lambda: kernel)
    with PyTorchSession(artifact, attention="fp8", attention_backend="reference") as session:
        assert session.attention is not None
        session.attention.rungs = (watched,)
        session.run(inputs, 8)
        first = len(seen)
        session.run(inputs, 8)
        layers = len(self_attentions(session.model))
    assert len(seen) - first == layers > 1
    words = int(inputs["encoder_attention_mask"].sum()) if "encoder_attention_mask" in inputs else 0
    joint = {"hunyuan-video": words, "cogvideox": artifact.sizes.text_tokens}.get(name, 0)
    assert {shape[1] for shape in seen} == {artifact.family().tokens(*artifact.sizes.at("opt")) + joint}
    monkeypatch.setattr(ladder, "MIN_TOKENS", 4096)
    with PyTorchSession(artifact, attention="fp8", attention_backend="reference") as session:
        session.run(inputs, 8)
        assert session.attention is not None
        assert not session.attention.decided


@pytest.mark.parametrize("name", [*FAMILIES[:3], pytest.param("ltx-video", marks=pytest.mark.stress)])
def test_folding_norms_changes_no_bit(name: str) -> None:
    """Norm weights of different size in q and k, as large models have them: even afterwards, and the same outputs."""
    artifact = Artifact.open(made.deep_export(name))
    model = made.quantized_model(artifact, "transformer", 8)
    generator = torch.Generator().manual_seed(1)
    modules = self_attentions(model)
    norms: list[Any] = [n for m in modules for pair in taken_over.norm_pairs(m) for n in pair]
    for norm in norms:
        size = (torch.rand(norm.weight.shape, generator=generator) * 8 - 4).exp2()
        norm.weight.data = (size * norm.weight.float()).to(norm.weight.dtype)
    inputs = sample(artifact)
    family = artifact.family()
    with torch.no_grad():
        before = model(**family.forward_kwargs(inputs), return_dict=False)[0]
        old = [norm.weight.clone() for norm in norms]
        for module in modules:
            fold_norms(module)
        after = model(**family.forward_kwargs(inputs), return_dict=False)[0]
    assert any(not torch.equal(norm.weight, weight) for norm, weight in zip(norms, old))
    assert torch.equal(before, after)
    for module in modules:
        pairs = taken_over.norm_pairs(module)
        if len(pairs) == 1:
            q, k = (taken_over.pair_sizes(norm) for norm in pairs[0])
            assert (q / k).log2().abs().max() <= 1.001
        bounds = norm_bounds(module)
        assert bounds is not None
        assert bounds.isfinite().all()


def test_libraries_run_with_the_sessions_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They launch their kernels there, wherever their tensors are: a second session has another device."""
    current: list[torch.device] = []
    seen: list[list[torch.device]] = []

    @contextlib.contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None) -> Tensor:
        seen.append(list(current))
        return ladder.exact(q, k, v, scale)

    monkeypatch.setattr(pytorch, "current_device", made_current)
    artifact = Artifact.open(made.weights_export("wan", ranges=False))
    with PyTorchSession(artifact, bits=[8], attention="int8", attention_backend="reference") as session:
        assert session.attention is not None
        session.attention.rungs = (dataclasses.replace(REFERENCE["int8"], load=lambda: kernel),)
        session.run(sample(artifact), 8)
        assert seen
        assert all(devices == [session.device] for devices in seen)
    assert not current


# ---------------------------------------------------------------------------------------------------------- HunyuanVideo


def test_padded_words_are_cut_off_exactly() -> None:
    """In float64 the model with padded words and their mask, and without both, are the same function."""
    artifact = Artifact.open(made.deep_export("hunyuan-video"))
    inputs = sample(artifact)
    mask = torch.zeros_like(inputs["encoder_attention_mask"])
    mask[:, :7] = 1
    inputs["encoder_attention_mask"] = mask
    cut, whole = cut_padded_words(inputs)
    assert whole
    assert cut["encoder_hidden_states"].shape[1] == cut["encoder_attention_mask"].shape[1] == 7
    assert inputs["encoder_hidden_states"].shape[1] == artifact.sizes.text_tokens
    exact = made.reference(artifact, "transformer", 8, inputs)[1]
    without = made.reference(artifact, "transformer", 8, cut)[1]
    assert made.relative(without, exact) < 1e-9


def test_masks_that_are_no_padding_stay() -> None:
    artifact = Artifact.open(made.deep_export("hunyuan-video"))
    inputs = sample(artifact)
    mask = torch.ones_like(inputs["encoder_attention_mask"])
    for kind in ("holes", "none", "two"):
        changed = mask.clone()
        if kind == "holes":
            changed[:, 3] = 0
        if kind == "none":
            changed[:] = 0
        if kind == "two":
            changed = torch.cat((changed, changed))
        given = {**inputs, "encoder_attention_mask": changed}
        got, whole = cut_padded_words(given)
        assert not whole, kind
        assert all(got[key] is given[key] for key in given), kind
    # With a mask that stays, attention is in 16 bit: no library takes one.
    holes = mask.clone()
    holes[:, 3] = 0
    with PyTorchSession(artifact, attention="int8", attention_backend="reference") as session:
        got = session.run({**inputs, "encoder_attention_mask": holes}, 8)
        assert session.attention is not None
        assert not session.attention.decided
    with PyTorchSession(artifact) as session:
        assert torch.equal(got, session.run({**inputs, "encoder_attention_mask": holes}, 8))


# ------------------------------------------------------------------------------------------------------------- options


def test_what_attention_does_not_go_with(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(short_wan_export())
    with pytest.raises(UnsupportedError, match="unknown attention 'int4'") as info:
        open_session(artifact, device="cpu", attention="int4")
    assert "fp8" in str(info.value)
    with pytest.raises(UnsupportedError, match="onnxruntime takes no library"):
        open_session(artifact, backend="onnxruntime", device="cpu", attention_backend="reference")
    with pytest.raises(UnsupportedError, match="attention is in 16 bit here"):
        open_session(artifact, backend="pytorch", device="cpu", attention_backend="reference")
    # Before a clip's text encoder is loaded, or a process of the session starts.
    with pytest.raises(UnsupportedError, match="attention is in 16 bit here"):
        open_generator(artifact, pipeline=TINY_WAN, attention_backend="reference")
    monkeypatch.setattr("dvdquant.deploy.sessions.ProcessSession", lambda *_, **__: pytest.fail("a process starts"))
    with pytest.raises(UnsupportedError, match="attention is in 16 bit here"):
        open_session(artifact, device="process:cpu", attention_backend="reference")
    with open_session(artifact, backend="onnxruntime", device="cpu", attention="int8") as session:
        assert session.attention is None
    (said,) = [r for r in caplog.records if "only PyTorch sessions have int8, not onnxruntime" in r.message]
    assert said.levelno == logging.WARNING
    # The recipe's own, which nobody asked for now, is no warning.
    caplog.clear()
    caplog.set_level(logging.INFO, "dvdquant")
    chosen = {**artifact.manifest.recipe, "attention": "fp8"}
    other = Artifact(artifact.root, dataclasses.replace(artifact.manifest, recipe=chosen), artifact.configs)
    with open_session(other, backend="onnxruntime", device="cpu"):
        pass
    (said,) = [r for r in caplog.records if "only PyTorch sessions have fp8" in r.message]
    assert said.levelno == logging.INFO


def test_without_a_library_a_session_stays_in_16_bit() -> None:
    artifact = Artifact.open(made.deep_export("wan"))
    inputs = sample(artifact)
    with PyTorchSession(artifact) as session:
        sixteen = session.run(inputs, 8)
    with PyTorchSession(artifact, attention="int8") as session:
        assert torch.equal(session.run(inputs, 8), sixteen)
        assert session.attention is not None
        assert session.attention.to_json()["library"] is None


def test_the_command_and_its_trace(tmp_path: Path) -> None:
    short = (short_wan_export(), "--pipeline", TINY_WAN, "--steps", 1, "--device", "cpu", "--prompt", PROMPT)
    more = ("--attention", "int8", "--attention-backend", "reference", "--trace", tmp_path / "t.json")
    drawn(*short, *more, "-o", tmp_path / "a.mp4")
    executed = json.loads((tmp_path / "t.json").read_text())["clips"][0]["executed"]
    assert executed["backend"] == "pytorch"
    assert (executed["attention"]["library"], executed["attention"]["format"]) == ("reference", "int8")
    assert executed["attention"]["error"] < ladder.MAX_ERROR
    out = short_wan_export()
    unknown = (out, "--pipeline", TINY_WAN, "--steps", 1, "--device", "cpu", "--prompt", PROMPT, "--attention", "int8")
    refused(run(*unknown, "--attention-backend", "x", "-o", tmp_path / "c.mp4"), "attention library 'x'", "cudnn")
    line = call(out, "--prompt", PROMPT, "--backend", "onnxruntime", "--attention-backend", "cudnn", "-o", "c.mp4")
    refused(run(*line), "--attention-backend runs in PyTorch")
    line = call(out, "--prompt", PROMPT, "--backend", "onnxruntime", "--attention", "fp8", "-o", "c.mp4")
    refused(run(*line), "ONNX Runtime computes attention in 16 bit, so --attention fp8 does not apply")
    line = (out, "--prompt", PROMPT, "--attention", "16", "--attention-backend", "cudnn", "-o", "c.mp4")
    refused(run(*line), "--attention 16 does not apply")


def test_an_engine_says_what_it_does_instead(tmp_path: Path) -> None:
    line = (
        TINY_WAN,
        "-o",
        tmp_path / "out",
        "--attention",
        "int8",
        "--target",
        "rtx",
        "--sm",
        "8.9",
        "--recipe",
        "w4a4",
        "--dry-run",
    )
    words = " ".join(in_process(*line).split())
    assert "INT8 attention would write its scores to memory" in words
    assert "SM 9.0 (H100, H200, GH200): sageattention-2, fa3-fwd, cudnn, comfy-kitchen" in words
    data = json.loads(in_process(*line, "--log-format", "json"))
    assert data["recipe"]["attention"] == "int8"
    assert "self-attention in FP8" in data["engines"][0]["executes"]
    assert "attention" not in " ".join(
        in_process(TINY_WAN, "-o", tmp_path / "out", "--dry-run").split("what will")[0].split()
    )


def test_inspect_says_what_is_tried() -> None:
    artifact = Artifact.open(made.deep_export("wan"))
    manifest = artifact.manifest
    assert "attention of long sequences" not in summary_text(artifact.root, manifest, False)
    chosen = dataclasses.replace(manifest, recipe={**manifest.recipe, "attention": "fp8"})
    words = summary_text(artifact.root, chosen, False)
    assert "SM 9.0 (H100, H200, GH200): fa3-fwd, cudnn, sageattention-2, comfy-kitchen" in words
    assert "installed here" in words
