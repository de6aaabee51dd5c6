"""A double of the engine library, for the parts of a session that a machine without a GPU cannot run.

``Runtime``, engine and context are stand-ins that record their calls; every name they are asked for must exist on the real
class of the installed TensorRT-RTX, as a method or as a property, or the test fails. Enumerations and ``ILogger`` are the
real ones. TensorRT and its lean runtime have the same interface without what TensorRT-RTX alone has. A pass reads its inputs
from, and writes its output to, the addresses it was given, and computes what a function of the test says; so an address,
shape or dtype that is wrong gives a wrong result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dvdquant.backends import LEAN, RTX, Backend, BackendName, load_backend
from dvdquant.deploy.sessions.engine_binding import torch_dtype

HOST = torch.device("cpu")
# The inputs and the output of an engine of the toy models: dtype, shape, whether it is an output.
BF16 = {
    "hidden_states": ("BF16", (1, 4, -1, -1, -1), False),
    "timestep": ("FLOAT", (1,), False),
    "encoder_hidden_states": ("BF16", (1, 12, 32), False),
    "sample": ("BF16", (1, 4, -1, -1, -1), True),
}

Compute = Callable[[dict[str, Tensor], str], Tensor]
_REAL = {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext", "config": "IRuntimeConfig"}


class Checked:
    """Answers only to names that the real class has."""

    kind: str

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "kind":
            real = getattr(load_backend("rtx").module, _REAL[object.__getattribute__(self, "kind")])
            value = object.__getattribute__(self, name)
            member = getattr(real, name, None)
            assert member is not None, f"{real.__name__} has no {name}"
            assert callable(value) == callable(member), f"{real.__name__}.{name} is not called like this"
            return value
        return object.__getattribute__(self, name)


class Library:
    """The module double and what happened to it.

    Args:
        tensors: name -> (DataType name, shape with −1 for dynamic, is it an output) of every engine.
        compute: inputs and the name of the engine (its SHA-256) -> output.
        memory: bytes of scratch an engine asks for at given shapes.
        name: the library that it doubles; None is TensorRT-RTX as it is installed.
        version: its release.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, tuple[int, ...], bool]],
        compute: Compute,
        memory: int = 1000,
        name: BackendName = RTX,
        version: str | None = None,
    ) -> None:
        real = load_backend("rtx")
        self.tensors, self.compute, self.memory = dict(tensors), compute, memory
        self.deserialized: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        self.scratch: list[tuple[int, int]] = []
        self.fail: str | None = None
        self.says = "an illegal access"
        self.plugins: list[str] = []
        names = ("ILogger", "DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy")
        if name == RTX:
            names += ("ComputeCapability", "CudaGraphStrategy", "EngineValidity", "EngineInvalidityDiagnostics")
        self.module = SimpleNamespace(**{n: getattr(real.module, n) for n in names}, Runtime=self._runtime)
        if name != RTX:
            registry = SimpleNamespace(load_library=lambda path: self.plugins.append(path) or object())
            self.module.get_plugin_registry = lambda: registry
        self.backend = Backend(name, self.module, version or real.version)

    def _runtime(self, logger: Any) -> Any:
        return DoubleRuntime(self, logger) if self.backend.name == RTX else DoubleTensorRTRuntime(self, logger)


class DoubleRuntime(Checked):
    """Counts what reaches it."""

    kind = "runtime"

    def __init__(self, library: Library, logger: Any) -> None:
        self._library, self._logger = library, logger
        self.engine_header_size = 64

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        assert len(header) <= 64
        return self._library.module.EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, raw: bytes) -> Any:
        self._library.deserialized.append(hashlib.sha256(raw).hexdigest())
        if self._library.fail == "deserialize":
            self._logger.log(self._library.module.ILogger.Severity.ERROR, "no room for the engine")
            return None
        return DoubleEngine(self._library, self._library.deserialized[-1], self._logger)


class DoubleTensorRTRuntime(Checked):
    """Takes what the double of TensorRT's builder wrote (tests/support/tensorrt_double), by NVIDIA's rules for releases.

    An engine loads in the release that built it. The lean runtime takes version-compatible engines alone: of any other, it
    says that a kernel is not there. An engine with a runtime inside needs leave to run code, which sessions never give.
    """

    kind = "runtime"

    def __init__(self, library: Library, logger: Any) -> None:
        self._library, self._logger = library, logger

    @property
    def engine_host_code_allowed(self) -> bool:
        return False

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        raise AssertionError("a session allowed code out of a file")

    def deserialize_cuda_engine(self, raw: bytes) -> Any:
        self._library.deserialized.append(hashlib.sha256(raw).hexdigest())
        plan, backend = json.loads(raw), self._library.backend
        problem = None
        if "VERSION_COMPATIBLE" in plan["flags"] and "EXCLUDE_LEAN_RUNTIME" not in plan["flags"]:
            problem = "the plan has host code, and engine_host_code_allowed is false"
        elif plan["version"] != backend.version:
            problem = f"the plan was built by {plan['version']}, expected {backend.version}"
        elif backend.name == LEAN and "VERSION_COMPATIBLE" not in plan["flags"]:
            problem = "Unexpected call to stub loadRunner"
        if problem is not None:
            self._logger.log(self._library.module.ILogger.Severity.ERROR, problem)
            return None
        return DoubleEngine(self._library, self._library.deserialized[-1], self._logger)


class DoubleConfig(Checked):
    kind = "config"

    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None
        self._strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class DoubleEngine(Checked):
    kind = "engine"

    def __init__(self, library: Library, name: str, logger: Any) -> None:
        self._library, self._name, self._logger = library, name, logger
        self.num_io_tensors = len(library.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._library.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._library.module.DataType, self._library.tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._library.tensors[name][1]

    def get_tensor_location(self, name: str) -> Any:
        return self._library.module.TensorLocation.DEVICE

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._library.module.TensorIOMode
        return mode.OUTPUT if self._library.tensors[name][2] else mode.INPUT

    def create_runtime_config(self) -> DoubleConfig:
        return DoubleConfig()

    def create_execution_context(self, how: Any) -> Any:
        strategies = self._library.module.ExecutionContextAllocationStrategy
        if isinstance(how, DoubleConfig):
            self._library.calls.append(("graphs", how.cuda_graph_strategy))
            how = how._strategy
        assert how == strategies.USER_MANAGED
        return None if self._library.fail == "context" else DoubleContext(self._library, self)


class DoubleContext(Checked):
    kind = "context"

    def __init__(self, library: Library, engine: DoubleEngine) -> None:
        self._library, self._engine = library, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._library.calls.append(("shape", name, shape))
        wanted = self._library.tensors[name][1]
        fits = len(shape) == len(wanted) and all(d in (-1, s) for d, s in zip(wanted, shape))
        self._shapes[name] = shape
        return fits

    def infer_shapes(self) -> list[str]:
        dynamic = [n for n, (_, shape, output) in self._library.tensors.items() if not output and -1 in shape]
        return [name for name in dynamic if name not in self._shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return self._library.memory

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._library.memory
        self._scratch = (address, size)
        self._library.scratch.append(self._scratch)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._library.tensors
        self._addresses[name] = address
        return address != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self._library.tensors[name][2]:
            return self._shapes[name]
        return self._shapes["hidden_states"]

    def execute_async_v3(self, stream: int) -> bool:
        self._library.calls.append(("execute", stream, self._scratch))
        if self._library.fail == "execute":
            self._engine._logger.log(self._library.module.ILogger.Severity.ERROR, self._library.says)
            return False
        inputs: dict[str, Tensor] = {}
        for name, (kind, shape, output) in self._library.tensors.items():
            if not output:
                inputs[name] = _read(self._addresses[name], self._shapes.get(name, shape), self._dtype(kind))
        (output_name,) = [n for n, (_, _, output) in self._library.tensors.items() if output]
        result = self._library.compute(inputs, self._engine._name)
        wanted = self._dtype(self._library.tensors[output_name][0])
        _write(self._addresses[output_name], result.to(wanted))
        return True

    def _dtype(self, kind: str) -> torch.dtype:
        return torch_dtype(getattr(self._library.module.DataType, kind))


def _read(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    ctypes.memmove(tensor.data_ptr(), address, tensor.nbytes)
    return tensor


def _write(address: int, value: Tensor) -> None:
    value = value.contiguous()
    ctypes.memmove(address, value.data_ptr(), value.nbytes)
