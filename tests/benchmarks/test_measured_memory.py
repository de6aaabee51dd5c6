"""The measure of a memory plan: its arrangements on every kind of device, its watches, and a clip on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measured_memory as measured
from dvdquant.ops import cuda_linear
from dvdquant.system import devices, memory
from tests.support.gpu_memory import GPU, gpu_double
from tests.support.running import wan_pipeline

GIB = 1 << 30


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_measured_on_a_gpu(integrated: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded weights where there are kernels, offload where the host has memory of its own; never ONNX Runtime."""
    gpu_double(monkeypatch, integrated, unused=GIB, available=5 * GIB)
    monkeypatch.setattr(devices, "resolve_device", lambda word: GPU)
    monkeypatch.setattr(cuda_linear, "usable_kernels", lambda device: object() if kernels else None)
    found = measured.arrangements("cuda")
    assert {backend for backend, _ in found} == {"pytorch"}
    assert any(how["weights"] == "expanded" for _, how in found) == kernels
    assert any(how.get("offload", False) for _, how in found) != integrated
    assert any(how.get("alternate", False) for _, how in found)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured.arrangements("cpu") == list(measured.ARRANGEMENTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["measured_memory", "--device", "cuda"])
    with pytest.raises(SystemExit, match=r"error: (?s:.*)cuda"):
        measured.main()


def test_a_watch_says_the_most_of_each_kind_beyond_the_beginning() -> None:
    now, starts = [10, 1], []
    watch = measured.Watch(lambda: (now[0], now[1]), lambda: starts.append(1))

    def work() -> str:
        now[:] = [50, 2]
        return "done"

    assert watch(work) == ("done", (40, 1))
    now[:] = [20, 9]
    assert watch(lambda: None) == (None, (10, 8))  # beyond what there was before anything, not before this
    assert len(starts) == 2


def test_a_gpu_that_shares_the_memory_is_asked_for_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(memory, "memory_limit", lambda: 5 * GIB)
    for integrated, used in ((True, 3 * GIB), (False, 7 * GIB)):
        gpu_double(monkeypatch, integrated, unused=GIB, available=5 * GIB)
        watch = measured.watch_gpu(GPU)
        assert watch.before == (used, 7)
        assert watch(lambda: "done") == ("done", (0, 0))
    assert resets == [GPU] * 4


def test_a_clip_is_measured_stage_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, pipeline = wan_pipeline()
    (tmp_path / "out").symlink_to(out)
    (tmp_path / "pipeline").symlink_to(pipeline)
    monkeypatch.setattr(measured, "CLIP", {"steps": 2})
    monkeypatch.setattr(measured, "PROMPT", "a red cat")
    rows = measured.measure(tmp_path, "pytorch", "cpu", {"weights": "packed", "alternate": True})
    assert [row["stage"] for row in rows] == ["text is encoded", "steps are taken", "frames are decoded"]
    assert all(len(row["bytes"]) == 3 and row["bytes"][0] > 0 for row in rows)
    assert all(row["how"] == "packed weights, text encoder before the transformer" for row in rows)
    for on_gpu, kind in ((False, "of it own"), (True, "PyTorch's tensors")):
        lines = measured.table([{"backend": "pytorch", **row} for row in rows], on_gpu=on_gpu).splitlines()
        assert len(lines) == 5
        assert kind in lines[0]
        assert len({line.count("|") for line in lines}) == 1
