"""Hadamard matrices and rotations: orthogonality in fp64, the written semantics, and the errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics import hadamard
from dvdquant.numerics.hadamard import (
    MAX_INNER,
    Rotation,
    hadamard_matrix,
    kept_hadamard_matrix,
    rotate,
    rotate_inverse,
)

# Input channels of the linear layers of Wan, HunyuanVideo, CogVideoX and LTX-Video.
FEATURES = (1536, 1920, 2048, 3072, 5120, 8192, 8960, 12288, 13824, 15360, 20480)
# Paley I over GF(q), over GF(27), GF(243) and GF(343); Paley II over GF(q), over GF(9), GF(25), GF(49) and GF(125).
PALEY_ORDERS = (4, 8, 12, 20, 24, 28, 32, 44, 60, 68, 72, 80, 84, 104, 108, 140, 244, 344, 36, 52, 76, 100, 252)


def _unit_error(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("order", [1, 2, *PALEY_ORDERS, 16, 64, 96, 256, 384, 1024, 1920])
def test_matrices_are_hadamard(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.float64
    signs = matrix * math.sqrt(order)
    assert float((signs.abs() - 1).abs().max()) < 1e-12
    # Integers, so exact: H Hᵀ = n I.
    rounded = signs.round()
    assert torch.equal(rounded @ rounded.T, order * torch.eye(order, dtype=torch.float64))
    assert _unit_error(matrix) < 1e-12


@pytest.mark.parametrize("order", [3, 6, 92, 116, 1537])
def test_orders_without_a_construction(order: int) -> None:
    with pytest.raises(UnsupportedError, match=str(order)) as caught:
        hadamard_matrix(order)
    assert caught.value.fix is not None
    usable = int(caught.value.fix.split()[-1])
    assert order % usable == 0
    assert _unit_error(hadamard_matrix(usable)) < 1e-12


@pytest.mark.parametrize("spec", ["full", "auto"])
@pytest.mark.parametrize("features", FEATURES)
def test_every_model_width_rotates_orthogonally(features: int, spec: str) -> None:
    rotation = Rotation.for_features(features, spec)
    hadamard, outer = rotation.matrices(torch.float64)
    assert hadamard.shape == (rotation.inner, rotation.inner)
    assert outer.shape == (rotation.outer, rotation.outer)
    assert _unit_error(hadamard) < 1e-12
    assert _unit_error(outer) < 1e-12
    assert rotation.block == (features if spec == "full" else rotation.inner)
    assert rotation.inner <= MAX_INNER
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(3, features, dtype=torch.float64, generator=generator)
    w = torch.randn(5, features, dtype=torch.float64, generator=generator)
    product = rotate(x, rotation) @ rotate(w, rotation).T
    assert float((product - x @ w.T).abs().max()) < 1e-12 * features
    assert float((rotate_inverse(rotate(x, rotation), rotation) - x).abs().max()) < 1e-12


def test_auto_blocks_hold_powers_of_two_only() -> None:
    for features in FEATURES:
        rotation = Rotation.for_features(features, "auto")
        assert rotation.block in (4, 16, 64, 256)
        assert rotation.block == 256 or features % (4 * rotation.block)
        hadamard, outer = rotation.matrices(torch.float32)
        assert math.frexp(float(hadamard[0, 0]))[0] == 0.5
        assert bool((hadamard.abs() == hadamard[0, 0]).all())
        assert outer.tolist() == [[1.0]]


def test_full_takes_the_smallest_core() -> None:
    cores = {1536: 12, 1920: 60, 3072: 12, 5120: 20, 8960: 140, 12288: 12, 13824: 108, 15360: 60, 20480: 20}
    for features, core in cores.items():
        assert Rotation.for_features(features, "full").outer == core
    # Beyond the largest inner factor the rest of the power of two goes outwards.
    assert Rotation.for_features(8192, "full") == Rotation(8192, 1024, 8)


@pytest.mark.parametrize(
    "rotation",
    [
        Rotation(48, 4, 12),
        Rotation(96, 8, 1),
        Rotation(120, 2, 20),
        Rotation(2048, 512, 1),
        Rotation(2048, 1024, 2),
        Rotation(56, 1, 28),
        Rotation(7, 1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotate_is_the_written_product(rotation: Rotation, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, rotation.features, generator=torch.Generator().manual_seed(0)).to(dtype)
    hadamard, outer = rotation.matrices(torch.float64)
    blocks = x.double().reshape(2, 3, -1, rotation.outer, rotation.inner)
    expected = (outer.T @ (blocks @ hadamard)).reshape(x.shape)
    got = rotate(x, rotation)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == x.shape
    # A plain product in the same dtype sets the error allowed to the staged one.
    kron = torch.kron(outer, hadamard)
    plain = (x.to(got.dtype).reshape(-1, rotation.block) @ kron.to(got.dtype)).reshape(x.shape)
    allowed = 2 * float((plain.double() - expected).abs().max()) + 4 * torch.finfo(got.dtype).eps
    if dtype == torch.float64:  # no higher precision to judge by: the rounding of ~30 operations on values below 5
        allowed = 150 * torch.finfo(dtype).eps
    assert float((got.double() - expected).abs().max()) <= allowed


def test_the_rotation_is_the_hadamard_matrix_of_its_block() -> None:
    x = torch.randn(4, 96, dtype=torch.float64)
    expected = x @ hadamard_matrix(96)
    assert float((rotate(x, Rotation.for_features(96, "full")) - expected).abs().max()) < 1e-13


@settings(max_examples=40, deadline=None)
@given(block=st.sampled_from([1, 2, 4, 12, 20, 24, 64, 128]), count=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_products_survive_the_rotation(block: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = block * count
    rotation = Rotation.for_features(features, block)
    x = torch.randn(3, features, dtype=torch.float64, generator=generator)
    w = torch.randn(4, features, dtype=torch.float64, generator=generator) * 100
    assert torch.allclose(rotate(x, rotation) @ rotate(w, rotation).T, x @ w.T, rtol=1e-12, atol=1e-10)


def test_slices_strides_and_result_dtype() -> None:
    rotation = Rotation.for_features(3072, "auto")
    # More than one slice, and a last slice that is not full.
    x = torch.randn(800, 3072)
    whole = rotate(x, rotation)
    assert torch.equal(whole[797:], rotate(x[797:], rotation))
    turned = torch.randn(3072, 5).T
    assert torch.equal(rotate(turned, rotation), rotate(turned.contiguous(), rotation))
    half = rotate(x, rotation, dtype=torch.bfloat16)
    assert torch.equal(half, whole.to(torch.bfloat16))
    assert torch.equal(rotate(x[:, :3], Rotation(3, 1, 1)), x[:, :3])
    assert rotate(x[:0], rotation).shape == (0, 3072)


def test_rotate_exports() -> None:
    rotation = Rotation.for_features(96, "full")

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rotate(x, rotation)

    rows = torch.export.Dim("rows", min=2, max=1 << 20)
    program = torch.export.export(Module(), (torch.randn(7, 96),), dynamic_shapes={"x": {0: rows}})
    x = torch.randn(13, 96)
    assert torch.allclose(program.module()(x), rotate(x, rotation), atol=1e-6)


def test_errors_name_a_block_that_works() -> None:
    with pytest.raises(ShapeError, match="does not divide 3072") as shape:
        Rotation.for_features(3072, 1000)
    assert shape.value.fix == "use block 1024"
    with pytest.raises(UnsupportedError, match="order 92") as order:
        Rotation.for_features(92, "full")
    assert "block 4," in str(order.value.fix)
    with pytest.raises(UnsupportedError, match="unknown"):
        Rotation.for_features(96, "fastest")
    with pytest.raises(ShapeError):
        Rotation(96, 3, 1)
    with pytest.raises(ShapeError):
        Rotation(96, 64, 1)
    with pytest.raises(UnsupportedError):
        Rotation(96, 1, 3)
    with pytest.raises(ShapeError, match="96 channels"):
        rotate(torch.zeros(2, 95), Rotation(96, 32, 1))
    with pytest.raises(UnsupportedError, match="int32"):
        rotate(torch.zeros(2, 96, dtype=torch.int32), Rotation(96, 32, 1))


def test_returned_matrices_are_copies() -> None:
    rotation = Rotation(96, 8, 12)
    rotation.matrices(torch.float64)[0].zero_()
    hadamard_matrix(8).zero_()
    assert _unit_error(rotation.matrices(torch.float64)[0]) < 1e-12
    assert rotation.identity is False
    assert Rotation.for_features(96, "none").identity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kept_matrix_is_made_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call makes no tensor, so that it can be part of a CUDA graph."""
    device = torch.device("cpu")
    matrix = kept_hadamard_matrix(24, dtype, device)
    assert matrix.dtype == dtype
    assert torch.equal(matrix, hadamard_matrix(24, torch.promote_types(dtype, torch.float32)).to(dtype))
    monkeypatch.setattr(hadamard, "hadamard_matrix", None)
    assert kept_hadamard_matrix(24, dtype, device) is matrix


def test_a_matrix_of_a_trace_is_not_kept() -> None:
    with FakeTensorMode():
        traced = kept_hadamard_matrix(40, torch.float32, torch.device("cpu"))
    assert isinstance(traced, FakeTensor)
    assert type(kept_hadamard_matrix(40, torch.float32, torch.device("cpu"))) is torch.Tensor
