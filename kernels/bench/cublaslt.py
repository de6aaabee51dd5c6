"""int8 products through cublasLt with its heuristics: the fair peer, which PyTorch has no call for.

``torch._int_mm`` asks cublasLt without a workspace and takes the first algorithm. Here eight algorithms are asked for,
with a workspace, and the fastest is kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CublasLtError", "Int8Product"]

WORKSPACE = 64 << 20
CANDIDATES = 8
# Values of cublasLt.h, library_types.h and cublas_api.h.
R_32F, R_8I, R_32I = 0, 3, 10
COMPUTE_32I = 72
DESC_TRANSA, DESC_TRANSB = 3, 4
OP_N, OP_T = 0, 1
PREF_MAX_WORKSPACE_BYTES = 1


class CublasLtError(RuntimeError):
    """The error that cublasLt is not there, or refused."""


class _Heuristic(ctypes.Structure):
    """The C structure cublasLtMatmulHeuristicResult_t: an algorithm and its workspace."""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def _open() -> ctypes.CDLL:
    """Load cublasLt.

    Raises:
        CublasLtError: It is not there.
    """
    errors = []
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):  # torch has loaded its own copy under this name
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise CublasLtError("; ".join(errors))


class Int8Product:
    """The product y = x · wᵀ of int8 operands.

    Args:
        x: The first operand, int8 [M, K], on a CUDA device; K is a multiple of 16.
        weight: The second operand, int8 [N, K]; N is a multiple of 16.
        output: The dtype of y: torch.int32, or torch.int8 (scaled by alpha, so that little is written).

    Raises:
        CublasLtError: There is no library, or no algorithm for these shapes.
    """

    def __init__(self, x: Tensor, weight: Tensor, output: torch.dtype = torch.int32) -> None:
        self.library = _open()
        self.x, self.weight = x, weight
        m, k, n = *x.shape, len(weight)
        self.y = torch.empty((m, n), dtype=output, device=x.device)
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
        self.handle, self.operation, self.preference = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        whole = output == torch.int32
        scale_type = R_32I if whole else R_32F
        self.alpha: ctypes._SimpleCData[int] | ctypes._SimpleCData[float]
        self.alpha = ctypes.c_int32(1) if whole else ctypes.c_float(2.0**-14)
        self.beta = ctypes.c_int32(0) if whole else ctypes.c_float(0.0)
        self._call("cublasLtCreate", ctypes.byref(self.handle))
        self._call("cublasLtMatmulDescCreate", ctypes.byref(self.operation), COMPUTE_32I, scale_type)
        for attribute, value in ((DESC_TRANSA, OP_T), (DESC_TRANSB, OP_N)):
            word = ctypes.c_int32(value)
            self._call(
                "cublasLtMatmulDescSetAttribute", self.operation, attribute, ctypes.byref(word), ctypes.c_size_t(4)
            )
        # Column-major: yᵀ [N, M] = (wᵀ)ᵀ [N, K] · xᵀ [K, M].
        self.layouts = [self._layout(R_8I, k, n), self._layout(R_8I, k, m)]
        self.layouts += [self._layout(R_32I if whole else R_8I, n, m)]
        self.algorithms = self._heuristics()
        self.best = self.algorithms[0]

    def _call(self, name: str, *arguments: object) -> None:
        """Call a function of cublasLt.

        Raises:
            CublasLtError: It returned a status other than success.
        """
        status = getattr(self.library, name)(*arguments)
        if status:
            raise CublasLtError(f"{name}: cublasStatus_t {status}")

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Return the descriptor of a column-major matrix.

        Args:
            kind: The type of its elements.
            rows: The number of rows.
            columns: The number of columns.
        """
        layout = ctypes.c_void_p()
        size = ctypes.c_uint64
        self._call(
            "cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, size(rows), size(columns), ctypes.c_int64(rows)
        )
        return layout

    def _heuristics(self) -> list[_Heuristic]:
        """Return the algorithms that cublasLt proposes.

        Raises:
            CublasLtError: There is none.
        """
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(self.preference))
        limit = ctypes.c_uint64(WORKSPACE)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            self.preference,
            PREF_MAX_WORKSPACE_BYTES,
            ctypes.byref(limit),
            ctypes.c_size_t(8),
        )
        found, results = ctypes.c_int(), (_Heuristic * CANDIDATES)()
        a, b, d = self.layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self.handle, self.operation, a, b, d, d, self.preference, CANDIDATES, results, ctypes.byref(found),
        )  # fmt: skip
        usable = [result for result in results[: found.value] if result.state == 0]
        if not usable:
            raise CublasLtError("cublasLt has no algorithm for this int8 product")
        return usable

    def run(self, algorithm: _Heuristic | None = None) -> Tensor:
        """Return y [M, N], computed on the current stream.

        Args:
            algorithm: The algorithm; None means the best one known.

        Raises:
            CublasLtError: cublasLt refused.
        """
        chosen = algorithm if algorithm is not None else self.best
        a, b, d = self.layouts
        stream = torch.cuda.current_stream(self.x.device).cuda_stream
        pointer = ctypes.c_void_p
        self._call(
            "cublasLtMatmul",
            self.handle, self.operation, ctypes.byref(self.alpha), pointer(self.weight.data_ptr()), a,
            pointer(self.x.data_ptr()), b, ctypes.byref(self.beta), pointer(self.y.data_ptr()), d,
            pointer(self.y.data_ptr()), d, ctypes.byref(chosen), pointer(self.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE), pointer(stream),
        )  # fmt: skip
        return self.y

    def choose(self, milliseconds: Callable[[Callable[[], object]], float]) -> None:
        """Keep the fastest algorithm.

        Args:
            milliseconds: A function that times a call.
        """
        self.best = min(self.algorithms, key=lambda algorithm: milliseconds(lambda: self.run(algorithm)))

    def close(self) -> None:
        """Free the handle and the descriptors."""
        for layout in self.layouts:
            self._call("cublasLtMatrixLayoutDestroy", layout)
        self._call("cublasLtMatmulPreferenceDestroy", self.preference)
        self._call("cublasLtMatmulDescDestroy", self.operation)
        self._call("cublasLtDestroy", self.handle)
