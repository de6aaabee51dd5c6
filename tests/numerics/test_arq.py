"""Activation quantization against a scalar reference in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.activation_grid import (
    AMAX_FLOOR,
    QMAX,
    dequantize_activation,
    fake_quantize_activation,
    fake_quantize_per_channel,
    quantize_activation,
)


def _scalar_reference(row: list[float], bits: int, group: int) -> tuple[list[int], list[float]]:
    """The definition, one fp32 operation at a time. np.rint rounds halves to even."""
    f = np.float32
    qmax = f(2 ** (bits - 1) - 1)
    codes, scales = [], []
    for start in range(0, len(row), group):
        part = [f(v) for v in row[start : start + group]]
        amax = max(max(abs(v) for v in part), f(2.0**-100))
        inverse = qmax / amax
        scales.append(float(amax / qmax))
        codes += [int(min(max(np.rint(v * inverse), -qmax), qmax)) for v in part]
    return codes, scales


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([4, 6, 8]),
    groups=st.integers(1, 4),
    group=st.sampled_from([1, 3, 16]),
    exponent=st.integers(-140, 120),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_are_bit_exact(bits: int, groups: int, group: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * group, generator=generator) * 2.0**exponent
    codes, scale = quantize_activation(x, bits, group)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (2, groups)
    for r in range(2):
        expected_codes, expected_scales = _scalar_reference(x[r].tolist(), bits, group)
        assert codes[r].tolist() == expected_codes
        assert scale[r].tolist() == expected_scales
    assert torch.equal(fake_quantize_activation(x, bits, group), dequantize_activation(codes, scale))


def test_halves_round_to_even() -> None:
    # amax 7 at 4 bits: scale 1, codes are the rounded values themselves.
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5]])
    codes, scale = quantize_activation(x, 4)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -2, 6]]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 10
    for group in (0, 16, 32):
        codes, scale = quantize_activation(x, bits, group)
        assert int(codes.abs().max()) == QMAX[bits]
        back = dequantize_activation(codes, scale)
        step = scale.double().repeat_interleave(group or 96, dim=1)
        assert bool(((back.double() - x.double()).abs() <= step * (0.5 + 1e-5)).all())
    # The whole token is one group.
    assert torch.equal(fake_quantize_activation(x, bits, 0), fake_quantize_activation(x, bits, 96))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 32).to(dtype)
    assert torch.equal(fake_quantize_activation(x, 8, 16), fake_quantize_activation(x.float(), 8, 16))


def test_fp64_stays_fp64() -> None:
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    exact = fake_quantize_activation(x, 8, 16)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, dequantize_activation(*quantize_activation(x, 8, 16)))
    # No value of this seed lies within fp32 rounding of a half: the codes agree, the scales to fp32.
    assert torch.allclose(fake_quantize_activation(x.float(), 8, 16).double(), exact, rtol=1e-6, atol=0)


def test_zeros_give_zeros() -> None:
    x = torch.zeros(2, 32)
    x[1, 16:] = 1.0
    codes, scale = quantize_activation(x, 4, 16)
    assert codes[0].tolist() == [0] * 32
    assert scale[0, 0] == torch.tensor(AMAX_FLOOR) / 7
    assert torch.equal(dequantize_activation(codes, scale), x)
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_never_hidden(bad: float) -> None:
    x = torch.ones(3, 32)
    x[1, 20] = bad
    for result in (
        fake_quantize_activation(x, 8, 16),
        dequantize_activation(*quantize_activation(x, 8, 16)),
        fake_quantize_activation(x, 4),
    ):
        assert not bool(torch.isfinite(result[1, 20]))
        assert bool(torch.isfinite(result[[0, 2]]).all())


def test_per_channel_scales_run_over_tokens() -> None:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 24)
    got = fake_quantize_per_channel(x, 4).reshape(14, 24)
    for j in range(24):
        column = x.reshape(14, 24)[:, j]
        assert torch.equal(got[:, j], fake_quantize_activation(column, 4))
    # Its scale is as fine as the channel: the error of small channels is below what one scale per token allows.
    assert float((got - x.reshape(14, 24))[:, 0].abs().max()) < 0.5 * float(x[..., 0].abs().max())
    assert float(fake_quantize_activation(x, 4)[..., 0].abs().max()) == 0.0


def test_exports_with_a_dynamic_token_axis() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            codes, scale = quantize_activation(x, 4, 16)
            return dequantize_activation(codes, scale) + fake_quantize_activation(x, 8, 0)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Module(), (torch.randn(2, 5, 32),), dynamic_shapes={"x": {1: tokens}})
    x = torch.randn(2, 11, 32)
    assert torch.equal(program.module()(x), Module()(x))


def test_errors() -> None:
    with pytest.raises(UnsupportedError, match="5-bit") as caught:
        quantize_activation(torch.zeros(2, 8), 5)
    assert caught.value.available == "4, 6, 8"
    with pytest.raises(ShapeError, match="do not divide 24"):
        quantize_activation(torch.zeros(2, 24), 8, 16)
    with pytest.raises(ShapeError, match="5 scales"):
        dequantize_activation(torch.zeros(2, 24, dtype=torch.int8), torch.ones(2, 5))
