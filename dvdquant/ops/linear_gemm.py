"""``dvdquant::linear_gemm``: the second half of a quantized linear layer, codes times a prepared weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.packing import unpack_int4
from dvdquant.ops.cuda_linear import layer_with_path, require_kernels
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.repack import PATHS, LayerShape, dequantize, from_bytes

__all__ = ["decode_codes", "linear_gemm"]


def decode_codes(codes: Tensor, path: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return code values [M, K] from bytes: the inverse of :func:`dvdquant.ops.rotate_quantize.encode_codes`.

    Args:
        codes: uint8 [M, K/2] on s4 paths, [M, K] on others.
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        dtype: Dtype of the result.
    """
    if path.startswith("s4"):
        return unpack_int4(codes).to(dtype)
    return codes.view(torch.float8_e4m3fn if path == "e4m3_group" else torch.int8).to(dtype)


@torch.library.custom_op("dvdquant::linear_gemm", mutates_args=())
def linear_gemm(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    prepared: Tensor,
    rows: int,
    weight_groups: int,
    float_zero_point: bool,
    act_group: int,
    path: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute ``y[m, n] = Σ_g s[g, m] Σ_{k∈g} c[m, k] · W[n, k] + bias[n]``, W the prepared weight; float64 on the CPU.

    Args:
        codes: uint8 [M, K/2] or [M, K], from ``dvdquant::rotate_quantize`` with the same act_group and path.
        scales: fp32 [groups, M], from the same call.
        sums: fp32 [groups, M], from the same call. Native s4 paths correct zero-points with them; the CPU corrects the
            weight itself.
        prepared: uint8 [bytes], from ``dvdquant::prepare_weight`` with the same path.
        rows: Output features N.
        weight_groups: Groups per row of the packed weight.
        float_zero_point: Whether the packed weight has float zero-points, uint8 [N, groups].
        act_group: Channels per activation scale; 0 for the whole token.
        path: One of :data:`dvdquant.ops.repack.PATHS`; on CUDA one that the device runs.
        dtype: Dtype of y; float16 or bfloat16 on CUDA.

    Returns:
        [M, N] of dtype.

    Raises:
        ShapeError: The prepared weight or the scales do not belong to codes of that width.
        UnsupportedError: The path is unknown.
    """
    layer = _layer(codes, rows, weight_groups, float_zero_point, act_group, path)
    values = decode_codes(codes, path)
    groups = layer.k // (act_group or layer.k)
    if scales.shape != (groups, len(codes)):
        raise ShapeError(f"scales of shape {tuple(scales.shape)}", available=f"expected ({groups}, {len(codes)})")
    scaled = values.reshape(len(codes), groups, layer.k // groups) * scales.T[:, :, None]
    weight = from_bytes(layer, path, prepared.numpy(force=True).tobytes())
    w = torch.from_numpy(dequantize(layer, weight))
    bias = torch.from_numpy(weight.bias.copy()).to(torch.float64)
    return torch.nn.functional.linear(scaled.reshape(values.shape), w, bias).to(dtype)


@linear_gemm.register_fake
def _linear_gemm_fake(codes: Tensor, scales: Tensor, sums: Tensor, prepared: Tensor, rows: int, *rest: Any) -> Tensor:
    dtype: torch.dtype = rest[-1]
    return codes.new_empty((codes.shape[0], rows), dtype=dtype)


@linear_gemm.register_kernel("cuda")
def _linear_gemm_cuda(codes: Tensor, scales: Tensor, sums: Tensor, prepared: Tensor, *rest: Any) -> Tensor:
    *described, path, dtype = rest  # rows, weight_groups, float_zero_point, act_group
    if dtype not in DTYPE_NAMES:
        raise UnsupportedError(f"the kernels write no {dtype}", available=DTYPE_NAMES.values())
    kernels = require_kernels(codes.device)
    shape = replace(_layer(codes, *described, path), dtype=DTYPE_NAMES[dtype])  # type: ignore[call-arg]
    layer = layer_with_path(kernels, shape, path, act_bits=(4, 8))
    needed = kernels.plan(layer).prepared_bytes
    if prepared.numel() != needed:
        raise ShapeError(f"a prepared weight of {prepared.numel()} bytes", available=f"{needed} bytes")
    return kernels.linear_gemm(layer, codes.contiguous(), scales.contiguous(), sums.contiguous(), prepared)


def _layer(
    codes: Tensor, rows: int, weight_groups: int, float_zero_point: bool, act_group: int, path: str
) -> LayerShape:
    if path not in PATHS:
        raise UnsupportedError(f"unknown path {path!r}", available=PATHS)
    features = codes.shape[1] * (2 if path.startswith("s4") else 1)
    return LayerShape(rows, features, weight_groups, float_zero_point, act_group=act_group)
