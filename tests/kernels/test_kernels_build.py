"""The kernels' build: dispatch table, source table, cache keys, what counts as a fault, and a cheap compile with nvcc.

The full compile and the reading of its machine code is `make kernels-check`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dvdquant.errors import DvdquantError, ShapeError, UnsupportedError
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.repack import LayerShape

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The build's modules, which import each other by name."""
    sys.path.insert(0, str(KERNELS))
    names = ("build", "check_sass", "ptxas_log", "toolchain")
    saved = {name: sys.modules.pop(name, None) for name in names}
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(KERNELS))
    for name, module in saved.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def library(scripts: SimpleNamespace) -> KernelLibrary:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the host part of the kernels")
    return KernelLibrary(scripts.build.build_emulated())


# ------------------------------------------------------------------------------------------------------ dispatch table

LAYERS = {
    "a8 token": {"act_bits": 8},
    "a4 token, row weights": {"act_bits": 4},
    "a4 token, grouped weights": {"act_bits": 4, "weight_groups": 8},
    "a4 group 64, row weights": {"act_bits": 4, "act_group": 64},
    "a4 group 128, row weights": {"act_bits": 4, "act_group": 128},
    "a4 group 128, weight groups of 128": {"act_bits": 4, "act_group": 128, "weight_groups": 8},
    "a4 group 128, weight groups of 64": {"act_bits": 4, "act_group": 128, "weight_groups": 16},
    "a8 group": {"act_bits": 8, "act_group": 128},
}


def _layer(**changes: object) -> LayerShape:
    return dataclasses.replace(LayerShape(64, 1024, 1, False, 256, 1, 8, 0), **changes)  # type: ignore[arg-type]


def test_readme_table_is_what_the_library_plans(library: KernelLibrary) -> None:
    rows = ["| activations | SM 8.0 8.6 8.7 8.9 | SM 9.0 | SM 10.0 10.3 11.0 12.0 12.1 |", "|---|---|---|---|"]
    for name, changes in LAYERS.items():
        paths = {sm: library.plan_layer(_layer(**changes), sm).path.upper() for sm in SMS}
        columns = [
            {paths[sm] for sm in SMS if chosen(sm)}
            for chosen in (lambda s: s < 90, lambda s: s == 90, lambda s: s > 90)
        ]
        assert [len(column) for column in columns] == [1, 1, 1]
        rows.append(f"| {name} | {' | '.join(column.pop() for column in columns)} |")
    assert "\n".join(rows) in (KERNELS / "README.md").read_text(), "\n".join(["kernels/README.md should hold", *rows])


def test_plan_of_every_path(library: KernelLibrary) -> None:
    for sm in SMS:
        for changes in LAYERS.values():
            layer = _layer(**changes)
            plan = library.plan_layer(layer, sm)
            native = plan.path.startswith("s4")
            assert plan.needs_sums == native
            assert plan.codes == ("s4" if native else "e4m3" if plan.path == "e4m3_group" else "s8")
            assert plan.codes_bytes_per_token == layer.k // (2 if native else 1)
            assert plan.scale_rows == (layer.k // layer.act_group if layer.act_group else 1)
            assert library.workspace_bytes(layer, sm, 0) == 0
            assert library.workspace_bytes(layer, sm, 7) % 256 == 0
            assert library.workspace_bytes(layer, sm, 75600) >= 75600 * plan.codes_bytes_per_token


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"act_bits": 6}, UnsupportedError, "6-bit activations: the kernels run 4 and 8 bits"),
        ({"act_group": 32}, UnsupportedError, "groups of 32: the kernels run one scale per token"),
        ({"act_group": 96}, ShapeError, "activation groups of 96 do not divide k = 1024"),
        ({"k": 1000}, ShapeError, "k = 1000 is no multiple of 32"),
        ({"k": 1056}, ShapeError, "rotation of 1 x 256 channels does not divide k = 1056"),
        ({"block": 48}, ShapeError, "block 48 is no power of two"),
        ({"block": 4096, "k": 4096}, ShapeError, "block 4096 is no power of two from 1 to 2048"),
        ({"weight_groups": 7}, ShapeError, "7 weight groups do not divide"),
        ({"weight_groups": 256}, ShapeError, "weight groups of 4 channels"),
        ({"n": 0}, ShapeError, "0 outputs"),
        ({"k": 1 << 21}, ShapeError, "k is 1 to"),
        ({"k": 40960}, UnsupportedError, "one scale per token over k = 40960"),
        ({"k": 20480 * 2, "block": 1024, "outer": 20, "act_group": 128}, UnsupportedError, "rows of up to 20480"),
        ({"k": 1536, "block": 256, "outer": 6}, UnsupportedError, "outer factors 2"),
    ],
)
def test_layers_that_are_refused(
    library: KernelLibrary, changes: dict[str, object], error: type[DvdquantError], message: str
) -> None:
    for sm in (80, 90, 120):
        with pytest.raises(error, match=re.escape(message)):
            library.plan_layer(_layer(**changes), sm)


# --------------------------------------------------------------------------------------------------------------- build


def test_every_source_is_compiled_and_chosen_architectures_cover_every_sm(scripts: SimpleNamespace) -> None:
    default, sources = scripts.build.read_sources()
    listed = {source.path for source in sources}
    assert listed == {f"csrc/{p.name}" for p in (KERNELS / "csrc").iterdir() if p.suffix in (".cu", ".cpp")}
    assert default == ("80", "87", "90a", "100", "110", "120")
    by_name = {source.name: source for source in sources}
    assert by_name["sm80_gemm_s4.cu"].architectures(default) == ("80", "87")
    assert by_name["sm90a_gemm_s8.cu"].architectures(default) == ("90a",)
    assert by_name["rotate_quantize.cu"].architectures(default) == default
    assert by_name["sm80_gemm_s4.cu"].architectures(("89", "90a")) == ("89",)
    assert [s.name for s in sources if s.left_out(default)] == []
    edge = ("87", "110")
    assert [s.name for s in sources if s.left_out(edge)] == ["sm90a_gemm_s8.cu", "sm90a_gemm_e4m3.cu"]
    assert by_name["sm80_gemm_s8.cu"].architectures(edge) == edge
    assert by_name["api.cpp"].architectures(default) == ()
    assert by_name["sm80_gemm_s8.cu"].uses_cutlass
    assert not by_name["rotate_quantize.cu"].uses_cutlass


def test_launchers_of_left_out_sources_answer_in_words(scripts: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever is left out, left_out.cpp holds its launcher: the library links, and a call says what is missing."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm")
    defined = {}
    for source in scripts.build.read_sources()[1]:
        if source.families and "gemm" in source.name:
            macro = f"-DDVDQ_LEFT_OUT_{Path(source.name).stem.upper()}"
            flags = ["-std=c++17", "-DDVDQ_EMULATE", f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'emulator'}", macro]
            target = tmp_path / "left_out.o"
            subprocess.run(["g++", *flags, "-c", KERNELS / "csrc" / "left_out.cpp", "-o", target], check=True)
            listed = subprocess.run(["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True)
            defined[source.name] = re.findall(r" T dvdq::(\w+)\(", listed.stdout)
    for name, launchers in defined.items():
        text = (KERNELS / "csrc" / name).read_text()
        assert launchers == re.findall(r"^dvdq_status (gemm_\w+)\(", text, re.MULTILINE), name


def test_portable_code_goes_with_the_first_architecture(scripts: SimpleNamespace) -> None:
    source = next(s for s in scripts.build.read_sources()[1] if s.name == "rotate_quantize.cu")
    flags = scripts.build.nvcc_flags(source, ("80", "87"), Path())
    assert [flag for flag in flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_87,code=sm_87",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    plan = next(s for s in scripts.build.read_sources()[1] if s.name == "plan.cpp")
    assert '-DDVDQ_ARCHITECTURES="80;87;compute_80"' in scripts.build.nvcc_flags(plan, ("80", "87"), Path())
    assert '-DDVDQ_ARCHITECTURES="87;110"' in scripts.build.nvcc_flags(plan, ("87", "110"), Path())


def test_gpus_of_a_later_day_run_what_every_gpu_runs(library: KernelLibrary) -> None:
    assert {library.plan_layer(_layer(**changes), 130).path[:2] for changes in LAYERS.values()} == {"s8"}
    assert library.plan_layer(_layer(act_bits=4), 88).path == "s4_token"
    for sm in (75, 79, 91, 95):
        with pytest.raises(UnsupportedError, match=r"8\.0 to 8\.9, 9\.0, and 10\.0 and later"):
            library.plan_layer(_layer(), sm)


def test_cache_key_follows_every_header_and_flag(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = scripts.build
    shutil.copytree(KERNELS / "csrc", tmp_path / "csrc")
    shutil.copytree(KERNELS / "include", tmp_path / "include")
    monkeypatch.setattr(build, "HERE", tmp_path)
    source = tmp_path / "csrc" / "rotate_quantize.cu"
    assert {p.name for p in build.local_files(source)} >= {"codes.cuh", "device.cuh", "kernels.h", "rotate_strip.cuh"}
    keys = [build.content_key(source, ["-O3"], "13.0"), build.content_key(source, ["-O2"], "13.0")]
    keys.append(build.content_key(source, ["-O3"], "13.1"))
    (tmp_path / "csrc" / "prepared.h").write_text("// of another kernel\n")
    assert build.content_key(source, ["-O3"], "13.0") == keys[0]
    (tmp_path / "csrc" / "codes.cuh").open("a").write("\n")
    keys.append(build.content_key(source, ["-O3"], "13.0"))
    assert len(set(keys)) == 4


LOG = """\
ptxas info    : Compiling entry function '_ZN4dvdq1aEv' for 'sm_80'
ptxas info    : Function properties for _ZN4dvdq1aEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 101 registers, used 1 barriers, 384 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN4dvdq1bEv' for 'sm_90a'
ptxas info    : Function properties for _ZN4dvdq1bEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
"""


def test_spills_and_warnings_are_faults(scripts: SimpleNamespace) -> None:
    log = scripts.ptxas_log
    first, second = log.read_kernels(LOG)
    assert (first.architecture, first.registers, first.shared, first.spills) == ("sm_80", 101, 384, 0)
    assert (second.architecture, second.registers, second.stack, second.spills) == ("sm_90a", 255, 16, 20)
    assert log.find_faults(LOG, KERNELS) == ["sm_90a b spills 20 bytes"] or shutil.which("c++filt") is None
    clean = "\n".join(LOG.splitlines()[:4])
    assert log.find_faults(clean, KERNELS) == []
    serialized = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    ours = f"{KERNELS}/csrc/api.cpp(3): warning #177-D: variable was declared but never referenced"
    foreign = "/opt/cutlass/include/cute/tensor.hpp(9): warning #20: something"
    assert log.find_faults("\n".join([clean, serialized, ours, foreign]), KERNELS) == [serialized, ours]


def test_missing_instruction_and_local_memory_are_faults(scripts: SimpleNamespace) -> None:
    check, kernel = scripts.check_sass, scripts.ptxas_log.Kernel("x", "sm_80", 100, 0, 0, 0)
    sass = ".text.x:\n        /*0000*/                   IMMA.16864.S4.S4 R4, R8.ROW, R2.COL, R4 ;\n"
    good = check.read_opcodes(sass)["x"]
    assert check.judge("sm80_gemm_s4.cu", kernel, "k", good).faults == ()
    assert check.judge("sm80_gemm_s8.cu", kernel, "k", good).faults != ()
    local = check.read_opcodes(sass + "        /*0010*/              @!P0 STL.64 [R1+0x8], R4 ;\n")["x"]
    assert "1 accesses to local memory" in check.judge("sm80_gemm_s4.cu", kernel, "k", local).faults[0]
    hopper = dataclasses.replace(kernel, architecture="sm_90a")
    assert not check.judge("mma_grouped.cu", hopper, "grouped::gemm<(grouped::Kind)2>", local).runs


def test_without_nvcc_the_build_says_what_to_do(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    environment["PATH"] = str(tmp_path)
    if (Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc").is_file():
        pytest.skip("this Python carries nvcc")
    command = [
        sys.executable,
        str(KERNELS / "build.py"),
        "--build",
        str(tmp_path / "out"),
        "--only",
        "prepare_weight.cu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "nvcc was not found" in done.stderr
    assert "--fetch-nvcc" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"), [("75", "no kernels for architecture 75"), ("90", "architecture 90;")]
)
def test_unknown_architectures_are_refused(
    scripts: SimpleNamespace, tmp_path: Path, argument: str, message: str
) -> None:
    with pytest.raises(scripts.toolchain.BuildError, match=re.escape(message)):
        scripts.build.build_kernels(tmp_path, (argument,), 1)


def test_host_part_compiles_without_cuda_headers(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    sources = [str(KERNELS / "csrc" / name) for name in ("plan.cpp", "error.cpp", "gemm_workspace.cpp")]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-DDVDQ_HOST_ONLY"]
    command += ["-Wl,--no-undefined", f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'csrc'}", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "plan.so")], check=True, timeout=120)


def test_load_time_kernel_compiles_for_a_gpu(scripts: SimpleNamespace, tmp_path: Path) -> None:
    try:
        nvcc = scripts.toolchain.find_nvcc(tmp_path)
    except scripts.toolchain.BuildError as error:
        pytest.skip(f"needs nvcc: {str(error).splitlines()[0]}")
    source = next(s for s in scripts.build.read_sources()[1] if s.name == "prepare_weight.cu")
    folder = scripts.build.compile_object(source, ("90a",), nvcc, Path(), tmp_path)
    assert {path.name for path in folder.iterdir()} == {"object.o", "log.txt", "sm_90a.cubin"}
    (kernel,) = scripts.ptxas_log.read_kernels((folder / "log.txt").read_text())
    assert kernel.architecture == "sm_90a"
    assert kernel.spills == kernel.stack == 0
    before = (folder / "object.o").stat().st_mtime_ns
    assert scripts.build.compile_object(source, ("90a",), nvcc, Path(), tmp_path) == folder
    assert (folder / "object.o").stat().st_mtime_ns == before
