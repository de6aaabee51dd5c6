"""Canonical packed weights to what each device path multiplies, and back: the reference of the kernels' ``prepare_weight``.

The canonical layout (``packing.py``) is what files hold: 4-bit codes c, one step Δ[n] per row, a byte f[n, g] per group,
a zero-point z. Per row n and path:

    s4_token, s4_group    c as packed, z as ``row_zero`` (the GEMM corrects with token sums), row_scale = step; with several
                          groups per row row_scale = Δ, and f and float zero-points stay bytes per group
    s8_token, s8_group, s8_wgmma, one group per row:
        z an integer      w8 = d         row_scale = step         exact
        2z an odd integer w8 = 2d        row_scale = step / 2     exact
    any other row         w8 = rint(d·step / D)   row_scale = D = max(max|d·step|, 2⁻¹⁰⁰) / 127
    e4m3_group            the first two as above, up to 16; any other row e4m3(2d·r), row_scale = step / 2 / r, where r is 1
                          unless 2d passes 448, the largest number there is

with step = Δ·(f/255) and d = c − z. Exact rows hold d or 2d up to 127 (16 on e4m3_group) for every code −8..7 there is, so
that the choice depends on z alone. Every operation is one fp32 operation in the order written, rounded to nearest even, so
that a device repeats it bit by bit (kernels/csrc/prepared.h).

Rounding grouped weights to 8 bits per row adds, as a share of the squared error of their 4-bit grid (64 rows of 3072):

    recipe      rotated Gaussian   rotated Student t (3)
    w4a8        1.49 %             1.75 %
    w4a4-g64    1.05 %             1.22 %
    w4a4-g128   0.79 %             0.94 %

(python -m pytest tests/ops/test_repack.py -k states_the_added_error -s)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.array_types import F32, F64, I8, U8
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.numerics.packing import expand_zero, pack_int4, unpack_int4

__all__ = [
    "PATHS",
    "LayerShape",
    "PreparedWeight",
    "padded",
    "added_error",
    "dequantize",
    "from_bytes",
    "prepare",
    "prepared_bytes",
    "restore",
    "to_bytes",
]


# In the order of dvdq_path in kernels/include/dvdquant/kernels.h.
PATHS = ("s4_token", "s4_group", "s8_token", "s8_group", "s8_wgmma", "e4m3_group")
# Up to 16 every integer is an e4m3 number, and 128 products with 4-bit codes stay below 2¹⁴; 448 is the largest.
_EXACT_E4M3, _LARGEST_E4M3 = np.float32(16), np.float32(E4M3_MAX)
_INT8 = np.float32(127)
_ROW_FLOOR = np.float32(2.0**-100)
# Sections of a prepared buffer start at multiples of this.
ALIGNMENT = 256
EXPANDED_AT_ONCE = 1 << 22
"""The number of weights that are expanded to fp32 at a time."""


@dataclass(frozen=True)
class LayerShape:
    """``dvdq_layer`` of the C ABI.

    Args:
        n: Output features N.
        k: Input features K, a multiple of 32 and of block · outer.
        weight_groups: Groups per weight row; 1 is one scale per row.
        float_zero_point: Whether zero is uint8 [N, groups] (z = byte/16 − 8) instead of fp32 [N].
        block: Order of the inner Hadamard factor; 1 for none.
        outer: Order of the outer rotation factor; 1 for none.
        act_bits: Bits of the activation codes: 4 or 8.
        act_group: Channels per activation scale; 0 for the whole token.
        dtype: Dtype of x and y: ``bf16`` or ``fp16``.
    """

    n: int
    k: int
    weight_groups: int = 1
    float_zero_point: bool = False
    block: int = 1
    outer: int = 1
    act_bits: int = 8
    act_group: int = 0
    dtype: str = "bf16"


@dataclass(frozen=True)
class PreparedWeight:
    """The arrays that a path multiplies: ``W[n, k] = row_scale[n] · [f[n, g]/255 ·] (w8[n, k] − zero)``.

    Args:
        codes: int8 [N, K/2] packed (s4), int8 [N, K] (s8), or uint8 [N, K] of e4m3 bytes.
        row_scale: fp32 [N].
        row_zero: fp32 [N]; 0 on 8-bit paths, whose codes are centred.
        bias: fp32 [N].
        group_scale: uint8 [N, groups] on s4_group with groups > 1, else None.
        group_zero: uint8 [N, groups] on s4_group with groups > 1 and float zero-points, else None.
    """

    codes: npt.NDArray[Any]
    row_scale: F32
    row_zero: F32
    bias: F32
    group_scale: U8 | None = None
    group_zero: U8 | None = None


def prepare(
    layer: LayerShape, path: str, codes: Any, scale: Any, group_scale: Any, zero: Any, bias: Any = None
) -> PreparedWeight:
    """Make a prepared weight from a packed one; arrays are numpy or CPU tensors.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        path: One of :data:`PATHS`.
        codes: int8 or uint8 [N, K/2], low nibble = even k.
        scale: fp32 [N].
        group_scale: uint8 [N, groups].
        zero: fp32 [N], or uint8 [N, groups] with float_zero_point.
        bias: fp32 [N], or None for zeros.

    Raises:
        ShapeError: An array has another shape or dtype than the layer says.
        UnsupportedError: The path is unknown, or is s4_token or e4m3_group and the weight has groups.
    """
    if path not in PATHS:
        raise UnsupportedError(f"unknown path {path!r}", available=PATHS)
    packed, step, group_scales, zeros = _canonical(layer, codes, scale, group_scale, zero)
    offset = np.zeros(layer.n, np.float32) if bias is None else _array("bias", bias, np.float32, (layer.n,))
    if path == "s4_token" and layer.weight_groups != 1:
        raise UnsupportedError("s4_token needs one scale per row", available="s4_group, or an 8-bit path")
    if path.startswith("s4") and layer.weight_groups == 1:
        return PreparedWeight(packed, step * _ratio(group_scales)[:, 0], _zero_points(zeros)[:, 0], offset)
    if path == "s4_group":
        row_zero = np.zeros(layer.n, np.float32) if layer.float_zero_point else zeros
        return PreparedWeight(packed, step, row_zero, offset, group_scales, zeros if layer.float_zero_point else None)
    if path == "e4m3_group" and layer.weight_groups != 1:
        raise UnsupportedError("e4m3_group needs one scale per row", available="s8_group")
    expanded = np.empty((layer.n, layer.k), np.uint8 if path == "e4m3_group" else np.int8)
    row_scale = np.empty(layer.n, np.float32)
    for rows in _blocks(layer.n, layer.k):
        expanded[rows], row_scale[rows] = _expand(packed[rows], step[rows], group_scales[rows], zeros[rows], path)
    return PreparedWeight(expanded, row_scale, np.zeros(layer.n, np.float32), offset)


def restore(layer: LayerShape, prepared: PreparedWeight, scale: Any, group_scale: Any, zero: Any) -> I8:
    """Return the packed codes int8 [N, K/2] nearest to a prepared weight: the inverse of :func:`prepare`.

    The result is exact wherever the expansion was exact. In int8 rows that were rounded, which moved a weight by at
    most 1/254 of the row's largest, it is exact where the group's step is above 2/254 of that largest.

    Args:
        layer: The layer that was given to :func:`prepare`.
        prepared: The result of :func:`prepare`.
        scale: fp32 [N], as it was given to :func:`prepare`.
        group_scale: uint8 [N, groups], as it was given to :func:`prepare`.
        zero: fp32 [N] or uint8 [N, groups], as it was given to :func:`prepare`.

    Raises:
        ShapeError: An array has another shape or dtype than the layer says.
    """
    if prepared.codes.shape[1] != layer.k:
        return prepared.codes.view(np.int8)
    step = _array("scale", scale, np.float32, (layer.n,)).astype(np.float64)[:, None]
    group_scales = _array("group_scale", group_scale, np.uint8, (layer.n, layer.weight_groups)).astype(np.float64) / 255
    width = layer.k // layer.weight_groups
    steps = np.repeat(step * group_scales, width, axis=1)
    points = _spread(_zero_points(_zero_array(layer, zero)), layer.k).astype(np.float64)
    units = np.divide(dequantize(layer, prepared), steps, out=np.zeros((layer.n, layer.k)), where=steps > 0)
    nearest = np.clip(np.rint(units + points), -8, 7).astype(np.int8)
    return pack_int4(torch.from_numpy(nearest)).numpy().view(np.int8)


def dequantize(layer: LayerShape, prepared: PreparedWeight) -> F64:
    """Return the weight [N, K] that a prepared weight stands for, in float64.

    Args:
        layer: Its k and weight_groups are read.
        prepared: The result of :func:`prepare` or :func:`from_bytes`.
    """
    packed = prepared.codes.shape[1] != layer.k
    values = _unpacked(prepared.codes).astype(np.float64) if packed else _decoded(prepared.codes)
    zero = prepared.row_zero.astype(np.float64)[:, None]
    if prepared.group_zero is not None:
        zero = _spread(_zero_points(prepared.group_zero), layer.k).astype(np.float64)
    values -= zero
    if prepared.group_scale is not None:
        values *= np.repeat(prepared.group_scale, layer.k // layer.weight_groups, axis=1) / 255.0
    result: F64 = values * prepared.row_scale.astype(np.float64)[:, None]
    return result


def to_bytes(prepared: PreparedWeight) -> bytes:
    """Return the prepared buffer as the device holds it: codes, row scales, row zeros, bias, [group scales, [group zeros]].

    Every section starts at a multiple of 256 bytes (kernels/csrc/prepared.h).

    Args:
        prepared: The result of :func:`prepare`.
    """
    sections = [prepared.codes, prepared.row_scale, prepared.row_zero, prepared.bias]
    sections += [section for section in (prepared.group_scale, prepared.group_zero) if section is not None]
    return b"".join(raw + bytes(-len(raw) % ALIGNMENT) for raw in (section.tobytes() for section in sections))


def from_bytes(layer: LayerShape, path: str, buffer: bytes) -> PreparedWeight:
    """Return the prepared weight in a buffer, as views of it: the inverse of :func:`to_bytes`.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        path: One of :data:`PATHS`, the path it was prepared for.
        buffer: The bytes of the prepared weight.

    Raises:
        ShapeError: The buffer has another size than the layer's.
    """
    if len(buffer) != prepared_bytes(layer, path):
        raise ShapeError(f"a prepared weight of {len(buffer)} bytes", available=f"{prepared_bytes(layer, path)} bytes")
    arrays: list[Any] = []
    position = 0
    for dtype, shape in _sections(layer, path):
        count = math.prod(shape)
        arrays.append(np.frombuffer(buffer, dtype, count, position).reshape(shape))
        position += padded(arrays[-1].nbytes)
    return PreparedWeight(*arrays)


def prepared_bytes(layer: LayerShape, path: str) -> int:
    """Return the size of a prepared buffer in bytes.

    Args:
        layer: Its n, k, weight_groups and float_zero_point are read.
        path: One of :data:`PATHS`.
    """
    return sum(padded(np.dtype(dtype).itemsize * math.prod(shape)) for dtype, shape in _sections(layer, path))


def _sections(layer: LayerShape, path: str) -> list[tuple[Any, tuple[int, ...]]]:
    row: tuple[Any, tuple[int, ...]] = (np.float32, (layer.n,))
    group: tuple[Any, tuple[int, ...]] = (np.uint8, (layer.n, layer.weight_groups))
    bytes_per_row = layer.k // 2 if path.startswith("s4") else layer.k
    codes: tuple[Any, tuple[int, ...]] = (np.uint8 if path == "e4m3_group" else np.int8, (layer.n, bytes_per_row))
    grouped = [group] * (1 + layer.float_zero_point) if path == "s4_group" and layer.weight_groups > 1 else []
    return [codes, row, row, row, *grouped]


def padded(size: int) -> int:
    """Return the bytes of a section with what fills it up to the next multiple of ``ALIGNMENT``.

    Args:
        size: The bytes of the section.
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def added_error(
    original: Any, layer: LayerShape, path: str, codes: Any, scale: Any, group_scale: Any, zero: Any
) -> float:
    """Return what the path's expansion adds: ``‖W_path − W_4bit‖² / ‖W_4bit − W‖²``, in float64; 0 if the latter is 0.

    Args:
        original: The rotated weight W, fp32 [N, K], that the codes were found for.
        layer: The layer that the arrays belong to.
        path: One of :data:`PATHS`.
        codes: int8 or uint8 [N, K/2], low nibble = even k.
        scale: fp32 [N].
        group_scale: uint8 [N, groups].
        zero: fp32 [N], or uint8 [N, groups] with float_zero_point.

    Raises:
        ShapeError: An array has another shape or dtype than the layer says.
        UnsupportedError: The path is unknown, or is s4_token or e4m3_group and the weight has groups.
    """
    packed, step, group_scales, zeros = _canonical(layer, codes, scale, group_scale, zero)
    grid = dequantize(layer, PreparedWeight(packed, step, np.zeros(layer.n, np.float32), step, group_scales, None))
    centre = (
        _spread(_zero_points(zeros), layer.k)
        * (_spread(group_scales, layer.k) / 255.0)
        * step[:, None].astype(np.float64)
    )
    grid -= centre
    expanded = dequantize(layer, prepare(layer, path, codes, scale, group_scale, zero))
    floor = np.square(grid - np.asarray(original, np.float64)).sum()
    return float(np.square(expanded - grid).sum() / floor) if floor else 0.0


def _expand(packed: I8, step: F32, group_scales: U8, zeros: Any, path: str) -> tuple[I8 | U8, F32]:
    """Return the expanded codes and row scales of some rows; ``step`` is Δ."""
    d = _unpacked(packed).astype(np.float32)
    features = d.shape[1]
    d -= _spread(_zero_points(zeros), features)
    steps = step[:, None] * _ratio(group_scales)
    whole, half, reach = _row_kinds(zeros, _EXACT_E4M3 if path == "e4m3_group" else _INT8)
    if group_scales.shape[1] > 1:
        whole[:], half[:] = False, False
    if path == "e4m3_group":
        shrink = np.where(2 * reach > _LARGEST_E4M3, _LARGEST_E4M3 / (2 * reach), np.float32(1))
        values = np.where(whole[:, None], d, np.where(half[:, None], 2 * d, (2 * d) * shrink[:, None]))
        scales = np.where(whole, steps[:, 0], (steps[:, 0] * np.float32(0.5)) / np.where(half, np.float32(1), shrink))
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales
    weights = d * _spread(steps, features)
    coarse = np.maximum(np.abs(weights).max(axis=1), _ROW_FLOOR) / _INT8
    values = np.where(whole[:, None], d, np.where(half[:, None], 2 * d, np.rint(weights / coarse[:, None])))
    scales = np.where(whole, steps[:, 0], np.where(half, steps[:, 0] * np.float32(0.5), coarse))
    return np.clip(values, -_INT8, _INT8).astype(np.int8), scales


def _row_kinds(zeros: Any, limit: np.float32) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], F32]:
    """Return per row, by its first zero-point: d is whole, 2d is odd (both only within the limit), and max |d|."""
    z = _zero_points(zeros)[:, 0]
    reach = np.maximum(np.abs(np.float32(-8) - z), np.abs(np.float32(7) - z))
    whole = z == np.rint(z)
    half = ~whole & (2 * z == np.rint(2 * z))
    return whole & (reach <= limit), half & (2 * reach <= limit), reach


def _canonical(layer: LayerShape, codes: Any, scale: Any, group_scale: Any, zero: Any) -> tuple[I8, F32, U8, Any]:
    packed = np.ascontiguousarray(codes)
    if packed.dtype not in (np.int8, np.uint8) or packed.shape != (layer.n, layer.k // 2) or layer.k % 2:
        raise ShapeError(f"codes are {packed.dtype} {packed.shape}", available=f"bytes ({layer.n}, {layer.k // 2})")
    if layer.weight_groups < 1 or layer.k % layer.weight_groups:
        raise ShapeError(
            f"{layer.weight_groups} weight groups do not divide {layer.k} channels",
            fix="give the group scales as the export stores them, a column for each group",
        )
    return (
        packed.view(np.int8),
        _array("scale", scale, np.float32, (layer.n,)),
        _array("group_scale", group_scale, np.uint8, (layer.n, layer.weight_groups)),
        _zero_array(layer, zero),
    )


def _zero_array(layer: LayerShape, zero: Any) -> Any:
    if layer.float_zero_point:
        return _array("zero", zero, np.uint8, (layer.n, layer.weight_groups))
    return _array("zero", zero, np.float32, (layer.n,))


def _array(name: str, value: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    array = np.ascontiguousarray(value)
    if array.dtype != dtype or array.shape != shape:
        raise ShapeError(f"{name} is {array.dtype} {array.shape}", available=f"expected {np.dtype(dtype)} {shape}")
    return array


def _zero_points(zeros: Any) -> F32:
    """Return zero-points as numbers, fp32 [N, 1] or [N, groups]."""
    points: F32 = expand_zero(torch.from_numpy(zeros.copy())).numpy()
    return points


def _ratio(group_scales: U8) -> F32:
    """Return f/255, fp32 [N, groups]."""
    return group_scales.astype(np.float32) / np.float32(255)


def _spread(per_group: Any, features: int) -> Any:
    """Spread [N, groups] to [N, K]; one group stays [N, 1] for broadcasting."""
    return per_group if per_group.shape[1] == 1 else np.repeat(per_group, features // per_group.shape[1], axis=1)


def _unpacked(packed: Any) -> I8:
    codes: I8 = unpack_int4(torch.from_numpy(packed.copy())).numpy()
    return codes


def _decoded(codes: I8 | U8) -> F64:
    """Return int8 or e4m3 bytes as numbers, in float64."""
    if codes.dtype == np.int8:
        return codes.astype(np.float64)
    decoded: F64 = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    return decoded


def _blocks(rows: int, features: int) -> Iterator[slice]:
    step = max(1, EXPANDED_AT_ONCE // features)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
