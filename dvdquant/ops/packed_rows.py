"""Weights that stay packed: the rows that the kernels keep beside the codes, and back. The reference of ``dvdq_make_rows``.

One copy of a weight, half a byte each, serves all activation grids on every GPU: the codes as the files hold them, and
a small buffer of rows (``RowsLayout`` in kernels/csrc/prepared.h). What ``s4_group`` has beside its codes is in it, and
the int8 row scales, which would ask for all codes of a row again. Where a path multiplies 8 bits, the weight is expanded
from both just before the product, to the very bytes of ``repack.prepare``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from dvdquant.errors import ShapeError
from dvdquant.ops.repack import ALIGNMENT, LayerShape, PreparedWeight, prepare

__all__ = ["expand", "make_rows", "packed_bytes", "rows_bytes"]


def rows_bytes(layer: LayerShape) -> int:
    """Return the size of a layer's rows in bytes; every part starts at a multiple of 256.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
    """
    return sum(_padded(np.dtype(dtype).itemsize * math.prod(shape)) for dtype, shape in _parts(layer))


def packed_bytes(layer: LayerShape) -> int:
    """Return the bytes of a weight that stays packed: codes and rows.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
    """
    return layer.n * layer.k // 2 + rows_bytes(layer)


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
    parts: list[Any] = [packed.row_scale, packed.row_zero, packed.bias]
    parts += [part for part in (packed.group_scale, packed.group_zero) if part is not None] + [eight.row_scale]
    return b"".join(raw + bytes(-len(raw) % ALIGNMENT) for raw in (np.ascontiguousarray(p).tobytes() for p in parts))


def expand(layer: LayerShape, path: str, codes: Any, rows: bytes) -> PreparedWeight:
    """Make the prepared weight of a path from codes and rows: what ``repack.prepare`` makes of the stored tensors.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        codes: int8 or uint8 [N, K/2], low nibble = even k.
        rows: The bytes of the rows.

    Raises:
        ShapeError: The rows have another size than the layer's.
        UnsupportedError: An unknown path, or weight groups on s4_token or e4m3_group.
    """
    if len(rows) != rows_bytes(layer):
        raise ShapeError(f"rows of {len(rows)} bytes", available=f"{rows_bytes(layer)} bytes")
    arrays: list[Any] = []
    position = 0
    for dtype, shape in _parts(layer):
        count = math.prod(shape)
        arrays.append(np.frombuffer(rows, dtype, count, position).reshape(shape))
        position += _padded(arrays[-1].nbytes)
    scale, zero, bias, *grouped, _ = arrays
    # One group: the row's step holds the factor already, and its zero-point is a number.
    group_scale = grouped[0] if grouped else np.full((layer.n, 1), 255, np.uint8)
    has_bytes = len(grouped) == 2
    return prepare(
        replace(layer, float_zero_point=has_bytes),
        path,
        codes,
        scale,
        group_scale,
        grouped[1] if has_bytes else zero,
        bias,
    )


def _parts(layer: LayerShape) -> list[tuple[Any, tuple[int, ...]]]:
    row: tuple[Any, tuple[int, ...]] = (np.float32, (layer.n,))
    group: tuple[Any, tuple[int, ...]] = (np.uint8, (layer.n, layer.weight_groups))
    grouped = [group] * (1 + layer.float_zero_point) if layer.weight_groups > 1 else []
    return [row, row, row, *grouped, row]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
