"""BGR in tensor operations (``backends/torch_grid.py``) against the compiled loops and against itself on odd input.

The same operations run on a GPU; here they run on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvdquant.errors import CheckpointError
from dvdquant.quantize.backends import torch_grid
from dvdquant.quantize.backends.torch_grid import quantize_rows
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight, relative_mse
from dvdquant.recipe import WeightSpec
from tests.support.bounds import assert_same_grid
from tests.support.grid_rows import CLOSENESS, GRIDS, assert_as_good, hostile_rows, layer_errors, weights


def solve(w: Tensor, zero_point: str, group: int, solver: str = "search") -> QuantizedWeight:
    return QuantizedWeight(*quantize_rows(w, w.shape[1] // group if group else 1, zero_point, solver))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "rotated"])
@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_as_good_as_the_compiled_search(kind: str, zero_point: str, group: int) -> None:
    """Row by row no more than 1 % worse, and over all rows within 1 ‰, of the search that is within 1 ‰ of a dense one."""
    w = weights(kind)
    loops = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point))
    tensors = solve(w, zero_point, group)
    assert relative_mse(w, tensors) <= 1.001 * relative_mse(w, loops)
    errors = [(w.double() - q.dequantize(torch.float64)).square().sum(1) for q in (tensors, loops)]
    assert bool((errors[0] <= 1.01 * errors[1]).all())


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_min_max_is_the_same_grid(zero_point: str, group: int) -> None:
    w = weights("heavy")
    loops = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point, solver="minmax"))
    tensors = solve(w, zero_point, group, "minmax")
    # A difference of two weights, a quotient, and a group's share of it: fewer than eight roundings on either side.
    torch.testing.assert_close(tensors.scale, loops.scale, rtol=16 * 2.0**-24, atol=0)
    assert bool((tensors.group_scale.int() - loops.group_scale.int()).abs().max() <= 1)  # a tie may round either way
    assert_same_grid(w, tensors, loops)


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_never_above_min_max(zero_point: str, group: int) -> None:
    w = weights("heavy", 64, 512)
    errors = [
        (w.double() - solve(w, zero_point, group, solver).dequantize(torch.float64)).square().sum(1)
        for solver in ("search", "minmax")
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())


@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_hostile_rows(zero_point: str, group: int) -> None:
    """Zero rows and groups reconstruct exactly; denormals, one-sided rows and huge ratios stay finite."""
    w = hostile_rows(1e38)
    quantized = solve(w, zero_point, group)
    restored = quantized.dequantize(torch.float64)
    assert bool(torch.isfinite(quantized.scale).all())
    assert bool((quantized.scale > 0).all())
    assert bool((quantized.codes >= -8).all())
    assert bool((quantized.codes <= 7).all())
    assert bool((restored[0] == 0).all())
    assert bool(torch.isfinite(restored).all())
    error, energy = (w.double() - restored).square().sum(1), w.double().square().sum(1)
    assert bool((error <= energy + 1e-80).all())
    if zero_point != "midrise" and group in (16, 32, 128):
        assert bool((restored[3, 128:] == 0).all())


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights("heavy", 24, 256)
    whole = solve(w, "midrise", 64)
    monkeypatch.setattr(torch_grid, "LOOKUPS_AT_ONCE", 4096)
    for a, b in zip(vars(whole).values(), vars(solve(w, "midrise", 64)).values()):
        assert torch.equal(a, b)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a device whose weights are quantized where they are."""
    monkeypatch.setattr(torch_grid, "solves", lambda _, zero_point, solver: "paper" not in (zero_point, solver))


@pytest.mark.usefixtures("on_device")
def test_quantize_weight_takes_it() -> None:
    w = weights("rotated")
    quantized = quantize_weight(w.bfloat16(), WeightSpec())
    for a, b in zip(vars(quantized).values(), quantize_rows(w.bfloat16().float(), 1, "midrise", "search")):
        assert torch.equal(a, b)
    w[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match="1 non-finite"):
        quantize_weight(w, WeightSpec())


@pytest.mark.gpu
@pytest.mark.parametrize(("zero_point", "group"), GRIDS)
def test_on_a_gpu(zero_point: str, group: int) -> None:
    w = weights("rotated", 128, 3072)
    here = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point))
    there = quantize_weight(w.cuda(), WeightSpec(group_size=group, zero_point=zero_point))
    assert there.codes.is_cuda
    assert relative_mse(w, there.dequantize().cpu()) <= 1.001 * relative_mse(w, here)


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "single", "mean"), CLOSENESS)
def test_export_on_a_gpu(tmp_path: Path, recipe: str, single: float, mean: float) -> None:
    """A whole export quantized on the GPU is as good as on the CPU."""
    here, there = (layer_errors(tmp_path / device, recipe, device) for device in ("cpu", "cuda"))
    assert_as_good(there, here, single, mean)


@pytest.mark.stress
@pytest.mark.parametrize(("recipe", "single", "mean"), CLOSENESS)
def test_layers_are_as_good_as_on_the_cpu(
    on_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, single: float, mean: float
) -> None:
    """A whole export with the search in tensor operations; rotation and packing are the CPU's own."""
    tensors = layer_errors(tmp_path / "tensors", recipe, "cpu")
    monkeypatch.undo()
    loops = layer_errors(tmp_path / "loops", recipe, "cpu")
    assert tensors != loops  # another path did run
    assert_as_good(tensors, loops, single, mean)
