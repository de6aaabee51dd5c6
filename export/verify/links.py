"""The check of how the files of an export refer to each other.

Hashes say that each file is as it was written, not that the files fit. An engine belongs to a graph. A graph reads its
weights from the weight files and nowhere else. The graphs of all bit-widths read the same weights. A file that lies
beside them unlisted may be taken for a part of the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dvdquant.artifact.entries import EngineEntry, GraphEntry, LayerEntry
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import MANIFEST, graph_path, is_bookkeeping, is_engine_of, is_weight_path
from dvdquant.errors import DvdquantError, OutputError
from dvdquant.system.files import FileEntry
from dvdquant.system.safetensors_reader import TensorInfo, read_header
from dvdquant.system.safetensors_writer import PAD
from dvdquant.text import first_of, shown

if TYPE_CHECKING:
    import onnx

__all__ = ["check_links", "link_problems", "unlisted_files"]

PACKED = ("weight", "weight_scale", "weight_group_scale", "weight_zero", "bias")
# Builders, runtimes and people take the files of these folders by their place.
OWN_FOLDERS = ("onnx", "engines")


@dataclass(frozen=True)
class _Region:
    """The place of external data.

    Args:
        location: The path of the file, relative to the ONNX file.
        offset: The position of the first byte in the file.
        length: The size in bytes.
    """

    location: str
    offset: int
    length: int


def check_links(
    root: Path,
    files: Mapping[str, FileEntry],
    graphs: Sequence[GraphEntry],
    engines: Sequence[EngineEntry],
    components: Sequence[str],
    layers: Sequence[LayerEntry],
) -> None:
    """Refuse an export whose files do not fit together.

    Args:
        root: The folder of the export.
        files: The ``files`` of its manifest.
        graphs: The ``graphs`` of its manifest.
        engines: The ``engines`` of its manifest.
        components: The ``components`` of its manifest.
        layers: The ``layers`` of its manifest.

    Raises:
        OutputError: The files do not fit; the error names up to five problems.
    """
    problems = link_problems(root, files, graphs, engines, components, layers)
    if problems:
        raise OutputError(
            f"the files of {root} do not fit together: {first_of(problems)}",
            fix="remove the folder and export again",
        )


def link_problems(
    root: Path,
    files: Mapping[str, FileEntry],
    graphs: Sequence[GraphEntry],
    engines: Sequence[EngineEntry],
    components: Sequence[str],
    layers: Sequence[LayerEntry],
) -> list[str]:
    """Return the places where files do not fit together, each as a clause that names the file.

    Args:
        root: The folder of the export.
        files: The ``files`` of its manifest.
        graphs: The ``graphs`` of its manifest.
        engines: The ``engines`` of its manifest.
        components: The ``components`` of its manifest.
        layers: The ``layers`` of its manifest.
    """
    problems = [*_engine_problems(files, engines, components)]
    # Compare the graphs of a component with its weights and with each other.
    names = {entry["name"] for entry in layers}
    for component in components:
        weights = _weights(root, files, component, problems)
        regions: dict[str, tuple[str, _Region]] = {}
        bare: dict[str, tuple[str, bytes]] = {}
        for graph in graphs:
            if _is_graph_of(graph, component):
                problems += _graph_problems(root, files, graph, names, weights, regions, bare)
    known = {g["path"] for g in graphs if any(_is_graph_of(g, c) for c in components)}
    problems += [f"{g['path']} is of none of the transformers" for g in graphs if g["path"] not in known]
    return problems


def _is_graph_of(graph: GraphEntry, component: str) -> bool:
    """Return whether a graph has the name that it would have as one of a transformer."""
    return graph["path"] == graph_path(component, graph["act_bits"], graph["target"])


def unlisted_files(root: Path, files: Mapping[str, FileEntry]) -> tuple[list[str], list[str]]:
    """Return the files that lie in an export and are not in its manifest.

    Args:
        root: The folder of the export.
        files: The ``files`` of its manifest.

    Returns:
        The relative paths in the folders of graphs and engines, and those elsewhere.

    Raises:
        OSError: A folder cannot be read, or too many are in each other.
    """
    inside: list[str] = []
    outside: list[str] = []
    with Folder.open(root, follow=True) as folder:
        names = sorted(entry.path for entry in folder.walk(is_bookkeeping) if not entry.is_folder)
    for name in names:
        top = name.partition("/")[0]
        if name in files or name == MANIFEST:
            continue
        (inside if top in OWN_FOLDERS else outside).append(name)
    return inside, outside


def _engine_problems(
    files: Mapping[str, FileEntry], engines: Sequence[EngineEntry], components: Sequence[str]
) -> Iterator[str]:
    """Yield the engines that belong to no graph, or were built from another one."""
    for engine in engines:
        bits = engine["act_bits"]
        component = next((c for c in components if is_engine_of(engine["path"], c, bits)), None)
        graph = None if component is None else graph_path(component, bits, "tensorrt")
        if graph is None or graph not in files:
            yield f"{engine['path']} is of no graph of the export"
        elif engine["onnx_sha256"] != files[graph]["sha256"]:
            yield f"{engine['path']} was built from another {graph}"


def _weights(
    root: Path, files: Mapping[str, FileEntry], component: str, problems: list[str]
) -> dict[str, tuple[str, TensorInfo]]:
    """Return the place of every stored tensor of a transformer: name -> (weight file, place in it).

    Args:
        root: The folder of the export.
        files: The ``files`` of its manifest.
        component: The name of the transformer's folder.
        problems: Gets the problems of the weight files.
    """
    found: dict[str, tuple[str, TensorInfo]] = {}
    for name in files:
        if not is_weight_path(name, component):
            continue
        try:
            tensors = read_header(root / name).tensors
        except DvdquantError as error:
            problems.append(error.what)
            continue
        for key, info in tensors.items():
            if key.startswith(PAD):
                continue
            if key in found:
                problems.append(f"{shown(key)} is in {found[key][0]} and in {name}")
            found[key] = (name, info)
    if not found:
        problems.append(f"there are no weights of {component}")
    return found


def _graph_problems(
    root: Path,
    files: Mapping[str, FileEntry],
    graph: GraphEntry,
    layers: set[str],
    weights: Mapping[str, tuple[str, TensorInfo]],
    regions: dict[str, tuple[str, _Region]],
    bare: dict[str, tuple[str, bytes]],
) -> Iterator[str]:
    """Yield the problems of one graph.

    Args:
        root: The folder of the export.
        files: The ``files`` of its manifest.
        graph: The entry of the graph.
        layers: The names of the quantized layers.
        weights: Name -> (weight file, place) of the stored tensors of its transformer.
        regions: Name -> (graph that read it first, place) of external tensors; this graph's are added.
        bare: Target -> (first graph, its bytes without activation bits); this graph is added.
    """
    import onnx

    from dvdquant.export.engines.network import read_model

    path = graph["path"]
    try:
        model = read_model(root / path)
    except DvdquantError as error:
        yield error.what
        return
    # 1. Compare every tensor with the weight files, and with the other graphs.
    for tensor, own in _tensors(model):
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        name = shown(tensor.name, 100)
        if not external:
            if tensor.name in weights:
                yield f"{path} carries a {name} of its own instead of the stored one"
            continue
        region = _region(tensor)
        if region is None or not own:
            yield f"{path}: the external data of {name} is out of form"
            continue
        place = (PurePosixPath(path).parent / region.location).as_posix()
        if place not in files or "/" in region.location:
            yield f"{path} reads {name} from {shown(region.location, 100)}, which is no file of the export beside it"
        elif region.offset + region.length > files[place]["bytes"]:
            yield f"{path} reads {name} beyond the end of {place}"
        elif place.endswith(".safetensors") or tensor.name in weights:
            stored = weights.get(tensor.name)
            if stored is None or (stored[0], stored[1].offset, stored[1].nbytes) != (
                place,
                region.offset,
                region.length,
            ):
                yield f"{path} reads {name} from another place than that of its tensor in the weight file"
        before = regions.setdefault(tensor.name, (path, region))
        if before[1] != region:
            yield f"{path} and {before[0]} read different {name}"
    # 2. Compare the layers and the rest of the graph.
    yield from _layer_problems(path, graph, model, layers, weights)
    if graph["target"] == "tensorrt":
        rest = _without_bits(model)
        first = bare.setdefault(graph["target"], (path, rest))
        if first[1] != rest:
            yield f"{path} and {first[0]} differ in more than the activation bits"


def _layer_problems(
    path: str, graph: GraphEntry, model: onnx.ModelProto, layers: set[str], weights: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the quantized layers that do not read their own packed tensors, and packed tensors that no node reads.

    Args:
        path: The path of the graph, for the text.
        graph: The entry of the graph.
        model: The graph.
        layers: The names of the quantized layers.
        weights: The stored tensors of its transformer, by name.
    """
    packed = {f"{name}.weight" for name in layers if f"{name}.weight" in weights}
    used: set[str] = set()
    for node in model.graph.node:
        if (node.domain, node.op_type) == ("dvdquant", "QuantLinear"):
            layer = node.input[1].removesuffix(".weight") if len(node.input) > len(PACKED) else ""
            if list(node.input[1 : 1 + len(PACKED)]) != [f"{layer}.{kind}" for kind in PACKED]:
                yield f"{path}: a QuantLinear reads {shown(', '.join(node.input[1:6]), 200)}"
        used.update(node.input)
    if missing := sorted(packed - used):
        yield f"{path} does not use {shown(missing[0])}" + (f" and {len(missing) - 1} more" if missing[1:] else "")


def _region(tensor: onnx.TensorProto) -> _Region | None:
    """Return the place of an external tensor, or None if it is out of form."""
    entry = {item.key: item.value for item in tensor.external_data}
    try:
        region = _Region(entry["location"], int(entry["offset"]), int(entry["length"]))
    except (KeyError, ValueError):
        return None
    return region if region.offset >= 0 and region.length >= 0 else None


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Yield every tensor of a graph, and whether it is an initializer of the main graph.

    Tensors in attributes of nodes, in subgraphs and in functions are not.
    """
    for tensor in model.graph.initializer:
        yield tensor, True
    for sparse in model.graph.sparse_initializer:
        yield from _parts(sparse)
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t, False
            for tensor in attribute.tensors:
                yield tensor, False
            if attribute.HasField("sparse_tensor"):
                yield from _parts(attribute.sparse_tensor)
            for sparse in attribute.sparse_tensors:
                yield from _parts(sparse)
            for sub in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                for tensor in sub.initializer:
                    yield tensor, False
                for sparse in sub.sparse_initializer:
                    yield from _parts(sparse)
                pending += sub.node


def _parts(sparse: onnx.SparseTensorProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Return the two tensors that a sparse one is made of, neither of them an initializer of the graph."""
    yield sparse.values, False
    yield sparse.indices, False


def _without_bits(model: onnx.ModelProto) -> bytes:
    """Return the serialized graph without the activation grids of its quantized layers."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if (node.domain, node.op_type) == ("dvdquant", "QuantLinear"):
            kept = [a for a in node.attribute if a.name not in ("act_bits", "act_group")]
            del node.attribute[:]
            node.attribute.extend(kept)
    return bytes(copy.SerializeToString(deterministic=True))
