"""QuantLinear as NVFP4 on Blackwell: both operands in e2m1 with one e4m3 scale per 16 channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from dvdquant.errors import ExportError
from dvdquant.export.passes.lowering.common import Emitter, QuantLinearNode, lower_each
from dvdquant.export.passes.lowering.modelopt_hooks import nvfp4_bytes
from dvdquant.export.passes.lowering.store import TensorStore
from dvdquant.numerics.activation_grid import AMAX_FLOOR
from dvdquant.numerics.dtypes import E4M3_MAX
from dvdquant.ops.reference import dequantize_weight

__all__ = ["NVFP4_BLOCK", "WeightSource", "lower_nvfp4", "nvfp4_weight"]

NVFP4_BLOCK = 16
E2M1_MAX = 6.0
CHUNK_ROWS = 1024

WeightSource = Callable[[str], torch.Tensor]


def nvfp4_weight(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Quantize a weight to NVFP4 with modelopt's quantizer: ``weight ≈ e2m1 · e4m3 · amax / 2688``.

    Args:
        weight: The rotated weight, fp32 [N, K], with K a multiple of 16.

    Returns:
        The packed e2m1 codes, uint8 [N, K/2] (low nibble = even k), the block scales [N, K/16] as e4m3 (ml_dtypes), and
        amax of ``weight`` (1 for an all-zero tensor).

    Raises:
        UnsupportedError: This release of modelopt does not give its packed bytes.
    """
    rows, features = weight.shape
    amax = float(weight.abs().max()) or 1.0
    unit = torch.tensor(1 / (E2M1_MAX * E4M3_MAX))
    packed = np.empty((rows, features // 2), np.uint8)
    scales = np.empty((rows, features // NVFP4_BLOCK), np.uint8)
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # Relative to its own amax a tensor needs no global scale of its own in the graph.
        chunk = weight[part].float() / amax
        codes, block_scale = nvfp4_bytes(chunk, NVFP4_BLOCK, unit)
        packed[part] = codes.numpy()
        scales[part] = block_scale.view(torch.uint8).numpy()
    return packed, scales.view(ir.DataType.FLOAT8E4M3FN.numpy()), amax


def lower_nvfp4(model: ir.Model, weight_source: WeightSource | None = None, store: TensorStore | None = None) -> bool:
    """Replace every QuantLinear by an NVFP4 product.

    The quantizer of both operands is replaced (e2m1 cannot hold −8..7): blocks of 16 with e4m3 scales, whatever the
    recipe's groups are. The rotation stays. The activation's global scale is dynamic, without calibration: x̃ is
    divided by its token's amax, ``trt::TRT_FP4DynamicQuantize`` gets the constant 1/2688, and amax[m] multiplies the
    product in fp32.

    Args:
        model: The graph, which is changed in place.
        weight_source: A function from the name of a layer to its *rotated* weight from the original checkpoint, fp32
            [N, K]. Without it the canonical 4-bit codes are dequantized and quantized again: two 4-bit roundings, not
            one.
        store: The store for the packed weights and their block scales; None keeps them in memory.

    Returns:
        True if there was a QuantLinear.

    Raises:
        ExportError: K is no multiple of 16, ``weight_source`` returns another shape, or a constant is missing.
        ResourceError: The disk is full.
        OutputError: The store's file cannot be written for another reason.
    """
    keep = store if store is not None else TensorStore()
    changed = lower_each(model, lambda emit: _lower(emit, weight_source, keep))
    if changed:
        model.graph.opset_imports.setdefault("trt", 1)
    return changed


def _weight(layer: QuantLinearNode, source: WeightSource | None) -> torch.Tensor:
    """Return the weight to quantize, fp32 [N, K], from the source or from the 4-bit codes.

    Raises:
        ExportError: The source returned another shape.
    """
    if source is None:
        # Copies: the arrays may be read-only maps of the weight file.
        parts = (layer.packed_rows(), layer.scale, layer.group_scale, layer.zero)
        weight, scale, group_scale, zero = (torch.from_numpy(part.copy()) for part in parts)
        return dequantize_weight(weight, scale, group_scale, zero)
    weight = source(layer.name)
    if tuple(weight.shape) != (layer.rows, layer.features):
        raise ExportError(
            f"{layer.name}: the weight source gave shape {tuple(weight.shape)}",
            available=f"the graph needs {(layer.rows, layer.features)}",
        )
    return weight


def _lower(emit: Emitter, source: WeightSource | None, store: TensorStore) -> ir.Value:
    """Emit the NVFP4 product of one layer, and return its output.

    Args:
        emit: The emitter of the layer.
        source: The source of rotated weights, or None.
        store: The store for the packed weight.

    Raises:
        ExportError: K is no multiple of 16.
    """
    layer, f32 = emit.layer, ir.DataType.FLOAT
    if layer.features % NVFP4_BLOCK:
        raise ExportError(
            f"{layer.name}: {layer.features} channels are no multiple of {NVFP4_BLOCK}, which NVFP4 needs",
            fix="keep that layer in 16 bits with the keep field of a recipe, or take --recipe w4a8",
        )
    rotated, residual = emit.rotate()
    amax = emit.op("ReduceMax", "amax", emit.op("Abs", "abs", rotated), emit.ints(-1), keepdims=1)
    amax = emit.op("Max", "amax_floor", emit.cast("amax_fp32", amax, f32), emit.scalar(AMAX_FLOOR))
    unit = emit.op("Div", "normalised", emit.cast("rotated_fp32", rotated, f32), amax)
    packed, block_scale, weight_amax = nvfp4_weight(_weight(layer, source))
    act = _act_fp4(emit, emit.cast("act", unit, layer.dtype))
    weight = _weight_fp4(emit, store, packed, block_scale)
    product = emit.cast("product_fp32", emit.op("MatMul", "product", act, weight), f32)
    return emit.finish(product, amax, np.full(layer.rows, weight_amax * residual))


def _act_fp4(emit: Emitter, unit: ir.Value) -> ir.Value:
    """Emit the dynamic quantization of the activation, and return its dequantized value in the graph's dtype.

    Args:
        emit: The emitter of the layer.
        unit: The rotated activation over its token's amax [..., K], in the graph's dtype.
    """
    global_scale = emit.scalar(1 / (E2M1_MAX * E4M3_MAX))
    attributes = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    codes = emit.op("TRT_FP4DynamicQuantize", "act_fp4", unit, global_scale, domain="trt", outputs=2, **attributes)
    block_scale = emit.nodes[-1].outputs[1]
    scale = emit.op("DequantizeLinear", "act_block_scale", block_scale, global_scale)
    act = emit.op("DequantizeLinear", "act_dq", codes, scale, axis=-1, block_size=NVFP4_BLOCK)
    return emit.cast("act_typed", act, emit.layer.dtype)


def _weight_fp4(emit: Emitter, store: TensorStore, packed: np.ndarray, block_scale: np.ndarray) -> ir.Value:
    """Emit the dequantization of the weight, and return it as [K, N] in the graph's dtype.

    Args:
        emit: The emitter of the layer.
        store: The store for the tensors.
        packed: The packed e2m1 codes, uint8 [N, K/2].
        block_scale: The block scales [N, K/16], e4m3.
    """
    layer = emit.layer
    name, scale_name = f"{layer.name}.weight_fp4", f"{layer.name}.weight_fp4_scale"
    fp4 = store.put(name, packed, ir.DataType.FLOAT4E2M1, (layer.rows, layer.features))
    fp8 = store.put(scale_name, block_scale, ir.DataType.FLOAT8E4M3FN, block_scale.shape)
    global_scale = emit.scalar(1 / (E2M1_MAX * E4M3_MAX))
    scale = emit.op("DequantizeLinear", "weight_block_scale", emit.initializer(scale_name, fp8), global_scale)
    weight = emit.op(
        "DequantizeLinear", "weight_dq", emit.initializer(name, fp4), scale, axis=1, block_size=NVFP4_BLOCK
    )
    return emit.op("Transpose", "weight_t", emit.cast("weight_typed", weight, layer.dtype), perm=[1, 0])
