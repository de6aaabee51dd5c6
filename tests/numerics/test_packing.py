"""pack_int4 and unpack_int4 against the layout written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdquant.errors import ShapeError
from dvdquant.numerics.packing import expand_zero, pack_int4, unpack_int4


def test_layout_of_every_pair() -> None:
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    codes = torch.stack((low, high), -1).reshape(256, 2).to(torch.int8)
    expected = [(int(a) & 0xF) | ((int(b) & 0xF) << 4) for a, b in codes.tolist()]
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.flatten().tolist() == expected
    assert sorted(expected) == list(range(256))
    assert torch.equal(unpack_int4(packed), codes)


def test_even_channels_take_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[1, 2, -1, -8]], dtype=torch.int8)).tolist() == [[0x21, 0x8F]]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 5), half=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 2 * half), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, half)
    for stored in (packed, packed.view(torch.int8)):
        unpacked = unpack_int4(stored)
        assert unpacked.dtype == torch.int8
        assert torch.equal(unpacked, codes)


def test_strided_and_stacked_codes() -> None:
    codes = torch.randint(-8, 8, (3, 8, 6), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)
    turned = codes.transpose(1, 2)
    assert torch.equal(unpack_int4(pack_int4(turned)), turned)


def test_an_odd_row_is_refused() -> None:
    with pytest.raises(ShapeError, match="odd number of codes"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_a_code_out_of_range_is_refused(bad: int) -> None:
    codes = torch.zeros(4, 4, dtype=torch.int8)
    codes[2, 1] = bad
    with pytest.raises(ShapeError, match=str(bad)):
        pack_int4(codes)


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(ShapeError, match="int8"):
        pack_int4(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="bytes"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.int32))


def test_zero_points_of_every_byte() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(64, 4)
    zero = expand_zero(stored)
    assert zero.dtype == torch.float32
    assert zero.flatten().tolist() == [byte / 16 - 8 for byte in range(256)]
    # What a kernel in 16 bit reads is the same number.
    assert torch.equal(zero.to(torch.bfloat16).float(), zero)
    assert torch.equal(zero.to(torch.float16).float(), zero)


def test_zero_points_per_row_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        zero = torch.tensor([-0.5, 3.0, 0.0], dtype=dtype)
        assert torch.equal(expand_zero(zero), zero[:, None])
        assert expand_zero(zero).dtype == dtype


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int8)]
)
def test_other_zero_points_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="zero-points are"):
        expand_zero(bad)
