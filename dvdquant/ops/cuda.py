"""ctypes binding of kernels/include/dvdquant/kernels.h: the same structs and calls, pointers as plain integers.

Nothing here imports PyTorch or needs a device: planning and workspace sizes are host-only functions of the library. The
library is looked for, in this order:

1. the file that the environment variable ``DVDQUANT_KERNELS`` names (an error if it is not there),
2. ``build/kernels/libdvdquant_kernels.so`` of a checkout, which ``make kernels`` writes,
3. ``_native/libdvdquant_kernels.so`` inside the installed package.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.errors import DvdquantError, ResourceError, ShapeError, UnsupportedError
from dvdquant.ops.repack import LayerShape

__all__ = [
    "ABI_VERSION",
    "DTYPES",
    "GRID_SOLVERS",
    "GRID_ZERO_POINTS",
    "GridPointers",
    "GridShape",
    "KernelError",
    "KernelLibrary",
    "LayerPlan",
    "NORMS",
    "ROPE_NORMS",
    "ProloguePointers",
    "RopePointers",
    "WeightPointers",
    "find_library",
    "load_library",
    "serves",
]

ABI_VERSION = 6
ENVIRONMENT = "DVDQUANT_KERNELS"
LIBRARY = "libdvdquant_kernels.so"
BUILD = "run `make kernels` in a checkout (needs nvcc), or set DVDQUANT_KERNELS to the built library"
DTYPES = ("bf16", "fp16")
CODES = ("s4", "s8", "e4m3")
# Orin and Thor: what is compiled for other GPUs of their major version does not run on them.
TEGRA = (87, 110)
NORMS = ("none", "layer", "rms")
ROPE_NORMS = ("none", "all", "head")
GRID_ZERO_POINTS = ("midrise", "symmetric", "float")
GRID_SOLVERS = ("minmax", "search")


class KernelError(DvdquantError):
    """Error of a kernel library that cannot be loaded, or of a launch that the CUDA runtime refused."""


# dvdq_status other than DVDQ_OK.
_ERRORS: dict[int, type[DvdquantError]] = {1: ShapeError, 2: UnsupportedError, 3: ResourceError, 4: KernelError}


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "weight_groups")),
        *((name, ctypes.c_int32) for name in ("float_zero_point", "block", "outer", "act_bits", "act_group", "dtype")),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "group_scale", "zero", "bias")]


class _Prologue(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "gate", "multiplier", "addend", "hidden")),
        *((name, ctypes.c_int64) for name in ("gate_tokens", "gate_stride", "modulate_tokens", "modulate_stride")),
        *((name, ctypes.c_int32) for name in ("norm", "gelu")),
        ("eps", ctypes.c_float),
    ]


class _Rope(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "stride", "period", "rope_channels")),
        *((name, ctypes.c_int32) for name in ("head", "dtype", "norm", "rotated")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weight", "cosines", "sines", "bound")),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("path", "codes", "scale_rows", "needs_sums")),
        *((name, ctypes.c_int64) for name in ("prepared_bytes", "codes_bytes_per_token")),
    ]


class _Grid(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "groups")),
        *((name, ctypes.c_int32) for name in ("zero_point", "solver")),
    ]


class _GridOut(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "group_scale", "zero")]


@dataclass(frozen=True)
class GridShape:
    """``dvdq_grid``: the grid that is searched for a weight [n, k] on a device.

    Args:
        n: Rows of the weight.
        k: Input features of the weight.
        groups: Segments per row; each has its own factor.
        zero_point: One of :data:`GRID_ZERO_POINTS`.
        solver: One of :data:`GRID_SOLVERS`.
    """

    n: int
    k: int
    groups: int
    zero_point: str
    solver: str


@dataclass(frozen=True)
class GridPointers:
    """``dvdq_grid_out``: device addresses of a grid; see :class:`dvdquant.quantize.bgr.QuantizedWeight`.

    Args:
        codes: Address of int8 [n, k].
        scale: Address of fp32 [n].
        group_scale: Address of uint8 [n, groups].
        zero: Address of fp32 [n], or of uint8 [n, groups] for the ``real`` zero-point.
    """

    codes: int
    scale: int
    group_scale: int
    zero: int


@dataclass(frozen=True)
class LayerPlan:
    """``dvdq_plan``: what a device needs for a layer.

    Args:
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        codes: Format of the activation codes that rotate_quantize writes: ``s4``, ``s8`` or ``e4m3``.
        scale_rows: Activation scales per token.
        needs_sums: Whether the GEMM reads the token sums.
        prepared_bytes: Bytes of the prepared weight.
        codes_bytes_per_token: Bytes of the codes of one token.
    """

    path: str
    codes: str
    scale_rows: int
    needs_sums: bool
    prepared_bytes: int
    codes_bytes_per_token: int

    @property
    def form(self) -> tuple[str, int]:
        """Return the key of the prepared weight's bytes: paths with codes of one kind multiply the same buffer."""
        return self.codes, self.prepared_bytes


@dataclass(frozen=True)
class WeightPointers:
    """``dvdq_weight``: device addresses of the canonical tensors of a packed weight.

    Args:
        codes: Address of int8 [n, k/2], packed 4-bit codes.
        scale: Address of fp32 [n].
        group_scale: Address of uint8 [n, groups].
        zero: Address of fp32 [n], or of uint8 [n, groups] with real zero-points.
        bias: Address of fp32 [n]; 0 for none.
    """

    codes: int
    scale: int
    group_scale: int
    zero: int
    bias: int = 0


@dataclass(frozen=True)
class ProloguePointers:
    """``dvdq_prologue``: what becomes of x before it is rotated; see :class:`dvdquant.ops.fused.Prologue`.

    Args:
        y: Address of [m, k] of x's dtype, added to x; 0 for none.
        gate: Address of fp32 rows of [k]; 0 for ones.
        multiplier: Address of fp32 rows of [k]; 0 for ones.
        addend: Address of fp32 rows of [k]; 0 for zeros.
        hidden: Address of [m, k] of x's dtype, where the sum is written; 0 for nowhere.
        gate_tokens: Tokens that read one row of the gate; 0 for one row for all.
        gate_stride: Floats between rows of the gate.
        modulate_tokens: Tokens that read one row of multiplier and addend; 0 for one row for all.
        modulate_stride: Floats between rows of multiplier and addend.
        norm: One of :data:`NORMS`.
        gelu: Whether it is GELU alone.
        eps: What the norm adds to the variance.
    """

    y: int = 0
    gate: int = 0
    multiplier: int = 0
    addend: int = 0
    hidden: int = 0
    gate_tokens: int = 0
    gate_stride: int = 0
    modulate_tokens: int = 0
    modulate_stride: int = 0
    norm: str = "none"
    gelu: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class RopePointers:
    """``dvdq_rope``: what q or k goes through before attention; see :class:`dvdquant.ops.rope.Rope`.

    Args:
        channels: Channels of a token, all heads.
        head: Channels of a head.
        dtype: ``bf16`` or ``fp16``, of x and of the result where it has no codes.
        stride: Elements of x from one token to the next.
        period: Tokens of a sample, which are the rows of the tables.
        rope_channels: Channels of a row of the tables, a head's or all; 0 for no rope.
        norm: One of :data:`ROPE_NORMS`.
        rotated: Whether each head is multiplied by the Hadamard matrix.
        eps: What the norm adds to the mean of squares.
        weight: Address of fp32 [channels] or [head]; 0 for ones.
        cosines: Address of fp32 [period, rope_channels / 2]; 0 without rope.
        sines: The same.
        bound: Address of fp32 [1], what becomes 448; 0 for 16 bits out.
    """

    channels: int
    head: int
    dtype: str
    stride: int
    period: int
    rope_channels: int = 0
    norm: str = "none"
    rotated: bool = False
    eps: float = 0.0
    weight: int = 0
    cosines: int = 0
    sines: int = 0
    bound: int = 0


def serves(architectures: Sequence[str], sm: int) -> bool:
    """Return whether a library that is built for ``architectures`` holds code for a GPU.

    Machine code runs on its own major version from its own minor version on, but the Tegra chips (:data:`TEGRA`) run theirs
    alone, and it runs on no other. PTX (``compute_80``) is compiled by the driver for any GPU since, except 9.0: the paths
    that are planned there have instructions of their own.

    Args:
        architectures: What ``dvdq_architectures`` says, such as ``("80", "90a", "compute_80")``.
        sm: major · 10 + minor of the GPU.
    """
    numbers = [int(name.rstrip("af")) for name in architectures if name.rstrip("af").isdigit()]
    if sm in numbers:
        return True
    earlier = [number for number in numbers if number // 10 == sm // 10 and number < sm and number not in TEGRA]
    if earlier and sm not in TEGRA:
        return True
    ptx = [name.removeprefix("compute_") for name in architectures if name.startswith("compute_")]
    return sm != 90 and any(number.isdigit() and int(number) <= sm for number in ptx)


class KernelLibrary:
    """An opened kernel library; a failed call raises the error of its status, with the library's own message.

    ``ShapeError`` stands for DVDQ_BAD_ARGUMENT, ``UnsupportedError`` for DVDQ_UNSUPPORTED, ``ResourceError`` for
    DVDQ_WORKSPACE, :class:`KernelError` for DVDQ_CUDA_ERROR. In all methods addresses are integers and 0 is null, a
    stream is the integer of a ``cudaStream_t``, and ``sm`` is major · 10 + minor of the device.

    Args:
        path: The shared library file.

    Raises:
        KernelError: The file is no such library, or it has another ABI version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} is not a usable kernel library: {error}", fix=BUILD) from error
        version = int(self._library.dvdq_abi_version())
        if version != ABI_VERSION:
            raise KernelError(
                f"{path} has ABI version {version}", available=f"this dvdquant speaks {ABI_VERSION}", fix=BUILD
            )
        self.architectures = tuple(self._library.dvdq_architectures().decode().split(";"))

    def _declare(self) -> None:
        layer, i32, i64, pointer = ctypes.POINTER(_Layer), ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        signatures: dict[str, tuple[type, list[type]]] = {
            "last_error": (ctypes.c_char_p, []),
            "abi_version": (i32, []),
            "architectures": (ctypes.c_char_p, []),
            "path_name": (ctypes.c_char_p, [i32]),
            "plan_layer": (i32, [layer, i32, ctypes.POINTER(_Plan)]),
            "workspace_bytes": (i32, [layer, i32, i64, ctypes.POINTER(i64)]),
            "prepare_weight": (i32, [layer, i32, ctypes.POINTER(_Weight), pointer, i64, pointer]),
            "rotate_quantize": (i32, [layer, i32, *[pointer] * 6, i64, pointer]),
            "linear_gemm": (i32, [layer, i32, *[pointer] * 5, i64, pointer, i64, pointer]),
            "quant_linear": (i32, [layer, i32, *[pointer] * 5, i64, pointer, i64, pointer]),
            "rows_bytes": (i32, [layer, i32, ctypes.POINTER(i64)]),
            "make_rows": (i32, [layer, i32, ctypes.POINTER(_Weight), pointer, i64, pointer]),
            "expand_weight": (i32, [layer, i32, ctypes.POINTER(_Weight), *[pointer] * 2, i64, pointer]),
            "packed_workspace_bytes": (i32, [layer, i32, i64, ctypes.POINTER(i64)]),
            "packed_linear": (
                i32,
                [layer, i32, *[pointer] * 3, ctypes.POINTER(_Weight), *[pointer] * 2, i64, pointer, i64, pointer],
            ),
            "fused_quantize": (i32, [layer, i32, ctypes.POINTER(_Prologue), *[pointer] * 5, i64, pointer]),
            "fused_linear": (
                i32,
                [layer, i32, ctypes.POINTER(_Prologue), *[pointer] * 4, i64, pointer, i64, pointer],
            ),
            "rope_quantize": (i32, [ctypes.POINTER(_Rope), *[pointer] * 2, i64, pointer]),
            "search_grid": (i32, [ctypes.POINTER(_Grid), pointer, ctypes.POINTER(_GridOut), pointer]),
            "gptq_round": (i32, [ctypes.POINTER(_Grid), pointer, ctypes.POINTER(_GridOut), pointer, i64, pointer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._library, f"dvdq_{name}")
            function.restype, function.argtypes = result, arguments

    def _check(self, status: int) -> None:
        if status:
            text = self._library.dvdq_last_error().decode(errors="replace")
            raise _ERRORS.get(status, KernelError)(text or f"the kernel library answered status {status}")

    def _size(self, function: Any, *arguments: Any) -> int:
        """Return the size that a function of the library writes to its last argument."""
        size = ctypes.c_int64()
        self._check(function(*arguments, ctypes.byref(size)))
        return size.value

    def serves(self, sm: int) -> bool:
        """Return whether the library holds code for ``sm``, as :func:`serves` says.

        Args:
            sm: major · 10 + minor of a device.
        """
        return serves(self.architectures, sm)

    def path_name(self, path: int) -> str:
        """Return the name of a ``dvdq_path``, as in :data:`dvdquant.ops.repack.PATHS`.

        Args:
            path: The number of the path.
        """
        return str(self._library.dvdq_path_name(path).decode()).lower()

    def plan_layer(self, layer: LayerShape, sm: int) -> LayerPlan:
        """Return how ``layer`` runs on ``sm``; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.

        Raises:
            ShapeError: The shape is not valid.
            UnsupportedError: No path runs this layer on ``sm``.
        """
        plan = _Plan()
        self._check(self._library.dvdq_plan_layer(_layer(layer), sm, ctypes.byref(plan)))
        return LayerPlan(
            self.path_name(plan.path),
            CODES[plan.codes],
            plan.scale_rows,
            bool(plan.needs_sums),
            plan.prepared_bytes,
            plan.codes_bytes_per_token,
        )

    def workspace_bytes(self, layer: LayerShape, sm: int, tokens: int) -> int:
        """Return the bytes of workspace that :meth:`quant_linear` needs; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            tokens: Rows M of x.
        """
        return self._size(self._library.dvdq_workspace_bytes, _layer(layer), sm, tokens)

    def prepare_weight(
        self, layer: LayerShape, sm: int, weight: WeightPointers, prepared: int, prepared_bytes: int, stream: int
    ) -> None:
        """Write a packed weight in the form that the GEMM reads.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            weight: Addresses of the packed tensors.
            prepared: Address of the buffer that is written, 256-byte aligned.
            prepared_bytes: Size of that buffer, ``plan.prepared_bytes``.
            stream: The CUDA stream.
        """
        self._check(
            self._library.dvdq_prepare_weight(_layer(layer), sm, _weight(weight), prepared, prepared_bytes, stream)
        )

    def rows_bytes(self, layer: LayerShape, sm: int) -> int:
        """Return the bytes of the rows of a layer that stays packed; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
        """
        return self._size(self._library.dvdq_rows_bytes, _layer(layer), sm)

    def make_rows(
        self, layer: LayerShape, sm: int, weight: WeightPointers, rows: int, rows_bytes: int, stream: int
    ) -> None:
        """Write the rows of a weight that stays packed.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            weight: Addresses of the packed tensors.
            rows: Address of the buffer that is written, 256-byte aligned.
            rows_bytes: Size of that buffer, from :meth:`rows_bytes`.
            stream: The CUDA stream.
        """
        self._check(self._library.dvdq_make_rows(_layer(layer), sm, _weight(weight), rows, rows_bytes, stream))

    def expand_weight(
        self,
        layer: LayerShape,
        sm: int,
        weight: WeightPointers,
        rows: int,
        prepared: int,
        prepared_bytes: int,
        stream: int,
    ) -> None:
        """Write the prepared weight of the layer's path from a packed weight and its rows.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            weight: Addresses of the packed tensors; scale and bias are not read.
            rows: Address of the rows, from :meth:`make_rows`.
            prepared: Address of the buffer that is written, 256-byte aligned.
            prepared_bytes: Size of that buffer, ``plan.prepared_bytes``.
            stream: The CUDA stream.

        Raises:
            UnsupportedError: The path multiplies the packed weight itself.
        """
        self._check(
            self._library.dvdq_expand_weight(_layer(layer), sm, _weight(weight), rows, prepared, prepared_bytes, stream)
        )

    def packed_workspace_bytes(self, layer: LayerShape, sm: int, tokens: int) -> int:
        """Return the bytes of workspace that :meth:`packed_linear` needs; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            tokens: Rows M of x.
        """
        return self._size(self._library.dvdq_packed_workspace_bytes, _layer(layer), sm, tokens)

    def packed_linear(
        self,
        layer: LayerShape,
        sm: int,
        x: int,
        outer: int,
        weight: WeightPointers,
        rows: int,
        y: int,
        tokens: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Run :meth:`quant_linear` on a weight that stays packed, which is expanded in the workspace where it has to be.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            x: Address of bf16 or fp16 [M, K].
            outer: Address of the outer rotation factor, fp32 [p, p]; 0 where that factor is 1.
            weight: Addresses of the packed tensors, the codes aligned to 16 bytes; scale and bias are not read.
            rows: Address of its rows, from :meth:`make_rows`.
            y: Address of the result, [M, N] of x's dtype.
            tokens: Rows M of x.
            workspace: Address of the workspace.
            workspace_bytes: Size of the workspace, from :meth:`packed_workspace_bytes`.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.
        """
        self._check(
            self._library.dvdq_packed_linear(
                _layer(layer),
                sm,
                x,
                pre_quant,
                outer,
                _weight(weight),
                rows,
                y,
                tokens,
                workspace,
                workspace_bytes,
                stream,
            )
        )

    def rotate_quantize(
        self,
        layer: LayerShape,
        sm: int,
        x: int,
        outer: int,
        codes: int,
        scales: int,
        sums: int,
        tokens: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Rotate x [M, K] and quantize it to codes, scales and token sums.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            x: Address of bf16 or fp16 [M, K].
            outer: Address of the outer rotation factor, fp32 [p, p]; 0 where that factor is 1.
            codes: Address of the codes that are written, [M, ``codes_bytes_per_token``] bytes.
            scales: Address of the scales that are written, fp32 [scale_rows, M].
            sums: Address of the token sums that are written, fp32 [scale_rows, M]; 0 for none.
            tokens: Rows M of x.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.
        """
        self._check(
            self._library.dvdq_rotate_quantize(
                _layer(layer), sm, x, pre_quant, outer, codes, scales, sums, tokens, stream
            )
        )

    def linear_gemm(
        self,
        layer: LayerShape,
        sm: int,
        codes: int,
        scales: int,
        sums: int,
        prepared: int,
        y: int,
        tokens: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """Multiply codes with a prepared weight and write y [M, N].

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            codes: Address of the codes from :meth:`rotate_quantize`.
            scales: Address of the scales, fp32 [scale_rows, M].
            sums: Address of the token sums, fp32 [scale_rows, M]; 0 where the plan needs none.
            prepared: Address of the prepared weight.
            y: Address of the result, bf16 or fp16 [M, N].
            tokens: Rows M.
            workspace: Address of the workspace.
            workspace_bytes: Size of the workspace, from :meth:`workspace_bytes`.
            stream: The CUDA stream.
        """
        self._check(
            self._library.dvdq_linear_gemm(
                _layer(layer), sm, codes, scales, sums, prepared, y, tokens, workspace, workspace_bytes, stream
            )
        )

    def quant_linear(
        self,
        layer: LayerShape,
        sm: int,
        x: int,
        outer: int,
        prepared: int,
        y: int,
        tokens: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Run :meth:`rotate_quantize` and :meth:`linear_gemm` in one call, with the codes in the workspace.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            x: Address of bf16 or fp16 [M, K].
            outer: Address of the outer rotation factor, fp32 [p, p]; 0 where that factor is 1.
            prepared: Address of the prepared weight.
            y: Address of the result, [M, N] of x's dtype.
            tokens: Rows M of x.
            workspace: Address of the workspace.
            workspace_bytes: Size of the workspace, from :meth:`workspace_bytes`.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.
        """
        self._check(
            self._library.dvdq_quant_linear(
                _layer(layer), sm, x, pre_quant, outer, prepared, y, tokens, workspace, workspace_bytes, stream
            )
        )

    def fused_quantize(
        self,
        layer: LayerShape,
        sm: int,
        prologue: ProloguePointers,
        x: int,
        codes: int,
        scales: int,
        sums: int,
        tokens: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Run :meth:`rotate_quantize` on what a prologue makes of x.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            prologue: What becomes of x first.
            x: Address of bf16 or fp16 [M, K].
            codes: Address of the codes that are written, [M, ``codes_bytes_per_token``] bytes.
            scales: Address of the scales that are written, fp32 [scale_rows, M].
            sums: Address of the token sums that are written, fp32 [scale_rows, M]; 0 for none.
            tokens: Rows M of x.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.

        Raises:
            UnsupportedError: The rotation has an outer factor, or a row is too long.
        """
        self._check(
            self._library.dvdq_fused_quantize(
                _layer(layer), sm, _prologue(prologue), x, pre_quant, codes, scales, sums, tokens, stream
            )
        )

    def fused_linear(
        self,
        layer: LayerShape,
        sm: int,
        prologue: ProloguePointers,
        x: int,
        prepared: int,
        y: int,
        tokens: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Run :meth:`fused_quantize` and :meth:`linear_gemm` in one call, with the codes in the workspace.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            prologue: What becomes of x first.
            x: Address of bf16 or fp16 [M, K].
            prepared: Address of the prepared weight.
            y: Address of the result, [M, N] of x's dtype.
            tokens: Rows M of x.
            workspace: Address of the workspace.
            workspace_bytes: Size of the workspace, from :meth:`workspace_bytes`.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.

        Raises:
            UnsupportedError: The rotation has an outer factor, or a row is too long.
        """
        self._check(
            self._library.dvdq_fused_linear(
                _layer(layer), sm, _prologue(prologue), x, pre_quant, prepared, y, tokens, workspace, workspace_bytes,
                stream,
            )
        )  # fmt: skip

    def rope_quantize(self, rope: RopePointers, x: int, out: int, tokens: int, stream: int) -> None:
        """Take q or k through norm, rope and rotation to e4m3 codes or 16 bits.

        Args:
            rope: What it goes through.
            x: Address of bf16 or fp16 [M, channels] at ``rope.stride``, aligned to 16 bytes.
            out: Address of [M, channels], packed: bytes of codes, or values of x's dtype.
            tokens: Rows M of x.
            stream: The CUDA stream.

        Raises:
            ShapeError: The sizes do not fit each other.
            UnsupportedError: Heads of another size, or too many channels.
        """
        told = _Rope(
            rope.channels, rope.stride, rope.period, rope.rope_channels, rope.head, DTYPES.index(rope.dtype),
            ROPE_NORMS.index(rope.norm), int(rope.rotated), rope.eps, rope.weight, rope.cosines, rope.sines, rope.bound,
        )  # fmt: skip
        self._check(self._library.dvdq_rope_quantize(ctypes.byref(told), x, out, tokens, stream))

    def search_grid(self, grid: GridShape, weight: int, out: GridPointers, stream: int) -> None:
        """Search the grid of a weight and write it with its nearest codes.

        Args:
            grid: Shape, zero-point and solver of the grid.
            weight: Address of fp32 [n, k].
            out: Addresses that are written.
            stream: The CUDA stream.

        Raises:
            UnsupportedError: The kernels have no such solver or zero-point.
        """
        pointers = _GridOut(out.codes, out.scale, out.group_scale, out.zero)
        self._check(self._library.dvdq_search_grid(_grid(grid), weight, ctypes.byref(pointers), stream))

    def gptq_round(
        self, grid: GridShape, weight: int, out: GridPointers, factors: int, block: int, stream: int
    ) -> None:
        """Write new codes for the grid in ``out``, rounded with feedback.

        Args:
            grid: Shape, zero-point and solver of the grid.
            weight: Address of fp32 [n, k].
            out: Addresses of the grid; the codes are written, the others are read.
            factors: Address of fp32 [k/block, block, block], unit upper triangular.
            block: Order of a block of factors.
            stream: The CUDA stream.

        Raises:
            UnsupportedError: The kernels have no such solver or zero-point.
        """
        pointers = _GridOut(out.codes, out.scale, out.group_scale, out.zero)
        self._check(self._library.dvdq_gptq_round(_grid(grid), weight, ctypes.byref(pointers), factors, block, stream))


def find_library() -> Path | None:
    """Return the path of this installation's kernel library, or None if it was not built.

    Raises:
        KernelError: ``DVDQUANT_KERNELS`` names a file that is not there.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise KernelError(f"{ENVIRONMENT}={named}: there is no such file", fix=BUILD)
        return Path(named)
    package = Path(__file__).resolve().parent.parent
    candidates = (package.parent / "build" / "kernels" / LIBRARY, package / "_native" / LIBRARY)
    return next((path for path in candidates if path.is_file()), None)


def load_library() -> KernelLibrary:
    """Return the library of this installation, opened once per file.

    Raises:
        KernelError: The library was not built, or it cannot be used.
    """
    path = find_library()
    if path is None:
        raise KernelError("the CUDA kernel library is not built", fix=BUILD)
    return _opened(path.resolve())


@functools.lru_cache(maxsize=8)
def _opened(path: Path) -> KernelLibrary:
    return KernelLibrary(path)


def _weight(weight: WeightPointers) -> _Weight:
    return _Weight(weight.codes, weight.scale, weight.group_scale, weight.zero, weight.bias or None)


def _prologue(prologue: ProloguePointers) -> _Prologue:
    if prologue.norm not in NORMS:
        raise UnsupportedError(f"the kernels have no {prologue.norm!r} norm", available=NORMS)
    fields = {**vars(prologue), "norm": NORMS.index(prologue.norm), "gelu": int(prologue.gelu)}
    return _Prologue(**fields)


def _grid(grid: GridShape) -> _Grid:
    if grid.zero_point not in GRID_ZERO_POINTS or grid.solver not in GRID_SOLVERS:
        raise UnsupportedError(
            f"the kernels have no {grid.solver} of {grid.zero_point} zero-points",
            available=[*GRID_SOLVERS, *GRID_ZERO_POINTS],
        )
    return _Grid(grid.n, grid.k, grid.groups, GRID_ZERO_POINTS.index(grid.zero_point), GRID_SOLVERS.index(grid.solver))


def _layer(layer: LayerShape) -> _Layer:
    if layer.dtype not in DTYPES:
        raise UnsupportedError(f"the kernels have no {layer.dtype} activations", available=DTYPES)
    return _Layer(
        layer.n,
        layer.k,
        layer.weight_groups,
        int(layer.float_zero_point),
        layer.block,
        layer.outer,
        layer.act_bits,
        layer.act_group,
        DTYPES.index(layer.dtype),
    )
