"""The rewrite of a graph into one that ONNX Runtime can run on a CPU."""

from __future__ import annotations

import onnx_ir as ir

from dvdquant.onnx.emulate_bfloat16 import emulate_bfloat16
from dvdquant.onnx.expand_attention_mask import expand_attention_mask

__all__ = ["prepare_for_onnxruntime"]


def prepare_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Rewrite the parts of a graph that ONNX Runtime's CPU provider cannot run; the arithmetic stays.

    Args:
        model: The graph, which is changed in place and returned.
    """
    expand_attention_mask(model)
    emulate_bfloat16(model)
    return model
