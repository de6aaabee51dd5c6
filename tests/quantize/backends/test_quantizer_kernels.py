"""The quantizer's CUDA kernels, their very source run on the CPU by kernels/emulator, against the compiled loops of the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.ops.cuda.arguments import GridPointers, GridShape
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.quantize.backends import cuda_grid, torch_grid
from dvdquant.quantize.backends.cuda_grid import QuantizerKernels
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight, relative_mse
from dvdquant.quantize.gptq import ErrorFeedback
from dvdquant.recipe import WeightSpec
from tests.support.bounds import assert_same_grid
from tests.support.emulated_kernels import library as library
from tests.support.grid_rows import CLOSENESS, GRIDS, assert_as_good, hostile_rows, layer_errors, weights


@pytest.fixture(scope="module")
def kernels(library: KernelLibrary) -> QuantizerKernels:
    return QuantizerKernels(library)


def solve(kernels: QuantizerKernels, w: Tensor, zero_point: str, group: int, solver: str = "search") -> QuantizedWeight:
    return QuantizedWeight(*kernels.search(w, w.shape[1] // group if group else 1, zero_point, solver))


def row_errors(w: Tensor, quantized: QuantizedWeight) -> Tensor:
    return (w.double() - quantized.dequantize(torch.float64)).square().sum(1)


@pytest.mark.parametrize(
    "kind", ["heavy", *(pytest.param(k, marks=pytest.mark.stress) for k in ("gaussian", "rotated"))]
)
@pytest.mark.parametrize(("zero_point", "group"), [*GRIDS, ("float", 64), ("float", 16)])
def test_as_good_as_the_compiled_search(kernels: QuantizerKernels, kind: str, zero_point: str, group: int) -> None:
    """All rows together at most 1 ‰ worse. Of a single row with a float zero-point, which has dozens of minima a per cent apart,
    either may find the better one."""
    w = weights(kind)
    loops = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point))
    found = solve(kernels, w, zero_point, group)
    assert relative_mse(w, found) <= 1.001 * relative_mse(w, loops)
    single = 1.03 if (zero_point, group) == ("float", 0) else 1.01
    assert bool((row_errors(w, found) <= single * row_errors(w, loops)).all())


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_min_max_is_the_same_grid(kernels: QuantizerKernels, zero_point: str, group: int) -> None:
    w = weights("heavy")
    loops = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point, solver="minmax"))
    found = solve(kernels, w, zero_point, group, "minmax")
    # A difference of two weights, a quotient, and a group's share of it: fewer than eight roundings on either side.
    torch.testing.assert_close(found.scale, loops.scale, rtol=16 * 2.0**-24, atol=0)
    assert int((found.group_scale.int() - loops.group_scale.int()).abs().max()) <= 1  # a tie may round either way
    if zero_point == "float":
        assert int((found.zero.int() - loops.zero.int()).abs().max()) <= 1
    else:
        assert torch.equal(found.zero, loops.zero)
    assert_same_grid(w, found, loops)


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_never_above_min_max(kernels: QuantizerKernels, zero_point: str, group: int) -> None:
    """Also where the search looks in the wrong place: rows of two values, of one value, of one weight."""
    w = weights("heavy", 16, 512)
    w[0] = torch.where(torch.arange(512) % 2 == 0, 1.0, -3.0)
    w[1] = 0.7
    w[2], w[2, 100] = 0, -2.5
    w[3, 256:] = 0
    errors = [row_errors(w, solve(kernels, w, zero_point, group, s)) for s in ("search", "minmax")]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-9 * w.square().sum(1)).all())


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_hostile_rows(kernels: QuantizerKernels, zero_point: str, group: int) -> None:
    """Zero rows reconstruct exactly; denormals, one-sided rows and huge ratios stay finite."""
    w = hostile_rows(3e38)
    found = solve(kernels, w, zero_point, group)
    restored = found.dequantize(torch.float64)
    assert bool(torch.isfinite(found.scale).all())
    assert bool((found.scale > 0).all())
    assert bool((found.group_scale >= 1).all())
    assert int(found.codes.min()) >= -8
    assert int(found.codes.max()) <= 7
    assert bool((restored[0] == 0).all())
    assert bool(torch.isfinite(restored).all())
    error, energy = (w.double() - restored).square().sum(1), w.double().square().sum(1)
    assert bool((error <= energy * (1 + 1e-6) + 1e-80).all())
    if zero_point != "midrise" and group in (16, 32, 128):
        assert bool((restored[3, 128:] == 0).all())


@pytest.mark.parametrize(("zero_point", "group"), [("midrise", 0), ("float", 32)])
def test_neither_guards_nor_the_order_of_threads_matter(library: KernelLibrary, zero_point: str, group: int) -> None:
    """Outputs between guard bytes, poisoned before; the same codes under shuffled schedules of threads."""
    w = weights("rotated", 3, 256).contiguous()
    groups = 256 // group if group else 1
    sizes = (3 * 256, 4 * 3, 3 * groups, 3 * groups if zero_point == "float" else 4 * 3)
    seen = []
    for seed in (0, 1, 7):
        library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(seed))
        buffers = [np.full(size + 512, 0xAB, np.uint8) for size in sizes]
        pointers = GridPointers(*(int(b.ctypes.data) + 256 for b in buffers))
        library.search_grid(GridShape(3, 256, groups, zero_point, "search"), w.data_ptr(), pointers, 0)
        for buffer, size in zip(buffers, sizes):
            assert (buffer[:256] == 0xAB).all()
            assert (buffer[256 + size :] == 0xAB).all()
        seen.append([b.tobytes() for b in buffers])
    library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("rows", "features", "block", "zero_point", "group"),
    [(32, 256, 256, "midrise", 0), (45, 512, 256, "float", 64), (1, 160, 160, "midrise", 32), (33, 96, 48, "float", 0)],
)
def test_gptq_is_the_compiled_loop(
    kernels: QuantizerKernels, rows: int, features: int, block: int, zero_point: str, group: int
) -> None:
    """fp32 sums where the loop has fp64: other codes only where a last bit decides."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(rows, features, generator=generator)
    x = torch.randn(4 * block, block, generator=generator) @ torch.randn(block, block, generator=generator)
    gptq = ErrorFeedback((x.T @ x).expand(features // block, block, block))
    grid = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point))
    exact = gptq.round(w, grid).codes
    codes = kernels.round(w, grid.scale, grid.group_scale, grid.zero, gptq.factors.float())
    assert float((codes != exact).float().mean()) <= 1e-3
    assert float((codes != grid.codes).float().mean()) > 0.05  # it did pass something on


def test_shapes_that_no_kernel_takes_are_refused(kernels: QuantizerKernels, library: KernelLibrary) -> None:
    """And known beforehand, so that they go through tensor operations."""
    w, out = torch.zeros(1, 64), GridPointers(8, 8, 8, 8)
    for features, groups in ((40, 1), (20496, 1), (64, 3), (1024, 2), (64, 8)):
        assert not kernels.searches(features, groups, "midrise", "search")
        with pytest.raises(ShapeError):
            library.search_grid(GridShape(1, features, groups, "midrise", "search"), w.data_ptr(), out, 0)
    assert not kernels.searches(64, 1, "paper", "search")
    assert not kernels.searches(64, 1, "midrise", "paper")
    with pytest.raises(UnsupportedError, match="paper"):
        library.search_grid(GridShape(1, 64, 1, "paper", "search"), w.data_ptr(), out, 0)
    assert kernels.searches(20480, 1280, "float", "search")
    assert kernels.rounds(512, 8, 256)
    assert not kernels.rounds(1024, 1, 512)
    for features, groups in ((20480, 1280), (20480, 1)):  # the same limit of shared memory on both sides
        shape = GridShape(0, features, groups, "float", "search")
        library.search_grid(shape, w.data_ptr(), out, 0)
    for block in (8, 24, 512):
        with pytest.raises(ShapeError, match="blocks"):
            library.gptq_round(GridShape(1, 64, 1, "float", "search"), w.data_ptr(), out, w.data_ptr(), block, 0)
    with pytest.raises(ShapeError, match="null"):
        library.search_grid(GridShape(1, 64, 1, "float", "search"), 0, out, 0)


@pytest.fixture
def by_kernels(kernels: QuantizerKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a device with kernels."""
    monkeypatch.setattr(torch_grid, "solves", lambda _, zero_point, solver: "paper" not in (zero_point, solver))
    monkeypatch.setattr(cuda_grid, "quantizer_kernels", lambda device: kernels)


@pytest.mark.usefixtures("by_kernels")
def test_quantize_weight_takes_them() -> None:
    w = weights("rotated")
    kernels = cuda_grid.quantizer_kernels(w.device)
    assert kernels is not None
    quantized = quantize_weight(w.bfloat16(), WeightSpec())
    for a, b in zip(vars(quantized).values(), kernels.search(w.bfloat16().float(), 1, "midrise", "search")):
        assert torch.equal(a, b)
    odd = torch.randn(2, 40)  # of a length that they do not take
    tensors = torch_grid.quantize_rows(odd, 1, "midrise", "search")
    assert torch.equal(quantize_weight(odd, WeightSpec()).codes, tensors[0])


@pytest.mark.stress
@pytest.mark.parametrize(("recipe", "single", "mean"), CLOSENESS[-1:])
def test_layers_are_as_good_as_on_the_cpu(
    by_kernels: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, single: float, mean: float
) -> None:
    """A whole export with the kernels' search; rotation, packing and feedback are the CPU's own."""
    emulated = layer_errors(tmp_path / "kernels", recipe, "cpu")
    monkeypatch.undo()
    loops = layer_errors(tmp_path / "loops", recipe, "cpu")
    assert emulated != loops  # another path did run
    assert_as_good(emulated, loops, single, mean)
