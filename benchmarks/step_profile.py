"""Sum the time of a model's operations by class, as torch.profiler sees them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_budget import ATTENTION, LINEARS, POINTWISE, QUANTIZING

__all__ = ["MEASURED", "class_of", "profile_classes", "sum_by_class"]

# The kernels of self-attention and of text attention have the same names, so that one class holds both.
MEASURED = (LINEARS, ATTENTION, POINTWISE, QUANTIZING)
# In this order: an attention kernel may be a CUTLASS kernel by its name, too.
_PATTERNS = (
    (ATTENTION, r"flash|fmha|sdpa|attention|attn|\bmha|sage"),
    # By their full names: torch has kernels that quantize, too. The last four work on weights, before the first step.
    (QUANTIZING, r"(?:rotate|fused|rope)_quantize|expand_packed|expand_weight|make_rows|search_rows|round_rows"),
    # Of the libraries of 8-bit attention: comfy-kitchen, SageAttention 1 and 2.
    (
        QUANTIZING,
        r"\bquant_(?:[qkv]|query|key)_|quant_per_block|(?:QuantInt8|SubMean|MeanScale|TransposePadPermute)Kernel",
    ),
    (LINEARS, r"gemm|gemv|nvjet|cutlass|cublas|splitk|quant_linear|prepared_linear|addmm|linear|\bmm\b"),
)


def class_of(name: str) -> str:
    """Return the class of a kernel, or of an operation on a CPU, by its name; what has no pattern is pointwise.

    Args:
        name: The name that torch.profiler gives it.
    """
    # Inductor names a fused kernel after all that went into it; what it fuses here is pointwise.
    if name.startswith("triton_"):
        return POINTWISE
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), POINTWISE)


def profile_classes(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Return the milliseconds of a call by class; nothing where the profiler sees no kernel, as without CUPTI.

    Args:
        work: The call, which ran before.
        device: The device that it runs on.
        repeats: The number of profiled calls.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(repeats):
            work()
        if cuda:
            torch.cuda.synchronize()
    sums = sum_by_class(seen.key_averages(), cuda)
    return {name: ms / repeats for name, ms in sums.items()} if any(sums.values()) else {}


def sum_by_class(events: Iterable[Any], cuda: bool) -> dict[str, float]:
    """Return the milliseconds of events by class.

    Args:
        events: What torch.profiler saw, averaged by name.
        cuda: Whether kernels of a GPU count; else operations on a CPU.
    """
    sums = dict.fromkeys(MEASURED, 0.0)
    for event in events:
        if (event.device_type.name == "CUDA") != cuda:
            continue
        # On a GPU a range spans kernels that are in the list themselves. Inductor marks every call of a graph with one.
        if cuda and event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        sums[class_of(event.key)] += microseconds / 1000
    return sums
