"""A deserialized engine on torch memory.

Tensors are bound by address, and work is queued on a stream ordered with torch's current stream. The same calls serve
TensorRT-RTX and TensorRT. Nothing is deserialized here.
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
from dvdquant.system.out_of_memory import says_no_memory

__all__ = [
    "BoundEngine",
    "EngineLog",
    "Lane",
    "Scratch",
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
    """Return the torch dtype of a library's ``DataType``.

    Args:
        kind: A member of the library's ``DataType``.

    Raises:
        EngineError: Torch has no buffers of this type.
    """
    if kind.name not in _TORCH_DTYPES:
        raise EngineError(f"the engine has a tensor of type {kind.name}", available=_TORCH_DTYPES)
    return _TORCH_DTYPES[kind.name]


class EngineLog:
    """The last errors and warnings of the library, for error messages."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=8)

    def tail(self) -> str:
        """Return the lines as one string, newest last."""
        return "; ".join(self.lines) or "the library gave no reason"

    @property
    def out_of_memory(self) -> bool:
        """Return whether the lines say that memory ran out."""
        return says_no_memory(self.tail())


def make_logger(module: Any, log: EngineLog) -> Any:
    """Make an ``ILogger`` of the library that keeps errors and warnings in ``log``.

    Args:
        module: The Python module of the library.
        log: The place where messages are kept.
    """

    class Logger(module.ILogger):
        """A logger that keeps errors and warnings."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Keep one message.

            The library calls this from any of its threads.

            Args:
                severity: A member of the library's ``ILogger.Severity``. Only errors and warnings are kept.
                message: The message of the library.
            """
            if severity <= module.ILogger.Severity.WARNING:
                log.lines.append(message.strip())

    return Logger()


class Scratch:
    """One allocation of scratch memory for all contexts of a session, which never run at once.

    It grows to the largest need. ``generation`` counts the growths. After a growth, addresses in CUDA graphs are stale.

    Args:
        device: The device of the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None
        self.generation = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return 0 if self._memory is None else self._memory.nbytes

    def at_least(self, nbytes: int) -> tuple[int, int]:
        """Return the address and the size of at least ``nbytes`` bytes.

        Torch aligns CUDA allocations to 512 bytes; the libraries ask for 256.

        Args:
            nbytes: The least size in bytes.
        """
        if self._memory is None or self._memory.nbytes < nbytes:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a pass on any stream may still use the old memory
            self._memory = None  # freed first, so that the old and the new memory are not held together
            self._memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
            self.generation += 1
        return self._memory.data_ptr(), self._memory.nbytes

    def free(self) -> None:
        """Free the memory."""
        self._memory = None


class BoundEngine:
    """An engine with its execution context.

    Args:
        library: The backend that the engine belongs to.
        engine: The engine as the library's runtime deserialized it.
        log: The messages of the library.
        scratch: Scratch memory that the engines of a session share.
        weight: A function that takes a name and returns a packed weight on the device. It serves engines that take
            their weights as inputs.
        inputs: The names of the graph's own inputs.
        library_graphs: True lets TensorRT-RTX capture CUDA graphs by itself.

    Raises:
        EngineError: The context cannot be made, the engine lacks an input of the graph, or an input is neither the
            graph's nor a weight, or differs from the weight.
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
            raise EngineError(
                f"no execution context could be made: {self._log.tail()}",
                fix="free memory of the GPU, or draw a smaller clip: dvdq-run --dry-run says what is needed",
                out_of_memory=self._log.out_of_memory,
            )
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
            raise EngineError(
                f"the engine refused the memory of {name}: {self._log.tail()}",
                fix="free memory of the GPU, or draw a smaller clip: dvdq-run --dry-run says what is needed",
                out_of_memory=self._log.out_of_memory,
            )

    # ------------------------------------------------------------------------------------------------------- running

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """Tell the context the shapes if they changed, and give it the scratch memory that they need.

        Args:
            inputs: The inputs of the next pass by name.

        Raises:
            EngineError: The engine refuses a shape, or lacks one.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if shapes != self._shapes:
            self._shapes = None
            for name, shape in shapes.items():
                if not self.context.set_input_shape(name, shape):
                    raise EngineError(
                        f"the engine refused {name} {list(shape)}: {self._log.tail()}",
                        fix="draw a size that the engine was built for: dvdq-inspect OUT lists them",
                        out_of_memory=self._log.out_of_memory,
                    )
            if unknown := self.context.infer_shapes():
                raise EngineError(
                    f"the engine lacks the shapes of {', '.join(unknown)}",
                    fix="build the engine again from this export: dvdq-export --resume, or dvdq-build on the device",
                )
            self._need = int(self.context.update_device_memory_size_for_shapes())
            self._shapes, self._generation = shapes, -1
        address, size = self._scratch.at_least(self._need)
        if self._generation != self._scratch.generation:
            self.context.set_device_memory(address, size)
            self._generation = self._scratch.generation

    def enqueue(self, inputs: Mapping[str, Tensor], device: torch.device, stream: int) -> Tensor:
        """Queue one pass on ``stream`` and return the first output, which is filled when the stream gets there.

        Args:
            inputs: Inputs by name. They are contiguous, on the device, and have the engine's dtypes. They must outlive
                the pass.
            device: The device of the outputs.
            stream: The handle of a CUDA stream, or 0 for the default stream.

        Raises:
            EngineError: An input has another dtype than the engine wants, or the library refuses the pass.
        """
        self.prepare(inputs)
        for name, tensor in inputs.items():
            if tensor.dtype != self.dtypes[name]:
                raise EngineError(
                    f"the engine wants {name} as {self.dtypes[name]}, got {tensor.dtype}",
                    fix="load the pipeline with torch_dtype of the export (dvdq-inspect OUT shows it)",
                )
            self._address(name, tensor)
        results = []
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=self.dtypes[name], device=device))
            self._address(name, results[-1])
        if not self.context.execute_async_v3(stream):
            raise EngineError(
                f"the engine failed: {self._log.tail()}",
                fix="run it again; if it fails again, --backend pytorch runs the same weights without the engine",
                out_of_memory=self._log.out_of_memory,
            )
        return results[0]


class Lane:
    """A queue that runs the passes of a session one after the other, whatever streams the callers use.

    The passes share scratch memory, so each pass waits for the one before it. All work of a pass must be queued on the
    stream that :meth:`stream` gives. Work that torch queues on its current stream meanwhile is not ordered with the
    pass.

    Args:
        device: The device of the session.

    Attributes:
        own: The stream that passes run on where the caller's is the default stream; None on the host.
        done: The event that the last pass records at its end; None on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.own: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.done: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stream(self) -> Iterator[Any]:
        """Yield a ``torch.cuda.Stream`` that is ordered with torch's current stream, or None on the host.

        The stream is the current stream itself, unless that is the default stream. On the default stream the libraries
        synchronize the whole device at every call, so this gives a stream of its own instead. The stream begins after
        the work that is queued on the current stream, and after the pass before. Work that the current stream gets
        after the ``with`` block begins after the pass.
        """
        if self.own is None:
            yield None
            return
        current = torch.cuda.current_stream(self._device)
        used = current if current.cuda_stream != 0 else self.own
        used.wait_event(self.done)
        if used is self.own:
            used.wait_stream(current)
        try:
            yield used
        finally:
            self.done.record(used)
            if used is self.own:
                # Memory that was allocated on the current stream may be reused there only after the pass.
                current.wait_stream(used)
