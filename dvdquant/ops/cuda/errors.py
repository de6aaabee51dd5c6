"""Errors of the kernel library, by the status that a call returns, and how to get a library that works."""

from __future__ import annotations

from dvdquant.errors import DvdquantError, ResourceError, ShapeError, UnsupportedError

__all__ = ["BUILD", "ERRORS", "OUT_OF_MEMORY", "KernelError"]

BUILD = "run `make kernels` in a checkout (needs nvcc), or set DVDQUANT_KERNELS to the built library"


class KernelError(DvdquantError):
    """Error of a kernel library that cannot be loaded, or of a launch that the CUDA runtime refused."""


# dvdq_status other than DVDQ_OK.
OUT_OF_MEMORY = 5
ERRORS: dict[int, type[DvdquantError]] = {
    1: ShapeError,
    2: UnsupportedError,
    3: ResourceError,
    4: KernelError,
    OUT_OF_MEMORY: KernelError,
}
