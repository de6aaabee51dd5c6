"""Model-local function bodies of the ``dvdquant`` operators in standard ONNX operators.

ONNX Runtime executes them, TensorRT-RTX inlines them, TensorRT prefers a registered plugin of the same name. They are the
same definition as ``dvdquant/ops/quant_linear.py``.
"""

# onnxscript reads these functions' source: annotations and names are part of the ONNX they become.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg"
from __future__ import annotations

import onnx_ir as ir
from onnxscript import OnnxFunction, script
from onnxscript import opset23 as op

from dvdquant.errors import ExportError
from dvdquant.numerics.activation_grid import AMAX_FLOOR
from dvdquant.onnx.schema import DOMAIN, DOMAIN_VERSION, OPSET

__all__ = ["QuantLinear", "QuantLinearFloatZero", "attach_functions", "quant_linear_function"]

_FLOOR = float(AMAX_FLOOR)
_KEY = (DOMAIN, "QuantLinear", "")


def _quant_linear(zero_step: float, zero_origin: float) -> OnnxFunction:
    """Return the body for one form of stored zero-points.

    The zero-point that a stored number stands for is ``stored · zero_step + zero_origin``.

    Args:
        zero_step: The zero-point's step of one stored unit.
        zero_origin: The zero-point that a stored 0 stands for.
    """

    @script(OPSET, default_opset=op)
    def QuantLinear(
        x,
        weight,
        weight_scale,
        weight_group_scale,
        weight_zero,
        bias,
        hadamard,
        outer,
        act_bits: int,
        act_group: int,
    ):
        """Rotate, scale and quantize x, multiply with the 4-bit weight, add the bias; fp32 inside, x's type outside."""
        last = op.Constant(value_ints=[-1])
        one = op.Constant(value_ints=[1])
        # rotate: [..., K] -> [..., q, p, b], outerᵀ @ (x @ hadamard)
        shape = op.Shape(x)
        lead = op.Shape(x, start=0, end=-1)
        blocks = op.Concat(lead, last, op.Shape(outer, start=0, end=1), op.Shape(hadamard, start=0, end=1), axis=0)
        mixed = op.MatMul(op.Reshape(op.Cast(x, to=1), blocks), hadamard)
        rotated = op.Reshape(op.MatMul(op.Transpose(outer, perm=[1, 0]), mixed), shape)
        # scale and round per (token, group); a group of 0 is the whole token
        features = op.Shape(x, start=-1)
        group = op.Reshape(op.Constant(value_int=act_group), one)
        width = op.Where(op.Equal(group, op.Constant(value_ints=[0])), features, group)
        grouped = op.Reshape(rotated, op.Concat(lead, last, width, axis=0))
        exponent = op.Cast(op.Sub(op.Constant(value_int=act_bits), op.Constant(value_int=1)), to=1)
        qmax = op.Sub(op.Pow(op.Constant(value_float=2.0), exponent), op.Constant(value_float=1.0))
        amax = op.Max(op.ReduceMax(op.Abs(grouped), last, keepdims=1), op.Constant(value_float=_FLOOR))
        codes = op.Clip(op.Round(op.Mul(grouped, op.Div(qmax, amax))), op.Neg(qmax), qmax)
        activation = op.Reshape(op.Mul(codes, op.Div(amax, qmax)), shape)
        # unpack two signed nibbles per byte, low one first
        packed = op.Cast(weight, to=6)
        sixteen = op.Cast(op.Constant(value_int=16), to=6)
        eight = op.Cast(op.Constant(value_int=8), to=6)
        low = op.Mod(op.Add(packed, op.Mul(sixteen, eight)), sixteen)
        even = op.Sub(low, op.Mul(op.Cast(op.GreaterOrEqual(low, eight), to=6), sixteen))
        odd = op.Div(op.Sub(packed, low), sixteen)
        pairs = op.Concat(op.Unsqueeze(even, last), op.Unsqueeze(odd, last), axis=-1)
        rows = op.Shape(weight, start=0, end=1)
        codes_w = op.Cast(
            op.Reshape(pairs, op.Concat(rows, op.Shape(weight_group_scale, start=1, end=2), last, axis=0)), to=1
        )
        # dequantize: Δ[n] · f[n, g] / 255 · (c − z), z one per row or one per row and group
        ratio = op.Div(op.Cast(weight_group_scale, to=1), op.Constant(value_float=255.0))
        step = op.Unsqueeze(op.Mul(op.Unsqueeze(weight_scale, last), ratio), last)
        stored = op.Reshape(op.Cast(weight_zero, to=1), op.Concat(rows, last, one, axis=0))
        zero = op.Add(op.Mul(stored, op.Constant(value_float=zero_step)), op.Constant(value_float=zero_origin))
        dequantized = op.Reshape(op.Mul(op.Sub(codes_w, zero), step), op.Concat(rows, last, axis=0))
        y = op.Add(op.MatMul(activation, op.Transpose(dequantized, perm=[1, 0])), bias)
        return op.CastLike(y, x)

    return QuantLinear


# The first body is for fp32 zero-points [N], which are stored as they are. The second body is for bytes, uint8
# [N, groups] (dvdquant.numerics.packing.expand_zero).
QuantLinear = _quant_linear(1.0, 0.0)
QuantLinearFloatZero = _quant_linear(1 / 16, -8.0)


def quant_linear_function(float_zero_point: bool = False) -> ir.Function:
    """Return the body of ``dvdquant::QuantLinear`` as an onnx-ir function.

    Args:
        float_zero_point: True where weight_zero is uint8 [N, groups]; False where it is fp32 [N].
    """
    return ir.serde.deserialize_function(
        (QuantLinearFloatZero if float_zero_point else QuantLinear).to_function_proto()
    )


def attach_functions(model: ir.Model) -> None:
    """Add the QuantLinear body to a graph; do this after tracing, because the exporter's own passes would inline it.

    Args:
        model: The graph, which is changed in place.

    Raises:
        ExportError: Some layers have fp32 zero-points and others have uint8 ones; a graph has one body for all layers.
    """
    zeros = {node.inputs[4].dtype for node in model.graph.all_nodes() if (node.domain, node.op_type) == _KEY[:2]}
    if len(zeros) > 1:
        raise ExportError(
            f"the zero-points of the layers are of several types: {sorted(str(z) for z in zeros)}",
            fix="take one zero_point for all layers of a recipe",
        )
    model.functions[_KEY] = quant_linear_function(float_zero_point=zeros == {ir.DataType.UINT8})
    model.opset_imports[DOMAIN] = DOMAIN_VERSION
