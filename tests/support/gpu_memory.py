"""A double of PyTorch's CUDA: a GPU with memory of its own, or with the host's, as on a Jetson."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dvdquant.system import device_memory as room

__all__ = ["GPU", "gpu_double"]

GIB = 1 << 30
GPU = torch.device("cuda")


def gpu_double(
    patched: pytest.MonkeyPatch, integrated: bool, *, unused: int, available: int, total: int = 8 * GIB
) -> None:
    """A GPU of which ``unused`` bytes hold nothing, on a machine that can give ``available``; PyTorch keeps 2 GiB, uses 1."""
    facts = SimpleNamespace(name="Orin", is_integrated=int(integrated), major=8, minor=7)
    patched.setattr(torch.cuda, "mem_get_info", lambda device: (unused, total))
    patched.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    patched.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    patched.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    patched.setattr(room, "memory_limit", lambda: available)
