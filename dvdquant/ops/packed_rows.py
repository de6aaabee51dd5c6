"""Weights that stay packed: the rows that the kernels keep beside the codes, and back. The reference of ``dvdq_make_rows``.

One copy of a weight, half a byte each, serves all activation grids on every GPU: the codes as the files hold them, the
scales and byte zero-points of groups as well, and a small buffer of rows (``RowsLayout`` in kernels/csrc/prepared.h).
Scale, zero-point and bias of each row are in it, and the int8 row scales, which would ask for all codes of a row again.
Where a path multiplies 8 bits, the weight is expanded from all of them just before the product, to the very bytes of
``repack.prepare``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dvdquant.errors import ShapeError
from dvdquant.ops.repack import ALIGNMENT, LayerShape, PreparedWeight, padded, prepare

__all__ = ["expand", "group_bytes", "make_rows", "packed_bytes", "rows_bytes"]

ROW_PARTS = 4  # scale, zero-point, bias and int8 scale, fp32 [N] each


def rows_bytes(layer: LayerShape) -> int:
    """Return the size of a layer's rows in bytes; every part starts at a multiple of 256.

    Args:
        layer: Its n is read.
    """
    return ROW_PARTS * padded(4 * layer.n)


def group_bytes(layer: LayerShape) -> tuple[int, int]:
    """Return the bytes of the scales and of the zero-points that groups have beside codes and rows; 0 without groups.

    Args:
        layer: Its n, weight_groups and float_zero_point are read.
    """
    each = layer.n * layer.weight_groups if layer.weight_groups > 1 else 0
    return each, each * layer.float_zero_point


def packed_bytes(layer: LayerShape) -> int:
    """Return the bytes of a weight that stays packed: codes, what groups have, and rows.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
    """
    return layer.n * layer.k // 2 + sum(group_bytes(layer)) + rows_bytes(layer)


def make_rows(layer: LayerShape, codes: Any, scale: Any, group_scale: Any, zero: Any, bias: Any = None) -> bytes:
    """Make the rows of a layer, as the device holds them; arrays are numpy or CPU tensors.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        codes: int8 or uint8 [N, K/2], low nibble = even k.
        scale: fp32 [N].
        group_scale: uint8 [N, groups].
        zero: fp32 [N], or uint8 [N, groups] with float_zero_point.
        bias: fp32 [N], or None for zeros.

    Raises:
        ShapeError: An array has another shape or dtype than the layer says.
    """
    packed = prepare(layer, "s4_group", codes, scale, group_scale, zero, bias)
    eight = prepare(layer, "s8_token", codes, scale, group_scale, zero, bias)
    parts: list[Any] = [packed.row_scale, packed.row_zero, packed.bias, eight.row_scale]
    return b"".join(raw + bytes(-len(raw) % ALIGNMENT) for raw in (np.ascontiguousarray(p).tobytes() for p in parts))


def expand(
    layer: LayerShape, path: str, codes: Any, rows: bytes, group_scale: Any = None, group_zero: Any = None
) -> PreparedWeight:
    """Make the prepared weight of a path from a packed one: what ``repack.prepare`` makes of the stored tensors.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        codes: int8 or uint8 [N, K/2], low nibble = even k.
        rows: The bytes of the rows.
        group_scale: uint8 [N, groups] as stored, where there are groups.
        group_zero: uint8 [N, groups] as stored, where groups have byte zero-points.

    Raises:
        ShapeError: The rows have another size than the layer's.
        UnsupportedError: The path is unknown, or is s4_token or e4m3_group and the weight has groups.
    """
    if len(rows) != rows_bytes(layer):
        raise ShapeError(f"rows of {len(rows)} bytes", available=f"{rows_bytes(layer)} bytes")
    step = padded(4 * layer.n)
    scale, zero, bias = (np.frombuffer(rows, np.float32, layer.n, part * step) for part in range(3))
    if layer.weight_groups == 1:
        # The row's step holds the group scale already, and its zero-point is a number.
        group_scale, has_bytes = np.full((layer.n, 1), 255, np.uint8), False
    else:
        has_bytes = layer.float_zero_point
    return prepare(
        replace(layer, float_zero_point=has_bytes),
        path,
        codes,
        scale,
        group_scale,
        group_zero if has_bytes else zero,
        bias,
    )
