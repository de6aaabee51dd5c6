"""``dvdq bench``: what is timed, what is not counted, and what the table and the JSON say. No time is judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from dvdquant.cli.bench import main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import compiled
from dvdquant.deploy.sessions.attention import MASK
from dvdquant.deploy.sessions.compiled import repeated_blocks
from dvdquant.deploy.sessions.onnxruntime import OnnxRuntimeSession
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.deploy.timing.bench import Timing, bench, executed_text
from dvdquant.deploy.timing.original import OriginalModel, share_blocks
from dvdquant.errors import EngineError
from dvdquant.model.plan import build_skeleton
from dvdquant.ops import cuda_linear
from dvdquant.ops.attention import ladder
from tests.support import tiny_models as tiny
from tests.support.session_exports import deep_export, family_export

ONE: dict[str, Any] = {"components": ["transformer"], "backend": "onnxruntime", "device": "cpu"}


@pytest.fixture(scope="module")
def out() -> Path:
    """Two transformers, with ranges of sizes."""
    return family_export("wan")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_widths_take_turns_and_the_warm_up_is_not_counted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    real = OnnxRuntimeSession.run

    def counted(self: Any, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        called.append(bits)
        return real(self, inputs, bits)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    result = bench(Artifact.open(out), **ONE, warm_up=1, repeats=3, which="min")
    assert called == [4, 8] * 5
    assert [(t.component, t.bits, len(t.seconds)) for t in result.timings] == [
        ("transformer", 4, 3),
        ("transformer", 8, 3),
    ]
    assert all(0 < t.quartiles[0] <= t.median <= t.quartiles[1] for t in result.timings)
    assert (result.backend, result.device) == ("onnxruntime", "cpu")
    artifact = Artifact.open(out)
    smallest = artifact.family().sample(artifact.sizes, artifact.dtype, which="min")
    assert result.sizes["hidden_states"] == list(smallest["hidden_states"].shape)
    assert result.resident_bytes["transformer"]["weights"] > 0


def test_time_ends_it_after_a_whole_turn(out: Path) -> None:
    result = bench(Artifact.open(out), **ONE, warm_up=0, repeats=1000, seconds=0, which="min")
    assert [len(t.seconds) for t in result.timings] == [1, 1]


def test_table_and_json(out: Path, tmp_path: Path) -> None:
    quick = ("--backend", "onnxruntime", "--device", "cpu", "--size", "min", "--repeats", 2, "--warm-up", 0)
    quick += ("--component", "transformer")
    told = run(out, *quick, "-o", tmp_path / "bench.json")
    assert told.exit_code == 0, (told.output, told.exception)
    for part in ("median, ms", "a4", "a8", "1.00", "measured here: onnxruntime on cpu", "hidden_states"):
        assert part in told.output
    written = json.loads((tmp_path / "bench.json").read_text())
    printed = json.loads(run(out, *quick, "--json", "--bits", 8, "--backend", "pytorch").stdout)
    assert [t["act_bits"] for t in written["timings"]] == [4, 8]
    assert [t["act_bits"] for t in printed["timings"]] == [8]
    assert printed["timings"][0]["executes"] == "PyTorch on the CPU, without kernels"
    for timing in (*written["timings"], *printed["timings"]):
        assert len(timing["samples_ms"]) == timing["calls"] == 2
        assert min(timing["samples_ms"]) == timing["milliseconds"]["min"]
    for data in (written, printed):
        assert (data["attention"], data["fused"]) == ({"transformer": "16"}, {"transformer": False})
        assert data["cuda_graphs"] == {"transformer": False}
    assert "attention 16; fused: no; CUDA graphs: no" in told.output


def test_what_ran_of_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library that computed attention is in table and JSON, and that steps could not be captured on a CPU."""
    monkeypatch.setattr(ladder, "MIN_TOKENS", 16)
    asked = ("--device", "cpu", "--repeats", 1, "--warm-up", 0, "--bits", 8, "--attention", "int8", "--cuda-graphs")
    told = run(deep_export("wan"), *asked, "--attention-backend", "reference", "-o", tmp_path / "bench.json")
    assert told.exit_code == 0, (told.output, told.exception)
    assert "attention int8, by reference; fused: no; CUDA graphs: no" in told.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (written["backend"], written["cuda_graphs"]) == ("pytorch", {"transformer": False})
    ran = written["attention"]["transformer"]
    assert (ran["library"], ran["format"], ran["wanted"]) == ("reference", "int8", "int8")
    told = run(deep_export("wan"), *asked, "--backend", "pytorch")
    assert "attention 16, not int8; fused: no" in told.output
    assert "transformer: times" not in told.output, "one row is held against nothing"


def test_the_original_is_timed_beside_the_widths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the same turns, eager and compiled; times are held against the faster of the two."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # Dynamo without the C++ compiler, which takes a minute
    quick = ("--backend", "pytorch", "--device", "cpu", "--repeats", 3, "--warm-up", 0, "--original")
    told = run(deep_export("wan"), *quick, "-o", tmp_path / "bench.json")
    assert told.exit_code == 0, (told.output, told.exception)
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = {timing["name"]: timing for timing in written["timings"]}
    assert [(name, row["act_bits"], row["calls"]) for name, row in rows.items()] == [
        ("a4", 4, 3),
        ("a8", 8, 3),
        ("float32 eager", 16, 3),
        ("float32 compiled", 16, 3),
    ]
    assert written["not_timed"] == {}
    faster = min(("float32 eager", "float32 compiled"), key=lambda name: float(rows[name]["milliseconds"]["median"]))
    assert f"transformer: times as fast as {faster}\n" in told.output
    assert "original model" in rows["float32 eager"]["executes"]


def test_an_original_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(compiled, "BACKEND", no_compiler)
    told = run(deep_export("wan"), "--backend", "pytorch", "--device", "cpu", "--repeats", 1, "--bits", 8, "--original")
    assert told.exit_code == 0, (told.output, told.exception)
    assert "transformer, float32 compiled not timed: " in told.output
    assert "no compiler is here" in told.output
    assert "transformer: times as fast as float32 eager\n" in told.output


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_the_original_computes_as_its_family_eager_compiled_and_cut(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(deep_export(family))
    inputs = {name: value.float() for name, value in artifact.family().sample(artifact.sizes, torch.bfloat16).items()}
    if MASK in inputs:
        inputs[MASK][:, -2:] = 0  # two words are padding
    model = partial(OriginalModel, artifact.family(), torch.float32, torch.device("cpu"))
    output = model(compiled=False, cut=False)(inputs)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch.testing.assert_close(model(compiled=True, cut=True)(inputs), output, rtol=1e-4, atol=1e-5)
    with PyTorchSession(artifact, bits=[8]) as session:
        sample = session.family.sample(artifact.sizes, session.dtype)
        assert output.shape == session.run(sample, 8).shape
    assert output.isfinite().all()
    assert output.std() > 0


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_blocks_of_one_kind_share_their_weights(family: str) -> None:
    skeleton = build_skeleton({**tiny.CONFIGS[family], "num_layers": 3}, torch.float32)
    every = sum(1 for block in repeated_blocks(skeleton) for _ in block.parameters())
    share_blocks(skeleton)
    blocks = repeated_blocks(skeleton)
    assert sum(1 for _ in nn.ModuleList(blocks).parameters()) < every  # each shared one once
    kinds = {type(block): block for block in reversed(blocks)}
    for block in blocks:
        for mine, of_first in zip(block.parameters(), kinds[type(block)].parameters(), strict=True):
            assert mine is of_first


def test_kernels_for_other_gpus_are_not_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is there and serves another SM: the session runs without it, and so it is told."""

    class Elsewhere:
        sm = 120
        library = SimpleNamespace(serves=lambda sm: False)

    monkeypatch.setattr(cuda_linear, "kernels_for", lambda device: Elsewhere())
    session: Any = SimpleNamespace(backend="pytorch", device=torch.device("cuda", 0))
    assert executed_text(session, 8) == "PyTorch without kernels"
    Elsewhere.library.serves = lambda sm: True
    assert executed_text(session, 8) == "PyTorch with the CUDA kernels"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", 6), "6"),
        (("--component", "transformer_9"), "no transformer 'transformer_9'"),
        (("--device", "gpu"), "unknown device"),
        (("--backend", "rtx", "--device", "cpu"), "fix: "),
        (("-o", "/nowhere/bench.json"), "/nowhere"),
        (("--plugin", "/nowhere/plugin.so"), "/nowhere/plugin.so is not there"),
        (("--attention-backend", "cudnn", "--backend", "rtx"), "--attention-backend runs in PyTorch"),
        (("--attention", "int8", "--attention-backend", "x", "--device", "cpu"), "unknown attention library 'x'"),
        (("--attention", "int8", "--backend", "onnxruntime"), "--attention int8 does not apply"),
        (("--compile", "--backend", "rtx"), "--compile runs in PyTorch"),
        (("--plugin", __file__, "--backend", "pytorch"), "--plugin is for TensorRT engines, so --backend pytorch"),
    ],
)
def test_what_is_not_there_is_an_error(arguments: tuple[object, ...], words: str, out: Path) -> None:
    result = run(out, *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert words in result.output


def test_a_call_that_fails_names_the_width(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, binding: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fails)
    with pytest.raises(EngineError, match="a4"):
        bench(Artifact.open(out), backend="onnxruntime", device="cpu")


def test_one_call_has_no_spread() -> None:
    assert Timing("transformer", 4, "x", (0.5,), 1.0, "a4").quartiles == (0.5, 0.5)
