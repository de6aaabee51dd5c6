"""Engine builders: every precision on every SM, packing proved by size and listing, and how builds can fail."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import psutil
import pytest

from dvdquant.backends import backend_name
from dvdquant.errors import EngineError, OutputError, ResourceError, UnsupportedError
from dvdquant.export.engines import Backend, BuildReport, build_engine, load_backend
from dvdquant.export.engines import engine as engine_module
from dvdquant.export.engines.network import WeightMaps, check_custom_ops
from dvdquant.export.engines.precision import RTX_SMS, plan_engines
from dvdquant.export.engines.stage import run_builder
from dvdquant.export.engines.worker import check_device, check_operators
from dvdquant.plugin_library import load_plugin
from dvdquant.recipe import ActivationSpec
from dvdquant.system.progress import Progress
from tests.support import quant_linear_graphs as qg
from tests.support.device_build import plugin_library
from tests.support.engine_building import LOWER, as_tensorrt, build, profile, save, unparsable
from tests.support.exporting import REPOSITORY

LISTED = {"int8": "Int8", "int4-weight-only": "Int4", "nvfp4": "FP4E2M1"}


GRIDS = {
    "a8": qg.Spec(widths=(256, 512, 256), act_bits=8, block=64),
    "a4": qg.Spec(widths=(384, 768, 384), act_bits=4, block=16, outer=12),
    "a8-w32": qg.Spec(widths=(256, 512, 256), act_bits=8, weight_group=32, block=64),
    "a4-g64": qg.Spec(widths=(256, 512, 256), act_bits=4, act_group=64, weight_group=64, block=64),
}


# In the normal run every grid stands once at least, and every way to run it with groups of weights and without.
FAST = {("auto", "bf16", "a8"), ("auto", "bf16", "a4"), ("auto", "bf16", "a4-g64"),
        ("int4-weight-only", "fp16", "a8-w32"), ("int4-weight-only", "fp16", "a4")}  # fmt: skip


@pytest.mark.parametrize(
    ("override", "dtype", "grid"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.stress)
        for case in itertools.product(("auto", "int4-weight-only"), ("bf16", "fp16"), GRIDS)
    ],
)
def test_every_sm_builds_what_the_table_says(grid: str, dtype: str, override: str, tmp_path: Path) -> None:
    base = GRIDS[grid]
    spec = qg.Spec(**{**base.__dict__, "dtype": dtype, "layers": []})
    activation = ActivationSpec(spec.act_bits, spec.act_group)
    plans = plan_engines("tensorrt_rtx", RTX_SMS, [activation], override=override)
    assert [sm for plan in plans for sm in plan.sms] == list(RTX_SMS)
    for plan in plans:
        spec.layers = []
        report = build(save(spec, tmp_path, plan.precision), spec, sms=plan.sms)
        layers = len(spec.layers)
        assert report.products[LISTED[plan.precision]] == layers
        # The packed operands are there in full, and in no wider type.
        weights = sum(layer.packed.size * 2 for layer in spec.layers)
        bits = 8 if plan.precision == "int8" else 4
        assert report.constant_bytes[LISTED[plan.precision]] == weights * bits // 8
        assert report.sms == plan.sms
        assert report.bytes == (tmp_path / "x.engine").stat().st_size


@pytest.mark.parametrize("sm", [pytest.param(sm, marks=[] if sm == "12.0" else [pytest.mark.stress]) for sm in RTX_SMS])
def test_every_precision_builds_alone_on_every_sm_that_takes_it(sm: str, tmp_path: Path) -> None:
    for precision in LOWER:
        if precision == "nvfp4" and not sm.startswith("12"):
            continue
        spec = qg.Spec("bf16", (256, 256), 4, block=64)
        path = save(spec, tmp_path, precision)
        assert build(path, spec, sms=[sm]).products == {LISTED[precision]: 1, "BFloat16": 1}


@pytest.mark.parametrize("sm", ["8.9", *(pytest.param(sm, marks=pytest.mark.stress) for sm in ("8.0", "8.6"))])
def test_nvfp4_before_blackwell_is_the_builders_error(sm: str, tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 256), 4, block=64)
    path = save(spec, tmp_path, "nvfp4")
    with pytest.raises(EngineError, match=r"could not build the engine for SM 8\.(?s:.*)fp4"):
        build(path, spec, sms=[sm])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["derived.bin", "model.onnx", "weights.safetensors"]


def plain_graph(spec: qg.Spec, folder: Path) -> Path:
    """The same chain with 16-bit weights and no quantization at all."""
    kind = qg.DTYPES[spec.dtype]
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape([1, "tokens", spec.widths[0]]))
    h, nodes, constants = x, [], []
    for i, layer in enumerate(spec.layers):
        array = layer.weight().T.astype(kind.numpy())
        tensor = ir.Tensor(array, dtype=kind, name=f"w{i}")
        weight = ir.Value(name=f"w{i}", type=ir.TensorType(kind), shape=tensor.shape, const_value=tensor)
        constants.append(weight)
        for op, inputs in (("MatMul", [h, weight]), ("Relu", None)):
            node = ir.node(op, inputs or [h], name=f"{op}{i}")
            node.outputs[0].name = f"{op}{i}"
            nodes.append(node)
            h = node.outputs[0]
    h.type, h.shape = ir.TensorType(kind), ir.Shape([1, "tokens", spec.widths[-1]])
    graph = ir.Graph([x], [h], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="plain")
    ir.save(ir.Model(graph, ir_version=11), folder / "plain.onnx")
    return folder / "plain.onnx"


@pytest.mark.parametrize("group", [0, pytest.param(64, marks=pytest.mark.stress)])
def test_engine_size_proves_packing(group: int, tmp_path: Path) -> None:
    spec = qg.Spec("bf16", (2048, 2048, 2048), 8, 0, group, block=64)
    sizes = {kind: build(save(spec, tmp_path, kind), spec).bytes for kind in ("int8", "int4-weight-only")}
    sizes["16 bit"] = build(plain_graph(spec, tmp_path), spec).bytes
    assert sizes["int4-weight-only"] < 0.75 * sizes["int8"]
    assert sizes["int4-weight-only"] < 0.4 * sizes["16 bit"]
    assert sizes["int8"] < 0.65 * sizes["16 bit"]


def test_several_sms_share_one_engine_at_no_extra_size(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (512, 512), 8, block=64)
    path = save(spec, tmp_path, "int8")
    alone = build(path, spec, sms=["8.0"])
    together = build(path, spec, sms=["8.0", "8.6", "8.9", "12.0"])
    assert together.bytes < alone.bytes + 4096


def test_report_says_what_was_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = qg.Spec("fp16", (256, 256), 8, block=64)
    path = save(spec, tmp_path, "int8")
    log, cache = tmp_path / "build.log", tmp_path / "timing.cache"
    report = build(
        path, spec, log_file=log, timing_cache=cache, optimization_level=3, workspace_bytes=1 << 30, progress=True
    )
    assert report.backend == "tensorrt_rtx"
    assert report.version == load_backend("rtx").version
    assert report.onnx_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.peak_rss_bytes > report.bytes
    assert BuildReport.from_json(report.to_json()) == report
    assert cache.stat().st_size > 0
    assert "[INFO]" in log.read_text()
    assert "step" in capsys.readouterr().err
    # A cache that exists is read again.
    assert build(path, spec, timing_cache=cache).bytes == report.bytes
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".dvdq")]


def test_serialized_model_with_its_data_elsewhere(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 512), 8, 0, 32, block=64)
    data = tmp_path / "data"
    data.mkdir()
    proto = onnx.load(save(spec, data, "int4-weight-only"), load_external_data=False).SerializeToString()
    arguments = {"backend": "rtx", "sms": ["8.0"], "profile": profile(256)}
    report = build_engine(proto, tmp_path / "a.engine", data_roots=[data], **arguments)
    assert report.constant_bytes["Int4"] == 256 * 512 // 2
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.engine"]
    assert not [p for p in data.iterdir() if p.name.startswith(".dvdq")]
    with pytest.raises(EngineError, match=r"weights\.safetensors cannot be mapped"):
        build_engine(proto, tmp_path / "b.engine", **arguments)
    assert not (tmp_path / "b.engine").exists()


def test_fixed_shapes_need_no_profile(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 256), 8, block=64)
    assert build(save(spec, tmp_path, "int8", rows=32), spec, profile=None).products["Int8"] == 1


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (None, r"lacks dynamic inputs \['x'\]"),
        ({"y": ((1, 1, 1),) * 3}, r"unknown inputs \['y'\]"),
        ({"x": ((1, 16, 128),) * 3}, r"does not fit input x \[1, -1, 256\]"),
        ({"x": ((16, 256),) * 3}, r"does not fit input x"),
    ],
)
def test_profiles_that_do_not_fit(ranges: dict | None, message: str, tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 256), 8, block=64)
    with pytest.raises(EngineError, match=message):
        build(save(spec, tmp_path, "int8"), spec, profile=ranges)


def test_a_failed_build_keeps_the_engine_there_was(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (1024, 1024), 8, block=64)
    path = save(spec, tmp_path, "int8")
    (tmp_path / "x.engine").write_bytes(b"the previous engine")
    with pytest.raises(
        EngineError, match=r"(?s)could not build.*log:.*(OutOfMemory|workspace limit).*raise the workspace limit"
    ):
        build(path, spec, workspace_bytes=1 << 16)
    assert (tmp_path / "x.engine").read_bytes() == b"the previous engine"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".dvdq")]


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have every builder process run ``lines`` first: the interpreter imports this before the worker."""
    hook = folder / "hook"
    hook.mkdir()
    begin = ["import os, signal, sys, time", "if 'dvdquant.export.engines.worker' in sys.orig_argv:"]
    (hook / "sitecustomize.py").write_text("\n".join([*begin, *(f"    {line}" for line in lines)]))
    monkeypatch.setenv("PYTHONPATH", str(hook))


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, qg.Spec]:
    spec = qg.Spec("fp16", (64, 64), 8, block=1)
    return save(spec, tmp_path, "int8"), spec


@pytest.mark.parametrize("signal", ["SIGABRT", "SIGSEGV", "SIGKILL"])
def test_a_crash_of_the_builder_is_an_error(
    signal: str, small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(
        tmp_path, monkeypatch, "os.write(2, b'last words of the builder\\n')", f"os.kill(os.getpid(), signal.{signal})"
    )
    with pytest.raises(EngineError, match=f"of x.engine was killed by {signal}(?s:.*)last words") as caught:
        build(*small)
    assert ("free memory" in str(caught.value)) == (signal == "SIGKILL")
    assert caught.value.fix
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize(
    "lines",
    [
        ("time.sleep(600)",),
        ("os.kill(os.getpid(), signal.SIGSTOP)",),
        ("sys.stdout.flush()", "os.close(1)", "time.sleep(600)"),
    ],
    ids=["sleeps", "stopped", "hangs on its way out"],
)
def test_a_builder_that_hangs_is_ended(
    lines: tuple[str, ...], small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, "os.write(2, b'last words of the builder\\n')", *lines)
    monkeypatch.setattr(engine_module, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(engine_module, "BEAT_SECONDS", 0.1)
    beats: list[tuple[float, float]] = []
    with pytest.raises(EngineError, match=r"of x.engine hangs(?s:.*)last words(?s:.*)--resume"):
        build(*small, alive=lambda seconds, silent: beats.append((seconds, silent)))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".dvdq")]
    if "close" not in str(lines):
        assert len(beats) > 3
        assert beats == sorted(beats)


def test_a_builder_that_works_in_silence_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a processor is a sign of life, and less is none, however slow the machine: both clocks are set here."""
    clock = SimpleNamespace(now=0.0, used=0.0)
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=clock.used / 2, system=clock.used / 2))
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(engine_module, "psutil", SimpleNamespace(Process=lambda pid: process, Error=psutil.Error))
    with (tmp_path / "log").open("wb") as log:
        watch = engine_module.ProcessWatch(SimpleNamespace(pid=1), log)

        def later(part: float, used: float, written: bytes = b"") -> bool:
            clock.now += part * engine_module.SILENT_SECONDS
            clock.used += used
            log.write(written)
            log.flush()
            watch.look()
            return watch.hangs

        assert not any(later(part, used) for part, used in 3 * [(0.9, 1.1), (0.2, 0.0)])
        assert watch.silent == watch.running
        assert not later(0.9, 0.0, b"a line")
        assert watch.silent == 0
        assert not later(0.9, 0.9)
        assert later(0.2, 0.0)


FAILS: dict[str, tuple[str, type[Exception], str]] = {
    "memory": ("MemoryError()", ResourceError, "no memory left"),
    "disk": ("OSError(28, 'No space left on device', '/there')", ResourceError, "/there"),
    "input": ("OSError(5, 'Input/output error', '/there')", OutputError, "/there"),
}


@pytest.mark.parametrize("fault", FAILS)
def test_a_failure_in_the_builder_process_is_an_error_in_words(
    fault: str, small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised, kind, named = FAILS[fault]
    plant(
        tmp_path,
        monkeypatch,
        f"sys.path.append({str(REPOSITORY)!r})",
        "import dvdquant.backends as backend",
        f"def fail(name): raise {raised}",
        "backend.load_backend = fail",
    )
    with pytest.raises(kind, match=named) as caught:
        build(*small)
    assert "x.engine" in str(caught.value)
    assert caught.value.fix  # type: ignore[attr-defined]
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("says", "memory"), [("terminate called: std::bad_alloc", True), ("an assertion failed", False)]
)
def test_memory_that_ends_within_the_library(
    says: str, memory: bool, small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, f"os.write(2, b'{says}\\n')", "os.abort()")
    with pytest.raises(EngineError, match="SIGABRT") as caught:
        build(*small)
    assert caught.value.out_of_memory == memory
    assert ("free memory" in (caught.value.fix or "")) == memory


def test_what_is_no_message_is_log(
    small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["@dvdq {", "@dvdq []", '@dvdq {"kind": 1}', '@dvdq {"other": 1}', "@dvdq " + "[" * 100000, "x" * 1_000_000]
    plant(tmp_path, monkeypatch, *(f"print({text!r})" for text in texts))
    log = tmp_path / "log"
    assert build(*small, log_file=log).bytes > 0
    assert all(text in log.read_text() for text in texts)


def test_a_builder_that_claims_an_engine(
    small: tuple[Path, qg.Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = BuildReport("tensorrt_rtx", "1", ("8.9",), 1.0, 1, 1, "0" * 64)
    message = "@dvdq " + json.dumps({"kind": "report", "report": report.to_json()})
    plant(tmp_path, monkeypatch, f"print({message!r}, flush=True)", "os._exit(0)")
    with pytest.raises(EngineError, match=r"x.engine was built, and left no file"):
        build(*small)


def test_a_process_that_cannot_be_started(small: tuple[Path, qg.Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.sys, "executable", str(small[0]))  # a file, and not executable
    with pytest.raises(EngineError, match=r"of x.engine cannot be started: Permission denied"):
        build(*small)


def test_the_worker_runs_without_pythonpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of its own, as those of users are."""
    monkeypatch.setattr(engine_module, "subprocess", subprocess)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    spec = qg.Spec("fp16", (64, 64), 8, block=1)
    assert build(save(spec, tmp_path, "int8"), spec).bytes > 0


def test_quant_linear_left_is_refused(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (64, 64, 64), 8, block=1)
    path = save(spec, tmp_path, None)
    with pytest.raises(EngineError, match=r"2 dvdquant::QuantLinear nodes are left in the graph: ql0, ql1") as caught:
        build(path, spec)
    assert "lower the graph first" in str(caught.value)


def test_plugins_on_rtx_are_refused(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (64, 64), 8, block=1)
    with pytest.raises(EngineError, match=r"tensorrt_rtx has no plugins, got \['.*libx\.so'\]"):
        build(save(spec, tmp_path, "int8"), spec, plugins=[Path("libx.so")])


def test_rotation_without_its_body_is_refused(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (64, 64), 8, block=16)
    path = save(spec, tmp_path, "int8")
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"without a function body: blocks\.0\.ffn\.rotate \(dvdquant::Rotate\)"):
        build(path, spec)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_drawn_for_a_terminal_alone(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the log of an export goes to a pipe or a file, its builder draws nothing there either."""
    progress = SimpleNamespace(draws_bars=terminal, working=Progress("quiet").working)
    with pytest.raises(EngineError, match="culprit"):
        run_builder(
            unparsable(tmp_path), tmp_path / "x.engine", backend="rtx", sms=["8.9"], profile=None, plugins=(),
            workspace_gib=None, timing_cache=None, optimization_level=None, version_compatible=False,
            data_root=tmp_path, fp8_attentions=0, progress=progress,
        )  # fmt: skip
    assert ("x.engine" in capsys.readouterr().err) == terminal


def test_version_compatible_engines_that_cannot_be(tmp_path: Path) -> None:
    """Of TensorRT-RTX, and of a graph whose operators TensorRT takes from libraries that no session loads."""
    path = unparsable(tmp_path)
    with pytest.raises(
        EngineError, match=r"tensorrt_rtx builds no version-compatible(?s:.*)without --version-compatible"
    ):
        build_engine(path, tmp_path / "x.engine", backend="rtx", sms=["8.9"], version_compatible=True)
    backend = Backend("tensorrt", None, "11.4.0.106")
    parser = load_backend("rtx").module.OnnxParser
    assert callable(parser.get_used_vc_plugin_libraries)
    check_operators(backend, SimpleNamespace(get_used_vc_plugin_libraries=list))
    with pytest.raises(EngineError, match=r"takes from libnvinfer_vc_plugin\.so\.11, which no session loads"):
        check_operators(
            backend, SimpleNamespace(get_used_vc_plugin_libraries=lambda: ["/usr/lib/libnvinfer_vc_plugin.so.11"])
        )


def test_parser_errors_name_the_node(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot parse the graph:\s+culprit \(Det\)"):
        build_engine(unparsable(tmp_path), tmp_path / "x.engine", backend="rtx", sms=["8.9"])


def test_the_engines_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none is no folder"):
        build_engine(b"", tmp_path / "none" / "x.engine", backend="rtx", sms=["8.9"])


@pytest.mark.parametrize("content", [b"", b"\xff" * 100], ids=["empty", "garbage"])
def test_what_is_no_onnx_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(EngineError):
        build_engine(tmp_path / "m.onnx", tmp_path / "x.engine", backend="rtx", sms=["8.9"])
    assert not (tmp_path / "x.engine").exists()


def test_a_graph_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        build_engine(tmp_path / "missing.onnx", tmp_path / "x.engine", backend="rtx", sms=["8.9"])
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize("attack", ["outside", "link", "past the end", "negative", "missing"])
def test_external_data_stays_inside_the_export(attack: str, tmp_path: Path) -> None:
    inside = tmp_path / "export"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"0" * 4096)
    (inside / "w.bin").write_bytes(b"0" * 64)
    (inside / "link").symlink_to(tmp_path / "secret")
    location = {"outside": "../secret", "link": "link", "missing": "none.bin"}.get(attack, "w.bin")
    tensor = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    offset = {"past the end": 60, "negative": -8}.get(attack, 0)
    for key, value in (("location", location), ("offset", offset), ("length", 32)):
        tensor.external_data.add(key=key, value=str(value))
    expected = {"outside": "lies outside", "link": "lies outside", "missing": "cannot be mapped"}.get(
        attack, "are needed"
    )
    with pytest.raises(EngineError, match=f"w: .*{expected}"):
        WeightMaps(inside, [inside]).region(tensor)
    tensor.external_data[0].value, tensor.external_data[1].value = "w.bin", "32"
    assert WeightMaps(inside, [inside]).region(tensor)[1] == 32


def test_truncated_weights(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 256), 8, block=64)
    path = save(spec, tmp_path, "int4-weight-only")
    os.truncate(tmp_path / "weights.safetensors", 1000)
    with pytest.raises(EngineError, match=r"blocks\.0\.ffn\.weight: bytes .* are needed(?s:.*)truncated"):
        build(path, spec)


def test_unknown_names() -> None:
    with pytest.raises(UnsupportedError, match="unknown engine backend 'openvino'"):
        backend_name("openvino")
    with pytest.raises(UnsupportedError, match=r"(?s)has no SM 9\.0.*8\.0, 8\.6, 8\.9, 12\.0"):
        load_backend("rtx").compute_capability("9.0")
    assert load_backend("rtx") == load_backend("tensorrt_rtx")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_missing_tensorrt_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tensorrt cannot be imported(?s:.*)dvdquant\[tensorrt\]"):
        load_backend("tensorrt")
    spec = qg.Spec("fp16", (64, 64), 8, block=1)
    with pytest.raises(EngineError, match=r"dvdquant\[tensorrt\]"):
        build(save(spec, tmp_path, None), spec, backend="tensorrt", plugins=[tmp_path / "libx.so"])


def test_tensorrt_wants_a_plugin_for_quant_linear(tmp_path: Path) -> None:
    model = ir.to_proto(qg.graph(qg.Spec(widths=(64, 64))))
    with pytest.raises(
        EngineError, match=r"1 dvdquant::QuantLinear nodes are left(?s:.*)pass the dvdquant plugin library"
    ):
        check_custom_ops(model, as_tensorrt(), [])
    check_custom_ops(model, as_tensorrt(), [tmp_path / "libx.so"])


def test_plugin_libraries_that_a_builder_does_not_get(tmp_path: Path) -> None:
    """What does not load says so; one for another major version never reaches the registry."""
    backend = as_tensorrt()
    builder = backend.module.Builder(backend.module.Logger(backend.module.Logger.INTERNAL_ERROR))
    registry, asked = builder.get_plugin_registry(), []
    watched = SimpleNamespace(load_library=lambda path: asked.append(path) or registry.load_library(path))
    library = tmp_path / "libx.so"
    library.write_bytes(b"not a library")
    with pytest.raises(EngineError, match=r"libx\.so does not load(?s:.*)make plugin"):
        load_plugin(library, backend, watched)
    assert asked == [str(library)]
    other = plugin_library(tmp_path / "other.so", major=int(backend.version.partition(".")[0]) + 1)
    with pytest.raises(EngineError, match=r"other\.so is built for TensorRT \d+, and this machine has tensorrt"):
        load_plugin(other, backend, watched)
    with pytest.raises(EngineError, match=r"there is no plugin library .*none\.so"):
        load_plugin(tmp_path / "none.so", backend, watched)
    assert asked == [str(library)]


def test_tensorrt_builds_for_the_gpu_it_has() -> None:
    import torch

    present = torch.cuda.is_available() and "{}.{}".format(*torch.cuda.get_device_capability())
    with pytest.raises(EngineError, match=r"cannot build for SM 7\.0 here" if present else "this machine has none"):
        check_device(as_tensorrt(), ("7.0",))
    check_device(load_backend("rtx"), ("7.0",))


@pytest.mark.tensorrt
@pytest.mark.gpu
def test_tensorrt_builds_the_int8_graph_on_its_gpu(tmp_path: Path) -> None:
    import torch

    spec = qg.Spec("fp16", (256, 512, 256), 8, block=64)
    sm = "{}.{}".format(*torch.cuda.get_device_capability())
    report = build(save(spec, tmp_path, "int8"), spec, backend="tensorrt", sms=[sm], timing_cache=tmp_path / "cache")
    assert report.backend == "tensorrt"
    assert (tmp_path / "cache").stat().st_size > 0
