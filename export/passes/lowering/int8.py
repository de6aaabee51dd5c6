"""QuantLinear → INT8 tensor cores: both operands' codes in 8 bits, static Q/DQ around a dynamic token scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dvdquant.errors import ExportError
from dvdquant.export.passes.lowering.common import Emitter, QuantLinearNode, lower_each
from dvdquant.export.passes.lowering.store import TensorStore

__all__ = ["int8_weight", "lower_int8"]

CHUNK_ROWS = 512


def lower_int8(model: ir.Model, store: TensorStore | None = None) -> bool:
    """Replace every QuantLinear by an INT8 Q/DQ product; returns whether there was one.

    TensorRT quantizes with constant scales only, so x̃ is divided by its token scale first and Q/DQ carry a power of
    two: ``DQ(Q(x̃ · qmax/amax)) = codes · 2⁻ᵃ`` and ``DQ(weight_int8) = codes · 2⁻ᵇ``, both in [−1, 1]. s[m] and the
    row scale multiply the product in fp32. The weight's INT8 codes, ``<layer>.weight_int8`` [N, K], come from
    :func:`int8_weight`.

    Args:
        store: where the INT8 weights go, one layer at a time; in memory by default. They serve the engine build only
        and
            are not part of an export.

    Raises:
        ExportError: a node has activation groups (a scale inside the K sum cannot leave an INT8 product), or a constant
            is missing.
    """
    keep = store if store is not None else TensorStore()
    return lower_each(model, lambda emit: _lower(emit, keep))


def int8_weight(layer: QuantLinearNode) -> tuple[np.ndarray, np.ndarray]:
    """INT8 codes [N, K] and fp64 row scales [N] with ``codes · scale ≈ Δ · f/255 · (c − z)``.

    1. per row, all z integers: c − z, in −15..15; exact. 2. per row, all 2z integers: 2(c − z), in −30..30, half the
    step; exact (mid-rise: 2c + 1). 3. weight groups or a real z: rounded again, per row, to ±127. Half a step of 1/127
    of the row's largest weight is small against half a step of the 4-bit grid (tests/export/test_lowering.py measures it).
    """
    zero = layer.zero_points
    doubled = zero * 2
    if layer.groups == 1 and np.array_equal(doubled, np.rint(doubled)):
        group_scale = 1 if np.array_equal(zero, np.rint(zero)) else 2
        shift = np.rint(zero * group_scale).astype(np.int8)
        codes = np.empty((layer.rows, layer.features), np.int8)
        for rows, chunk in _code_chunks(layer):
            np.subtract(chunk * np.int8(group_scale), shift[rows], out=codes[rows])
        return codes, layer.scale.astype(np.float64) * layer.group_scale[:, 0] / (255 * group_scale)
    return _rounded_again(layer)


def _rounded_again(layer: QuantLinearNode) -> tuple[np.ndarray, np.ndarray]:
    codes = np.empty((layer.rows, layer.features), np.int8)
    scale, zero = np.empty(layer.rows), layer.zero_points
    for rows, chunk in _code_chunks(layer):
        centred = chunk.astype(np.float32).reshape(len(chunk), layer.groups, -1) - zero[rows, :, None]
        centred *= layer.group_scale[rows, :, None].astype(np.float32)
        centred = centred.reshape(len(chunk), -1)
        amax = np.maximum(np.abs(centred).max(axis=1), np.float32(1e-30))
        np.rint(centred * (np.float32(127) / amax)[:, None], out=centred)
        codes[rows] = centred
        scale[rows] = layer.scale[rows].astype(np.float64) * amax / (255 * 127)
    return codes, scale


def _code_chunks(layer: QuantLinearNode) -> Iterator[tuple[slice, np.ndarray]]:
    """(row slice, signed codes int8 [rows, K]) of a few hundred rows at a time."""
    packed = layer.packed_rows()
    # One look-up turns a byte into its two codes, low nibble first.
    nibbles = np.arange(256, dtype=np.uint8)
    pair = np.stack([(nibbles << 4).view(np.int8) >> 4, nibbles.view(np.int8) >> 4], axis=1)
    table = pair.copy().view(np.int16).reshape(-1)
    for start in range(0, layer.rows, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, layer.rows))
        yield rows, table[packed[rows]].view(np.int8)


def _lower(emit: Emitter, store: TensorStore) -> ir.Value:
    layer = emit.layer
    if layer.act_group:
        raise ExportError(
            f"{layer.name}: activation groups of {layer.act_group} channels cannot run as one INT8 product",
            available="int4-weight-only",
            fix="use --precision int4-weight-only, or a recipe with one activation scale per token",
        )
    clipped, scale = emit.token_codes(*emit.rotate())
    shift = layer.act_bits - 1
    zero = emit.scalar(0, ir.DataType.INT8)
    codes = emit.op("QuantizeLinear", "act_q", clipped, emit.scalar(1.0), zero)
    act = emit.op("DequantizeLinear", "act_dq", codes, emit.scalar(2.0**-shift, layer.dtype), zero)
    weight_codes, row_scale = int8_weight(layer)
    bits = int(np.abs(weight_codes).max(initial=1)).bit_length()
    name = f"{layer.name}.weight_int8"
    tensor = store.put(name, weight_codes, ir.DataType.INT8, (layer.rows, layer.features))
    weight = emit.op(
        "DequantizeLinear", "weight_dq", emit.initializer(name, tensor), emit.scalar(2.0**-bits, layer.dtype), zero
    )
    product = emit.op("MatMul", "product", act, emit.op("Transpose", "weight_t", weight, perm=[1, 0]))
    product = emit.cast("product_fp32", product, ir.DataType.FLOAT)
    return emit.finish(product, scale, row_scale * 2.0 ** (shift + bits))
