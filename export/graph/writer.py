"""The ONNX files of an export: one base graph, a file per bit-width and flavour, one copy of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from dvdquant.artifact.entries import GraphEntry
from dvdquant.artifact.layout import constants_path, graph_path
from dvdquant.export.graph.functions import attach_functions
from dvdquant.export.passes.bind_weights import StoredTensor, bind_weights
from dvdquant.export.passes.lowering.qdq_int4 import lower_qdq_int4
from dvdquant.export.passes.lowering.store import TensorStore
from dvdquant.export.passes.set_activation import set_activation
from dvdquant.model.plan import ModelPlan
from dvdquant.onnx.expand_attention_mask import expand_attention_mask
from dvdquant.system.safetensors_reader import TensorInfo

__all__ = ["FLAVOURS", "GraphWriter", "stored_tensors"]

FLAVOURS = {
    "tensorrt": "dvdquant::QuantLinear nodes for the TensorRT plugin, with function bodies for ONNX Runtime",
    "onnx": "standard QDQ: INT4 DequantizeLinear weights, activations rounded online; rotation as dvdquant::Rotate",
}

_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
}


def stored_tensors(tensors: Mapping[str, tuple[str, TensorInfo]]) -> dict[str, StoredTensor]:
    """Return the places of tensors in the weight files as external data relative to ``onnx/``.

    Args:
        tensors: Name -> (weight file relative to the export, place in it).
    """
    return {
        name: StoredTensor(Path(relative).name, info.offset, info.nbytes, _DTYPES[info.dtype], info.shape)
        for name, (relative, info) in tensors.items()
    }


@dataclass
class GraphWriter:
    """The writer of the graphs of one transformer, into ``root/onnx``.

    Args:
        root: The folder of the export.
        plan: The plan of the model.
        component: The name of the transformer's folder, which the file names begin with.
        base: The traced graph. It is changed, and serves every bit-width in turn.
        tensors: Name -> (weight file relative to ``root``, place in it).

    Attributes:
        constants: The store of the tensors that all graphs share and the weight files do not hold.
    """

    root: Path
    plan: ModelPlan
    component: str
    base: ir.Model
    tensors: Mapping[str, tuple[str, TensorInfo]]

    def __post_init__(self) -> None:
        self._folder = self.root / "onnx"
        self._folder.mkdir(exist_ok=True)
        # Rotary tables and Hadamard matrices are the same in every graph, so they are stored once.
        self.constants = TensorStore(self.root / constants_path(self.component), self._folder)
        bind_weights(self.base, stored_tensors(self.tensors), str(self._folder))
        for name, value in self.base.graph.initializers.items():
            tensor = value.const_value
            if tensor is not None and not isinstance(tensor, ir.ExternalTensor):
                value.const_value = self.constants.put(name, tensor.numpy(), tensor.dtype, tuple(tensor.shape.numpy()))

    def quantlinear(self, bits: int) -> ir.Model:
        """Return the base graph itself, with its QuantLinear nodes set to ``bits``; use it before the next call.

        Args:
            bits: The bits of the activations, one of the recipe's.

        Raises:
            RecipeError: The recipe has no activations of so many bits.
            ExportError: Some layers have fp32 zero-points and others have uint8 ones.
        """
        asked = self.plan.recipe.activation(bits)
        specs = {spec.name: spec for spec in self.plan.layers}
        set_activation(self.base, asked, lambda layer: specs[layer].activation(asked))
        attach_functions(self.base)
        return self.base

    def write(self, bits: int, flavour: str) -> GraphEntry:
        """Save one graph, and return its entry for the manifest; every flavour reads the same weight file.

        Args:
            bits: The bits of the activations, one of the recipe's.
            flavour: ``tensorrt`` or ``onnx``, a key of ``FLAVOURS``.

        Raises:
            RecipeError: The recipe has no activations of so many bits.
            ExportError: A layer cannot be lowered to QDQ operators.
            ResourceError: The disk is full.
            OutputError: The file of constants cannot be written for another reason.
        """
        relative = graph_path(self.component, bits, flavour)
        model = self.quantlinear(bits)
        if flavour == "onnx":
            model = self.base.clone()
            lower_qdq_int4(model, self.constants)
            expand_attention_mask(model)
        ir.save(model, self.root / relative)
        return GraphEntry(path=relative, target=flavour, act_bits=bits)
