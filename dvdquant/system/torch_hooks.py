"""All that is used of PyTorch without being public, looked up at import; what would import ``torch._dynamo``, at first use.

``torch._check`` is documented for fake kernels and counts as public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dvdquant.system.hooks import hook

__all__ = [
    "FAKE_TENSOR_LOG",
    "REQUIREMENT",
    "FakeTensorMode",
    "allow_recompiles",
    "compile_in_this_process",
    "compiler_named",
    "notice_module_hooks",
    "parse_to",
    "tensor_version",
    "trace_error",
    "without_stack_traces",
]

REQUIREMENT = "torch>=2.10,<2.15"

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger that reports what goes wrong on fake tensors."""

if TYPE_CHECKING:
    import torch
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


def allow_recompiles(count: int) -> None:
    """Let torch.compile keep at least ``count`` compiled forms of one function, in the whole process.

    Args:
        count: The number of forms.
    """
    why = "to compile a block for each of its forms"
    present = hook("torch", "torch._dynamo.config:recompile_limit", why, REQUIREMENT)
    hook("torch", "torch._dynamo.config", why, REQUIREMENT).recompile_limit = max(count, present)


def notice_module_hooks() -> None:
    """Let functions that torch.compile makes from now on notice hooks that modules get, or lose, later.

    By default they go on as if nothing had changed, and a LoRA that is attached after the first step would do nothing.
    """
    hook(
        "torch", "torch._dynamo.config", "to compile a layer anew that gets a LoRA", REQUIREMENT
    ).skip_nnmodule_hook_guards = False


def compile_in_this_process() -> None:
    """Let torch.compile start no processes that compile: one after another, in this process."""
    why = "to compile where no process can be started"
    hook("torch", "torch._inductor.config:compile_threads", why, REQUIREMENT)
    hook("torch", "torch._inductor.config", why, REQUIREMENT).compile_threads = 1


def compiler_named(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile by its name, to give it a graph that was changed.

    Args:
        name: Such as ``inductor``.
    """
    look_up = hook("torch", "torch._dynamo.backends.registry:lookup_backend", "to compile a fused graph", REQUIREMENT)
    found: Callable[..., Any] = look_up(name)
    return found


def trace_error() -> type[Exception]:
    """Return the class of what torch.export raises about code that it cannot trace."""
    found: type[Exception] = hook("torch", "torch._dynamo.exc:UserError", "to report a failed trace", REQUIREMENT)
    return found


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """Let PyTorch note no line of code beside each node that it traces, which takes time in every trace."""
    config = hook("torch", "torch.fx.config", "to trace a model without the lines of its code", REQUIREMENT)
    name = "do_not_emit_stack_traces"
    before = getattr(config, name, False)  # versions that do not know it pass over it
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
