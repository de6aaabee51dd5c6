"""NVFP4 by its definition, in float64, and TensorRT's operator for ONNX's reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference.op_run import OpRun

__all__ = ["E2M1", "TRT_FP4DynamicQuantize", "nearest_e2m1", "nvfp4_reference", "to_e4m3"]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest_e2m1(x: np.ndarray) -> np.ndarray:
    """Round to the nearest e2m1 value, ties to the even mantissa; saturates at ±6."""
    distance = np.abs(np.abs(x)[..., None] - E2M1)
    # Even mantissas are the even indices; prefer them on ties.
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    return np.sign(x) * E2M1[order[np.argmin(distance[..., order], axis=-1)]]


def to_e4m3(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).float().clamp(2**-9, 448).to(torch.float8_e4m3fn).double().numpy()


def nvfp4_reference(x: np.ndarray, scale: float) -> np.ndarray:
    """Quantize and dequantize blocks of 16 along the last axis, fp64; ``scale`` is the global one."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    step = to_e4m3(np.where(amax == 0, 1.0, amax / 6 / scale)) * scale
    return (nearest_e2m1(blocks / step) * step).reshape(x.shape)


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's op, after its documentation: fp4 codes and fp8 block scales relative to a constant global scale."""

    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, scale_type=None):  # type: ignore[no-untyped-def]
        assert (axis, block_size, scale_type) == (-1, 16, int(ir.DataType.FLOAT8E4M3FN))
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 16)
        amax = np.abs(blocks).max(-1)
        steps = to_e4m3(np.where(amax == 0, 1.0, amax / 6 / float(scale)))
        codes = nearest_e2m1(blocks / (steps * float(scale))[..., None]).reshape(x.shape)
        return codes.astype(ir.DataType.FLOAT4E2M1.numpy()), steps.astype(ir.DataType.FLOAT8E4M3FN.numpy())
