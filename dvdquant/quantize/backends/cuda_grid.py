"""The quantizer's CUDA kernels on tensors: the search of ``bgr.py`` and the rounding of ``gptq.py``.

They run where the kernel library is built (``make kernels``) and take the shapes it takes; everything else on a device goes
through tensor operations (``backends/torch_grid.py``), which move hundreds of times as many bytes
(``benchmarks/quantize.py --traffic``).
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from dvdquant.errors import DvdquantError
from dvdquant.ops.cuda.arguments import GRID_SOLVERS, GRID_ZERO_POINTS, GridPointers, GridShape
from dvdquant.ops.cuda.errors import BUILD
from dvdquant.ops.cuda.find import find_library, load_library
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.cuda_linear import stream_of

__all__ = ["QuantizerKernels", "quantizer_kernels"]

log = logging.getLogger(__name__)

# As in kernels/csrc/quantizer_api.cpp.
_MAX_FEATURES, _MAX_GROUP, _MAX_BLOCK, _UNIT = 20480, 256, 256, 16
_SHARED_FLOATS = 99 * 1024 // 4 - 24


class QuantizerKernels:
    """The library's calls on tensors of one device, on its current stream.

    Args:
        library: The opened kernel library, or anything with its ``search_grid`` and ``gptq_round``.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self.library = library

    def searches(self, features: int, groups: int, zero_point: str, solver: str) -> bool:
        """Return whether :meth:`search` takes these rows.

        Args:
            features: Input features K of the weight.
            groups: Groups per row; divides K.
            zero_point: ``midrise``, ``symmetric`` or ``float``; others are not taken.
            solver: ``minmax`` or ``search``; others are not taken.
        """
        size = features // groups
        return (
            zero_point in GRID_ZERO_POINTS
            and solver in GRID_SOLVERS
            and features % _UNIT == 0
            and features <= _MAX_FEATURES
            and (groups == 1 or (size % _UNIT == 0 and size <= _MAX_GROUP))
            and features + 2 * groups <= _SHARED_FLOATS
        )

    def rounds(self, features: int, groups: int, block: int) -> bool:
        """Return whether :meth:`round` takes these rows and blocks of moments.

        Args:
            features: Input features K of the weight.
            groups: Groups per row; divides K.
            block: Order b of a block of moments.
        """
        return self.searches(features, groups, "float", "search") and _UNIT <= block <= _MAX_BLOCK

    def search(self, w: Tensor, groups: int, zero_point: str, solver: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Search the grid of a weight; return it with its nearest codes.

        Args:
            w: fp32 [N, K], finite, of a shape that :meth:`searches` takes.
            groups: Groups per row; divides K.
            zero_point: ``midrise``, ``symmetric`` or ``float``.
            solver: ``minmax`` or ``search``.

        Returns:
            Codes int8 [N, K], scale fp32 [N], group_scale uint8 [N, groups], zero fp32 [N] or (``float``) uint8 [N, groups].
        """
        w = w.contiguous()
        rows, features = w.shape
        codes = torch.empty(rows, features, dtype=torch.int8, device=w.device)
        scale = torch.empty(rows, device=w.device)
        group_scale = torch.empty(rows, groups, dtype=torch.uint8, device=w.device)
        zero = torch.empty_like(group_scale) if zero_point == "float" else torch.empty_like(scale)
        shape = GridShape(rows, features, groups, zero_point, solver)
        with stream_of(w) as stream:
            self.library.search_grid(shape, w.data_ptr(), _pointers(codes, scale, group_scale, zero), stream)
        return codes, scale, group_scale, zero

    def round(self, w: Tensor, scale: Tensor, group_scale: Tensor, zero: Tensor, factors: Tensor) -> Tensor:
        """Return codes int8 [N, K] of ``w`` on the grid (scale, group_scale, zero), rounded with feedback.

        Args:
            w: fp32 [N, K], of a shape that :meth:`rounds` takes.
            scale: fp32 [N].
            group_scale: uint8 [N, groups].
            zero: fp32 [N], or uint8 [N, groups] with float zero-points.
            factors: fp32 [K/b, b, b], unit upper triangular, on the device of w; b as :meth:`rounds` takes it.
        """
        w = w.contiguous()
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        zero_point = "float" if zero.dtype == torch.uint8 else "midrise"
        rows, features = w.shape
        shape = GridShape(rows, features, group_scale.shape[1], zero_point, "search")
        kept = [t.contiguous() for t in (scale, group_scale, zero)]
        pointers = _pointers(codes, *kept)
        passed = factors.contiguous()
        with stream_of(w) as stream:
            self.library.gptq_round(shape, w.data_ptr(), pointers, passed.data_ptr(), passed.shape[1], stream)
        return codes


def _pointers(codes: Tensor, scale: Tensor, group_scale: Tensor, zero: Tensor) -> GridPointers:
    return GridPointers(codes.data_ptr(), scale.data_ptr(), group_scale.data_ptr(), zero.data_ptr())


def quantizer_kernels(device: torch.device) -> QuantizerKernels | None:
    """Return the kernels of a CUDA device, or None, after one warning: then tensor operations quantize.

    Args:
        device: Any device; None is returned for others than CUDA, without a warning.
    """
    return _opened() if device.type == "cuda" else None


@functools.lru_cache(maxsize=1)
def _opened() -> QuantizerKernels | None:
    try:
        if find_library() is None:
            log.warning("the CUDA kernels are not built; weights are quantized by slower tensor operations (%s)", BUILD)
            return None
        return QuantizerKernels(load_library())
    except DvdquantError as error:
        log.warning("the CUDA kernels cannot be used, weights are quantized by slower tensor operations: %s", error)
        return None
