"""What a request takes of a device's memory beside the weights, and whether it is there.

Until clips were drawn, the need is estimated from shapes. On a GPU every clip is measured, and the need of another size
follows from the measured one in proportion: attention and convolutions keep memory that is linear in tokens and pixels.
Nothing here imports torch.
"""

from __future__ import annotations

import threading

from dvdquant.deploy.generation.check import RequestChecker
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.errors import ResourceError, ShapeError
from dvdquant.model.working_memory import decode_bytes, step_bytes_at
from dvdquant.text import amount

__all__ = ["Admission", "estimated_need", "stage_bytes"]


def estimated_need(checker: RequestChecker, request: GenerateRequest, *, vae_tiling: bool = False) -> int:
    """Return the bytes that a clip takes beside the weights, from shapes: the larger of a step's and the VAE's.

    Args:
        checker: The checker that filled in the request.
        request: The request, with its size filled in.
        vae_tiling: Whether the VAE works in tiles.
    """
    step, decode = stage_bytes(checker, request, vae_tiling=vae_tiling)
    frames, area = request.num_frames or 1, (request.height or 1) * (request.width or 1)
    return max(step, decode) + frames * area * 3


def stage_bytes(checker: RequestChecker, request: GenerateRequest, *, vae_tiling: bool = False) -> tuple[int, int]:
    """Return the bytes that a call of the transformer works in, and those of the VAE, 0 where there is none.

    Args:
        checker: The checker that filled in the request.
        request: The request, with its size filled in.
        vae_tiling: Whether the VAE works in tiles.
    """
    family = checker.family
    step = step_bytes_at(family, checker.artifact.sizes, checker.size_of(request).latent)
    if not checker.decodes:
        return step, 0
    frames, height, width = request.num_frames or 1, request.height or 1, request.width or 1
    return step, decode_bytes(family, frames, height, width, tiled=vae_tiling)


class Admission:
    """The memory that requests of one generator take. Threads may share it.

    Args:
        checker: The checker of the generator.
        vae_tiling: Whether its VAE works in tiles.
    """

    def __init__(self, checker: RequestChecker, *, vae_tiling: bool = False) -> None:
        self._checker, self._tiling = checker, vae_tiling
        self._lock = threading.Lock()
        self._measured: dict[int, int] = {}  # pixels of a clip -> the largest need that was measured

    def note(self, request: GenerateRequest, taken: int) -> None:
        """Note what a clip took beside the weights.

        Args:
            request: The request, with its size filled in.
            taken: The bytes at its peak.
        """
        pixels = _pixels(request)
        with self._lock:
            self._measured[pixels] = max(taken, self._measured.get(pixels, 0))

    def need(self, request: GenerateRequest) -> int:
        """Return the bytes that a request takes beside the weights, measured as far as clips were drawn.

        Args:
            request: The request, with its size filled in.
        """
        with self._lock:
            measured = dict(self._measured)
        if not measured:
            return estimated_need(self._checker, request, vae_tiling=self._tiling)
        pixels = _pixels(request)
        if pixels in measured:
            return measured[pixels]
        nearest = min(measured, key=lambda known: abs(known - pixels))
        return max(measured[nearest] * pixels // nearest, 1)

    def check(self, request: GenerateRequest, free: int, total: int) -> None:
        """Refuse a request that does not fit.

        Args:
            request: The request, with its size filled in.
            free: The bytes that are free now.
            total: The bytes of the device.

        Raises:
            ShapeError: It does not fit the device at all.
            ResourceError: It does not fit what is free now.
        """
        need = self.need(request)
        size = f"{request.num_frames} frames of {request.height} × {request.width}"
        if need > total:
            raise ShapeError(
                f"{size} take about {amount(need)} beside the weights",
                available=f"{amount(total)} on this device",
                fix="ask for a smaller or shorter clip",
            )
        if need > free:
            raise ResourceError(
                f"{size} take about {amount(need)} beside the weights, and {amount(free)} are free now",
                available=f"{amount(total)} on this device",
                fix="wait until another clip has ended, or ask for a smaller or shorter clip",
            )


def _pixels(request: GenerateRequest) -> int:
    return (request.num_frames or 1) * (request.height or 1) * (request.width or 1)
