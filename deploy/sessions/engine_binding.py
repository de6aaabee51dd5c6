"""A deserialized engine on torch memory: tensors are bound by address, work is queued on torch's current stream.

The same calls serve TensorRT-RTX and TensorRT. Nothing here deserializes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dvdquant.backends import Backend
from dvdquant.errors import EngineError

__all__ = [
    "BoundEngine",
    "EngineLog",
    "Lane",
    "Scratch",
    "current_device",
    "make_logger",
    "torch_dtype",
]

_TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def torch_dtype(kind: Any) -> torch.dtype:
    """The torch dtype of a library's ``DataType``; EngineError for one torch has no buffers of."""
    if kind.name not in _TORCH_DTYPES:
        raise EngineError(f"the engine has a tensor of type {kind.name}", available=_TORCH_DTYPES)
    return _TORCH_DTYPES[kind.name]


class EngineLog:
    """The last errors and warnings of the library, for messages."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=8)

    def tail(self) -> str:
        """The lines, newest last."""
        return "; ".join(self.lines) or "the library gave no reason"


def make_logger(module: Any, log: EngineLog) -> Any:
    """An ``ILogger`` of the library that keeps errors and warnings in ``log``."""

    class Logger(module.ILogger):
        """Keeps what matters when something fails."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by the library, from any of its threads."""
            if severity <= module.ILogger.Severity.WARNING:
                log.lines.append(message.strip())

    return Logger()


class Scratch:
    """One allocation for all contexts of a session: they never run at once.

    Grows to the largest need; ``generation`` counts growths, after which addresses baked into CUDA graphs are stale.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None
        self.generation = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._memory is None else self._memory.nbytes

    def at_least(self, nbytes: int) -> tuple[int, int]:
        """(address, size) of at least ``nbytes``. torch aligns CUDA allocations to 512 bytes; the libraries ask for 256."""
        if self._memory is None or self._memory.nbytes < nbytes:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a pass on any stream may still use it
            self._memory = None  # first, so that the old and the new are not held together
            self._memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
            self.generation += 1
        return self._memory.data_ptr(), self._memory.nbytes

    def free(self) -> None:
        """Give it back."""
        self._memory = None


class BoundEngine:
    """An engine with its execution context.

    Args:
        library: the backend the engine belongs to.
        engine: what its runtime deserialized.
        scratch: shared by the engines of a session.
        weight: gives a packed weight on the device, by name, for engines that take their weights as inputs.
        inputs: names of the graph's own inputs.
        library_graphs: let TensorRT-RTX capture CUDA graphs by itself.

    Raises:
        EngineError: the context cannot be made, or an input is neither the graph's nor a weight, or differs from it.
    """

    def __init__(
        self,
        library: Backend,
        engine: Any,
        log: EngineLog,
        scratch: Scratch,
        weight: Callable[[str], Tensor],
        inputs: frozenset[str],
        library_graphs: bool = False,
    ) -> None:
        self._trt, self._engine, self._log, self._scratch = library.module, engine, log, scratch
        self.context = self._make_context(library, library_graphs)
        self.dtypes: dict[str, torch.dtype] = {}
        self.outputs: list[str] = []
        self._weights: list[Tensor] = []
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._generation, self._need = -1, 0
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            self._take_tensor(name, weight, inputs)
        if lacking := sorted(inputs - self.dtypes.keys()):
            raise EngineError(f"the engine lacks the inputs {', '.join(lacking)}", available=self.dtypes)

    def _make_context(self, library: Backend, library_graphs: bool) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if library_graphs and not library.takes_plugins:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"no execution context could be made: {self._log.tail()}")
        return context

    def _take_tensor(self, name: str, weight: Callable[[str], Tensor], inputs: frozenset[str]) -> None:
        dtype = torch_dtype(self._engine.get_tensor_dtype(name))
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise EngineError(f"the engine wants {name} in host memory", fix="export again")
        if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.OUTPUT:
            self.outputs.append(name)
            self.dtypes[name] = dtype
        elif name in inputs:
            self.dtypes[name] = dtype
        else:
            self._bind_weight(name, dtype, weight(name))

    def _bind_weight(self, name: str, dtype: torch.dtype, tensor: Tensor) -> None:
        wanted = tuple(self._engine.get_tensor_shape(name))
        if (tensor.dtype, dtype) == (torch.uint8, torch.int8):
            tensor = tensor.view(
                torch.int8
            )  # TensorRT passes no UINT8 to plugins, so their engines call the bytes INT8
        if tensor.dtype != dtype or tuple(tensor.shape) != wanted:
            raise EngineError(
                f"the engine wants {name} as {dtype} {wanted}", available=f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        self._address(name, tensor)
        self._weights.append(tensor)

    def _address(self, name: str, tensor: Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise EngineError(f"the engine refused the memory of {name}: {self._log.tail()}")

    # ------------------------------------------------------------------------------------------------------- running

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """Tell the context the shapes where they changed, and give it the scratch they need."""
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if shapes != self._shapes:
            self._shapes = None
            for name, shape in shapes.items():
                if not self.context.set_input_shape(name, shape):
                    raise EngineError(f"the engine refused {name} {list(shape)}: {self._log.tail()}")
            if unknown := self.context.infer_shapes():
                raise EngineError(f"the engine lacks the shapes of {', '.join(unknown)}")
            self._need = int(self.context.update_device_memory_size_for_shapes())
            self._shapes, self._generation = shapes, -1
        address, size = self._scratch.at_least(self._need)
        if self._generation != self._scratch.generation:
            self.context.set_device_memory(address, size)
            self._generation = self._scratch.generation

    def enqueue(self, inputs: Mapping[str, Tensor], device: torch.device, stream: int) -> Tensor:
        """Queue one pass on ``stream``; returns the first output, which is filled when the stream gets there.

        Args:
            inputs: contiguous, on the device; cast here to the engine's dtypes. They must outlive the pass.
        """
        self.prepare(inputs)
        for name, tensor in inputs.items():
            if tensor.dtype != self.dtypes[name]:
                raise EngineError(f"the engine wants {name} as {self.dtypes[name]}, got {tensor.dtype}")
            self._address(name, tensor)
        results = []
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=self.dtypes[name], device=device))
            self._address(name, results[-1])
        if not self.context.execute_async_v3(stream):
            raise EngineError(f"the engine failed: {self._log.tail()}")
        return results[0]


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one; does nothing on the host."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Lane:
    """Puts the passes of a session one after the other on the device, whatever streams the callers are on.

    They share scratch memory, so a pass waits for the one before it. All of a pass must be queued on the stream that
    :meth:`stream` gives: what torch queues on its current stream meanwhile is ordered with nothing of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.own: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stream(self) -> Iterator[Any]:
        """A ``torch.cuda.Stream`` that is ordered with torch's current one; None on the host, which has none.

        That is the current stream itself, or one of our own where the current one is the default stream, on which the
        libraries synchronize the whole device at every call. It begins after what the current stream has queued and after
        the pass before; what the current stream is given once the ``with`` has ended, begins after the pass.
        """
        if self.own is None:
            yield None
            return
        current = torch.cuda.current_stream(self._device)
        used = current if current.cuda_stream != 0 else self.own
        used.wait_event(self._done)
        if used is self.own:
            used.wait_stream(current)
        try:
            yield used
        finally:
            self._done.record(used)
            if used is self.own:
                # What was allocated on the current stream may be used again there only after this.
                current.wait_stream(used)
