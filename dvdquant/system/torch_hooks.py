"""All that is used of PyTorch without being public; each is looked up once, when this module is imported.

``torch._check`` is documented for fake kernels and counts as public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dvdquant.system.hooks import hook

__all__ = ["FAKE_TENSOR_LOG", "REQUIREMENT", "FakeTensorMode", "TraceError", "parse_to", "tensor_version"]

REQUIREMENT = "torch>=2.10,<2.15"

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger that reports what goes wrong on fake tensors."""

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
else:
    FakeTensorMode = hook("torch", f"{FAKE_TENSOR_LOG}:FakeTensorMode", "to find the shapes of a model", REQUIREMENT)

TraceError: type[Exception] = hook("torch", "torch._dynamo.exc:UserError", "to report a failed trace", REQUIREMENT)
"""What torch.export raises about code that it cannot trace."""

_parse_to = hook("torch", "torch._C:_nn._parse_to", "to read the arguments of a module's to()", REQUIREMENT)
_version = hook("torch", "torch:Tensor._version", "to see that a tensor was changed in place", REQUIREMENT)


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype that the arguments of ``torch.nn.Module.to`` name, None for what they do not."""
    device, dtype, *_ = _parse_to(*args, **kwargs)
    return device, dtype


def tensor_version(x: torch.Tensor) -> int:
    """Return the number of changes in place that ``x`` has seen; 0 for an inference tensor, which counts none."""
    number: int = 0 if x.is_inference() else _version.__get__(x)
    return number
