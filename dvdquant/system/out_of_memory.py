"""Whether an error means that memory ran out, whichever library raised it. Nothing here imports those libraries."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from dvdquant.errors import DvdquantError

__all__ = ["causes", "is_out_of_memory", "ran_out_of_memory", "says_no_memory"]

# What PyTorch, CUDA, cuBLAS, cuDNN, TensorRT, ONNX Runtime, the dynamic linker, C++ and Python say.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|allocate memory:|failed to allocate|std::bad_alloc|bad allocation"
    r"|out ?of ?(device |host )?memory|not enough memory|failed to map segment|can't start new thread"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def says_no_memory(text: str) -> bool:
    """Return whether the text of a library's error says that memory ran out.

    Args:
        text: The text of the error, without a fix of ours, which may speak of memory as well.
    """
    return _NO_MEMORY.search(text) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error by itself, without its causes, is that of an allocation that failed.

    Args:
        error: The error.
    """
    # torch.OutOfMemoryError, by its name: whoever asks may run without PyTorch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return says_no_memory(error.what if isinstance(error, DvdquantError) else str(error))


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, is that of an allocation that failed.

    Args:
        error: The error.
    """
    return any(is_out_of_memory(cause) for cause in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, or while handling; each once.

    Args:
        error: The error.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting.append(one.__cause__)
        if not one.__suppress_context__:
            waiting.append(one.__context__)
