"""``dvdquant::prepare_weight``: a packed weight to the buffer that the GEMM of a path reads (``repack.py``)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dvdquant.errors import UnsupportedError
from dvdquant.ops.cuda_linear import layer_with_path, require_kernels
from dvdquant.ops.repack import PATHS, LayerShape, prepare, prepared_bytes, to_bytes

__all__ = ["packed_shape", "prepare_weight"]


def packed_shape(weight: Tensor, weight_group_scale: Tensor, weight_zero: Tensor) -> LayerShape:
    """Return n, k, weight_groups and float_zero_point of a packed weight.

    Args:
        weight: int8 [N, K/2].
        weight_group_scale: uint8 [N, groups].
        weight_zero: fp32 [N], or uint8 [N, groups] with float zero-points.
    """
    return LayerShape(
        weight.shape[0], 2 * weight.shape[1], weight_group_scale.shape[1], not weight_zero.is_floating_point()
    )


@torch.library.custom_op("dvdquant::prepare_weight", mutates_args=())
def prepare_weight(
    weight: Tensor, weight_scale: Tensor, weight_group_scale: Tensor, weight_zero: Tensor, bias: Tensor, path: str
) -> Tensor:
    """Repack or expand a weight once, for :func:`dvdquant.ops.linear_gemm.linear_gemm`.

    Args:
        weight: int8 [N, K/2], packed 4-bit codes of the rotated weight.
        weight_scale: fp32 [N].
        weight_group_scale: uint8 [N, groups].
        weight_zero: fp32 [N], or uint8 [N, groups] with float zero-points.
        bias: fp32 [N].
        path: One of :data:`dvdquant.ops.repack.PATHS`; on CUDA one that the device runs.

    Returns:
        uint8 [bytes]: codes, fp32 row scales, row zero-points and bias; on s4_group also group scales and group zero-points.

    Raises:
        ShapeError: A tensor has another shape or dtype than the others require.
        UnsupportedError: The path is unknown, or is s4_token or e4m3_group and the weight has groups.
    """
    layer = packed_shape(weight, weight_group_scale, weight_zero)
    tensors = (weight, weight_scale, weight_group_scale, weight_zero, bias)
    prepared = prepare(layer, path, *(t.numpy(force=True) for t in tensors))
    return torch.from_numpy(np.frombuffer(bytearray(to_bytes(prepared)), np.uint8))


@prepare_weight.register_fake
def _prepare_weight_fake(
    weight: Tensor, weight_scale: Tensor, weight_group_scale: Tensor, weight_zero: Tensor, bias: Tensor, path: str
) -> Tensor:
    layer = packed_shape(weight, weight_group_scale, weight_zero)
    return weight.new_empty((prepared_bytes(layer, path),), dtype=torch.uint8)


@prepare_weight.register_kernel("cuda")
def _prepare_weight_cuda(
    weight: Tensor, weight_scale: Tensor, weight_group_scale: Tensor, weight_zero: Tensor, bias: Tensor, path: str
) -> Tensor:
    if path not in PATHS:
        raise UnsupportedError(f"unknown path {path!r}", available=PATHS)
    kernels = require_kernels(weight.device)
    shape = packed_shape(weight, weight_group_scale, weight_zero)
    layer = layer_with_path(kernels, shape, path, act_bits=(8, 4), act_group=(0, 128, 64))
    return kernels.prepare(layer, (weight, weight_scale, weight_group_scale, weight_zero, bias))
