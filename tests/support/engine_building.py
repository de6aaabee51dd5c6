"""Engines of small graphs: the graph in a folder, lowered or not, its build, and graphs that no builder takes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from dvdquant.export.engines import Backend, BuildReport, build_engine, load_backend
from dvdquant.export.passes.lowering.int8 import lower_int8
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4
from dvdquant.export.passes.lowering.qdq_int4 import lower_qdq_int4
from dvdquant.export.passes.lowering.store import TensorStore
from tests.support import quant_linear_graphs as qg

__all__ = ["LOWER", "as_tensorrt", "build", "profile", "save", "unparsable"]

LOWER = {"int8": lower_int8, "int4-weight-only": lower_qdq_int4, "nvfp4": lower_nvfp4}


def profile(width: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {"x": ((1, 16, width), (1, 64, width), (1, 256, width))}


def save(spec: qg.Spec, folder: Path, precision: str | None, **kwargs: object) -> Path:
    """Lowered (or not) graph of ``spec`` in ``folder``, weights beside it."""
    model = qg.graph(spec, folder, **kwargs)
    if precision:
        LOWER[precision](model, store=TensorStore(folder / "derived.bin"))
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def build(path: Path, spec: qg.Spec, **kwargs: object) -> BuildReport:
    arguments = {"backend": "rtx", "sms": ["8.9"], "profile": profile(spec.widths[0])} | kwargs
    return build_engine(path, path.parent / "x.engine", **arguments)


def unparsable(folder: Path) -> Path:
    """A graph with an operator TensorRT-RTX lacks between two it has."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Det", ["a"], ["b"], name="culprit"),
        helper.make_node("Relu", ["b"], ["y"], name="last"),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [4, 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    onnx.save(model, folder / "bad.onnx")
    return folder / "bad.onnx"


def as_tensorrt() -> Backend:
    """TensorRT's side of the code on the library that is here: the two modules share the API."""
    rtx = load_backend("rtx")
    return Backend("tensorrt", rtx.module, rtx.version)
