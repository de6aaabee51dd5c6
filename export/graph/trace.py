"""Checkpoint plan → base ONNX graph: one torch.export per model, on placeholder weights, for every bit-width.

The base graph has a ``dvdquant::QuantLinear`` node for each quantized layer and initializers without data; passes then set
the bits, bind the weight file and lower the nodes for a target. Nothing of the checkpoint is in memory here.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch

from dvdquant.errors import ExportError
from dvdquant.export.passes.boolean_where import boolean_where
from dvdquant.export.passes.initializers_to_inputs import initializers_to_inputs
from dvdquant.export.passes.name_weights import name_weights
from dvdquant.export.passes.simplify import simplify
from dvdquant.model.families import Family, Sizes
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.lora_inputs import install_lora_inputs, lora_input_shapes
from dvdquant.model.plan import ModelPlan, quantized_skeleton
from dvdquant.onnx.schema import OPSET, register_schemas
from dvdquant.system.torch_hooks import trace_error, without_stack_traces

__all__ = ["OPSET_VERSION", "profile_shapes", "trace_graph"]

OPSET_VERSION = 23
log = logging.getLogger(__name__)


def trace_graph(plan: ModelPlan, sizes: Sizes) -> ir.Model:
    """Trace the base graph of a plan: QuantLinear nodes, and weights as initializers named like the parameters.

    Initializers of parameters carry shape and dtype only (a placeholder tensor); bind them with
    :func:`dvdquant.export.passes.bind_weights.bind_weights`. Constants (rotary tables, Hadamard matrices) hold real
    data.

    Args:
        plan: The plan of the model.
        sizes: The sizes of the export, in latent units. Axes with a range become dynamic dimensions.

    Returns:
        The graph, with the activation bits of the recipe's first grid and with ``sample`` as its output. Where the plan
        reserves a rank for LoRAs, their matrices are its last inputs, of fixed shapes.

    Raises:
        ShapeError: The model cannot run at these sizes.
        ExportError: torch.export or the translation to ONNX failed; the cause is kept.
    """
    plan.family.check(sizes)
    # 1. Build the quantized model on placeholder weights.
    bits = plan.recipe.activations[0].bits
    skeleton = quantized_skeleton(plan, bits)
    install_lora_inputs(skeleton, plan.lora_rank, plan.dtype)
    wrapper = GraphWrapper(skeleton, plan.family)
    inputs = plan.family.sample(sizes, plan.dtype)
    # 2. Trace it and translate it to ONNX.
    try:
        with _quiet_exporter(), without_stack_traces(), torch.no_grad():
            exported = torch.export.export(
                wrapper, (inputs,), dynamic_shapes=_dynamic_shapes(plan.family, sizes), strict=False
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET_VERSION,
                optimize=False,
                verbose=False,
                custom_translation_table={torch.ops.dvdquant.quant_linear.default: _translate_quant_linear},
            )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        trace_error(),
        torch.onnx.errors.OnnxExporterError,
    ) as error:
        raise ExportError(
            f"{plan.family.name}: the transformer could not be traced to ONNX: {error}",
            fix="check that these sizes run in diffusers; give single sizes instead of ranges",
        ) from error
    if program is None:
        raise ExportError(
            f"{plan.family.name}: torch.onnx.export returned no graph",
            fix="export again with -v, and report it with what dvdq doctor prints",
        )
    model: ir.Model = program.model
    # 3. Name weights, inputs and output.
    reserved = lora_input_shapes(plan.layers, plan.lora_rank)
    parameters = {*plan.kept, *(name for spec in plan.layers for name in spec.tensors()), *reserved}
    name_weights(model, "model.", parameters)
    model.graph.name = plan.family.name
    for value, spec in zip(model.graph.inputs, plan.family.inputs(sizes), strict=True):
        value.name = spec.name
    model.graph.outputs[0].name = "sample"
    # 4. Simplify the graph.
    with _quiet_exporter():
        simplify(model, parameters)
    boolean_where(model)
    initializers_to_inputs(model, reserved)
    _forget_places(model)
    return model


def _forget_places(model: ir.Model) -> None:
    """Remove the exporter's stack traces: they hold paths of this machine, and bytes that depend on where dvdquant lies."""
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if "stack_trace" in key]:
            del node.metadata_props[key]


def _translate_quant_linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    weight_group_scale: Any,
    weight_zero: Any,
    bias: Any,
    hadamard: Any,
    outer: Any,
    act_bits: int,
    act_group: int,
) -> Any:
    """Translate PyTorch's op ``dvdquant::quant_linear`` into one QuantLinear node with the same inputs."""
    register_schemas()
    tensors = (x, weight, weight_scale, weight_group_scale, weight_zero, bias, hadamard, outer)
    return OPSET.QuantLinear(*tensors, act_bits=act_bits, act_group=act_group)


def _dynamic_shapes(family: Family, sizes: Sizes) -> tuple[dict[str, dict[int, Any]]] | None:
    """Return torch.export's shape ranges, or None where all sizes are fixed.

    Multiples of the patch are spelled as such, so that no guard narrows them.

    Args:
        family: The model family.
        sizes: The sizes of the export, in latent units.

    Returns:
        A tuple of one dictionary: input name -> dimension index -> range of that dimension.
    """
    if not sizes.dynamic:
        return None
    names = ("frames", "height", "width")
    axes = dict(zip(names, (sizes.frames, sizes.height, sizes.width)))
    dims: dict[str, Any] = {}
    for (name, axis), patch in zip(axes.items(), family.patch()):
        if axis.dynamic:
            dim = torch.export.Dim(
                f"{name}_patches" if patch > 1 else name, min=axis.min // patch, max=axis.max // patch
            )
            dims[name] = patch * dim if patch > 1 else dim
    low, high = (family.tokens(*sizes.at(which)) for which in ("min", "max"))
    dims["tokens"] = torch.export.Dim("tokens", min=low, max=high)
    shapes: dict[str, dict[int, Any]] = {}
    for spec in family.inputs(sizes):
        shapes[spec.name] = {i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str) and d in dims}
    return (shapes,)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter, which logs at WARNING what concerns its own developers (a missing torchvision, for one)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def profile_shapes(family: Family, sizes: Sizes) -> Mapping[str, tuple[tuple[int, ...], ...]] | None:
    """Return the shapes of every input for an optimization profile, or None where all sizes are fixed.

    Args:
        family: The model family.
        sizes: The sizes of the export, in latent units.

    Returns:
        Input name -> its (min, opt, max) shape.
    """
    if not sizes.dynamic:
        return None
    axes = [family.axes(sizes, which) for which in ("min", "opt", "max")]
    return {spec.name: tuple(spec.sizes(a) for a in axes) for spec in family.inputs(sizes)}
