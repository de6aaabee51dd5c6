"""The names in an export folder: weights, graphs and engines of a transformer, the manifest, the lock, unfinished work."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "COMMIT",
    "LOCK",
    "MANIFEST",
    "OWNER",
    "PLUGIN_PLACE",
    "STAGE",
    "TREE",
    "constants_path",
    "engine_path",
    "graph_path",
    "is_bookkeeping",
    "is_engine_of",
    "is_weight_path",
    "weight_paths",
]

MANIFEST = "manifest.json"
LOCK = ".lock"
COMMIT = ".commit"
TREE = "tree"
OWNER = "owner.json"
STAGE = re.compile(r"\.tmp-[0-9a-f]{16}")
PLUGIN_PLACE = "plugins/libdvdquant_plugins.so"
"""Where a bundle holds the plugin library, and the script of trtexec looks for it."""


def weight_paths(component: str, count: int) -> list[str]:
    """Return the paths of the files of a transformer's packed weights, relative to the export.

    Args:
        component: The name of the transformer's folder, which every file name begins with.
        count: The number of files.
    """
    if count == 1:
        return [f"onnx/{component}.safetensors"]
    return [f"onnx/{component}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def is_weight_path(path: str, component: str) -> bool:
    """Return whether a path is one of :func:`weight_paths`.

    Args:
        path: The path, relative to the export.
        component: The name of the transformer's folder.
    """
    return re.fullmatch(rf"onnx/{re.escape(component)}(-\d{{5}}-of-\d{{5}})?\.safetensors", path) is not None


def constants_path(component: str) -> str:
    """Return the path of the file of the graphs' constants, relative to the export.

    Args:
        component: The name of the transformer's folder.
    """
    return f"onnx/{component}.constants.bin"


def graph_path(component: str, bits: int, flavour: str) -> str:
    """Return the path of a graph, relative to the export.

    Args:
        component: The name of the transformer's folder.
        bits: The bits of the activations: 4, 6 or 8.
        flavour: "tensorrt" for the graph with QuantLinear nodes, "onnx" for the one that ONNX Runtime runs.
    """
    return f"onnx/{component}_a{bits}{'_qdq' if flavour == 'onnx' else ''}.onnx"


def engine_path(component: str, backend: str, sms: Sequence[str], bits: int) -> str:
    """Return the path of an engine, relative to the export.

    Args:
        component: The name of the transformer's folder.
        backend: The name of the builder's backend: "tensorrt" or "tensorrt_rtx".
        sms: The compute capabilities that the engine is for, such as "8.9".
        bits: The bits of the activations.
    """
    place = f"{backend.removeprefix('tensorrt_')}-sm{'+'.join(sm.replace('.', '') for sm in sms)}"
    return f"engines/{place}/{_engine_name(component, bits)}"


def is_engine_of(path: str, component: str, bits: int) -> bool:
    """Return whether an engine has the name that :func:`engine_path` gives it, whatever GPU it is for.

    Args:
        path: The path of the engine, relative to the export.
        component: The name of the transformer's folder.
        bits: The bits of the activations.
    """
    return path.rpartition("/")[2] == _engine_name(component, bits)


def _engine_name(component: str, bits: int) -> str:
    """Return the name of an engine's file."""
    return f"{component}_a{bits}.engine"


def is_bookkeeping(name: str) -> bool:
    """Return whether an entry is a lock, a decided commit or a stage: work of an export that runs, or was killed.

    Args:
        name: The name of the entry.
    """
    return name in (LOCK, COMMIT) or STAGE.fullmatch(name) is not None
