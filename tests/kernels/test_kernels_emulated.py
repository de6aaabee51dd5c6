"""The kernels' device code on the CPU: the very .cu files, compiled by g++ against kernels/emulator, behind the C ABI.

Rotation and codes are judged by float64, prepared weights bit by bit by dvdquant.ops.repack, a whole layer by
``quant_linear_reference`` in float64. Every buffer lies between guard bytes that must not change. In place of CUTLASS's
main loops the emulated library runs plain ones, so their checks are the GPU's (`make gpu-check`).
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dvdquant.errors import ResourceError, ShapeError, UnsupportedError
from dvdquant.numerics.activation_grid import fake_quantize_activation
from dvdquant.numerics.hadamard import rotate
from dvdquant.ops import repack
from dvdquant.ops.cuda.arguments import LayerPlan, WeightPointers
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.reference import dequantize_weight, quant_linear_reference
from dvdquant.ops.repack import LayerShape
from tests.support.emulated_kernels import library as library
from tests.support.guarded_calls import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    LAYER_CASES,
    PREPARE_CASES,
    Buffer,
    filled,
    layer_dtype,
    layer_rotation,
    outer_matrix,
    prepare,
    stored_weight,
    token_rows,
)

UNIT = 2.0**-24
QMAX = {4: 7, 8: 127}
Array = npt.NDArray[np.generic]


def _decode(plan: LayerPlan, codes: npt.NDArray[np.uint8], m: int, k: int) -> npt.NDArray[np.float64]:
    if plan.codes == "s4":
        packed = codes.view(np.int8).reshape(m, k // 2)
        return np.stack([(packed << 4).astype(np.int8) >> 4, packed >> 4], axis=-1).reshape(m, k).astype(np.float64)
    if plan.codes == "s8":
        return codes.view(np.int8).reshape(m, k).astype(np.float64)
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).double().numpy().reshape(m, k)


def _rotate_quantize(
    library: KernelLibrary, layer: LayerShape, sm: int, x: torch.Tensor, sums: bool = True
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Codes [M, K], scales [M, groups], sums [M, groups], with guards and poison checked."""
    m, plan = len(x), library.plan_layer(layer, sm)
    source, outer = filled(x), outer_matrix(layer)
    codes, scales = Buffer(m * plan.codes_bytes_per_token), Buffer(4 * m * plan.scale_rows)
    totals = Buffer(4 * m * plan.scale_rows)
    library.rotate_quantize(
        layer, sm, source.address, outer.address if outer else 0, codes.address, scales.address,
        totals.address if sums else 0, m, 0,
    )  # fmt: skip
    for buffer in (source, codes, scales, totals, *([outer] if outer else [])):
        buffer.check_guards()
    assert source.bytes.tobytes() == x.contiguous().view(torch.uint8).numpy().tobytes()

    def per_token(buffer: Buffer) -> npt.NDArray[np.float32]:
        return buffer.bytes.view(np.float32).reshape(plan.scale_rows, m).T

    return _decode(plan, codes.bytes, m, layer.k), per_token(scales), per_token(totals)


# --------------------------------------------------------------------------------------------------- rotate, quantize

RQ_CASES = [
    # k, block, outer, act_bits, act_group, sm, dtype, tokens
    (1536, 256, 1, 4, 0, AMPERE, "bf16", 33),
    (1536, 256, 1, 8, 0, HOPPER, "fp16", 3),
    (5120, 256, 1, 8, 0, HOPPER, "bf16", 3),
    (5120, 256, 1, 4, 128, HOPPER, "bf16", 3),
    (8960, 256, 1, 4, 128, AMPERE, "bf16", 1),
    (13824, 256, 1, 8, 0, BLACKWELL, "bf16", 1),
    (1920, 64, 1, 4, 0, AMPERE, "bf16", 9),
    (1920, 64, 1, 4, 64, AMPERE, "fp16", 5),
    (1920, 64, 1, 8, 128, HOPPER, "bf16", 3),
    (320, 16, 1, 4, 64, HOPPER, "bf16", 33),
    (288, 32, 1, 8, 0, HOPPER, "bf16", 3),
    (1024, 512, 1, 8, 0, HOPPER, "bf16", 3),
    (3072, 1024, 1, 4, 128, HOPPER, "bf16", 3),
    (4096, 2048, 1, 4, 0, AMPERE, "bf16", 3),
    (352, 1, 1, 4, 0, AMPERE, "bf16", 3),
    (384, 2, 1, 8, 128, HOPPER, "fp16", 3),
    (32768, 256, 1, 8, 0, HOPPER, "bf16", 1),
    (1536, 128, 12, 4, 128, HOPPER, "bf16", 3),
    (1920, 32, 60, 4, 0, AMPERE, "bf16", 3),
    (5120, 256, 20, 8, 0, HOPPER, "fp16", 3),
    (8960, 64, 140, 8, 0, HOPPER, "bf16", 1),
    (13824, 128, 108, 4, 0, AMPERE, "bf16", 1),
    (4096, 1024, 2, 4, 128, AMPERE, "bf16", 2),
    (20480, 1024, 20, 8, 128, HOPPER, "bf16", 1),
    (736, 2, 368, 8, 0, HOPPER, "bf16", 1),
]


@pytest.mark.parametrize("case", RQ_CASES, ids=lambda case: "-".join(map(str, case)))
def test_codes_scales_and_sums_against_float64(library: KernelLibrary, case: tuple[int, ...]) -> None:
    k, block, outer, bits, group, sm, dtype, m = case
    layer = LayerShape(8, k, 1, False, block, outer, bits, group, str(dtype))
    x = token_rows(m, k, layer_dtype(layer), seed=k)
    codes, scales, sums = _rotate_quantize(library, layer, sm, x)
    groups = scales.shape[1]
    rotated = rotate(x.double(), layer_rotation(layer)).numpy().reshape(m, groups, k // groups)
    amax = np.abs(rotated).max(-1)
    # One rounding per stage of adds (log2 b, or p in a row for the outer factor), relative to what the stage sums: at most
    # the l1 norm of a block over sqrt(b·p), times the rounding unit; then a few of the scale and of the product.
    size = block * outer
    norms = x.double().abs().numpy().reshape(m, k // size, size).sum(-1).max(-1) / math.sqrt(size)
    rounding = UNIT * (math.log2(block) + outer + 4) * norms[:, None]
    np.testing.assert_array_less(np.abs(scales - amax / QMAX[bits]), rounding / QMAX[bits] + 4 * UNIT * amax)
    grid = rotated * (QMAX[bits] / amax[..., None])
    expected = np.rint(grid)
    wrong = expected != codes.reshape(grid.shape)
    # A code may differ only where the exact value is nearer to a tie than fp32 resolves.
    reach = 2 * QMAX[bits] * (rounding / amax + 4 * UNIT)
    to_tie = np.abs(np.abs(grid - np.floor(grid)) - 0.5)
    assert (to_tie[wrong] <= np.broadcast_to(reach[..., None], grid.shape)[wrong]).all()
    assert wrong.mean() <= 1e-3
    np.testing.assert_array_equal(sums, codes.reshape(grid.shape).sum(-1))
    assert np.abs(codes).max() == QMAX[bits]


@pytest.mark.parametrize("sm", [AMPERE, HOPPER])
@pytest.mark.parametrize(("block", "outer", "group"), [(256, 1, 0), (256, 1, 128), (64, 12, 0), (64, 12, 128)])
def test_nan_and_inf_reach_the_scale(library: KernelLibrary, sm: int, block: int, outer: int, group: int) -> None:
    layer = LayerShape(8, 1536, 1, False, block, outer, 4, group)
    x = token_rows(6, 1536)
    x[1, 700], x[2, 0], x[3, 1535], x[4, 255] = math.nan, math.inf, -math.inf, math.nan
    codes, scales, _ = _rotate_quantize(library, layer, sm, x)
    clean, clean_scales, _ = _rotate_quantize(library, layer, sm, token_rows(6, 1536))
    for token in (0, 5):
        np.testing.assert_array_equal(codes[token], clean[token])
        np.testing.assert_array_equal(scales[token], clean_scales[token])
    groups = scales.shape[1]
    for token, channel in ((1, 700), (2, 0), (3, 1535), (4, 255)):
        block_start = channel // (block * outer) * block * outer
        touched = slice(block_start * groups // 1536, max(1, (block_start + block * outer) * groups // 1536))
        assert not np.isfinite(scales[token, touched]).any()
        bad = ~np.isfinite(scales[token])
        assert (codes[token].reshape(groups, -1)[bad] == 0).all()


def test_zeros_subnormals_and_extremes(library: KernelLibrary) -> None:
    for block, outer, group in ((256, 1, 0), (256, 1, 128), (64, 4, 0)):
        layer = LayerShape(8, 512, 1, False, block, outer, 8, group)
        x = torch.zeros(4, 512, dtype=torch.bfloat16)
        x[1, 5], x[2, 5], x[3, :4] = 2.0**-133, 3.0e38, 3.0e38
        codes, scales, _ = _rotate_quantize(library, layer, HOPPER, x)
        floor = np.float32(2.0**-100) / np.float32(127)
        np.testing.assert_array_equal(scales[:2], floor)
        assert (codes[:2] == 0).all()
        # 4 · 3e38 / sqrt(256): the normalization is inside, not after a sum that overflows.
        assert np.isfinite(scales[2:]).all()
        rotated = rotate(x[2:].double(), layer_rotation(layer)).numpy().reshape(2, scales.shape[1], -1)
        amax = np.maximum(np.abs(rotated).max(-1), 2.0**-100)
        np.testing.assert_allclose(scales[2:], amax / 127, rtol=8 * UNIT)
        np.testing.assert_array_equal(codes[2:].reshape(rotated.shape), np.rint(rotated * (127 / amax[..., None])))


@pytest.mark.parametrize(("block", "outer", "group"), [(256, 1, 0), (1024, 1, 128), (64, 24, 0)])
def test_thread_order_does_not_matter(library: KernelLibrary, block: int, outer: int, group: int) -> None:
    layer = LayerShape(8, 3072, 1, False, block, outer, 4, group)
    x = token_rows(3, 3072)
    expected = _rotate_quantize(library, layer, AMPERE, x)
    for seed in (1, 2, 3):
        library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(seed))
        for left, right in zip(expected, _rotate_quantize(library, layer, AMPERE, x)):
            np.testing.assert_array_equal(left, right)
    library.c_library.dvdq_emulator_schedule(ctypes.c_uint64(0))


def test_without_sums(library: KernelLibrary) -> None:
    layer = LayerShape(8, 512, 1, False, 256, 1, 8, 0)
    x = token_rows(3, 512)
    codes, scales, sums = _rotate_quantize(library, layer, HOPPER, x, sums=False)
    assert (sums.astype(np.float32).view(np.uint32) == 0xABABABAB).all()
    expected = _rotate_quantize(library, layer, HOPPER, x)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])


# ------------------------------------------------------------------------------------------------------ prepare weight


@pytest.mark.parametrize("case", PREPARE_CASES, ids=lambda case: "-".join(map(str, case)))
def test_prepared_weight_equals_the_repacker(library: KernelLibrary, case: tuple[int, ...]) -> None:
    n, k, groups, float_zero, bits, group, sm, zeros, path = case
    layer = LayerShape(n, k, groups, bool(float_zero), 1, 1, bits, group)
    assert library.plan_layer(layer, sm).path == path
    weight = stored_weight(layer, str(zeros))
    for bias in (True, False):
        prepared = prepare(library, layer, sm, weight, bias)
        expected = repack.prepare(layer, str(path), *weight[:4], weight[4] if bias else None)
        actual = repack.from_bytes(layer, str(path), prepared.bytes.tobytes())
        for name in ("codes", "row_scale", "row_zero", "bias", "group_scale", "group_zero"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


# ---------------------------------------------------------------------------------------------------------- whole layer


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_whole_layer_against_float64(library: KernelLibrary, case: tuple[int, ...]) -> None:
    n, k, groups, float_zero, block, outer, bits, group, sm, m = case
    layer = LayerShape(n, k, groups, bool(float_zero), block, outer, bits, group)
    weight, x = stored_weight(layer, ""), token_rows(m, k)
    prepared = prepare(library, layer, sm, weight, bias=True)
    workspace = Buffer(library.workspace_bytes(layer, sm, m))
    source, outer, y = filled(x), outer_matrix(layer), Buffer(2 * m * n)
    library.quant_linear(
        layer, sm, source.address, outer.address if outer else 0, prepared.address, y.address, m,
        workspace.address, workspace.bytes.size, 0,
    )  # fmt: skip
    for buffer in (workspace, y, prepared):
        buffer.check_guards()
    actual = torch.from_numpy(y.bytes.copy()).view(torch.bfloat16).reshape(m, n).double()
    inner, matrix = layer_rotation(layer).matrices(torch.float64)
    packed, scale, group_scales, zero, bias = weight
    expected = quant_linear_reference(
        x.double(),
        packed.view(torch.int8),
        scale,
        group_scales,
        zero,
        bias.double(),
        inner,
        matrix,
        bits,
        group,
        torch.float64,
    )
    # bf16 rounds y once, fp32 sums err by far less; int8 expansion of grouped weights moves each weight by a known amount.
    size = expected.abs().max(dim=1, keepdim=True).values
    path = library.plan_layer(layer, sm).path
    held = torch.from_numpy(repack.dequantize(layer, repack.from_bytes(layer, path, prepared.bytes.tobytes())))
    moved = (held - dequantize_weight(packed.view(torch.int8), scale, group_scales, zero, torch.float64)).abs()
    assert (moved.max() > 1e-6) == (path.startswith("s8") and groups > 1)
    quantized = fake_quantize_activation(rotate(x.double(), layer_rotation(layer)), bits, group)
    tolerance = 2.0**-8 * expected.abs() + 1e-5 * size + quantized.abs() @ moved.T
    assert ((actual - expected).abs() <= tolerance).all()


# ------------------------------------------------------------------------------------------------------ refusals


def test_pointers_and_sizes_are_checked(library: KernelLibrary) -> None:
    layer = LayerShape(8, 256, 1, False, 256, 1, 8, 0)
    buffer = Buffer(4096)
    here = buffer.address
    with pytest.raises(ShapeError, match="x is null"):
        library.rotate_quantize(layer, HOPPER, 0, 0, here, here, 0, 1, 0)
    with pytest.raises(ShapeError, match="codes is not aligned to 16 bytes"):
        library.rotate_quantize(layer, HOPPER, here, 0, here + 8, here, 0, 1, 0)
    with pytest.raises(ShapeError, match="-1 tokens"):
        library.rotate_quantize(layer, HOPPER, here, 0, here, here, 0, -1, 0)
    with pytest.raises(ShapeError, match="outer_matrix is null"):
        library.rotate_quantize(LayerShape(8, 768, 1, False, 64, 12, 8, 0), HOPPER, here, 0, here, here, 0, 1, 0)
    with pytest.raises(ResourceError, match=r"need \d+ bytes of workspace, the buffer has 256"):
        library.quant_linear(layer, HOPPER, here, 0, here, here, 4, here, 256, 0)
    with pytest.raises(ResourceError, match="prepared weight needs"):
        library.prepare_weight(layer, HOPPER, WeightPointers(here, here, here, here), here, 256, 0)
    with pytest.raises(ShapeError, match=r"sums is null"):
        library.linear_gemm(LayerShape(8, 256, 1, False, 256, 1, 4, 0), AMPERE, here, here, 0, here, here, 1, 0, 0, 0)
    library.rotate_quantize(layer, HOPPER, 0, 0, 0, 0, 0, 0, 0)  # no tokens: nothing to do, nothing read
    with pytest.raises(UnsupportedError, match=r"SM 7\.5"):
        library.plan_layer(layer, 75)
