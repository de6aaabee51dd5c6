"""The words for backends and devices, the PyTorch device that a user's word means, and the wait for its work."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from dvdquant.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["BACKEND_WORDS", "DEVICE_WORDS", "BackendWord", "check_device_word", "cuda_sm", "resolve_device", "wait_for"]

BackendWord = Literal["auto", "onnxruntime", "pytorch", "rtx", "tensorrt"]
BACKEND_WORDS: tuple[BackendWord, ...] = get_args(BackendWord)
DEVICE_WORDS = ("auto", "cpu", "cuda", "cuda:N")
# A number with more digits is no index of a device, and torch.device overflows on it.
_CUDA = re.compile(r"cuda(?::(0|[1-9][0-9]{0,2}))?", re.ASCII)


def check_device_word(word: str) -> None:
    """Refuse a word that names no device, without asking PyTorch which devices there are.

    Args:
        word: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UnsupportedError: The word is another one.
    """
    if word not in ("auto", "cpu", "cpu:0") and _CUDA.fullmatch(word) is None:
        raise UnsupportedError(f"unknown device {word!r:.100}", available=DEVICE_WORDS, fix="pick one with --device")


def cuda_sm(device: torch.device | int | None = None) -> int:
    """Return the compute capability of a CUDA device, major · 10 + minor: 89 for SM 8.9, 121 for SM 12.1.

    Args:
        device: The device or its index; None means the current one.
    """
    import torch  # imported here, because the command line needs the words without torch

    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def resolve_device(word: str | torch.device) -> torch.device:
    """Return the device that ``word`` names, with its index if it is a GPU.

    Args:
        word: ``auto`` (the current GPU if PyTorch sees one, else the CPU), ``cpu``, ``cuda`` (the current GPU) or
            ``cuda:N``. A device of PyTorch is taken by its name.

    Raises:
        UnsupportedError: The word is another one, or PyTorch does not see that GPU.
    """
    import torch  # imported here, because the command line needs the words without torch

    text = str(word)
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text in ("cpu", "cpu:0"):  # torch writes its own CPU device as cpu or cpu:0
        return torch.device("cpu")
    check_device_word(text)
    match = _CUDA.fullmatch(text)
    assert match is not None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # "cuda" alone means another device in another thread, so the index is fixed here.
    index = int(match[1]) if match[1] is not None else (torch.cuda.current_device() if count else 0)
    if index >= count:
        seen = ["cpu", *(f"cuda:{i}" for i in range(count))]
        raise UnsupportedError(
            f"there is no device {text}: PyTorch sees {f'{count} CUDA devices' if count else 'no CUDA device'}",
            available=seen,
            fix="use --device cpu, or a machine with a GPU, its driver and a CUDA build of PyTorch",
        )
    return torch.device("cuda", index)


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that makes a CUDA device the current one, and does nothing on the host.

    Libraries that launch kernels by themselves do so on the current device, wherever their tensors are.

    Args:
        device: The device of the work in the ``with`` block.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(device)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work, so that a clock that is read next counts it; a CPU has none to wait for.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
