"""The store of the large tensors that a lowering derives: in memory, or appended to one file one after another."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dvdquant.system.files import disk_error

__all__ = ["INLINE_BYTES", "TensorStore"]

# A tensor of at most this size stays inside the ONNX file; protobuf's limit of 2 GB holds for the sum of these.
INLINE_BYTES = 1 << 16
ALIGNMENT = 64


class TensorStore:
    """The derived tensors (INT8 weights, block scales) on their way into the graph.

    With ``path`` every tensor over 64 KiB is appended to that file, 64-byte aligned, and the graph gets an external
    reference to it: memory holds one layer at a time, and the ONNX file stays small. Without it the tensors stay in
    memory. A tensor that is put again under the same name with the same bytes is not written again, so the graphs of
    all bit-widths can share one store.

    Args:
        path: The file to create (an existing one is overwritten), or None.
        base_dir: The folder that the references are relative to, usually the one that will hold the ONNX file. The
            default is the folder of ``path``.

    Attributes:
        bytes_written: The size of the file in bytes.

    Raises:
        ResourceError: The disk is full.
        OutputError: The file cannot be written for another reason.
    """

    def __init__(self, path: Path | None = None, base_dir: Path | None = None) -> None:
        self.path = path
        self.base_dir = base_dir if base_dir is not None else (path.parent if path is not None else None)
        self.bytes_written = 0
        self._regions: dict[tuple[str, int, int], int] = {}
        if path is not None:
            try:
                path.write_bytes(b"")
            except OSError as error:
                raise disk_error(error, path) from error

    def put(self, name: str, array: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Take one tensor, and return the object that the initializer points to.

        Args:
            name: The name of the initializer.
            array: The packed bytes for 4-bit types, uint8 [elements / 2]; the elements themselves for other types.
            dtype: The ONNX element type.
            shape: The shape, in elements.

        Raises:
            ResourceError: The disk is full.
            OutputError: The file cannot be written for another reason.
        """
        packed = dtype.bitwidth < 8
        if self.path is None or array.nbytes <= INLINE_BYTES:
            if packed:
                return ir.PackedTensor(array.reshape(-1), dtype, shape=ir.Shape(shape), name=name)
            return ir.Tensor(array.reshape(shape), dtype=dtype, name=name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        key = (name, array.nbytes, zlib.crc32(data))
        if key not in self._regions:
            self._regions[key] = self._append(name, self.path, data)
        offset = self._regions[key]
        base = self.base_dir or self.path.parent
        location = self.path.resolve().relative_to(base.resolve()).as_posix()
        return ir.ExternalTensor(
            location, offset, array.nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=str(base)
        )

    def _append(self, name: str, path: Path, data: memoryview) -> int:
        """Write bytes at the end of the file, aligned, and return their offset.

        Args:
            name: The name of the tensor.
            path: The file.
            data: The bytes.

        Raises:
            ResourceError: The disk is full.
            OutputError: The file cannot be written for another reason.
        """
        try:
            with path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                offset = file.tell()
                file.write(data)
        except OSError as error:
            raise disk_error(error, path) from error
        self.bytes_written = offset + data.nbytes
        return offset
