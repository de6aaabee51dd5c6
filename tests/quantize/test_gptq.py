"""Rounding with feedback: against exhaustive search, against the textbook recursion, and on what must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.numerics.packing import expand_zero
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight
from dvdquant.quantize.gptq import ErrorFeedback, gptq_round, output_energy, round_by_loops, round_by_tensors
from dvdquant.recipe import WeightSpec


def correlated(features: int, seed: int, rank: int | None = None) -> Tensor:
    """Second moments [K, K] of inputs that mostly lie in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or features, features, generator=generator, dtype=torch.float64)
    return mix.T @ mix / len(mix) + 0.05 * torch.eye(features, dtype=torch.float64)


def weight(rows: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def textbook(w: Tensor, grid: QuantizedWeight, hessian: Tensor, damping: float) -> Tensor:
    """Codes by the recursion as it is usually stated: the inverse of what is left, updated column by column."""
    features = w.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(features, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    left, scale = w.double().clone(), grid.scale.double()
    codes = torch.zeros_like(grid.codes)
    for i in range(features):
        code = (left[:, i] / scale + grid.zero.double()).round().clamp(-8, 7)
        codes[:, i] = code.to(torch.int8)
        error = (left[:, i] - scale * (code - grid.zero.double())) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def test_identity_hessian_rounds_to_nearest() -> None:
    w = weight(16, 64)
    grid = quantize_weight(w, WeightSpec())
    again = gptq_round(w, grid, torch.eye(64))
    nearest = (w / grid.scale[:, None] + grid.zero[:, None]).round().clamp(-8, 7)
    assert torch.equal(again.codes, nearest.to(torch.int8))
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.zero, grid.zero)


@pytest.mark.parametrize("features", [8, 64, 96, 160, 288])
def test_equals_the_textbook_recursion(features: int) -> None:
    """Across the boundary of what is brought up to date at once (256 columns)."""
    w, hessian = weight(12, features, 1), correlated(features, 2, rank=max(2, features // 4))
    grid = quantize_weight(w, WeightSpec())
    codes = gptq_round(w, grid, hessian, damping=0.05).codes
    # A value within 1e-9 of a rounding boundary may go either way; none of these is.
    assert torch.equal(codes, textbook(w, grid, hessian, 0.05))


def test_factors_lie_row_by_row() -> None:
    """Column by column, as LAPACK leaves them, the compiled loop is not vectorized."""
    assert ErrorFeedback(correlated(32, 5).expand(3, -1, -1)).factors.is_contiguous()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("spec", [WeightSpec(), WeightSpec(group_size=16, zero_point="float")])
def test_the_form_for_a_gpu_gives_the_same_codes(spec: WeightSpec, blocks: int) -> None:
    w, hessian = weight(9, 160, 12), correlated(160 // blocks, 13, rank=20).expand(blocks, -1, -1)
    hessian = hessian * torch.arange(1.0, 1 + blocks)[:, None, None]
    grid = quantize_weight(w, spec)
    step = grid.scale[:, None] * (grid.group_scale.float() / 255)
    zero = expand_zero(grid.zero).float().expand(step.shape).contiguous()
    arguments = (w, step, zero, ErrorFeedback(hessian).factors)
    assert torch.equal(round_by_tensors(*arguments), round_by_loops(*arguments))


def test_lies_between_nearest_rounding_and_the_optimum() -> None:
    w, hessian = weight(48, 4, 3), correlated(4, 4, rank=2)
    grid = quantize_weight(w, WeightSpec(solver="minmax"))
    found = gptq_round(w, grid, hessian, damping=0.01)
    every = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)), dtype=torch.float64)

    def error(values: Tensor, row: Tensor) -> Tensor:
        d = row.double() - values
        return ((d @ hessian) * d).sum(-1)

    total = {"nearest": 0.0, "feedback": 0.0, "best": 0.0}
    for row in range(len(w)):
        scale, zero = float(grid.scale[row]), float(grid.zero[row])
        total["best"] += float(error(scale * (every - zero), w[row]).min())
        total["feedback"] += float(error(found.dequantize(torch.float64)[row], w[row]))
        total["nearest"] += float(error(grid.dequantize(torch.float64)[row], w[row]))
    assert total["best"] <= total["feedback"] < total["nearest"]


@pytest.mark.parametrize(
    "spec", [WeightSpec(), WeightSpec(group_size=32), WeightSpec(group_size=32, zero_point="float")]
)
def test_lowers_the_error_of_the_outputs_on_every_grid(spec: WeightSpec) -> None:
    w, hessian = weight(32, 128, 5), correlated(128, 6, rank=16)
    grid = quantize_weight(w, spec)
    found = gptq_round(w, grid, hessian)
    before, after = (output_energy(w.double() - q.dequantize(torch.float64), hessian) for q in (grid, found))
    # With the inputs in 16 of 128 directions most of the error can be moved out of the way.
    assert after < 0.6 * before
    assert torch.equal(found.group_scale, grid.group_scale)
    assert int(found.codes.min()) >= -8
    assert int(found.codes.max()) <= 7


def test_blocks_equal_the_whole_where_nothing_lies_between_them() -> None:
    w, blocks = weight(8, 96, 7), torch.stack([correlated(32, seed, rank=8) for seed in (8, 9, 10)])
    grid = quantize_weight(w, WeightSpec())
    # One damping for all blocks, as the whole row has.
    level = blocks.diagonal(dim1=1, dim2=2).mean(1)
    blocks = blocks / level[:, None, None]
    whole = torch.block_diag(*blocks)
    assert torch.equal(gptq_round(w, grid, blocks).codes, gptq_round(w, grid, whole).codes)


def test_rows_and_groups_of_zeros_stay_exact() -> None:
    w = weight(4, 64, 11)
    w[1] = 0
    w[2, :32] = 0
    spec = WeightSpec(group_size=32, zero_point="float")
    grid = quantize_weight(w, spec)
    found = gptq_round(w, grid, torch.zeros(64, 64)).dequantize()
    assert torch.equal(found[1], torch.zeros(64))
    assert torch.equal(found[2, :32], torch.zeros(32))


def test_a_hessian_of_another_size_is_refused() -> None:
    w = weight(4, 64)
    grid = quantize_weight(w, WeightSpec())
    for hessian in (torch.eye(32), torch.zeros(3, 16, 16), torch.zeros(64, 63)):
        with pytest.raises(ShapeError, match="64 inputs"):
            gptq_round(w, grid, hessian)


def test_rows_in_parts_get_the_codes_of_the_whole() -> None:
    w = weight(12, 64)
    grid = quantize_weight(w, WeightSpec())
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    hessian = (x.T @ x / len(x)).view(64, 2, 32)[:32, 0][None].repeat(2, 1, 1)
    gptq, whole = ErrorFeedback(hessian, 0.1), gptq_round(w, grid, hessian, 0.1)
    for part in (slice(0, 5), slice(5, 12)):
        assert torch.equal(gptq.round(w[part], grid.rows(part)).codes, whole.codes[part])
    assert not torch.equal(whole.codes, grid.codes)
