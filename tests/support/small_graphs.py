"""Small ONNX graphs from text, and running them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator

HEADER = '<ir_version: 10, opset_import: ["" : 23, "dvdquant" : 1]>'
Arrays = Mapping[str, np.ndarray]


def parse(graph: str, initializers: Arrays | None = None) -> ir.Model:
    """A model from ONNX text; shapes and types inferred."""
    proto = onnx.parser.parse_model(f"{HEADER} {graph}")
    for name, array in (initializers or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, feeds: Arrays) -> list[np.ndarray]:
    """In ONNX Runtime."""
    proto = ir.serde.serialize_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, dict(feeds))
    return outputs


def reference(model: ir.Model, feeds: Arrays) -> list[np.ndarray]:
    """In ONNX's own evaluator, which knows every type."""
    outputs: list[np.ndarray] = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, dict(feeds))
    return outputs


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
