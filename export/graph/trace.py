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
from dvdquant.export.passes.name_weights import name_weights
from dvdquant.export.passes.simplify import simplify
from dvdquant.model.families import Family, Sizes
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan, quantized_skeleton
from dvdquant.onnx.schema import OPSET, register_schemas
from dvdquant.system.torch_hooks import trace_error

__all__ = ["OPSET_VERSION", "profile_shapes", "trace_graph"]

OPSET_VERSION = 23
log = logging.getLogger(__name__)


def trace_graph(plan: ModelPlan, sizes: Sizes) -> ir.Model:
    """The base graph of ``plan`` at ``sizes``: QuantLinear nodes, weights as initializers named like the parameters.

    Initializers of parameters carry shape and dtype only (a placeholder tensor); bind them with
    :func:`dvdquant.export.passes.bind_weights.bind_weights`. Constants (rotary tables, Hadamard matrices) are real.

    Raises:
        ExportError: torch.export or the translation to ONNX failed; the cause is kept.
    """
    plan.family.check(sizes)
    bits = plan.recipe.activations[0].bits
    wrapper = GraphWrapper(quantized_skeleton(plan, bits), plan.family)
    inputs = plan.family.sample(sizes, plan.dtype)
    try:
        with _quiet_exporter(), torch.no_grad():
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
        raise ExportError(f"{plan.family.name}: torch.onnx.export returned no graph")
    model: ir.Model = program.model
    parameters = {*plan.kept, *(name for spec in plan.layers for name in spec.tensors())}
    name_weights(model, "model.", parameters)
    model.graph.name = plan.family.name
    for value, spec in zip(model.graph.inputs, plan.family.inputs(sizes), strict=True):
        value.name = spec.name
    model.graph.outputs[0].name = "sample"
    with _quiet_exporter():
        simplify(model, parameters)
    boolean_where(model)
    return model


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
    register_schemas()
    tensors = (x, weight, weight_scale, weight_group_scale, weight_zero, bias, hadamard, outer)
    return OPSET.QuantLinear(*tensors, act_bits=act_bits, act_group=act_group)


def _dynamic_shapes(family: Family, sizes: Sizes) -> tuple[dict[str, dict[int, Any]]] | None:
    """torch.export's shape ranges; multiples of the patch are spelled as such, so that no guard narrows them."""
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
    """The exporter logs at WARNING what concerns its own developers (a missing torchvision, for one)."""
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
    """(min, opt, max) shape of every input for an optimization profile, or None where all sizes are fixed."""
    if not sizes.dynamic:
        return None
    axes = [family.axes(sizes, which) for which in ("min", "opt", "max")]
    return {spec.name: tuple(spec.sizes(a) for a in axes) for spec in family.inputs(sizes)}
