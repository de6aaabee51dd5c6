"""The pass that points initializers at their bytes in the weight file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from dvdquant.errors import ExportError

__all__ = ["StoredTensor", "bind_weights"]


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor's bytes.

    Args:
        location: The path of the file, relative to the ONNX file.
        offset: The position of the first byte in the file.
        length: The size in bytes.
        dtype: The ONNX element type.
        shape: The shape, in elements.
    """

    location: str
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


def bind_weights(model: ir.Model, stored: Mapping[str, StoredTensor], base_dir: str) -> bool:
    """Make every initializer named in ``stored`` external data, so that all graphs read the same bytes.

    1. The initializer has the stored shape and dtype, or no data: it is bound.
    2. They differ: ExportError, because the graph would read garbage.

    Args:
        model: The graph, which is changed in place.
        stored: Name -> place of the stored tensor.
        base_dir: The folder that the ONNX file will be in, for passes that read the data.

    Returns:
        True if an initializer was bound.

    Raises:
        ExportError: An initializer has another shape or dtype than the stored tensor.
    """
    changed = False
    for name, value in model.graph.initializers.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        expected = value.const_value
        if expected is not None and (expected.dtype != tensor.dtype or tuple(expected.shape.numpy()) != tensor.shape):
            raise ExportError(
                f"{name} is {expected.dtype.name} {expected.shape} in the graph",
                available=f"{tensor.dtype.name} {list(tensor.shape)} in the weight file",
            )
        value.const_value = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=base_dir,
        )
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape)
        changed = True
    return changed
