"""The ctypes binding, the torch glue around it and the ops, on the emulated kernel library (its own device code on the CPU)."""

from __future__ import annotations

import gc
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.errors import ResourceError, ShapeError, UnsupportedError
from dvdquant.export.engines import precision as precision
from dvdquant.ops import cuda_linear
from dvdquant.ops.cuda import find
from dvdquant.ops.cuda import library as cuda_library
from dvdquant.ops.cuda.abi import ABI_VERSION
from dvdquant.ops.cuda.arguments import WeightPointers
from dvdquant.ops.cuda.errors import KernelError
from dvdquant.ops.cuda.find import find_library, load_library
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.cuda_linear import CudaKernels, run_quant_linear
from dvdquant.ops.linear_gemm import linear_gemm
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.prepare_weight import prepare_weight
from dvdquant.ops.prepared_cache import PreparedCache
from dvdquant.ops.quant_linear import quant_linear
from dvdquant.ops.repack import PATHS, LayerShape, prepared_bytes
from dvdquant.ops.rotate_quantize import rotate_quantize
from dvdquant.system.out_of_memory import is_out_of_memory
from tests.support.emulated_kernels import KERNELS, one_thread  # noqa: F401
from tests.support.emulated_kernels import library as library

sys.path[:0] = [str(KERNELS), str(KERNELS / "bench"), str(KERNELS / "check")]

import check_kernels  # noqa: E402
import check_ops  # noqa: E402
from check_cases import GRIDS, layers, make_tokens, make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402

CPU = torch.device("cpu")
SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def bench(library: Any, sm: int) -> Any:
    return check_kernels.Bench(check_kernels.GuardedKernels(library, sm), CPU, (256,), ((3, 8), (5, 24)))


# ------------------------------------------------------------------------------------------------------------ the binding


def test_names_and_sizes(library: KernelLibrary) -> None:
    assert tuple(library.path_name(i) for i in range(len(PATHS))) == PATHS
    for sm in SMS:
        for features in (256, 1536, 5120):
            for _, layer in layers(features, 136):
                plan = library.plan_layer(layer, sm)
                assert plan == HostLibrary().plan_layer(layer, sm), (sm, layer)
                assert plan.prepared_bytes == prepared_bytes(layer, plan.path)
                per_token = plan.codes_bytes_per_token + 4 * plan.scale_rows * (1 + plan.needs_sums)
                assert library.workspace_bytes(layer, sm, 1000) >= 1000 * per_token


def test_statuses_become_errors_with_the_librarys_words(library: KernelLibrary) -> None:
    layer = LayerShape(8, 256)
    with pytest.raises(ShapeError, match="no multiple of 32"):
        library.plan_layer(replace(layer, k=100), 90)
    with pytest.raises(UnsupportedError, match="6-bit activations: the kernels run 4 and 8 bits"):
        library.plan_layer(replace(layer, act_bits=6), 90)
    with pytest.raises(UnsupportedError, match=r"SM 7\.5"):
        library.plan_layer(layer, 75)
    with pytest.raises(UnsupportedError, match="no fp32 activations"):
        library.plan_layer(replace(layer, dtype="fp32"), 90)
    with pytest.raises(ShapeError, match="null"):
        library.prepare_weight(layer, 90, WeightPointers(0, 0, 0, 0), 0, 0, 0)
    kernels = check_kernels.GuardedKernels(library, 90)
    packed = make_weight(layer, "midrise", CPU, 1)
    prepared = kernels.prepare(layer, packed.stored())
    x = kernels.allocate((4, 256), torch.bfloat16, CPU)
    y, workspace = (kernels.allocate((4, 256), torch.bfloat16, CPU) for _ in range(2))
    pointers = (x.data_ptr(), 0, prepared.data_ptr(), y.data_ptr())
    with pytest.raises(ResourceError, match="workspace"):
        library.quant_linear(layer, 90, *pointers, 4, workspace.data_ptr(), 256, 0)


@pytest.mark.parametrize(("code", "memory"), [(2, True), (1, False), (719, False)])
def test_want_of_memory_is_known_by_cudas_code(library: KernelLibrary, code: int, memory: bool) -> None:
    """cudaErrorMemoryAllocation is 2; the words of the message, which here name no memory, decide nothing."""
    kernels, layer = check_kernels.GuardedKernels(library, 90), LayerShape(8, 256)
    stored = make_weight(layer, "midrise", CPU, 1).stored()
    library.c_library.dvdq_emulator_refuse(code)
    with pytest.raises(KernelError, match=rf"prepare_weight: CUDA error {code}\n") as caught:
        kernels.prepare(layer, stored)
    assert is_out_of_memory(caught.value) is memory
    assert kernels.prepare(layer, stored).numel()  # the next launch runs


def test_what_executes_agrees_with_the_plan(library: KernelLibrary) -> None:
    """The manifest's words per SM say the units that the plan's path multiplies on."""
    for sm in precision.TENSORRT_SMS:
        number = round(float(sm) * 10)
        for bits in (4, 8):
            words = precision.what_executes("plugin", bits, sm)
            path = library.plan_layer(LayerShape(64, 256, act_bits=bits), number).path
            assert ("s4 mma" in words) == (path == "s4_token"), (sm, bits, words)
            assert ("8-bit" in words) == path.startswith("s8"), (sm, bits, words)
            grouped = library.plan_layer(LayerShape(64, 256, act_bits=bits, act_group=128), number).path
            assert ("s4 mma" in words) == grouped.startswith("s4"), (sm, bits, grouped)
    planned = {sm for sm in SMS if _plans(library, sm)}
    assert {round(float(sm) * 10) for sm in precision.TENSORRT_SMS} <= planned


def _plans(library: KernelLibrary, sm: int) -> bool:
    try:
        library.plan_layer(LayerShape(64, 256), sm)
    except UnsupportedError:
        return False
    return True


def test_the_library_is_looked_for_where_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVDQUANT_KERNELS", str(tmp_path / "none.so"))
    with pytest.raises(KernelError, match=r"none\.so: there is no such file\n  fix: run `make kernels`"):
        find_library()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("DVDQUANT_KERNELS", str(broken))
    with pytest.raises(KernelError, match="not a usable kernel library"):
        load_library()
    monkeypatch.delenv("DVDQUANT_KERNELS")
    module = tmp_path / "dvdquant" / "ops" / "cuda" / "find.py"
    monkeypatch.setattr(find, "__file__", str(module))
    with pytest.raises(KernelError, match="is not built"):
        load_library()
    for place in ("dvdquant/_native", "build/kernels"):  # a checkout's build comes before the package's
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / find.LIBRARY).touch()
        assert find_library() == tmp_path / place / find.LIBRARY


def test_another_abi_is_refused(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "ABI_VERSION", ABI_VERSION + 1)
    with pytest.raises(KernelError, match="ABI version"):
        KernelLibrary(library.path)


def test_which_gpus_a_library_serves() -> None:
    class Built(KernelLibrary):
        def __init__(self, *architectures: str) -> None:
            self.architectures = architectures

    every = Built("80", "87", "90a", "100", "110", "120", "compute_80")
    assert all(every.serves(sm) for sm in (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121, 130))
    assert not every.serves(75)
    # Tegra chips run their own machine code alone, and nothing else runs it.
    desktop = Built("80", "90a", "100", "120")
    assert [sm for sm in (86, 87, 89, 103, 110, 121) if not desktop.serves(sm)] == [87, 110]
    edge = Built("87", "110")
    assert [sm for sm in (80, 86, 87, 89, 90, 110, 111, 120) if edge.serves(sm)] == [87, 110]
    # PTX is compiled for any GPU since, but not for the paths of 9.0.
    assert not Built("compute_80").serves(90)
    assert Built("compute_80").serves(87)
    assert not Built("compute_").serves(87)
    assert not Built("89").serves(80)
    assert not Built("host").serves(90)


# ----------------------------------------------------------------------------------------------- the device code, emulated


@pytest.mark.parametrize("sm", [89, 90, 120])
def test_emulated_kernels_are_chosen_as_on_the_gpu(library: KernelLibrary, sm: int) -> None:
    rows = list(check_kernels.run_all([check_kernels.check_dispatch(bench(library, sm))]))
    assert rows
    assert [r for r in rows if not r.passed] == []


@pytest.mark.parametrize(
    "sm", [pytest.param(90, marks=pytest.mark.slow), *(pytest.param(sm, marks=pytest.mark.stress) for sm in (89, 120))]
)
def test_emulated_kernels_pass_gpu_check(library: KernelLibrary, sm: int) -> None:
    """The very checks of ``make gpu-check``, on small shapes: our own device code, CUTLASS products by their reference."""
    checks = [
        check_kernels.check_dispatch(bench(library, sm)),
        check_kernels.check_shapes(bench(library, sm)),
        check_kernels.check_extremes(bench(library, sm), 5),
        check_kernels.check_exact_sums(bench(library, sm), 256),
        check_ops.check_op(bench(library, sm)),
        check_ops.check_pre_quant(bench(library, sm), 5, 24),  # one tile of the product
    ]
    rows = list(check_kernels.run_all(checks))
    assert len(rows) > 30
    assert [r for r in rows if not r.passed] == []


# ------------------------------------------------------------------------------------------------------------ torch glue


class Counting(CudaKernels):
    prepared = 0

    def prepare(self, *args: Any) -> torch.Tensor:
        self.prepared += 1
        return super().prepare(*args)


def small_layer(groups: int = 1, act_bits: int = 8) -> tuple[LayerShape, PackedLayer]:
    layer = LayerShape(16, 256, groups, False, 256, 1, act_bits)
    return layer, make_weight(layer, "midrise", CPU, 3)


def test_prepared_weights_are_made_once_and_die_with_the_weight() -> None:
    cache, kernels = PreparedCache(), Counting(HostLibrary(), 90)  # type: ignore[arg-type]
    layer, packed = small_layer()
    x = make_tokens(layer, 5, CPU, 1)
    for bits in (8, 4, 8, 4):  # both widths run on one path here and share an entry
        run_quant_linear(kernels, cache, x, packed, bits, 0)
    assert (kernels.prepared, len(cache)) == (1, 1)
    run_quant_linear(kernels, cache, x, packed, 8, 128)  # another path, with weights in the same form
    assert (kernels.prepared, len(cache)) == (1, 1)
    run_quant_linear(kernels, cache, x, packed, 4, 128)  # as e4m3
    assert (kernels.prepared, len(cache)) == (2, 2)
    assert cache.held_bytes(packed.weight) == 2 * prepared_bytes(layer, "s8_wgmma")
    before = run_quant_linear(kernels, cache, x, packed, 8, 0)
    packed.bias.add_(1)
    after = run_quant_linear(kernels, cache, x, packed, 8, 0)
    assert kernels.prepared == 3
    assert not torch.equal(before, after)
    with torch.inference_mode():  # its tensors count no versions
        other = PackedLayer(*(t.clone() for t in (*packed.stored(), packed.hadamard, packed.outer)))
        assert torch.equal(run_quant_linear(kernels, cache, x, other, 8, 0), after)
    assert len(cache) == 3
    del other, packed
    gc.collect()
    assert len(cache) == 0


def test_what_the_kernels_do_not_run_is_refused() -> None:
    cache, kernels = PreparedCache(), CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    layer, packed = small_layer()
    x = make_tokens(layer, 5, CPU, 1)
    with pytest.raises(UnsupportedError, match="float32 activations"):
        run_quant_linear(kernels, cache, x.float(), packed, 8, 0)
    with pytest.raises(UnsupportedError, match="6-bit"):
        run_quant_linear(kernels, cache, x, packed, 6, 0)
    turned = replace(packed, hadamard=packed.hadamard.flip(0).contiguous())
    with pytest.raises(UnsupportedError, match="Sylvester"):
        run_quant_linear(kernels, cache, x, turned, 8, 0)
    with pytest.raises(ShapeError, match="256 channels"):
        run_quant_linear(kernels, cache, x[:, :128], packed, 8, 0)
    meta = replace(packed, bias=packed.bias.to("meta"))
    with pytest.raises(ShapeError, match="different devices: cpu, meta"):
        run_quant_linear(kernels, cache, x, meta, 8, 0)


def test_layers_without_a_kernel_fall_back_once_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer, packed = small_layer()
    x = make_tokens(layer, 5, CPU, 1)
    cuda_linear.notice_reference.cache_clear()
    monkeypatch.setattr(cuda_linear, "kernels_for", lambda device: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert cuda_linear.quant_linear_cuda(x, packed, 8, 0) is None
    (record,) = caplog.records
    assert "make kernels" in record.getMessage()
    with cuda_linear.reference_policy("raise"), pytest.raises(UnsupportedError, match="make kernels"):
        cuda_linear.quant_linear_cuda(x, packed, 8, 0)
    kernels = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_linear, "kernels_for", lambda device: kernels)
    assert cuda_linear.quant_linear_cuda(x.float(), packed, 8, 0) is None
    y = cuda_linear.quant_linear_cuda(x, packed, 8, 0)
    assert y is not None
    assert len(caplog.records) == 2


# ----------------------------------------------------------------------------------------------------------------- the ops


def op_cases() -> Iterator[tuple[Any, LayerShape, str]]:
    seen = set()
    for sm in (80, 90):
        for grid, layer in layers(256, 16):
            path = HostLibrary().plan_layer(layer, sm).path
            if (path, layer.weight_groups > 1, layer.float_zero_point) not in seen:
                seen.add((path, layer.weight_groups > 1, layer.float_zero_point))
                yield grid, layer, path


CASES = list(op_cases())


@pytest.mark.parametrize(("grid", "layer", "path"), CASES, ids=[f"{c[2]}-{c[0]}" for c in CASES])
def test_ops_on_the_cpu_are_the_layer_in_two_halves(grid: Any, layer: LayerShape, path: str) -> None:
    packed = make_weight(layer, grid.zero, CPU, 5)
    x = make_tokens(layer, 6, CPU, 6)
    quantize = (x, packed.hadamard, packed.outer, layer.act_bits, layer.act_group, path)
    codes, scales, sums = rotate_quantize(*quantize)
    prepared = prepare_weight(*packed.stored(), path)
    multiply = (
        codes,
        scales,
        sums,
        prepared,
        layer.n,
        layer.weight_groups,
        layer.float_zero_point,
        layer.act_group,
        path,
    )
    y = linear_gemm(*multiply, torch.float64)
    want = quant_linear(x.double(), *check_ops.arguments(packed, layer))
    # fp32 against float64 where the expansion is exact; else half a step of 8 bits of the row's largest weight (two of
    # its own kind where it is in groups), which a sum of independent roundings makes about 0.3 %.
    exact = path.startswith("s4") or (layer.weight_groups == 1 and not layer.float_zero_point)
    assert (y - want).norm() <= want.norm() * (1e-5 if exact else 0.02)
    torch.library.opcheck(torch.ops.dvdquant.rotate_quantize.default, quantize)
    torch.library.opcheck(torch.ops.dvdquant.prepare_weight.default, (*packed.stored(), path))
    torch.library.opcheck(torch.ops.dvdquant.linear_gemm.default, (*multiply, torch.bfloat16))


def test_ops_refuse_what_they_cannot_hold() -> None:
    layer, packed = small_layer()
    x = make_tokens(layer, 6, CPU, 6)
    with pytest.raises(UnsupportedError, match="e4m3_group holds no 8-bit codes"):
        rotate_quantize(x, packed.hadamard, packed.outer, 8, 128, "e4m3_group")
    with pytest.raises(UnsupportedError, match="unknown path"):
        prepare_weight(*packed.stored(), "s16")
    codes, scales, sums = rotate_quantize(x, packed.hadamard, packed.outer, 8, 0, "s8_wgmma")
    with pytest.raises(ShapeError, match="prepared weight of 7 bytes"):
        linear_gemm(codes, scales, sums, torch.zeros(7, dtype=torch.uint8), 16, 1, False, 0, "s8_wgmma", torch.bfloat16)
    with pytest.raises(ShapeError, match="scales of shape"):
        linear_gemm(codes, scales, sums, prepare_weight(*packed.stored(), "s8_wgmma"), 16, 1, False, 128, "s8_wgmma", torch.bfloat16)  # fmt: skip # noqa: E501
    kernels = CudaKernels(HostLibrary(), 90)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="s8_wgmma") as caught:
        cuda_linear.layer_with_path(kernels, layer, "s4_token", act_bits=(4, 8))
    assert caught.value.available == "s8_wgmma"


def test_a_compiled_module_calls_the_op() -> None:
    model, inputs = check_ops.make_stack(bench(HostLibrary(), 90))
    eager = model(**inputs)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)[0]
    assert torch.equal(eager, compiled)
    assert math.isfinite(float(compiled.float().norm()))
    assert len(GRIDS) == len(set(GRIDS))


# ------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_op_runs_kernels_on_a_gpu(act_bits: int) -> None:
    if find_library() is None:
        pytest.skip("needs the kernel library: make kernels")
    device = torch.device("cuda")
    layer, packed = small_layer(act_bits=act_bits)
    here = PackedLayer(*(t.to(device) for t in (*packed.stored(), packed.hadamard, packed.outer)))
    x = make_tokens(layer, 33, CPU, 6)
    want = quant_linear(x, *check_ops.arguments(packed, layer)).double()
    with cuda_linear.reference_policy("raise"):
        y = quant_linear(x.to(device), *check_ops.arguments(here, layer)).cpu().double()
    assert (y - want).norm() <= 2.0**-7 * want.norm()
