"""A graph as ONNX Runtime on a CPU can run it."""

from __future__ import annotations

import onnx_ir as ir

from dvdquant.onnx.emulate_bfloat16 import emulate_bfloat16
from dvdquant.onnx.expand_attention_mask import expand_attention_mask

__all__ = ["prepare_for_onnxruntime"]


def prepare_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Rewrite, in place, what ONNX Runtime's CPU provider cannot run; the arithmetic stays. Returns ``model``."""
    expand_attention_mask(model)
    emulate_bfloat16(model)
    return model
