"""``dvdquant::prepared_linear`` and ``packed_linear``: a layer on the kernels, as one opaque operation of a compiled model.

A compiler cannot look into the kernel library. It fuses what lies between two of these operations, and calls the library
for them. Layers of one shape have the same arguments but for their tensors, so that the blocks of a model share one
compiled function.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvdquant.ops.cuda.errors import KernelError
from dvdquant.ops.packed_layer import DTYPE_NAMES
from dvdquant.ops.repack import LayerShape

if TYPE_CHECKING:
    from dvdquant.ops.cuda_linear import CudaKernels

__all__ = ["handle_of", "kernels_of", "opened", "packed_linear", "prepared_linear"]

_numbers = itertools.count(1)
_kernels: weakref.WeakValueDictionary[int, CudaKernels] = weakref.WeakValueDictionary()
_handles: weakref.WeakKeyDictionary[CudaKernels, int] = weakref.WeakKeyDictionary()


def handle_of(kernels: CudaKernels) -> int:
    """Return the number by which :func:`prepared_linear` finds ``kernels``: an operation takes no Python objects.

    Args:
        kernels: The opened kernels.
    """
    if kernels not in _handles:
        _handles[kernels] = next(_numbers)
        _kernels[_handles[kernels]] = kernels
    return _handles[kernels]


def kernels_of(number: int) -> CudaKernels:
    """Return the kernels of a number.

    Args:
        number: The number of the kernels, of :func:`handle_of`.

    Raises:
        KernelError: They are gone.
    """
    kernels = _kernels.get(number)
    if kernels is None:
        raise KernelError("the kernels that a compiled model was made for are gone", fix="compile it again")
    return kernels


@torch.library.custom_op("dvdquant::prepared_linear", mutates_args=())
def prepared_linear(
    x: Tensor,
    outer: Tensor,
    prepared: Tensor,
    pre_quant: Tensor | None,
    kernels: int,
    rows: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """Multiply x with a weight that was prepared for the kernels.

    Args:
        x: [..., K] bf16 or fp16.
        outer: fp32 [p, p], the outer factor of the rotation.
        prepared: uint8 [bytes], of :meth:`.CudaKernels.prepare`.
        pre_quant: [K/8, 2, 8] of x's dtype, what x is multiplied by and what is added to it; or None.
        kernels: The number of the kernels, of :func:`handle_of`.
        rows: The output features, N.
        weight_groups: Scales per row of the weight.
        float_zero_point: Whether the weight has a zero-point per group.
        block: The order of the inner Hadamard matrix.
        act_bits: 4 or 8.
        act_group: Channels per activation scale, 0 for the whole token.

    Returns:
        [..., N] of x's dtype.

    Raises:
        KernelError: The kernels of this number are gone.
    """
    library, layer = opened(kernels, x, len(outer), rows, weight_groups, float_zero_point, block, act_bits, act_group)
    y = library.quant_linear(layer, _tokens(x), outer.contiguous(), prepared, pre_quant)
    return y.reshape(*x.shape[:-1], rows)


@prepared_linear.register_fake
def _prepared_linear_fake(
    x: Tensor,
    outer: Tensor,
    prepared: Tensor,
    pre_quant: Tensor | None,
    kernels: int,
    rows: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("dvdquant::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    outer: Tensor,
    codes: Tensor,
    weight_rows: Tensor,
    pre_quant: Tensor | None,
    kernels: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    """Multiply x with a weight that stays packed.

    Args:
        x: [..., K] bf16 or fp16.
        outer: fp32 [p, p], the outer factor of the rotation.
        codes: int8 [N, K/2], of :meth:`.CudaKernels.make_rows`.
        weight_rows: uint8 [bytes], of the same call.
        pre_quant: [K/8, 2, 8] of x's dtype, what x is multiplied by and what is added to it; or None.
        kernels: The number of the kernels, of :func:`handle_of`.
        weight_groups: Scales per row of the weight.
        float_zero_point: Whether the weight has a zero-point per group.
        block: The order of the inner Hadamard matrix.
        act_bits: 4 or 8.
        act_group: Channels per activation scale, 0 for the whole token.

    Returns:
        [..., N] of x's dtype.

    Raises:
        KernelError: The kernels of this number are gone.
    """
    rows = codes.shape[0]
    library, layer = opened(kernels, x, len(outer), rows, weight_groups, float_zero_point, block, act_bits, act_group)
    y = library.packed_linear(layer, _tokens(x), outer.contiguous(), codes, weight_rows, pre_quant)
    return y.reshape(*x.shape[:-1], rows)


@packed_linear.register_fake
def _packed_linear_fake(
    x: Tensor,
    outer: Tensor,
    codes: Tensor,
    weight_rows: Tensor,
    pre_quant: Tensor | None,
    kernels: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _tokens(x: Tensor) -> Tensor:
    """Return x as [M, K]."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def opened(
    number: int,
    x: Tensor,
    outer: int,
    rows: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> tuple[CudaKernels, LayerShape]:
    """Return the kernels of a number, and the layer that the arguments of an operation describe.

    Args:
        number: The number of the kernels, of :func:`handle_of`.
        x: [..., K] bf16 or fp16.
        outer: The order of the outer factor of the rotation.
        rows: The output features, N.
        weight_groups: Scales per row of the weight.
        float_zero_point: Whether the weight has a zero-point per group.
        block: The order of the inner Hadamard matrix.
        act_bits: 4 or 8.
        act_group: Channels per activation scale, 0 for the whole token.

    Raises:
        KernelError: The kernels of this number are gone.
    """
    kernels = kernels_of(number)
    dtype = DTYPE_NAMES[x.dtype]
    shape = (rows, x.shape[-1], weight_groups, float_zero_point, block, outer, act_bits, act_group, dtype)
    return kernels, LayerShape(*shape)
