"""The device that a user names: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvdquant.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["resolve_device"]

_CHOICES = ("auto", "cpu", "cuda", "cuda:N")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that ``device`` names, with its index if it is a GPU.

    Args:
        device: ``auto`` is the current GPU where there is one, else the CPU.

    Raises:
        UnsupportedError: no such device here, or none that engines run on.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"unknown device {str(device)!r:.100}", available=_CHOICES) from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {str(device)!r:.100} is not supported", available=_CHOICES)
    if chosen.type == "cpu":
        return torch.device("cpu")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"there is no device {device}",
            available=["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))],
            fix="use --device cpu, or install a driver and a torch built for CUDA",
        )
    # "cuda" alone is another device in another thread.
    return torch.device("cuda", torch.cuda.current_device()) if chosen.index is None else chosen
