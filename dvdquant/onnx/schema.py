"""The ``dvdquant`` operator domain as ONNX knows it: the schema of QuantLinear, registered once per process."""

from __future__ import annotations

import onnx.defs
from onnxscript import values

__all__ = ["DOMAIN", "DOMAIN_VERSION", "OPSET", "QUANT_LINEAR_INPUTS", "register_schemas"]

DOMAIN = "dvdquant"
DOMAIN_VERSION = 1
OPSET = values.Opset(DOMAIN, DOMAIN_VERSION)

QUANT_LINEAR_INPUTS = (
    ("x", "T", "[..., K]"),
    ("weight", "tensor(int8)", "[N, K/2] packed 4-bit codes of the rotated weight, low nibble = even k"),
    ("weight_scale", "tensor(float)", "[N]"),
    ("weight_group_scale", "tensor(uint8)", "[N, groups]; 255 stands for 1"),
    ("weight_zero", "Z", "centred zero-point: fp32 [N], or uint8 [N, groups] that stands for byte/16 - 8"),
    ("bias", "tensor(float)", "[N]"),
    ("hadamard", "tensor(float)", "[b, b] orthonormal"),
    ("outer", "tensor(float)", "[p, p] orthonormal"),
)


def register_schemas() -> None:
    """Make ``dvdquant::QuantLinear`` known to onnx and onnxscript; a second call does nothing."""
    if onnx.defs.has("QuantLinear", DOMAIN):
        return
    parameter = onnx.defs.OpSchema.FormalParameter
    attribute = onnx.defs.OpSchema.Attribute
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            "QuantLinear",
            DOMAIN,
            DOMAIN_VERSION,
            doc="Rotate, scale and quantize x online, multiply with 4-bit weights, correct for the zero-point.",
            inputs=[parameter(name, kind, description=text) for name, kind, text in QUANT_LINEAR_INPUTS],
            outputs=[parameter("y", "T", description="[..., N]")],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "x and y"),
                ("Z", ["tensor(float)", "tensor(uint8)"], "one zero-point per row, or one per weight group"),
            ],
            attributes=[
                attribute("act_bits", onnx.defs.OpSchema.AttrType.INT, description="4, 6 or 8"),
                attribute("act_group", onnx.defs.OpSchema.AttrType.INT, description="channels per scale, 0 = token"),
            ],
        )
    )
