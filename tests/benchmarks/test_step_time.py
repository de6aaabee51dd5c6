"""The prediction of a block's time against closed forms and the H100 that was measured; the script on toy sizes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks import step_budget as budget
from benchmarks import step_model, step_time
from benchmarks.apart import EndedError
from benchmarks.step_cases import CASES, FLAVOURS, Flavour, select_cases, with_libraries
from benchmarks.step_profile import class_of, profile_classes, sum_by_class
from dvdquant.deploy.sessions import compiled, fusion_check, replay
from dvdquant.errors import UnsupportedError
from dvdquant.ops.attention import ladder
from dvdquant.ops.cuda_linear import CudaKernels
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "kernels" / "check"), str(ROOT / "kernels" / "bench")]

from host_library import HostLibrary  # noqa: E402

CSRC = ROOT / "kernels" / "csrc"
BENCHMARKS = ROOT / "benchmarks"
MEASURED = BENCHMARKS / "results" / "2026-11-26-h100-step-time.md"


@pytest.mark.parametrize(("name", "width", "ffn"), [("wan2.1-1.3b", 1536, 8960), ("wan2.1-14b", 5120, 13824)])
def test_the_work_of_a_wan_block_is_its_closed_form(name: str, width: int, ffn: int) -> None:
    """q, k, v, o twice (k and v of the text are of its 512 words) and the feed-forward network; scores and their sums."""
    (case,) = select_cases([f"{name} 21x60x104"])
    tokens, text = 21 * 30 * 52, case.text_tokens
    linears = 2.0 * width * (tokens * (6 * width + 2 * ffn) + 2 * text * width)
    for bits in (16, 8):
        work = budget.work_of_block(case, bits)
        assert work.flops[budget.LINEARS] == pytest.approx(linears, rel=1e-12)
        assert work.flops[budget.ATTENTION] == 4.0 * tokens**2 * width
        assert work.flops[budget.TEXT_ATTENTION] == 4.0 * tokens * text * width
        # Read in 16 bit, written in 8: the inputs of self-attention, of its output, the two of text attention, both of
        # the feed-forward network, and the text's own.
        quantizing = 3 * (tokens * (5 * width + ffn) + text * width)
        assert work.moved[budget.QUANTIZING] == (0 if bits == 16 else quantizing)
        assert work.moved[budget.POINTWISE] > 40 * tokens * width


def test_the_prediction_is_the_h100_that_was_measured() -> None:
    """Within 2 % in bf16, which one rate was fitted to; a8 within 6 %, which none was."""
    text = MEASURED.read_text().partition("Earlier the same day")[0]
    assert "H100" in text
    rows = re.findall(r"^\| (wan2\.1-\S+ 21x60x104) \| 32760 \| ([\d.]+) \| ([\d.]+) ", text, re.MULTILINE)
    assert len(rows) == 2
    for name, *measured in rows:
        (case,) = select_cases([name])
        for bits, ms, near in zip((16, 8), map(float, measured), (0.02, 0.06)):
            flavour = next(f for f in FLAVOURS if f.bits == bits and not f.compiled)
            predicted = budget.predict(case, flavour, budget.RATES["H100"], budget.work_of_block(case, bits))
            assert sum(predicted.values()) == pytest.approx(ms, rel=near)


def test_packed_weights_cost_what_they_move() -> None:
    (case,) = select_cases(["wan2.1-1.3b 21x60x104"])
    packed, plain = (next(f for f in FLAVOURS if f.name == name) for name in ("a8 eager, packed", "a8 eager"))
    work, rates = budget.work_of_block(case, 8), budget.RATES["H100"]
    with_it, without = (budget.predict(case, flavour, rates, work) for flavour in (packed, plain))
    assert with_it is not None
    assert without is not None
    weights = 8 * 1536**2 + 2 * 1536 * 8960
    added = with_it[budget.QUANTIZING] - without[budget.QUANTIZING]
    assert added == pytest.approx(1.5 * weights / rates.bandwidth / 1e9)
    assert added < 0.02 * sum(without.values())
    # 4-bit tensor cores multiply the packed weight.
    assert budget.expanded_bytes(case, 4, 89) == 0


def test_where_compiled_traffic_was_not_counted_nothing_is_predicted() -> None:
    (case,) = select_cases(["hunyuan"])
    compiled = next(f for f in FLAVOURS if f.compiled)
    assert budget.predict(case, compiled, budget.RATES["H100"], budget.Work()) is None
    lines = budget.table([case], ["H100"], (compiled,))
    assert "not counted" in lines[-1]


def test_classes_of_kernels() -> None:
    for name, kind in {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": budget.ATTENTION,
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": budget.ATTENTION,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": budget.LINEARS,
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>": budget.LINEARS,
        "void dvdq::strip::rotate_quantize_token<false, 1>(dvdq::strip::Params)": budget.QUANTIZING,
        "void dvdq::(anonymous namespace)::expand_packed_kernel(ExpandParams)": budget.QUANTIZING,
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...>>": budget.POINTWISE,
        "triton_red_fused__to_copy_add_linear_mul_native_layer_norm_3": budget.POINTWISE,
        # Libraries of 8-bit attention, as comfy-kitchen 0.2.40 and SageAttention 1.0.6 and 2.2 name their kernels.
        "void qk_int_sv_i8_attn_kernel<128u, 64u, 32u, 64u, 128u>(signed char*)": budget.ATTENTION,
        "void qk_int_sv_f8_attn_kernel<64u, 128u, 128u>(CUtensorMap)": budget.ATTENTION,
        "_attn_fwd": budget.ATTENTION,
        "void (anonymous namespace)::quant_q_kernel<128>(void const*)": budget.QUANTIZING,
        "void (anonymous namespace)::quant_v_int8_kernel<128>(void const*)": budget.QUANTIZING,
        "quant_per_block_int8_kernel": budget.QUANTIZING,
        "quant_query_per_thread_int8_kernel": budget.QUANTIZING,
        "void QuantInt8Kernel<128u, 64u, 1u, false, false, __nv_bfloat16>(__nv_bfloat16*)": budget.QUANTIZING,
        "void TransposePadPermuteKernel<128u, 64u, true, __nv_bfloat16>(__nv_bfloat16*)": budget.QUANTIZING,
        "Memcpy DtoD (Device -> Device)": budget.POINTWISE,
        "aten::addmm": budget.LINEARS,
        "dvdquant::quant_linear": budget.LINEARS,
    }.items():
        assert class_of(name) == kind, name


def test_what_spans_kernels_is_not_counted_beside_them() -> None:
    """Inductor marks every call of a graph with a range, which torch.profiler lists among a GPU's events."""

    def event(key: str, microseconds: float, device: DeviceType, spans: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=device, is_user_annotation=spans,
            self_device_time_total=microseconds, self_cpu_time_total=microseconds,
        )  # fmt: skip

    events = [
        event("nvjet_tst_128x256", 3000.0, DeviceType.CUDA),
        event("triton_poi_fused_add_0", 1000.0, DeviceType.CUDA),
        event("## Call CompiledFxGraph fq3d ##", 4500.0, DeviceType.CUDA, spans=True),
        event("aten::mm", 50.0, DeviceType.CPU),
    ]
    zeros = dict.fromkeys((budget.ATTENTION, budget.QUANTIZING), 0.0)
    assert sum_by_class(events, cuda=True) == {budget.LINEARS: 3.0, budget.POINTWISE: 1.0, **zeros}
    assert sum_by_class(events, cuda=False)[budget.LINEARS] == 0.05


def test_no_kernel_of_ours_is_forgotten() -> None:
    """Each is a product or quantizes: a new one that no pattern knows would be counted as pointwise."""
    names: set[str] = set()
    for path in sorted(CSRC.iterdir()):
        code = path.read_text()
        found = re.findall(r"__global__[^;{]*?\b(\w+)\(const \w+", code)
        assert len(found) == code.count("__global__"), path.name
        names |= set(found)
    assert {"gemm", "fused_quantize", "rope_quantize_kernel"} < names
    for name in names:
        kind = budget.LINEARS if name == "gemm" else budget.QUANTIZING
        assert class_of(f"void dvdq::(anonymous namespace)::{name}<false, 1>(dvdq::Params)") == kind, name


def test_fused_kernels_quantize_what_they_take_over() -> None:
    """The sums that they read and write are no longer pointwise; the block is the same as it was predicted to be."""
    (case,) = select_cases(["wan2.1-14b 21x60x104"])
    work, rates = budget.work_of_block(case, 8), budget.RATES["H100"]
    plain, fused = (budget.predict(case, Flavour(8, compiled=True, fused=f), rates, work) for f in (False, True))
    assert plain is not None
    assert fused is not None
    tokens, width, ffn = 21 * 30 * 52, 5120, 13824
    added = fused[budget.QUANTIZING] - plain[budget.QUANTIZING]
    assert added * rates.bandwidth * 1e9 == pytest.approx(8 * tokens * width)
    saved = sum(plain.values()) - sum(fused.values())
    assert saved * rates.bandwidth * 1e9 == pytest.approx(tokens * (12 * width + 4 * ffn))
    # With 8-bit attention norm and rope of q and k are in a kernel, too.
    rope = budget.predict(case, Flavour(8, compiled=True, fused=True, attention="fp8"), rates, work)
    assert rope is not None
    assert (rope[budget.QUANTIZING] - fused[budget.QUANTIZING]) * rates.bandwidth * 1e9 == pytest.approx(
        8 * tokens * width
    )
    # What inductor counts there, in GB (compiled_launches.py --fuse --rope), for both widths.
    for name, moved in (("wan2.1-14b", 1.69), ("wan2.1-1.3b", 0.51)):
        (case,) = select_cases([f"{name} 21x60x104"])
        rope = budget.predict(case, Flavour(8, compiled=True, fused=True, attention="fp8"), rates, work)
        assert rope is not None
        assert rope[budget.POINTWISE] * rates.bandwidth == pytest.approx(moved, rel=0.04)


def test_the_work_of_a_block_is_counted_once() -> None:
    """It takes about a second, and the tables are written anew after every row."""
    (case,) = select_cases(["wan2.1-1.3b 5x34x60"])
    assert budget.work_of_block(case, 16) is budget.work_of_block(case, 16)


def test_what_has_no_model_is_not_predicted() -> None:
    (case,) = select_cases(["wan2.1-1.3b 5x34x60"])
    for change in ({"masked": True}, {"batch": 2}, {"graphs": True}):
        flavour = replace(Flavour(8), **change)
        assert budget.predict(case, flavour, budget.RATES["H100"], budget.Work()) is None
    assert budget.predict(case, Flavour(8), budget.RATES["H100"], budget.Work()) is not None


# ----------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of two heads in place of the real ones, whose few dozen tokens count as long, and no compiler."""

    def config_of(name: str) -> dict[str, Any]:
        return tiny_models.HUNYUAN if name == "hunyuan-video" else tiny_models.WAN

    monkeypatch.setattr(step_time, "config_of", config_of)
    monkeypatch.setattr(ladder, "MIN_TOKENS", 8)
    monkeypatch.setattr(compiled, "BACKEND", "eager")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' double, and a capture of steps that repeats them on the CPU."""
    double = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]

    def capture(step: replay.Step, inputs: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        output = step(inputs)
        return output, lambda: output.copy_(step(inputs))

    monkeypatch.setattr(step_model, "usable_kernels", lambda device: double)
    monkeypatch.setattr(replay, "capture_step", capture)
    monkeypatch.setattr(step_model, "why_not", lambda device, dynamic, tokens: replay.why_not(CUDA, dynamic, tokens))


CUDA = torch.device("cuda")


def row(case: str, flavour: Flavour, **changes: Any) -> step_time.Row:
    options = argparse.Namespace(device="cpu", scale=4, steps=1, budget=False, recipe="w4a4")
    vars(options).update(changes)
    (found,) = select_cases([case])
    return step_time.row_of(replace(found, depths=(1, 2)), flavour, options, {})


def test_hunyuan_runs_in_8_bits_as_in_a_session(tiny: None) -> None:
    """Its padded words are cut off, and with them the mask, which no 8-bit attention takes."""
    ran = row("hunyuan", Flavour(8, attention="fp8"), scale=16)
    assert not ran.refused
    assert ran.attention.startswith("reference (fp8), ")
    assert "mask" not in ran.attention


def test_hunyuan_has_a_row_with_the_mask_and_one_without(tiny: None) -> None:
    assert any(flavour.masked for flavour in FLAVOURS)
    with_mask = Flavour(16, masked=True)
    assert row("hunyuan", with_mask, scale=16).attention == "16 bit, with a mask"
    assert row("hunyuan", replace(with_mask, masked=False), scale=16).attention == "16 bit"
    assert "no mask" in row("5x34x60", with_mask).refused


@pytest.mark.parametrize(
    "flavour",
    [
        Flavour(8, compiled=True, attention="fp8", fused=True, graphs=True),
        pytest.param(Flavour(4, compiled=True, fused=True), marks=pytest.mark.stress),
        *(pytest.param(flavour, marks=pytest.mark.stress) for flavour in FLAVOURS if not flavour.masked),
    ],
    ids=lambda flavour: flavour.name,
)
def test_every_flavour_runs_on_the_kernels(tiny: None, kernels: None, flavour: Flavour) -> None:
    """And computes what the plain one of its width does, within the error of 8-bit attention and of roundings to bf16."""
    (case,) = select_cases(["5x34x60"])
    options = argparse.Namespace(device="cpu", scale=4, steps=1, budget=False, recipe="w4a4")
    ran = step_time.measure(case, 1, flavour, options)
    wanted = "16 bit" if flavour.attention == "16" else f"reference ({flavour.attention})"
    assert ran.attention.startswith(wanted)
    plain: dict[int, Tensor] = {}
    step_time.distance(Flavour(flavour.bits), step_time.measure(case, 1, Flavour(flavour.bits), options).output, plain)
    apart = step_time.distance(flavour, ran.output, plain)
    assert (apart is None) == (flavour.batch != 1 or flavour == Flavour(flavour.bits))
    assert apart is None or apart < 0.02


def test_a_flavour_that_would_run_as_another_one_does_is_refused(
    tiny: None, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long steps are not captured, and layers are not fused by kernels that fail their self-test, nor without kernels."""
    fused = Flavour(8, fused=True)
    monkeypatch.setattr(fusion_check, "kernels_fuse", lambda *_: "its codes differ")
    refused = row("5x34x60", fused).refused
    assert "fused" in refused
    assert "its codes differ" in refused, "why the self-test failed"
    monkeypatch.setattr(step_model, "usable_kernels", lambda device: None)
    refused = row("5x34x60", fused).refused
    assert "fused" in refused
    assert "no kernels" in refused
    assert f"{replay.MOST_TOKENS} tokens" in row("21x90x160", Flavour(16, graphs=True), scale=2).refused
    monkeypatch.undo()
    assert "no CUDA device" in row("5x34x60", Flavour(16, graphs=True)).refused


def test_a_capture_that_fails_is_a_row(tiny: None, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "capture_step", fail)
    assert "not permitted when stream is capturing" in row("5x34x60", Flavour(16, graphs=True)).refused


def test_sessions_allow_graphs_in_one_case_at_least() -> None:
    """And its attention is long enough for 8 bits."""
    tokens = [frames * (height // 2) * (width // 2) for frames, height, width in (case.latent for case in CASES)]
    assert any(ladder.MIN_TOKENS <= count <= replay.MOST_TOKENS for count in tokens)


def test_libraries_are_compared_in_one_run() -> None:
    flavours = [Flavour(8), Flavour(8, attention="int8"), Flavour(8, attention="fp8")]
    assert with_libraries(flavours, ()) == flavours
    names = [flavour.name for flavour in with_libraries(flavours, ("fa3-fwd", "comfy-kitchen"))]
    assert names == ["a8 eager", "a8 eager, fp8 attention by fa3-fwd", "a8 eager, int8 attention by comfy-kitchen"]
    both = [flavour.name for flavour in with_libraries(flavours[1:], ("reference",))]
    assert both == ["a8 eager, int8 attention by reference", "a8 eager, fp8 attention by reference"]
    assert len({flavour.name for flavour in FLAVOURS}) == len(FLAVOURS)


def test_only_the_card_itself_has_its_rates() -> None:
    assert budget.rates_for("NVIDIA H100 80GB HBM3") == ("H100", budget.RATES["H100"])
    assert budget.rates_for("NVIDIA H200") == ("H200", budget.RATES["H200"])
    for kin in (
        "NVIDIA H200 NVL",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ):
        assert budget.rates_for(kin) is None


def test_how_far_an_output_is_from_the_plain_one() -> None:
    plain: dict[int, torch.Tensor] = {}
    output = torch.tensor([3.0, 4.0])
    assert step_time.distance(Flavour(8, compiled=True), output, plain) is None
    assert step_time.distance(Flavour(8), output, plain) is None
    assert step_time.distance(Flavour(8, compiled=True), output + torch.tensor([0.0, 0.5]), plain) == 0.1
    assert step_time.distance(Flavour(4, compiled=True), output, plain) is None
    assert step_time.distance(Flavour(8, batch=2), output, plain) is None


def test_the_ratio_of_one_batch_is_of_one_branch() -> None:
    rows = [step_time.Row(Flavour(16, compiled=True), 10.0, 100.0), step_time.Row(Flavour(8, batch=2), 16.0, 160.0)]
    assert [line[3] for line in step_time.time_table(CASES[0], rows)] == ["1.00", "1.25"]


def script(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--device", "cpu", "--scale", "4", "--steps", "1", *words])
    return step_time.main()


def test_the_script_runs_on_toy_sizes(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "step.md"
    words = ["--flavour", "a8 eager, fp8 attention", "--attention-backend", "cudnn", "--attention-backend", "reference"]
    assert script(monkeypatch, *words, "--case", "5x34x60", "--budget", "--out", str(out)) == 0
    text = out.read_text()
    assert "the times mean nothing" in text
    name = "a8 eager, fp8 attention by reference"
    assert len(re.findall(rf"^\| wan2\.1-1\.3b 5x34x60 \| {name} \| -?\d", text, re.MULTILINE)) == 2
    (refused,) = re.findall(r"^\|.* fp8 attention by cudnn \| did not run: (.*?) \|", text, re.MULTILINE)
    assert "cudnn" in refused
    assert "CUDA device" in refused, "what it needs"
    assert "| reference (fp8), " in text
    assert "set grid" in text


def test_what_fails_is_a_row_and_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is raised, at any time; only Ctrl-C stops, and the file is whole after every row."""
    out, seen = tmp_path / "step.md", []

    def measure(case: Any, depth: int, flavour: Flavour, options: Any) -> step_time.Times:
        seen.append(out.read_text() if out.exists() else "")
        if flavour.compiled:
            raise torch.OutOfMemoryError("CUDA out of memory") if flavour.masked else RuntimeError("a | b\n\nof ptxas")
        if flavour.bits == 8:
            raise KeyboardInterrupt
        return step_time.Times(float(depth), 0)

    monkeypatch.setattr(step_time, "measure", measure)
    assert script(monkeypatch, "--case", "5x34x60", "--out", str(out)) == 130
    # bf16 eager at two depths, bf16 compiled, with the mask, a8 eager.
    assert ["| bf16 eager | 1.00 |" in text for text in seen] == [False, False, True, True, True]
    assert "| bf16 compiled | did not run: RuntimeError: a \\| b of ptxas |" in seen[3]
    assert "did not run: OutOfMemoryError: CUDA out of memory" in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["step.md"]
    printed = capsys.readouterr()
    assert printed.out.strip() == out.read_text().strip()
    assert "Traceback" in printed.err


def test_a_process_that_ended_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(work: Any, *arguments: Any) -> Any:
        if Flavour(8) in arguments or step_time.switching_cost in arguments:
            raise EndedError("its process was ended by SIGSEGV")
        return step_time.Times(float(arguments[2]), 0)

    options = argparse.Namespace(device="cpu", scale=4, steps=1, budget=False, recipe="w4a4", out=None)
    report = step_time.Report("a GPU", options)
    step_time.measure_all(select_cases(["5x34x60"]), [Flavour(16), Flavour(8), Flavour(4)], report, run)
    ((_, rows),) = report.measured
    assert [row.refused for row in rows] == ["", "its process was ended by SIGSEGV", ""]
    assert "not measured: its process was ended by SIGSEGV" in report.text()
    assert re.search(r"1 runs of each; \d{4}-\d\d-\d\d \d\d:\d\d UTC", report.text()), "when it was measured"


def test_a_profiler_that_sees_nothing_leaves_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where CUPTI is missing; or it raises."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(step_time, "profile_classes", fail)
    assert step_time.classes_of(lambda: None, torch.device("cpu")) == {}
    assert "CUPTI_ERROR_NOT_INITIALIZED" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.step_profile.profile", lambda activities: nullcontext(EventsOfNothing()))
    assert profile_classes(lambda: None, torch.device("cpu")) == {}
    rows = [step_time.Row(Flavour(8), 10.0, 100.0)]
    (cells,) = step_time.budget_table(CASES[0], rows, "another GPU")
    assert cells[2:] == ["– / –"] * 4 + ["10.00 / –"]


class EventsOfNothing:
    """What torch.profiler gives where it saw nothing."""

    def key_averages(self) -> list[Any]:
        return []


def test_nothing_measured_or_nowhere_to_write_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise UnsupportedError("no such thing", fix="another one")

    monkeypatch.setattr(step_time, "measure", refuse)
    monkeypatch.setattr(step_time, "switching_cost", refuse)
    assert script(monkeypatch, "--case", "5x34x60", "--flavour", "a8 eager") == 2
    printed = capsys.readouterr()
    assert "nothing could be measured" in printed.err
    (line,) = [line for line in printed.out.splitlines() if "not measured" in line]
    assert "wan2.1-1.3b 5x34x60" in line
    assert "no such thing" in line, "the error's own words"
    assert script(monkeypatch, "--case", "5x34x60", "--out", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_case_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_budget.py", "--case", "sora"])
    assert budget.main() == 2
    assert "wan2.1-14b 21x60x104" in capsys.readouterr().err
