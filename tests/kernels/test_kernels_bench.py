"""kernels/bench: floors, table and peers, and the whole benchmark on the CPU with the library computed by PyTorch."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The scripts' modules, which import each other by name."""
    sys.path[:0] = [str(BENCH), str(BENCH.parent / "check")]
    names = ("bench", "peers", "report", "timing", "cublaslt", "host_library")
    loaded: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    yield SimpleNamespace(**loaded)
    sys.path.remove(str(BENCH))
    sys.path.remove(str(BENCH.parent / "check"))
    for name in names:
        del sys.modules[name]


def test_floors_agree_with_the_brief_for_an_h200(modules: SimpleNamespace) -> None:
    """At 4.3 TB/s and 1580 TOPS the layers of the table have these floors (milliseconds, by hand)."""
    report, bench = modules.report, modules.bench
    machine = report.Machine(4.3e12, 1580e12, 790e12)
    rq = [report.floor_rotate_quantize(s, s.k, 1, machine) for s in bench.SHAPES]
    assert rq == pytest.approx([0.2547, 0.2547, 1.0186, 0.1170, 0.2701, 0.0352], rel=2e-3)
    ql = [report.floor_gemm(s, s.k * (s.m + s.n), machine.int8, machine) for s in bench.SHAPES]
    assert ql == pytest.approx([1.419, 5.677, 5.677, 1.0871, 6.774, 0.5707], rel=2e-3)
    bf16 = [report.floor_gemm(s, 2 * s.k * (s.m + s.n), machine.bf16, machine) for s in bench.SHAPES]
    best = [b / (r + q) for b, r, q in zip(bf16, rq, ql)]
    assert best == pytest.approx([1.70, 1.91, 1.70, 1.81, 1.92, 1.88], abs=0.01)


def test_floor_of_a_thin_product_is_its_traffic(modules: SimpleNamespace) -> None:
    report = modules.report
    machine, shape = report.Machine(1e12, 1e15, 1e15), report.Shape(1, 4096, 4096)
    read = shape.k * (shape.m + shape.n)
    assert report.floor_gemm(shape, read, machine.int8, machine) == pytest.approx((read + 8192) / 1e12 * 1e3)
    assert report.floor_gemm(shape, read, 0.0, machine) == report.floor_gemm(shape, read, machine.int8, machine)


def test_table_gives_ratios_to_floor_and_to_the_reference(modules: SimpleNamespace) -> None:
    report = modules.report
    shape, other = report.Shape(64, 32, 16, "a"), report.Shape(8, 32, 16, "b")
    rows = [
        report.Row(None, "machine", "device copy", 0.5, rate="4 TB/s"),
        report.Row(shape, "QL", "A8", 2.0, True, 1.5, "9 T/s", reference=True),
        report.Row(shape, "QL", "peer", 3.0, False, 1.5, "6 T/s"),
        report.Row(shape, "QL", "missing", None, note="absent: no module"),
        report.Row(other, "QL", "peer", 3.0),
    ]
    lines = report.to_markdown(rows, "Title", ["one GPU"]).splitlines()
    assert lines[:3] == ["# Title", "", "- one GPU"]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(cells) for cells in table} == {7}
    assert table[2] == ["", "machine", "device copy", "0.5", "4 TB/s", "–", "–"]
    assert table[3] == ["a 64×32→16", "QL", "**A8**", "2", "9 T/s", "75%", "–"]
    assert table[4] == ["", "QL", "peer", "3", "6 T/s", "50%", "1.50"]
    assert table[5] == ["", "QL", "missing", "–", "absent: no module", "–", "–"]
    assert table[6][0] == "b 8×32→16"
    assert table[6][-1] == "–"  # no reference of its own layer


def test_clocks_are_read_from_samples(modules: SimpleNamespace) -> None:
    parse = modules.timing.parse_clocks
    clocks = parse("1980, 1980, 650.1, 700.00, 55\n1755, 1980, 699.5, 700.00, 61\n17")
    assert (clocks.sm, clocks.limit, clocks.max_sm) == ([1980, 1755], 700, 1980)
    assert "1755 to 1980 MHz" in str(clocks)
    assert "nvidia-smi gave no samples" in str(parse("[N/A], [N/A], [N/A], [N/A], [N/A]\n"))


def test_host_timer_counts_its_calls(modules: SimpleNamespace) -> None:
    calls: list[int] = []
    timer = modules.timing.HostTimer(repeats=7, warm_up=2)

    def call() -> None:
        calls.append(1)
        time.sleep(0.002)

    assert timer.milliseconds(call) >= 2  # sleep never returns early
    assert len(calls) == 9
    assert timer.brief().repeats < 7


def test_random_operands_are_not_zeros_and_repeat(modules: SimpleNamespace) -> None:
    peers, cpu = modules.peers, torch.device("cpu")
    shape = modules.report.Shape(64, 256, 32)
    x = peers.random_tokens(shape, cpu)
    assert torch.equal(x, peers.random_tokens(shape, cpu))
    assert x.dtype == torch.bfloat16
    assert (x != 0).float().mean() > 0.99
    assert peers.random_codes(8, 512, cpu).unique().numel() > 200


def test_whole_benchmark_runs_on_the_cpu(modules: SimpleNamespace, tmp_path: Path) -> None:
    bench, report = modules.bench, modules.report
    shapes = [report.Shape(24, 256, 40, "small"), report.Shape(9, 512, 16, "thin")]
    timer = modules.timing.HostTimer(repeats=2, warm_up=1)
    told: list[str] = []
    rows = bench.run(
        modules.host_library.HostLibrary(),
        "cpu",
        shapes=shapes,
        square=report.Shape(32, 32, 32),
        timer=timer,
        sm=90,
        progress=told.append,
    )
    assert [text for text in told if text[0] != " "] == ["machine", "small 24×256→40", "thin 9×512→16"]
    assert sum(text[0] == " " for text in told) == len([row for row in rows if row.shape])
    ours = [row for row in rows if row.ours]
    assert [row.stage for row in ours] == ["RQ", "QL", "RQ+QL", "EX", "RQ+QL"] * len(bench.MODES) * len(shapes)
    assert all(row.milliseconds is not None and row.milliseconds > 0 and row.floor > 0 for row in ours)
    assert sum(row.reference for row in rows) == 3 * len(shapes)
    assert {"A8 token (s8_wgmma)", "A8 token (s8_wgmma), packed", "A4 group 128 (e4m3_group)"} <= {
        row.name for row in ours
    }
    named = {row.name: row for row in rows if row.shape == shapes[0]}
    assert named["F.linear bf16 + bias"].milliseconds is not None
    # What a CPU does not have is in the table, with the reason.
    assert named["cublasLt int8, int32 out"].note == "absent: not on a CUDA device"
    assert all(peer.name in named for peer in modules.peers.PEERS)
    path = bench.result_path("NVIDIA H200 (test)", tmp_path)
    assert path.name.endswith("-nvidia-h200-test-bench.md")
    bench.write(rows, ["a line"], "NVIDIA H200 (test)", path)
    assert path.read_text().count("|\n") == len(rows) + 2
    assert bench.result_path("NVIDIA H200 (test)", tmp_path).name.endswith("-nvidia-h200-test-bench-2.md")


def test_peers_are_left_out_when_time_is_over(modules: SimpleNamespace) -> None:
    bench, report = modules.bench, modules.report
    rows = bench.run(
        modules.host_library.HostLibrary(),
        "cpu",
        shapes=[report.Shape(4, 256, 16)],
        square=report.Shape(16, 16, 16),
        timer=modules.timing.HostTimer(repeats=1, warm_up=0),
        sm=90,
        seconds=-1.0,
    )
    peers = [row for row in rows if row.shape is not None and not row.ours]
    assert len(peers) == len(modules.peers.PEERS)
    assert all(row.milliseconds is None and "left out" in row.note for row in peers)


def test_what_fails_is_a_row_and_layers_before_it_are_told(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that fails costs its own rows, and a run that is cut off afterwards has those of the layers before."""
    bench, report = modules.bench, modules.report
    shapes = [report.Shape(4, 256, 16), report.Shape(4, 512, 16)]
    told: list[int] = []

    class Fails(modules.host_library.HostLibrary):  # type: ignore[name-defined, misc]
        def linear_gemm(self, layer: Any, *rest: Any) -> None:
            if layer.act_bits == 4 and layer.k == 512:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().linear_gemm(layer, *rest)

    rows = bench.run(
        Fails(), "cpu", shapes=shapes, peers=(), square=report.Shape(16, 16, 16),
        timer=modules.timing.HostTimer(repeats=1, warm_up=0), sm=90, so_far=lambda rows: told.append(len(rows)),
    )  # fmt: skip
    failed = [row for row in rows if row.milliseconds is None and row.ours]
    assert [(row.shape, row.note) for row in failed] == [(shapes[1], "failed: CUDA out of memory")] * 3
    assert len([row for row in rows if row.ours and row.shape == shapes[0]]) == 5 * len(bench.MODES)
    assert told == [len(rows) - 5 - 3, len(rows)]
    gpu_check = importlib.import_module("gpu_check")
    monkeypatch.setattr(bench, "run", lambda *_, so_far, **__: so_far(rows) or rows)
    texts: list[str] = []
    library = SimpleNamespace(architectures=("90a",))
    outcome, text = gpu_check.run_bench(library, torch.device("cpu"), 1.0, texts.append)
    assert (outcome.passed, outcome.cases) == (False, len(rows))
    assert "A4 token, 4×512→16: failed: CUDA out of memory" in outcome.note
    assert text.count("failed: CUDA out of memory") == 3
    assert texts[0].count("\n| ") == text.count("\n| ")

    def cut(*_: Any, so_far: Any, **__: Any) -> Any:
        so_far(rows)
        raise KeyError("cut off")

    monkeypatch.setattr(bench, "run", cut)
    outcome, text = gpu_check.run_bench(library, torch.device("cpu"), 1.0, texts.append)
    assert not outcome.passed
    assert text.count("failed: CUDA out of memory") == 3, "what was measured before it stays"


def test_refused_layer_is_a_row_with_the_reason(modules: SimpleNamespace) -> None:
    bench, report = modules.bench, modules.report
    kernels = modules.bench.CudaKernels(modules.host_library.HostLibrary(), 75)
    shape = report.Shape(4, 256, 16)
    x = modules.peers.random_tokens(shape, torch.device("cpu"))
    machine, timer = report.Machine(1e12, 1e12, 1e12), modules.timing.HostTimer(1, 0)
    (row,) = bench.measure_mode(kernels, bench.MODES[0], x, shape, machine, timer)
    assert row.milliseconds is None
    assert "7.5" in row.note


def test_command_line(modules: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    bench = modules.bench
    assert bench.parse_arguments(["--shapes", "Wan", "--no-peers"]).no_peers
    assert bench.main(["--shapes", "no such layer"]) == 2
    assert "HunyuanVideo 118800×3072→3072" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert bench.main([]) == 2
        assert "CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
def test_cublaslt_gives_the_product(modules: SimpleNamespace) -> None:
    device = torch.device("cuda")
    x, weight = (modules.peers.random_codes(rows, 256, device, rows) for rows in (160, 96))
    exact = (x.double() @ weight.double().t()).to(torch.int32)
    product = modules.cublaslt.Int8Product(x, weight)
    for algorithm in product.algorithms:
        product.y.fill_(-1)
        assert torch.equal(product.run(algorithm), exact)
    product.close()
