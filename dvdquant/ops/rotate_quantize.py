"""``dvdquant::rotate_quantize``: the first half of a quantized linear layer, x to the codes the GEMM of a path reads."""

from __future__ import annotations

import torch
from torch import Tensor

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.activation_grid import quantize_activation
from dvdquant.numerics.packing import pack_int4
from dvdquant.ops.cuda_linear import CACHE, CudaKernels, layer_with_path, require_kernels
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.reference import rotate_by_matrices
from dvdquant.ops.repack import PATHS, LayerShape

__all__ = ["encode_codes", "kernels_to_rotate", "rotate_quantize"]


def encode_codes(codes: Tensor, path: str) -> Tensor:
    """Return codes as a path holds them: uint8 [M, K/2] packed (s4), [M, K] two's complement (s8) or [M, K] e4m3.

    Args:
        codes: int8 [M, K].
        path: One of :data:`dvdquant.ops.repack.PATHS`.
    """
    if path.startswith("s4"):
        return pack_int4(codes)
    if path == "e4m3_group":
        return codes.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.view(torch.uint8)


@torch.library.custom_op("dvdquant::rotate_quantize", mutates_args=())
def rotate_quantize(
    x: Tensor, hadamard: Tensor, outer: Tensor, act_bits: int, act_group: int, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate x and round it to codes.

    Args:
        x: [M, K] float32 (CPU only), float16 or bfloat16.
        hadamard: The inner rotation factor, fp32 [b, b]; on CUDA the Sylvester matrix / √b.
        outer: The outer rotation factor, fp32 [p, p].
        act_bits: Bits of the activation codes: 4 or 8.
        act_group: Channels per scale; 0 for the whole token.
        path: One of :data:`dvdquant.ops.repack.PATHS`; on CUDA one that the device runs.

    Returns:
        codes uint8 [M, K/2] on s4 paths, [M, K] on others (:func:`encode_codes`); scales fp32 [groups, M]; token sums
        fp32 [groups, M], the sum of a group's codes.

    Raises:
        UnsupportedError: An unknown path, or codes that it cannot hold.
    """
    _check(path, act_bits)
    rotated = rotate_by_matrices(x.to(torch.float32), hadamard, outer)
    codes, scales = quantize_activation(rotated, act_bits, act_group)
    sums = codes.reshape(*scales.shape, x.shape[-1] // scales.shape[-1]).sum(dim=-1).to(torch.float32)
    return encode_codes(codes, path), scales.T.contiguous(), sums.T.contiguous()


@rotate_quantize.register_fake
def _rotate_quantize_fake(
    x: Tensor, hadamard: Tensor, outer: Tensor, act_bits: int, act_group: int, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features = x.shape
    groups = features // act_group if act_group else 1
    codes = x.new_empty((tokens, features // 2 if path.startswith("s4") else features), dtype=torch.uint8)
    scales, sums = (x.new_empty((groups, tokens), dtype=torch.float32) for _ in range(2))
    return codes, scales, sums


@rotate_quantize.register_kernel("cuda")
def _rotate_quantize_cuda(
    x: Tensor, hadamard: Tensor, outer: Tensor, act_bits: int, act_group: int, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(path, act_bits)
    kernels = kernels_to_rotate(x, hadamard)
    features = x.shape[1]
    shape = LayerShape(
        8, features, 1, False, len(hadamard), len(outer), act_bits, act_group, DTYPE_NAMES[x.dtype]
    )  # fmt: skip
    grouped = tuple(g for g in (1, features // 128, features // 64, features // 32) if g)
    layer = layer_with_path(kernels, shape, path, weight_groups=grouped, float_zero_point=(False, True))
    return kernels.rotate_quantize(layer, x, outer.contiguous())


def kernels_to_rotate(x: Tensor, hadamard: Tensor) -> CudaKernels:
    """Return the kernels of the device of ``x``, which can rotate it by a matrix.

    Args:
        x: The input of a layer [M, K], on a CUDA device.
        hadamard: The inner factor of the rotation, fp32 [b, b].

    Raises:
        UnsupportedError: The kernels are not there, or know no such rotation.
    """
    if x.dtype not in DTYPE_NAMES or not CACHE.is_sylvester(hadamard):
        raise UnsupportedError(
            f"the kernels cannot rotate {x.dtype} by this matrix", available="bf16 and fp16, by Sylvester matrices"
        )
    return require_kernels(x.device)


def _check(path: str, act_bits: int) -> None:
    if path not in PATHS:
        raise UnsupportedError(f"unknown path {path!r}", available=PATHS)
    if act_bits != 4 and not path.startswith("s8"):
        raise UnsupportedError(f"{path} holds no {act_bits}-bit codes", available="4-bit codes, or an s8 path")
