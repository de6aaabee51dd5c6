"""Reads of a checkpoint in an export: each weight once where memory allows, and the same bytes whether it does or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import dvdquant.export.estimate as estimate
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint import reader
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.read_once import ReadOnce
from dvdquant.model.plan import plan_model
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, poke

# A weight and a norm that hold what is no number: both stages must see it, the second after the first replaced it.
SPOILED = ("blocks.0.attn1.to_q.weight", "blocks.0.norm2.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32, in which a conversion to fp32 returns the tensor itself."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE, torch.float32)
    for name in SPOILED:
        poke(name, float("nan"))(folder)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of a checkpoint was read from the disk."""
    counts: Counter[str] = Counter()
    original = reader.read_tensor_from

    def count(fd: int, info: reader.TensorInfo, path: str | Path) -> torch.Tensor:
        counts[info.name] += 1
        return original(fd, info, path)

    monkeypatch.setattr(reader, "read_tensor_from", count)
    return counts


def quantized(model: Path, work: Path, budget: int) -> tuple[ReadOnce, bytes, tuple[str, ...]]:
    """The checkpoint with what it holds, the weight file, and the names of the tensors with NaN."""
    checkpoint = ReadOnce.of(open_checkpoint(model), budget)
    plan = plan_model(checkpoint.config, get_recipe("w4a4"), torch.bfloat16)
    with ExportTransaction(work, key={"model": "tiny"}) as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress("quiet"), allow_nonfinite=True)
        (name,) = packed.files
        return checkpoint, (transaction.tree / name).read_bytes(), packed.nonfinite


def test_memory_decides_what_is_read_again_and_nothing_else(model: Path, tmp_path: Path, reads: Counter[str]) -> None:
    total = open_checkpoint(model).nbytes
    written, found = {}, {}
    for budget in (0, total // 2, total):
        reads.clear()
        checkpoint, written[budget], found[budget] = quantized(model, tmp_path / str(budget), budget)
        assert checkpoint.held_bytes <= budget
        assert set(reads) == set(checkpoint.tensors)
        if budget == 0:
            assert min(reads.values()) == 2
        elif budget == total:
            assert max(reads.values()) == 1
        else:
            assert set(reads.values()) >= {1, 2}
    assert len(set(written.values())) == 1
    assert {tuple(sorted(names)) for names in found.values()} == {tuple(sorted(SPOILED))}


def test_what_is_held_stays_what_is_in_the_file(model: Path, tmp_path: Path) -> None:
    checkpoint, _, _ = quantized(model, tmp_path / "out", 1 << 30)
    again = open_checkpoint(model)
    assert checkpoint.held_bytes == again.nbytes
    for name in again.tensors:
        held = checkpoint.read(name)
        assert torch.equal(held.view(torch.uint8), again.read(name).view(torch.uint8)), name
        assert not held.is_inference()
    checkpoint.forget()
    assert checkpoint.held_bytes == 0


def test_an_export_with_an_engine_made_from_the_original_weights(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVFP4 needs the weights a third time; with --verify they are read once more, from the disk on purpose."""
    source = tiny.write_checkpoint(tmp_path / "model", tiny.WAN_ONE)
    monkeypatch.setattr(estimate, "memory_limit", lambda: 1 << 40)
    dropped: list[int] = []
    forget = ReadOnce.forget
    monkeypatch.setattr(ReadOnce, "forget", lambda self: (dropped.append(self.held_bytes), forget(self))[1])
    in_process(source, "-o", tmp_path / "out", "--target", "rtx", "--sm", "12.0", "--activations", "4", *SIZES)
    assert [e["precision"] for e in load_manifest(tmp_path / "out").engines] == ["nvfp4"]
    assert set(reads) == set(open_checkpoint(source).tensors)
    assert set(reads.values()) == {1}
    assert dropped == [open_checkpoint(source).nbytes]  # held until the engines were there, and then no longer
