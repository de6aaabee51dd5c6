"""Runs of exported graphs in ONNX Runtime's CPU provider: whole with the inputs of chosen layers, or a layer alone."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from torch import Tensor

from dvdquant.errors import DvdquantError, ExportError
from dvdquant.onnx.prepare import prepare_for_onnxruntime
from dvdquant.onnx.runtime_options import runtime_options
from dvdquant.system.files import disk_error

__all__ = ["Intermediate", "add_intermediates", "cut_out", "find_intermediates", "load_graph", "run_graph", "select"]

LONG = np.iinfo(np.int64).max


@dataclass
class Intermediate:
    """The input and the output of one layer in a graph.

    Args:
        layer: The name of the layer.
        x: The input value.
        y: The output value.
        lowered: True if standard operators stand in the place of QuantLinear.
    """

    layer: str
    x: ir.Value
    y: ir.Value
    lowered: bool

    @property
    def fed(self) -> str:
        """Return the name of the input that takes the place of x when the layer is cut out."""
        return f"{self.layer}::x"


def load_graph(path: Path, edit: Callable[[ir.Model], None] | None = None) -> ir.Model:
    """Load a graph, and make it ready for ONNX Runtime.

    Args:
        path: The ONNX file.
        edit: A function that changes the graph before that, or None.
    """
    model = ir.load(path)
    if edit is not None:
        edit(model)
    return prepare_for_onnxruntime(model)


def find_intermediates(model: ir.Model, layers: Iterable[str]) -> dict[str, Intermediate]:
    """Return input and output of each layer: of its QuantLinear node, or of the first and last node it was lowered to.

    Args:
        model: The graph.
        layers: The names of the layers.

    Raises:
        ExportError: A layer is not in the graph.
    """
    whole = {n.inputs[1].name: n for n in model.graph if n.op_type == "QuantLinear" and n.inputs[1] is not None}
    parts = {node.name: node for node in model.graph}
    intermediates = {}
    for layer in layers:
        node = whole.get(f"{layer}.weight")
        first, last = (node, node) if node is not None else (_first(parts, layer), parts.get(f"{layer}.output"))
        if first is None or last is None or first.inputs[0] is None:
            raise ExportError(
                f"the graph {model.graph.name} has no layer {layer}",
                fix="export again: graph and manifest are of different exports",
            )
        intermediates[layer] = Intermediate(layer, first.inputs[0], last.outputs[0], node is None)
    return intermediates


def _first(parts: Mapping[str | None, ir.Node], layer: str) -> ir.Node | None:
    """Return the node where x enters a lowered layer, or None if there is none.

    It is the rotation. Without one, it is the split into groups or the absolute values.

    Args:
        parts: The nodes of the graph by name.
        layer: The name of the layer.
    """
    for step in ("rotate", "act_groups", "abs"):
        if (node := parts.get(f"{layer}.{step}")) is not None:
            return node
    return None


def add_intermediates(model: ir.Model, values: Mapping[str, ir.Value], step: int = 1) -> dict[str, str]:
    """Make values outputs of the graph, every ``step``-th token of them (the last axis but one).

    Args:
        model: The graph, which is changed in place.
        values: The values, under any keys.
        step: Every ``step``-th token is kept; values with one axis are kept whole.

    Returns:
        The name of the output for each key.
    """
    graph, names = model.graph, {}
    for key, value in values.items():
        if step > 1 and value.shape is not None and len(value.shape) > 1:
            value = _strided(graph, value, step)
        if all(value is not output for output in graph.outputs):
            graph.outputs.append(value)
        names[key] = value.name or ""
    return names


def _strided(graph: ir.Graph, value: ir.Value, step: int) -> ir.Value:
    """Return a value with every ``step``-th token of another; it is made once and is an output."""
    name = f"{value.name}::strided"
    for output in graph.outputs:
        if output.name == name:
            return output
    bounds = []
    for part, number in (("start", 0), ("end", LONG), ("axis", -2), ("step", step)):
        constant = f"dvdquant.intermediate.{part}"
        if constant not in graph.initializers:
            tensor = ir.tensor(np.array([number], np.int64), name=constant)
            made = ir.Value(name=constant, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            graph.initializers[constant] = made
        bounds.append(graph.initializers[constant])
    node = ir.node("Slice", [value, *bounds], name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, value.dtype
    graph.append(node)
    return node.outputs[0]


def cut_out(model: ir.Model, intermediates: Mapping[str, Intermediate]) -> ir.Model:
    """Keep the layers alone: an input ``<layer>::x`` with any number of tokens, and the output y, for each.

    Args:
        model: The graph, which is changed in place and returned.
        intermediates: The inputs and outputs of the layers, by name.
    """
    graph = model.graph
    # 1. Feed every layer from an input of its own.
    for layer, intermediate in intermediates.items():
        shape = (
            None
            if intermediate.x.shape is None
            else ir.Shape([None] * (len(intermediate.x.shape) - 1) + [intermediate.x.shape[-1]])
        )
        fed = ir.Value(
            name=intermediate.fed, type=ir.TensorType(intermediate.x.dtype or ir.DataType.FLOAT), shape=shape
        )
        graph.inputs.append(fed)
        for node, index in list(intermediate.x.uses()):
            if node is intermediate.y.producer() or (node.name or "").startswith(f"{layer}."):
                node.replace_input_with(index, fed)
    # 2. Drop the rest, and the shapes, which were those of the graph's tokens.
    model = select(model, [intermediate.y for intermediate in intermediates.values()])
    for node in graph:
        for value in node.outputs:
            value.shape = None
    return model


def select(model: ir.Model, outputs: Iterable[ir.Value]) -> ir.Model:
    """Keep only the part of the graph that some outputs need.

    Args:
        model: The graph, which is changed in place and returned.
        outputs: The values that become its outputs.
    """
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    return model


def run_graph(model: ir.Model, folder: Path, inputs: Mapping[str, Tensor], title: str) -> dict[str, Tensor]:
    """Run a prepared graph once on the CPU provider.

    Weights are unpacked when their layer runs and freed after it, so memory grows with the largest layer.

    Args:
        model: The graph; see :func:`load_graph`.
        folder: The folder of the weight files, for a copy of the graph while it loads.
        inputs: The inputs of the graph by name, and perhaps others; bfloat16 ones are fed as float32.
        title: The name of the graph in an error.

    Returns:
        Every output by name, bfloat16 as float32.

    Raises:
        ExportError: ONNX Runtime cannot run the graph.
        OutputError, ResourceError: the copy cannot be written.
    """
    import onnxruntime

    for value in model.graph.outputs:
        value.dtype = value.dtype or ir.DataType.FLOAT
    # 1. Set ONNX Runtime up.
    options = runtime_options(torch.get_num_threads())
    if any(node.outputs[0].dtype == ir.DataType.FLOAT8E4M3FN for node in model.graph):
        # It would make an integer product of Q/DQ in e4m3, which is no valid graph.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # 2. Load a copy of the graph beside its weights, and run it.
    copy = folder / f".verify-{uuid.uuid4().hex}.onnx"
    try:
        try:
            ir.save(model, copy)
        except OSError as error:
            raise disk_error(error, copy) from error
        # Folding would hold every weight in fp32.
        session = onnxruntime.InferenceSession(
            str(copy), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        feeds = {}
        for value in session.get_inputs():
            tensor = inputs[value.name]
            feeds[value.name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        results = session.run(None, feeds)
    except (DvdquantError, MemoryError):
        raise  # neither says anything about the graph
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise ExportError(
            f"ONNX Runtime refused {title}: {error}",
            fix="export again with -v; dvdq doctor shows the version of ONNX Runtime",
        ) from error
    finally:
        copy.unlink(missing_ok=True)
    return {o.name: torch.from_numpy(np.asarray(value)) for o, value in zip(session.get_outputs(), results)}
