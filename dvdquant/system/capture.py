"""A step of PyTorch on a CUDA device, captured as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dvdquant.system.torch_hooks import close_capture_pool

__all__ = ["Step", "capture_step"]

Step = Callable[[dict[str, Tensor]], Tensor]

# PyTorch captures one graph at a time in a process, and sessions of several devices run in threads.
_CAPTURING = threading.Lock()


def capture_step(
    step: Step, inputs: dict[str, Tensor], device: torch.device, stream: Any = None
) -> tuple[Tensor, Callable[[], Any]]:
    """Capture a step on a CUDA device; return the tensor that it writes, and what repeats it.

    PyTorch's own stream for captures belongs to the device of the first one, and kernels of another device would run instead of
    being captured. So each capture has a stream of its device. The caller's stream is the current one again behind a capture that
    fails, too, where PyTorch may leave that of the capture, and memory can be freed again, which PyTorch goes on to put off.

    Args:
        step: The step.
        inputs: The tensors that it reads, now and at every repetition.
        device: The device of the session.
        stream: The stream that the step is captured on. By default it is a new one.

    Raises:
        Exception: The step cannot be captured: whatever it, PyTorch or a library raises.
    """
    with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        torch.cuda.synchronize(device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device) if stream is None else stream  # type: ignore[no-untyped-call]
        try:
            # Other threads may allocate memory meanwhile: those of a second session, or of a server.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = step(inputs)
        except BaseException:
            close_capture_pool(torch.cuda.current_device(), pool)
            raise
    return output, graph.replay
