"""All that is used of PyTorch without being public, looked up at import; what would import ``torch._dynamo``, at first use.

``torch._check`` is documented for fake kernels and counts as public.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dvdquant.system.hooks import hook, lost_hook

__all__ = [
    "FAKE_TENSOR_LOG",
    "REQUIREMENT",
    "FakeTensorMode",
    "allow_recompiles",
    "check_example_values",
    "close_capture_pool",
    "compile_in_this_process",
    "compiler_named",
    "example_value",
    "notice_module_hooks",
    "parse_to",
    "set_example_value",
    "tensor_version",
    "trace_error",
    "without_stack_traces",
]

REQUIREMENT = "torch>=2.10,<2.15"

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger that reports what goes wrong on fake tensors."""

if TYPE_CHECKING:
    import torch
    from torch import fx
    from torch._subclasses.fake_tensor import FakeTensorMode
else:
    FakeTensorMode = hook("torch", f"{FAKE_TENSOR_LOG}:FakeTensorMode", "to find the shapes of a model", REQUIREMENT)

_parse_to = hook("torch", "torch._C:_nn._parse_to", "to read the arguments of a module's to()", REQUIREMENT)
_version = hook("torch", "torch:Tensor._version", "to see that a tensor was changed in place", REQUIREMENT)


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype that the arguments of ``torch.nn.Module.to`` name, None for what they do not.

    Args:
        *args: The positional arguments of the call.
        **kwargs: The named arguments of the call.
    """
    device, dtype, *_ = _parse_to(*args, **kwargs)
    return device, dtype


def close_capture_pool(device: int, pool: Any) -> None:
    """Give back the memory of a CUDA graph whose capture failed; nothing happens where PyTorch has done so.

    PyTorch's allocator takes a capture that could not be ended for one that goes on: it frees no cached memory any more, neither
    on request nor where memory runs out.

    Args:
        device: The index of the device.
        pool: The capture's memory, of ``torch.cuda.graph_pool_handle``.
    """
    why = "to give back the memory of a capture that failed"
    end = hook("torch", "torch._C:_cuda_endAllocateToPool", why, REQUIREMENT)
    release = hook("torch", "torch._C:_cuda_releasePool", why, REQUIREMENT)
    try:
        end(device, pool)
    except RuntimeError:
        return  # it was ended, and the graph itself gives its memory back
    release(device, pool)


def allow_recompiles(count: int) -> None:
    """Let torch.compile keep at least ``count`` compiled forms of one function, in the whole process.

    Args:
        count: The number of forms.
    """
    path, why = "torch._dynamo.config:recompile_limit", "to compile a block for each of its forms"
    _set_option(path, max(count, hook("torch", path, why, REQUIREMENT)), why)


def notice_module_hooks() -> None:
    """Let functions that torch.compile makes from now on notice hooks that modules get, or lose, later.

    By default they go on as if nothing had changed, and a LoRA that is attached after the first step would do nothing.
    """
    _set_option("torch._dynamo.config:skip_nnmodule_hook_guards", False, "to compile a layer anew that gets a LoRA")


def compile_in_this_process() -> None:
    """Let torch.compile start no processes that compile: one after another, in this process."""
    _set_option("torch._inductor.config:compile_threads", 1, "to compile where no process can be started")


def _set_option(path: str, value: Any, why: str) -> None:
    """Set an option of PyTorch's compiler, ``module:option``, that it has: another name would be set without an effect."""
    hook("torch", path, why, REQUIREMENT)
    module, _, option = path.partition(":")
    setattr(hook("torch", module, why, REQUIREMENT), option, value)


def compiler_named(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile by its name, to give it a graph that was changed.

    Args:
        name: Such as ``inductor``.
    """
    look_up = hook("torch", "torch._dynamo.backends.registry:lookup_backend", "to compile a fused graph", REQUIREMENT)
    found: Callable[..., Any] = look_up(name)
    return found


EXAMPLE_KEY = "example_value"
"""Where torch.compile keeps the example tensor of a node, among what the node is marked with."""


@functools.cache
def check_example_values() -> None:
    """Refuse a PyTorch that notes no example tensors in the graphs it compiles; one addition is traced to see it.

    Raises:
        UnsupportedError: The nodes have none: no pass over a graph would recognise anything, without a word.
    """
    import torch

    found: list[Any] = []

    def note(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        found.extend(example_value(node) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    torch.compile(add, backend=note, fullgraph=True)(torch.zeros(2, device="cpu"))
    if not found or not all(isinstance(value, torch.Tensor) for value in found):
        raise lost_hook("torch", f"meta[{EXAMPLE_KEY!r}] in the nodes of a graph", "to fuse layers", REQUIREMENT)


def example_value(node: fx.Node) -> Any:
    """Return the example tensor that a node was traced with; None for a node of which there is none.

    Args:
        node: A node of a graph that torch.compile made, see :func:`check_example_values`.
    """
    return node.meta.get(EXAMPLE_KEY)


def set_example_value(node: fx.Node, value: Any) -> None:
    """Give a new node of a graph an example tensor, as torch.compile gives it to those it makes.

    Args:
        node: The node.
        value: The tensor, or None.
    """
    node.meta[EXAMPLE_KEY] = value


def trace_error() -> type[Exception]:
    """Return the class of what torch.export raises about code that it cannot trace."""
    found: type[Exception] = hook("torch", "torch._dynamo.exc:UserError", "to report a failed trace", REQUIREMENT)
    return found


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """Let PyTorch note no line of code beside each node that it traces, which takes time in every trace."""
    config = hook("torch", "torch.fx.config", "to trace a model without the lines of its code", REQUIREMENT)
    name = "do_not_emit_stack_traces"
    before = getattr(config, name, False)  # PyTorch before 2.12 passes over it: the trace is the same, and slower
    setattr(config, name, True)
    try:
        yield
    finally:
        setattr(config, name, before)


def tensor_version(x: torch.Tensor) -> int:
    """Return the number of changes in place that ``x`` has seen; 0 for an inference tensor, which counts none.

    Args:
        x: The tensor.
    """
    number: int = 0 if x.is_inference() else _version.__get__(x)
    return number
