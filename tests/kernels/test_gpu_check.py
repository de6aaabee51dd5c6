"""gpu_check on the CPU: a correct library passes every check, and each of these wrong ones fails the check meant for it.

The library is ``host_library.HostLibrary``, the C ABI computed from the definitions. What each broken variant does wrong is
a mistake kernels make: tails, rounding, saturation, indices, races, stale caches.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.apart import EndedError
from dvdquant.ops import prepared_cache
from dvdquant.ops.attention.libraries import LIBRARIES, REFERENCE

CHECK = Path(__file__).parents[2] / "kernels" / "check"
sys.path[:0] = [str(CHECK), str(CHECK.parent / "bench")]

import check_attention  # noqa: E402
import check_cases  # noqa: E402
import check_fused  # noqa: E402
import check_kernels  # noqa: E402
import check_ops  # noqa: E402
import check_quantizer  # noqa: E402
import check_report  # noqa: E402
import check_rope  # noqa: E402
import gpu_check  # noqa: E402
from check_compare import check_equal, half_ulp  # noqa: E402
from host_library import HostLibrary  # noqa: E402

from tests.support import wrong_kernels as wrong  # noqa: E402
from tests.support.emulated_kernels import one_thread  # noqa: E402, F401

Rows = Iterator[Any]


PAIRS = ((1, 8), (7, 24), (33, 16))
"""Numbers of tokens and of rows; the last is enough to find any of the faults below."""


def bench(library: Any, sm: int = 90, pairs: tuple[tuple[int, int], ...] = PAIRS) -> Any:
    kernels = check_kernels.GuardedKernels(library, sm)
    return check_kernels.Bench(kernels, torch.device("cpu"), (384,), pairs)


def shapes(b: Any) -> Rows:
    return check_kernels.check_shapes(b)


def large(b: Any) -> Rows:
    return check_kernels.check_large(b, 77, 512, 40, chunk=16)


CHECKS: dict[str, Callable[[Any], Rows]] = {
    "dispatch": check_kernels.check_dispatch,
    "shapes": shapes,
    "extremes": check_kernels.check_extremes,
    "exact": check_kernels.check_exact_sums,
    "large": large,
    "op": check_ops.check_op,
    "pre_quant": check_ops.check_pre_quant,
    "streams": lambda b: check_ops.check_streams(b, 2, 4, 384, 40),
    "fused": check_fused.check_fused,
    "rope": check_rope.check_rope,
    "quantizer": lambda b: check_quantizer.check_quantizer(b, 12, (256,)),
}


# The paths of SM 120 are among those of 80 and 90: what differs there is which one is taken.
@pytest.mark.parametrize("sm", [80, 90, pytest.param(120, marks=pytest.mark.stress)])
@pytest.mark.parametrize("name", CHECKS)
def test_a_correct_library_passes(name: str, sm: int) -> None:
    rows = list(check_kernels.run_all([CHECKS[name](bench(HostLibrary(), sm))]))
    assert rows
    assert [r for r in rows if not r.passed] == []
    assert all(r.cases > 0 for r in rows)


def test_every_path_of_a_device_is_reached() -> None:
    for sm, paths in (
        (80, {"s4_token", "s4_group", "s8_token", "s8_group"}),
        (90, {"s8_wgmma", "s8_group", "e4m3_group"}),
        (120, {"s8_token", "s8_group"}),
    ):
        b = bench(HostLibrary(), sm, PAIRS[:1])
        list(shapes(b))
        assert b.paths == paths


# ------------------------------------------------------------------------------------------------------ wrong libraries


WRONG: list[tuple[type[HostLibrary], str, int, str]] = [
    (wrong.SwappedNibbles, "shapes", 80, "s4_token: codes"),
    (wrong.WrongSums, "shapes", 80, "s4_group: codes"),
    (wrong.Truncated, "shapes", 90, "s8_wgmma: codes"),
    (wrong.RoundedBetweenStages, "shapes", 90, "s8_wgmma: codes"),
    (wrong.OuterNotTransposed, "shapes", 90, "s8_wgmma: codes"),
    (wrong.OuterNotTransposed, "op", 90, "op against float64"),
    (wrong.UnbalancedTail, "pre_quant", 90, "balance in the kernel"),
    (wrong.AsymmetricRange, "extremes", 90, "all codes ±qmax"),
    (wrong.NoFloor, "extremes", 90, "zeros"),
    (wrong.NanHidden, "extremes", 90, "NaN and Inf"),
    (wrong.NanSpreads, "extremes", 90, "NaN and Inf"),
    (wrong.UnwrittenTail, "shapes", 90, "s8_wgmma: product"),
    (wrong.UnwrittenTail, "large", 90, "outputs beyond"),
    (wrong.WritesBeyond, "shapes", 90, "guard zones"),
    (wrong.LosesAGroup, "shapes", 90, "e4m3_group: product"),
    (wrong.LosesAGroup, "op", 90, "op against float64"),
    (wrong.NoBias, "extremes", 90, "zeros give the bias"),
    (wrong.CoarseSums, "exact", 90, "e4m3_group: integer-exact sums"),
    (wrong.CoarseSums, "exact", 80, "s4_group: integer-exact sums"),
    (wrong.ScaleOffByOneBit, "shapes", 90, "prepared bits"),
    (wrong.ScaleOffByOneBit, "shapes", 80, "prepared bits"),
    (wrong.RacyOutput, "shapes", 90, "two runs bit-equal"),
    (wrong.RacyOutput, "shapes", 90, "one call = two calls"),
    (wrong.WrongPath, "dispatch", 90, "dispatch table"),
    (wrong.WrapsRows, "large", 90, "outputs beyond"),
    (wrong.ExpandsWrongly, "shapes", 90, "packed weight, expanded = prepared"),
    (wrong.ExpandsWrongly, "shapes", 120, "packed weight gives the same bits"),
    (wrong.OneScratchForAll, "streams", 120, "packed weights on several streams"),
    (wrong.RoughNorm, "fused", 90, "fused: layer"),
    (wrong.RoughNorm, "fused", 80, "fused: rms"),
    (wrong.RoughGelu, "fused", 90, "fused: gelu"),
    (wrong.OneGate, "fused", 90, "fused: layer"),
    (wrong.SwapsTables, "rope", 90, "rope: 16 bit"),
    (wrong.TurnsTheText, "rope", 90, "rope: 16 bit"),
    (wrong.ForgetsTheBias, "rope", 90, "rope: e4m3"),
    (wrong.NoRotation, "rope", 90, "rope: e4m3"),
    (wrong.RoundsTwice, "rope", 90, "rope: e4m3"),
    (wrong.WidestGrid, "quantizer", 90, "quantizer: search"),
    (wrong.OneCodeOff, "quantizer", 90, "quantizer: codes"),
    (wrong.ForgetsErrors, "quantizer", 90, "quantizer: feedback"),
]


@pytest.mark.parametrize(
    ("library", "check", "sm", "row"), WRONG, ids=[f"{w[0].__name__}-{w[1]}-{w[2]}" for w in WRONG]
)
def test_a_wrong_library_fails(library: type[HostLibrary], check: str, sm: int, row: str) -> None:
    rows = list(check_kernels.run_all([CHECKS[check](bench(library(), sm, PAIRS[-1:]))]))
    failed = [r for r in rows if not r.passed]
    assert any(row in r.name for r in failed), [r.name for r in failed]
    assert all(r.note for r in failed)


def test_a_stale_prepared_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_cache, "tensor_version", lambda tensor: 0)
    rows = {r.name: r.passed for r in check_ops.check_op(bench(HostLibrary()))}
    assert rows["op after weights changed in place"] is False
    assert rows["op against float64"] is True


@pytest.mark.parametrize(
    "error", [RuntimeError("illegal memory access"), KeyError("no such field"), ImportError("no such name")], ids=repr
)
def test_a_raising_check_is_a_failed_row(error: Exception) -> None:
    class Raises(HostLibrary):
        def prepare_weight(self, *args: Any) -> None:
            raise error

    rows = list(check_kernels.run_all([shapes(bench(Raises())), check_kernels.check_dispatch(bench(Raises()))]))
    assert error.args[0] in rows[0].note
    assert [r.passed for r in rows] == [False, True]


def test_a_late_check_is_a_failed_row() -> None:
    b = bench(HostLibrary())
    b.deadline = 0.0
    (row,) = list(shapes(b))
    assert (row.name, row.passed) == ("time", False)


# ----------------------------------------------------------------------------------------------- libraries of attention


def attention_rows(form: str = "fp8", spoil: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Rows of the definition as a library, or of a library that does something else with its output."""
    library = REFERENCE[form]
    if spoil is not None:
        kernel = library.load()
        library = replace(library, load=lambda: lambda *operands: spoil(kernel(*operands)))
    libraries = {"ours": library, "fa3-fwd": LIBRARIES["fa3-fwd"]}
    # SM 8.0, which has no kernels in that library.
    rows = check_attention.check_attention(bench(HostLibrary(), 80), (1, 200, 2, 64), libraries)
    return {row.name: row for row in check_kernels.run_all([rows])}


def test_a_right_library_of_attention_passes_and_a_missing_one_says_why() -> None:
    rows = attention_rows()
    assert list(rows) == ["attention: fa3-fwd", "attention: ours", "attention: ours, of codes"]
    assert rows.pop("attention: fa3-fwd").note == "not run: it has no kernels for SM 8.0"
    for row in rows.values():
        assert (row.passed, row.cases) == (True, 1)
        assert 0.01 < row.worst < 1
        assert re.fullmatch(r"[\d.]+ % from exact, \S+ TOPS, [\d.]+ times as fast as 16 bit", row.note)
    assert list(attention_rows("int8")) == ["attention: fa3-fwd", "attention: ours"]


def test_a_wrong_library_of_attention_fails() -> None:
    def missing(out: Any) -> Any:
        raise OSError("undefined symbol")

    def ragged(out: Any) -> Any:
        """A tail of the last tile that nobody wrote."""
        out[:, 192:] = 0
        return out

    wrong_ones = {
        " % from exact, ": (lambda out: 1.1 * out, lambda out: out / 0, lambda out: out.flip(2), ragged),
        "it gives": (lambda out: out.float(), lambda out: out[:, :-1]),
        "OSError: undefined symbol": (missing,),
    }
    for note, spoils in wrong_ones.items():
        for spoil in spoils:
            row = attention_rows("int8", spoil)["attention: ours"]
            assert not row.passed
            assert note in row.note


def test_a_library_of_attention_that_crashes_is_a_row() -> None:
    """It runs in a process of its own, which is asked for one library after the other."""

    def apart(call: Any, name: str, shape: Any, device: str) -> list[Any]:
        assert call is check_attention.rows_of
        if name == "fa3-fwd":
            raise EndedError("its process was ended by SIGSEGV")
        return [check_kernels.Outcome(f"attention: {name}", True, note=f"{shape} on {device}")]

    names = ("fa3-fwd", "cudnn")
    here = {name: replace(LIBRARIES[name], sms=None, package="") for name in names}
    found = check_attention.check_attention(bench(HostLibrary()), (1, 200, 2, 64), here, apart)
    crashed, after = check_kernels.run_all([found])
    assert (crashed.name, crashed.passed) == ("attention: fa3-fwd", False)
    assert crashed.note == "EndedError: its process was ended by SIGSEGV"
    assert after == check_kernels.Outcome("attention: cudnn", True, note="(1, 200, 2, 64) on cpu")


def test_libraries_of_attention_are_timed_before_tools_run_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """memcheck, racecheck and pytest run on the same GPU; and the time to build is none of the checks'."""
    order: list[str] = []

    class Built(HostLibrary):
        path = tmp_path / "library.so"
        architectures = ("90a",)

    def rows(name: str, note: str = "") -> Callable[..., Iterator[Any]]:
        def run(bench: Any, *_: Any, **__: Any) -> Iterator[Any]:
            order.append(name)
            yield check_kernels.Outcome(name, True, note=note)

        return run

    def beside(name: str) -> Callable[..., Any]:
        def start(*_: Any, **__: Any) -> Any:
            order.append(name)
            return check_kernels.Outcome(name, True, 0)

        return start

    def build() -> Any:
        order.append("build")
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda: 1000.0)
        return Built()

    def late(b: Any) -> Iterator[Any]:
        yield check_kernels.Outcome("deadline", True, note=str(b.deadline))

    for name in [name for name in vars(gpu_check) if name.startswith("check_")]:
        monkeypatch.setattr(gpu_check, name, rows(name))
    monkeypatch.setattr(gpu_check, "check_shapes", late)
    for name in ("start_pytest", "start_sanitizer"):
        monkeypatch.setattr(gpu_check, name, beside(name))
    monkeypatch.setattr(gpu_check, "load_library", build)
    monkeypatch.setattr(gpu_check, "find_library", lambda: Path("library.so"))
    monkeypatch.setattr(gpu_check, "cuda_sm", lambda: 90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    monkeypatch.setattr(gpu_check, "hardware", lambda: {"date": "2026-01-02 03:04 UTC"})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_check.main(["--no-bench", "--seconds", "100", "--out", str(tmp_path)]) == 0
    assert order[:2] == ["build", "check_attention"]
    assert order[2:5] == ["start_pytest", "start_sanitizer", "start_sanitizer"]
    (written,) = tmp_path.glob("*.md")
    assert "| deadline | ok | 1 | 0 | 0 | 1070.0 |" in written.read_text()
    assert "start_pytest" in written.read_text(), "a broken context costs no rows of tools"


def fails() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


# --------------------------------------------------------------------------------------------------- models and reports


def test_a_stack_of_modules_runs_on_the_binding_and_a_wrong_product_fails() -> None:
    b = bench(HostLibrary())
    row, same = check_ops.compare_model(b, "stack", *check_ops.make_stack(b))
    assert row.passed
    assert same.passed
    assert 0 < row.worst <= 1
    unbiased = bench(wrong.NoBias())
    row, same = check_ops.compare_model(unbiased, "stack", *check_ops.make_stack(unbiased))
    assert not row.passed
    assert same.passed
    again = bench(wrong.PreparedTwice())
    row, same = check_ops.compare_model(again, "stack", *check_ops.make_stack(again))
    assert row.passed
    assert not same.passed


@pytest.mark.slow
def test_tiny_wan_runs_on_the_binding() -> None:
    rows = list(check_ops.check_model(bench(HostLibrary())))
    assert [r.name for r in rows[2::2]] == ["tiny Wan (diffusers), a8", "tiny Wan (diffusers), a4"]
    assert all(r.name.endswith("only prepared or packed weights held") for r in rows[1::2])
    assert all(r.passed and r.cases == 1 for r in rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_an_ulp_is_what_rounding_may_lose(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # From fp32, since torch rounds float64 to fp32 on its way.
    y = torch.cat([torch.randn(4096, generator=generator) * 2.0**e for e in (-24, -14, 0, 10)]).double()
    share = (y.to(dtype).double() - y).abs() / half_ulp(y, dtype)
    assert 0.99 < float(share.max()) <= 1


def test_bits_that_differ_are_counted() -> None:
    a = torch.tensor([1.0, float("nan"), -0.0])
    assert check_equal(a, a.clone(), "y").passed
    assert not check_equal(a, a.abs(), "y").passed
    assert not check_equal(a, a[:2], "y").passed


def test_report_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = check_kernels.Outcome("good", True, 3, 0.5, 2)
    bad = check_kernels.Outcome("bad", False, 1, 7.0, 0, "y at [0, 1]: 7 × its bound | more")
    skipped = check_kernels.Outcome("skipped", True, 0, note="not run: no tool")
    collected: list[Any] = []
    assert gpu_check.report(iter([good, skipped]), collected) == 0
    assert gpu_check.report(iter([bad]), collected) == 1
    out = capsys.readouterr().out
    assert "FAILED  bad" in out
    assert "not run skipped" in out
    facts = {"date": "2026-01-02 03:04 UTC", "GPU": "NVIDIA H200, SM 9.0", "driver_version": "1"}
    text = check_report.markdown("gpu-check", facts, collected, "extra")
    assert "| bad | **failed** | 1 | 7 | 0 | y at [0, 1]: 7 × its bound \\| more |" in text
    assert "| skipped | not run |" in text
    assert text.endswith("\nextra\n")
    path = check_report.report_path(tmp_path, facts)
    assert path.name == "2026-01-02-nvidia-h200-gpu-check.md"
    path.touch()
    assert check_report.report_path(tmp_path, facts).name == "2026-01-02-nvidia-h200-gpu-check-2.md", (
        "the first run is kept"
    )


def written(running: gpu_check.Running, seconds: float = 60) -> str:
    """What a tool has written, once it is a whole line."""
    end, text = time.monotonic() + seconds, ""
    while not text.endswith("\n"):
        assert time.monotonic() < end, text
        time.sleep(0.02)
        text = running.said()
    return text


def test_tools_run_beside_and_become_rows() -> None:
    def row(code: str, seconds: float = 60) -> Any:
        running = gpu_check.Running("t", [sys.executable, "-c", code], gpu_check.judge_tool)
        outcome = running.finish(seconds)
        running.stop()
        return outcome

    ran = row("print('3 passed')")
    assert (ran.passed, ran.cases, ran.note) == (True, 1, "3 passed")
    assert not row("raise SystemExit(9)").passed
    refused = row("print('Device not supported'); raise SystemExit(1)")
    assert (refused.passed, refused.cases) == (True, 0)
    late = row("import time; time.sleep(60)", 0)
    assert (late.passed, late.cases) == (True, 0)
    assert "not run to its end" in late.note
    tests = gpu_check.Running("p", [sys.executable, "-c", "import time; time.sleep(60)"], gpu_check.judge_pytest, False)
    assert not tests.finish(0).passed
    for found in ("..F..", "FAILED tests/test_a.py::test_b", "========= Invalid __global__ read of size 4 bytes"):
        code = f"import time; print({found!r}, flush=True); time.sleep(600)"
        running = gpu_check.Running("t", [sys.executable, "-c", code], gpu_check.judge_tool)
        assert written(running).strip() == found
        late = running.finish(0)
        assert not late.passed
        assert found in late.note


def test_stopped_tools_take_their_children_along() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    running = gpu_check.Running("t", [sys.executable, "-c", code], lambda name, status, output: output)
    child = psutil.Process(int(written(running)))
    running.stop()
    end = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child outlives its tool"
        time.sleep(0.02)


def test_tools_end_by_themselves_where_nobody_ends_them() -> None:
    """As where this process was killed; else they would go on beside what is measured next."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    running = gpu_check.Running("t", [sys.executable, "-c", code], lambda name, status, output: output, seconds=3)
    child = psutil.Process(int(written(running)))
    end = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child outlives its time"
        time.sleep(0.02)
    running.stop()


@pytest.mark.parametrize("library", [wrong.WrongAtTheTilesEdge, wrong.SkipsOneToken])
def test_many_tokens_are_checked_at_the_edges_of_tiles(library: type[HostLibrary]) -> None:
    for made, passes in ((HostLibrary(), True), (library(), False)):
        kernels = check_kernels.GuardedKernels(made, 90)
        rows = check_kernels.check_shapes(check_kernels.Bench(kernels, torch.device("cpu"), (256,), ((300, 8),)))
        products = [row.passed for row in rows if row.name.endswith("product")]
        assert all(products) if passes else not any(products)


def test_every_test_for_a_gpu_is_found() -> None:
    """In whichever room of the suite it lies."""
    root = Path(__file__).parents[1]
    marked = {str(p) for p in root.rglob("test_*.py") if "@pytest.mark.gpu" in p.read_text()}
    assert len(marked) > 5
    assert marked <= set(gpu_check.gpu_tests())


def test_pytest_rows_excuse_missing_packages_only() -> None:
    lacks = "ERROR tests/test_a.py - ModuleNotFoundError: No module named 'diffusers'\n"
    row = gpu_check.judge_pytest("p", 1, lacks + "3 passed, 1 error in 2s")
    assert (row.passed, row.cases) == (True, 3)
    assert "missing: diffusers" in row.note
    ours = "ERROR tests/test_a.py - ModuleNotFoundError: No module named 'dvdquant.ops.gone'\n"
    assert not gpu_check.judge_pytest("p", 1, ours + "3 passed, 1 error in 2s").passed
    assert not gpu_check.judge_pytest("p", 1, lacks + "FAILED tests/test_b.py::t - x\n1 failed, 1 error").passed
    assert not gpu_check.judge_pytest("p", 2, lacks + "ERROR tests/test_b.py - SyntaxError\n2 errors").passed
    assert gpu_check.judge_pytest("p", 5, "no tests ran in 1s").cases == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_nothing_but_torch_and_numpy_is_needed_to_begin() -> None:
    """A machine with a GPU has PyTorch; what else is missing there is a row of its own."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
missing, sys.path[:0] = set(sys.argv[1].split()), sys.argv[2].split(":")
sys.meta_path.insert(0, Missing())
import gpu_check
print(gpu_check.main(["--no-bench"]))
"""
    needed = importlib.metadata.requires("dvdquant") or []
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in needed if "extra ==" not in line}
    missing = {*names, "modelopt", "PIL"} - {"torch", "numpy", "typing_extensions"}
    assert {"diffusers", "onnx", "pydantic"} <= missing
    folders = (CHECK, CHECK.parent / "bench", CHECK.parents[1])
    command = [sys.executable, "-c", code, " ".join(missing), ":".join(map(str, folders))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert "needs a CUDA device" in done.stderr, done.stderr


def test_cases_cover_what_is_promised() -> None:
    assert {m for m, _ in check_cases.PAIRS} == set(check_cases.TOKENS)
    assert {n for _, n in check_cases.PAIRS} == set(check_cases.ROWS)
    seen = [(layer.block, layer.outer, layer.dtype) for k in check_cases.FEATURES for _, layer in check_cases.layers(k)]
    assert {d for _, _, d in seen} == {"bf16", "fp16"}
    assert any(outer > 1 for _, outer, _ in seen)
    assert any(block == 1 for block, _, _ in seen)
    assert importlib.util.find_spec("check_cases") is not None
