"""QuantLinear → INT4 weights behind DequantizeLinear, activations fake-quantized, product in the graph's dtype."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvdquant.export.passes.lowering.common import Emitter, QuantLinearNode, lower_each
from dvdquant.export.passes.lowering.store import TensorStore

__all__ = ["int4_block", "lower_qdq_int4", "packed_int4_view"]

# TensorRT-RTX keeps any of these packed; 128 is the block that public INT4 kernels are written for.
ROW_BLOCKS = (128, 64, 32, 16)
CODE_BITS, FACTOR_BITS = 3, 8


def int4_block(layer: QuantLinearNode) -> int:
    """Columns per block of scales: the weight group; for per-row scales the first of 128, 64, 32, 16 that divides K."""
    if layer.groups > 1:
        return layer.features // layer.groups
    for block in ROW_BLOCKS:
        if layer.features % block == 0:
            return block
    return layer.features


def packed_int4_view(layer: QuantLinearNode) -> ir.TensorProtocol:
    """The canonical bytes [N, K/2] as an INT4 tensor [N, K]: the same region of the same file, or the same array."""
    tensor, shape = layer.weight_tensor, ir.Shape([layer.rows, layer.features])
    name = layer.weight.name or layer.name
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            ir.DataType.INT4,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    return ir.PackedTensor(layer.packed_rows().reshape(-1), ir.DataType.INT4, shape=shape, name=name)


def lower_qdq_int4(model: ir.Model, store: TensorStore | None = None) -> bool:
    """Replace every QuantLinear by standard ops on INT4 weights; returns whether there was one.

    The INT4 initializer is a view of the canonical bytes, the block scales ``<layer>.qdq_scale`` [N, K/B] are
    f · 2⁻¹¹ (grouped) or 2⁻³ (per row), exact in fp16 and bf16; Δ[n] follows the product in fp32.

    1. act_group 0: integer codes · 2⁻ᵃ enter the product, s[m] follows it.
    2. act_group G: codes · s[m, g] rounded to the graph's dtype enter it.
    3. zero = 0 for all rows: no correction. 4. one scale per row: Σ_k x̂ times z[n], an outer product of fp32 vectors.
    5. weight groups: Σ_{k∈g} x̂ [.., groups] times the block scales, a MatMul of width K/G, then z[n] in fp32.
    6. a zero-point per weight group: as 5, with f · z[n, g] · 2⁻¹¹ rounded to the graph's dtype in the place of f, the
       initializer ``<layer>.qdq_zero`` [N, K/G].

    Args:
        store: where the block scales of grouped weights go; in memory by default.

    Raises:
        ExportError: a constant is missing, or the input's type or rank is unknown.
    """
    keep = store if store is not None else TensorStore()
    return lower_each(model, lambda emit: _lower(emit, keep))


def _lower(emit: Emitter, store: TensorStore) -> ir.Value:
    layer, f32 = emit.layer, ir.DataType.FLOAT
    clipped, scale = emit.token_codes(*emit.rotate())
    codes = emit.op("Round", "codes", clipped)
    if layer.act_group:
        shift, after = 0, None
        values = emit.join("act_join", emit.op("Mul", "act_dequantized", codes, scale))
    else:
        shift, after = layer.act_bits - 1, scale
        values = emit.op("Mul", "act_shifted", codes, emit.scalar(2.0**-shift))
    weight, weight_shift = _dequantized(emit, store)
    product = emit.op("MatMul", "product", emit.cast("act", values, layer.dtype), weight)
    product = emit.cast("product_fp32", product, f32)
    if np.any(layer.zero_points):
        product = emit.op("Sub", "centred", product, _zero_term(emit, store, values, weight_shift))
    row_scale = layer.scale.astype(np.float64) * 2.0 ** (shift + weight_shift) / 255
    if layer.groups == 1:
        row_scale = row_scale * layer.group_scale[:, 0]
    return emit.finish(product, after, row_scale)


def _dequantized(emit: Emitter, store: TensorStore) -> tuple[ir.Value, int]:
    """(the weight [K, N] in the graph's dtype: c · f · 2^-shift, shift)."""
    layer = emit.layer
    block = int4_block(layer)
    weight, view = layer.weight, packed_int4_view(layer)
    weight.const_value, weight.shape, weight.type = view, view.shape, ir.TensorType(view.dtype)
    name, shape = f"{layer.name}.qdq_scale", (layer.rows, layer.features // block)
    if layer.groups == 1:
        shift, group_scales = CODE_BITS, np.ones(shape)
    else:
        shift, group_scales = CODE_BITS + FACTOR_BITS, layer.group_scale
    scales = (group_scales.astype(np.float32) * 2.0**-shift).astype(layer.dtype.numpy())
    scale = emit.initializer(name, store.put(name, scales, layer.dtype, shape))
    dequantized = emit.op("DequantizeLinear", "weight_dq", weight, scale, axis=1, block_size=block)
    return emit.op("Transpose", "weight_t", dequantized, perm=[1, 0]), shift


def _zero_term(emit: Emitter, store: TensorStore, values: ir.Value, weight_shift: int) -> ir.Value:
    """fp32 Σ_g (Σ_{k∈g} x̂) · f[n, g] · z · 2^-shift, what the uncentred codes add too much."""
    layer, zero = emit.layer, emit.layer.zero_points
    if layer.groups == 1:
        total = emit.op("ReduceSum", "act_sum", values, emit.ints(-1), keepdims=1)
        return emit.op("Mul", "zero_term", total, emit.array("zero_shifted", zero[:, 0] * 2.0**-weight_shift))
    grouped = emit.split("weight_groups", values, layer.groups, layer.features // layer.groups)
    sums = emit.cast("act_sums", emit.op("ReduceSum", "act_group_sum", grouped, emit.ints(-1), keepdims=0), layer.dtype)
    name, each = f"{layer.name}.qdq_scale", zero.shape[1] > 1
    if each:
        name = f"{layer.name}.qdq_zero"
        shares = (layer.group_scale.astype(np.float32) * zero * 2.0**-weight_shift).astype(layer.dtype.numpy())
        emit.initializer(name, store.put(name, shares, layer.dtype, shares.shape))
    group_scales = emit.op("Transpose", "zero_group_scales", emit.graph.initializers[name], perm=[1, 0])
    term = emit.cast("group_product", emit.op("MatMul", "zero_product", sums, group_scales), ir.DataType.FLOAT)
    return term if each else emit.op("Mul", "zero_term", term, emit.array("zero", zero[:, 0]))
