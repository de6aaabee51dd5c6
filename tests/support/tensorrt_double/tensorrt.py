"""A double of TensorRT's builder, for the process that builds: it has this folder on its path, and imports ``tensorrt``.

Enumerations, logger and progress monitor are those of the installed TensorRT-RTX, whose Python interface is the same; and what
the doubles are asked for must exist there, or the build fails. It writes an "engine" that says what the builder was given.
``DOUBLE_VERSION`` is the release it claims to be; ``DOUBLE_FAIL`` makes it refuse the engines whose graph has that name.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx as real
from tensorrt_rtx import (
    BuilderFlag,
    ILogger,
    IProgressMonitor,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
)

__all__ = [
    "Builder",
    "BuilderFlag",
    "ILogger",
    "IProgressMonitor",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ProfilingVerbosity",
]

__version__ = os.environ.get("DOUBLE_VERSION", "11.4.0.1")


class _Checked:
    """Refuses the names that the real class does not have."""

    _real: Any

    def __init_subclass__(cls) -> None:
        for name in vars(cls):
            assert name.startswith("_") or name == "given" or hasattr(cls._real, name), f"{cls._real} has no {name}"


class _Registry:
    def __init__(self) -> None:
        self.libraries: list[str] = []

    def load_library(self, path: str) -> object | None:
        self.libraries.append(path)
        return object() if os.path.isfile(path) else None


class _Profile(_Checked):
    _real = real.IOptimizationProfile

    def __init__(self) -> None:
        self.given: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.given[name] = [list(low), list(best), list(high)]


class _Config(_Checked):
    _real = real.IBuilderConfig
    profiling_verbosity: Any = None
    progress_monitor: Any = None
    builder_optimization_level: int = 3

    def __init__(self) -> None:
        self.given: dict[str, Any] = {"profiles": [], "flags": []}

    def set_flag(self, flag: BuilderFlag) -> None:
        self.given["flags"].append(flag.name)

    def set_memory_pool_limit(self, kind: Any, size: int) -> None:
        self.given["workspace"] = size

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.given["profiles"].append(profile.given)


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]


class _Network(_Checked):
    _real = real.INetworkDefinition

    def __init__(self) -> None:
        self.given: Any = None

    @property
    def num_inputs(self) -> int:
        return len(self.given.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.given.graph.input[index])


class Builder(_Checked):
    _real = real.Builder

    def __init__(self, logger: ILogger) -> None:
        self._logger, self._registry = logger, _Registry()

    def create_network(self, flags: int) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def get_plugin_registry(self) -> _Registry:
        return self._registry

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        model = network.given
        config.progress_monitor.phase_start("Building", None, 1)
        if os.environ.get("DOUBLE_FAIL", "nothing") in model.graph.output[0].name + json.dumps(
            [a.i for n in model.graph.node for a in n.attribute if a.name == "act_bits"][:1]
        ):
            self._logger.log(ILogger.Severity.ERROR, "the double refuses")
            return None
        config.progress_monitor.step_complete("Building", 0)
        config.progress_monitor.phase_finish("Building")
        quant = [node for node in model.graph.node if node.op_type in ("QuantLinear", "FusedQuantLinear")]
        told = {
            "version": __version__,
            "quant_linears": len(quant),
            "fused": sum(node.op_type == "FusedQuantLinear" for node in quant),
            "act_bits": sorted({a.i for node in quant for a in node.attribute if a.name == "act_bits"}),
            "inputs": [value.name for value in model.graph.input],
            "libraries": self._registry.libraries,
            **config.given,
        }
        return np.frombuffer(json.dumps(told).encode(), np.uint8)


class OnnxParser(_Checked):
    _real = real.OnnxParser

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network, self._weights = network, {}
        self.given: set[str] = set()

    def load_model_proto(self, raw: bytes) -> bool:
        self._network.given = onnx.load_model_from_string(raw)
        return True

    def load_initializer(self, name: str, address: int, size: int) -> bool:
        self.given.add(name)
        return address > 0 and size > 0

    def parse_model_proto(self) -> bool:
        external = {t.name for t in self._network.given.graph.initializer if t.data_location == 1}
        return external == self.given

    @property
    def num_errors(self) -> int:
        return 0

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []
