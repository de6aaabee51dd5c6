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
    r"|out ?of ?(device |host )?memory|not enough memory|\bMemoryError\b|failed to map segment|can't start new thread"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def says_no_memory(text: str) -> bool:
    """Return whether a text of a library, of an error or a log, says that memory ran out.

    Args:
        text: The text, with no word of ours: a sentence of ours may name a file that is called so.
    """
    return _NO_MEMORY.search(text) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of an allocation that failed; of an error of ours, what it was raised from decides.

    Args:
        error: The error.
    """
    seen: set[int] = set()
    while isinstance(error, DvdquantError):
        if error.out_of_memory:
            return True
        seen.add(id(error))
        if error.__cause__ is None or id(error.__cause__) in seen:
            return False
        error = error.__cause__
    # torch.OutOfMemoryError, by its name: whoever asks may run without PyTorch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return says_no_memory(str(error))


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, one of its causes, or one that it was raised after is that of an allocation that failed.

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
