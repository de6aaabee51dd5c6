"""The compiled row passes against the plain definitions."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.numerics.packing import expand_zero, pack_int4
from dvdquant.quantize.backends.numba_rows import for_row_parts, hadamard_rows, pack_rows, squared_errors
from dvdquant.quantize.bgr import quantize_weight, relative_mse
from dvdquant.quantize.layer import rotate_rows
from dvdquant.recipe import WeightSpec
from tests.support.bounds import LAMBDA, UNIT


@pytest.mark.parametrize("order", [2, 8, 64, 256, 1024])
@pytest.mark.parametrize("rows", [1, 15, 16, 37])
def test_hadamard_rows_is_the_sylvester_transform(order: int, rows: int) -> None:
    rotation = Rotation(features=3 * order, inner=order, outer=1)
    w = torch.randn(rows, 3 * order, generator=torch.Generator().manual_seed(order)) * 100
    expected = rotate(w.double(), rotation)
    got = w.clone()
    hadamard_rows(got.numpy(), order, order**-0.5)
    # log2(order) additions, each rounded once relative to the block's norm.
    bound = np.log2(order) * 2.0**-23 * float(w.norm(dim=1).max())
    assert float((got.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("spec", ["auto", "full", "none", 32])
def test_rotate_rows_equals_rotate(spec: str | int) -> None:
    rotation = Rotation.for_features(96 * 16, spec)
    w = torch.randn(21, 96 * 16, generator=torch.Generator().manual_seed(1))
    expected = rotate(w.double(), rotation)
    # Sums over a block in fp32, in two stages: each is off by at most λ·u of the block's norm, as the layer judge has it.
    size = w.double().unflatten(1, (-1, rotation.block)).norm(dim=-1).repeat_interleave(rotation.block, 1)
    bound = 2 * LAMBDA * UNIT[torch.float32] * size * (rotation.block > 1)
    assert bool(((rotate_rows(w.clone(), rotation).double() - expected).abs() <= bound).all())


def test_pack_rows_equals_pack_int4() -> None:
    codes = torch.randint(-8, 8, (33, 64), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    packed = np.empty((33, 32), np.int8)
    pack_rows(codes.numpy(), packed)
    assert torch.equal(torch.from_numpy(packed).view(torch.uint8), pack_int4(codes))


@pytest.mark.parametrize("zero_point", ["midrise", "float"])
@pytest.mark.parametrize("group", [0, 32])
def test_squared_errors_equal_the_definition(group: int, zero_point: str) -> None:
    w = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)) ** 3
    q = quantize_weight(w, WeightSpec(group_size=group, zero_point=zero_point))  # type: ignore[arg-type]
    out = np.zeros(2)
    zero = expand_zero(q.zero).numpy()
    squared_errors(w.numpy(), q.codes.numpy(), q.scale.numpy(), q.group_scale.numpy(), zero, out)
    # A restored weight in fp32 is off by four roundings of itself at most, the error's norm by that share of ‖w‖. Both
    # sums are of up to 128 squares in fp32.
    exact = relative_mse(w, q)
    rounded = (2 * 4 / exact**0.5 + 2 * LAMBDA * 128**0.5) * UNIT[torch.float32]
    assert out[1] / out[0] == pytest.approx(exact, rel=rounded)


def test_for_row_parts_covers_every_row_once_and_reraises() -> None:
    seen = np.zeros(1001, int)

    def count(part: slice) -> None:
        seen[part] += 1

    for_row_parts(1001, count)
    assert (seen == 1).all()

    def fail(part: slice) -> None:
        raise ValueError(f"rows {part.start}")

    with pytest.raises(ValueError, match="rows 0"):
        for_row_parts(10, fail)


def count_rows(rows: int) -> int:
    seen = np.zeros(rows, int)

    def count(part: slice) -> None:
        seen[part] += 1

    for_row_parts(rows, count)
    return int((seen == 1).sum())


# Python warns of any fork of a process that has threads: this one has a pool on purpose.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """The child inherits the pool of its parent, whose threads it does not have."""
    assert count_rows(1001) == 1001
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: there.send(count_rows(1001)))
    child.start()
    try:
        assert here.poll(30), "the child hangs"
        assert here.recv() == 1001
        child.join(30)
        assert child.exitcode == 0, "the child cannot end"
    finally:
        if child.exitcode is None:
            child.kill()
    assert count_rows(1001) == 1001


def test_the_pool_follows_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            assert count_rows(1001) == 1001
    finally:
        torch.set_num_threads(threads)
