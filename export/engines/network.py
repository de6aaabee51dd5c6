"""The way from ONNX to a network: external weights are mapped, never copied, and errors of the parser name the node."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dvdquant.backends import Backend
from dvdquant.errors import EngineError
from dvdquant.onnx.function_depth import check_functions
from dvdquant.plugin_library import require_no_plugins

__all__ = ["WeightMaps", "check_custom_ops", "parse_network", "read_model"]


def read_model(path: Path) -> onnx.ModelProto:
    """Return a graph without its external data.

    Args:
        path: The ONNX file.

    Raises:
        EngineError: The file cannot be read, is no ONNX file, or its functions unfold without end.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        check_functions(model)
        return model
    except (OSError, ValueError, onnx.onnx_cpp2py_export.checker.ValidationError) as error:
        raise EngineError(
            f"{path} cannot be read as ONNX: {error}", fix="check that it is an ordinary file and that you may read it"
        ) from error
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise EngineError(
            f"{path} is no ONNX file: {error}",
            fix="export again: dvdq-inspect --check OUT names the file that was damaged",
        ) from error


def check_custom_ops(model: onnx.ModelProto, backend: Backend, plugins: Sequence[Path]) -> None:
    """Refuse nodes that the builder would abort on, or would build into something else than was asked for.

    1. TensorRT-RTX: any plugin library, and any ``dvdquant::QuantLinear``.
    2. TensorRT: QuantLinear without a plugin library (its function body would be inlined, a slow fp32 emulation).
    3. Both: other custom ops without a function body, if there is no plugin library.

    Args:
        model: The graph.
        backend: The builder library.
        plugins: The plugin libraries.

    Raises:
        EngineError: The graph has such nodes; the error names them.
    """
    require_no_plugins(backend, plugins)
    kinds = {("dvdquant", name) for name in ("QuantLinear", "FusedQuantLinear")}
    quant = [node.name or node.output[0] for node in _nodes(model.graph) if _key(node) in kinds]
    if quant and not plugins:
        raise EngineError(
            f"{len(quant)} dvdquant::QuantLinear nodes are left in the graph: {_some(quant)}",
            fix=(
                "pass the dvdquant plugin library"
                if backend.takes_plugins
                else "lower the graph first (int8, int4-weight-only or nvfp4)"
            ),
        )
    bodies = {(f.domain, f.name) for f in model.functions}
    standard = {"", "ai.onnx", "trt", "com.nvidia"}
    if not plugins:
        unknown = [
            f"{node.name or node.output[0]} ({node.domain}::{node.op_type})"
            for node in _nodes(model.graph)
            if node.domain not in standard and _key(node) not in bodies
        ]
        if unknown:
            raise EngineError(f"custom ops without a function body: {_some(unknown)}", available=[n for _, n in bodies])


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    """Return (domain, operator) of a node."""
    return node.domain, node.op_type


def _some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for sub in (attribute.g, *attribute.graphs):
                yield from _nodes(sub)


class WeightMaps:
    """The read-only maps of the files that hold external initializers; they must outlive the build.

    Args:
        base: The folder that the ONNX file's locations are relative to.
        roots: The folders that may be read; a location that resolves outside of them is refused.
    """

    def __init__(self, base: Path, roots: Sequence[Path]) -> None:
        self._base = base
        self._roots = [root.resolve() for root in roots]
        self._maps: dict[Path, np.ndarray] = {}
        self._files: list[mmap.mmap] = []

    def region(self, tensor: onnx.TensorProto) -> tuple[int, int]:
        """Return (address, size in bytes) of an external initializer.

        Args:
            tensor: The initializer, with its external data.

        Raises:
            EngineError: The file is missing or outside of the roots, or the region passes its end.
        """
        entry = {item.key: item.value for item in tensor.external_data}
        path = (self._base / entry.get("location", "")).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise EngineError(
                f"{tensor.name}: external data {entry.get('location')!r} lies outside the export",
                available=[str(root) for root in self._roots],
            )
        data = self._open(path, tensor.name)
        offset = int(entry.get("offset", 0))
        length = int(entry["length"]) if "length" in entry else data.nbytes - offset
        if offset < 0 or length < 0 or offset + length > data.nbytes:
            raise EngineError(
                f"{tensor.name}: bytes {offset} to {offset + length} of {path} are needed",
                available=f"the file has {data.nbytes}",
                fix="export again; the weight file is truncated",
            )
        return int(data.ctypes.data) + offset, length

    def drop_pages(self) -> None:
        """Give the pages read so far back to the page cache; what is read again comes from there.

        The builder copies what it needs phase by phase, and its own copies are the larger part: without this, the whole
        weight file stays resident beside them.
        """
        for file in self._files:
            file.madvise(mmap.MADV_DONTNEED)

    def _open(self, path: Path, name: str) -> np.ndarray:
        """Return the bytes of a file, uint8 [size], from its map, which is made at the first call.

        Args:
            path: The file.
            name: The name of the tensor, for the error.

        Raises:
            EngineError: The file cannot be mapped.
        """
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self._maps[path] = np.frombuffer(self._files[-1], np.uint8)
            except (OSError, ValueError) as error:
                raise EngineError(
                    f"{name}: external data {path} cannot be mapped: {error}",
                    fix="put the export on a disk that can map files (no FIFO, no network disk without mmap)",
                ) from error
        return self._maps[path]


def parse_network(
    backend: Backend, builder: Any, logger: Any, model: onnx.ModelProto, maps: WeightMaps
) -> tuple[Any, Any]:
    """Parse a graph, with its external initializers bound to the maps.

    Args:
        backend: The builder library.
        builder: The builder.
        logger: The builder's logger.
        model: The graph.
        maps: The maps of the weight files.

    Returns:
        (network, parser); both must stay alive until the build is over.

    Raises:
        EngineError: The parser refuses the graph (the error names nodes), or a weight cannot be bound.
    """
    trt = backend.module
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if not parser.load_model_proto(model.SerializeToString()):
        raise _parser_error(backend, parser)
    for tensor in external:
        address, size = maps.region(tensor)
        if size == 0 or not parser.load_initializer(tensor.name, address, size):
            shape = list(tensor.dims)
            raise EngineError(
                f"{tensor.name}: {size} bytes do not fit an initializer of type {tensor.data_type}, shape {shape}",
                fix="export again: the weight file is not the one of this graph",
            )
    if not parser.parse_model_proto():
        raise _parser_error(backend, parser)
    return network, parser


def _parser_error(backend: Backend, parser: Any) -> EngineError:
    """Return the parser's errors as one error, with the names of the nodes."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        where = error.node_name() or f"node {error.node()}"
        lines.append(f"{where} ({error.node_operator() or '?'}): {error.desc().strip()}")
    return EngineError(
        f"{backend.name} {backend.version} cannot parse the graph:\n    " + "\n    ".join(lines or ["?"]),
        fix="install the release that the export was written for (dvdq doctor shows yours), or export again",
    )
