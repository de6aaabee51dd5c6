"""The regular Hadamard matrix of order 4ᵏ that ConvRot rotates with, by way of Sylvester's, which everything here computes.

The regular matrix of order 4 is half of ``[[1, 1, 1, −1], [1, 1, −1, 1], [1, −1, 1, 1], [−1, 1, 1, 1]]``; those of order 4ᵏ
are its Kronecker powers R. Each is ``R = P · H · D`` with Sylvester's matrix H, signs D, and a permutation with signs P.
All are orthonormal, and R and H are symmetric. So ``w · R = (w · D) · H · Pᵀ``: a weight whose channels got the signs D, and
which was rotated by Sylvester's matrix, holds the values of the regular rotation in another order and with other signs.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.numerics.hadamard import hadamard_matrix

__all__ = ["regular_hadamard", "regular_order", "regular_signs"]

_SIGNS = (1.0, 1.0, 1.0, -1.0)
"""D of order 4; that of order 4ᵏ is its Kronecker power."""


def _powers(order: int) -> int:
    """Return k of an order 4ᵏ.

    Raises:
        ShapeError: The order is no power of four.
    """
    k = (order.bit_length() - 1) // 2
    if order < 1 or 4**k != order:
        raise ShapeError(
            f"there is no regular Hadamard matrix of order {order} here",
            available="powers of four: 4, 16, 64, 256",
            fix="take one of these, or rotation auto",
        )
    return k


def regular_hadamard(order: int) -> Tensor:
    """Return R, the regular Hadamard matrix, orthonormal, fp64 [order, order].

    Args:
        order: A power of four.

    Raises:
        ShapeError: The order is none.
    """
    four = (1.0 - 2.0 * torch.eye(4, dtype=torch.float64).flip(0)) / 2
    return reduce(torch.kron, [four] * _powers(order), torch.ones(1, 1, dtype=torch.float64))


def regular_signs(order: int, features: int) -> Tensor:
    """Return D for each of the blocks of a row, fp32 [features] of ±1.

    Args:
        order: The channels of a block, a power of four.
        features: K, the channels of the row, which the order divides.

    Raises:
        ShapeError: The order is no power of four, or does not divide K.
    """
    if features % max(1, order):
        raise ShapeError(
            f"blocks of {order} do not divide {features} channels", fix="take the block of Rotation.for_features"
        )
    signs = reduce(torch.kron, [torch.tensor(_SIGNS)] * _powers(order), torch.ones(1))
    return signs.repeat(features // order)


def regular_order(order: int) -> tuple[Tensor, Tensor]:
    """Return P as (places, signs): column j of the regular rotation is ``signs[j]`` times column ``places[j]`` of Sylvester's.

    Args:
        order: The channels of a block, a power of four.

    Returns:
        int64 [order], and int8 [order] of ±1.

    Raises:
        ShapeError: The order is no power of four.
    """
    signs = regular_signs(order, order).double()
    between = (regular_hadamard(order) * signs) @ hadamard_matrix(order)  # R · D · H = P
    places = between.abs().argmax(1)
    return places, between.gather(1, places[:, None])[:, 0].round().to(torch.int8)
