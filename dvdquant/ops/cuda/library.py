"""The calls of an opened kernel library, with its errors raised."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from dvdquant.ops.cuda.abi import ABI_VERSION, PlanStruct, declare
from dvdquant.ops.cuda.architectures import serves
from dvdquant.ops.cuda.arguments import (
    CODES,
    GridPointers,
    GridShape,
    LayerPlan,
    ProloguePointers,
    RopePointers,
    WeightPointers,
    grid_out_struct,
    grid_struct,
    layer_struct,
    prologue_struct,
    rope_struct,
    weight_struct,
)
from dvdquant.ops.cuda.errors import BUILD, ERRORS, OUT_OF_MEMORY, KernelError
from dvdquant.ops.repack import LayerShape

__all__ = ["KernelLibrary"]


class KernelLibrary:
    """An opened kernel library; a failed call raises the error of its status, with the library's own message.

    ``ShapeError`` stands for DVDQ_BAD_ARGUMENT, ``UnsupportedError`` for DVDQ_UNSUPPORTED, ``ResourceError`` for
    DVDQ_WORKSPACE, :class:`KernelError` for DVDQ_CUDA_ERROR, and for DVDQ_OUT_OF_MEMORY, with ``out_of_memory`` set. In all
    methods addresses are integers and 0 is null, a stream is the integer of a ``cudaStream_t``, and ``sm`` is
    major · 10 + minor of the device.

    Args:
        path: The shared library file.

    Attributes:
        c_library: The opened library, for functions of a build that are not in its interface, such as the emulator's.
        architectures: The GPUs that it is built for, such as ``sm_90a``.

    Raises:
        KernelError: The file is no such library, or it has another ABI version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.c_library = ctypes.CDLL(str(path))
            declare(self.c_library)
        except (OSError, AttributeError) as error:
            raise KernelError(f"{path} is not a usable kernel library: {error}", fix=BUILD) from error
        version = int(self.c_library.dvdq_abi_version())
        if version != ABI_VERSION:
            raise KernelError(
                f"{path} has ABI version {version}", available=f"this dvdquant speaks {ABI_VERSION}", fix=BUILD
            )
        self.architectures = tuple(self.c_library.dvdq_architectures().decode().split(";"))

    def _check(self, status: int) -> None:
        if status:
            text = self.c_library.dvdq_last_error().decode(errors="replace")
            raise ERRORS.get(status, KernelError)(
                text or f"the kernel library answered status {status}", out_of_memory=status == OUT_OF_MEMORY
            )

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
        return str(self.c_library.dvdq_path_name(path).decode()).lower()

    def plan_layer(self, layer: LayerShape, sm: int) -> LayerPlan:
        """Return how ``layer`` runs on ``sm``; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.

        Raises:
            ShapeError: The shape is not valid.
            UnsupportedError: No path runs this layer on ``sm``.
        """
        plan = PlanStruct()
        self._check(self.c_library.dvdq_plan_layer(layer_struct(layer), sm, ctypes.byref(plan)))
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
        return self._size(self.c_library.dvdq_workspace_bytes, layer_struct(layer), sm, tokens)

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
            self.c_library.dvdq_prepare_weight(
                layer_struct(layer), sm, weight_struct(weight), prepared, prepared_bytes, stream
            )
        )

    def rows_bytes(self, layer: LayerShape, sm: int) -> int:
        """Return the bytes of the rows of a layer that stays packed; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
        """
        return self._size(self.c_library.dvdq_rows_bytes, layer_struct(layer), sm)

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
        self._check(
            self.c_library.dvdq_make_rows(layer_struct(layer), sm, weight_struct(weight), rows, rows_bytes, stream)
        )

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
            self.c_library.dvdq_expand_weight(
                layer_struct(layer), sm, weight_struct(weight), rows, prepared, prepared_bytes, stream
            )
        )

    def packed_workspace_bytes(self, layer: LayerShape, sm: int, tokens: int) -> int:
        """Return the bytes of workspace that :meth:`packed_linear` needs; this needs no device.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            tokens: Rows M of x.
        """
        return self._size(self.c_library.dvdq_packed_workspace_bytes, layer_struct(layer), sm, tokens)

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
            self.c_library.dvdq_packed_linear(
                layer_struct(layer),
                sm,
                x,
                pre_quant,
                outer,
                weight_struct(weight),
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
            self.c_library.dvdq_rotate_quantize(
                layer_struct(layer), sm, x, pre_quant, outer, codes, scales, sums, tokens, stream
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
            self.c_library.dvdq_linear_gemm(
                layer_struct(layer), sm, codes, scales, sums, prepared, y, tokens, workspace, workspace_bytes, stream
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
            self.c_library.dvdq_quant_linear(
                layer_struct(layer), sm, x, pre_quant, outer, prepared, y, tokens, workspace, workspace_bytes, stream
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
            self.c_library.dvdq_fused_quantize(
                layer_struct(layer), sm, prologue_struct(prologue), x, pre_quant, codes, scales, sums, tokens, stream
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
            self.c_library.dvdq_fused_linear(
                layer_struct(layer), sm, prologue_struct(prologue), x, pre_quant, prepared, y, tokens, workspace, workspace_bytes,
                stream,
            )
        )  # fmt: skip

    def packed_fused_linear(
        self,
        layer: LayerShape,
        sm: int,
        prologue: ProloguePointers,
        x: int,
        weight: WeightPointers,
        rows: int,
        y: int,
        tokens: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
        pre_quant: int = 0,
    ) -> None:
        """Run :meth:`packed_linear` on what a prologue makes of x.

        Args:
            layer: Shape and grids of the layer.
            sm: major · 10 + minor of the device.
            prologue: What becomes of x first.
            x: Address of bf16 or fp16 [M, K].
            weight: Addresses of the packed tensors, the codes aligned to 16 bytes; scale and bias are not read.
            rows: Address of its rows, from :meth:`make_rows`.
            y: Address of the result, [M, N] of x's dtype.
            tokens: Rows M of x.
            workspace: Address of the workspace.
            workspace_bytes: Size of the workspace, from :meth:`packed_workspace_bytes`.
            stream: The CUDA stream.
            pre_quant: Address of the packed pre-quant scale and offset, [K/8, 2, 8] of x's dtype; 0 for none.

        Raises:
            UnsupportedError: The rotation has an outer factor, or a row is too long.
        """
        self._check(
            self.c_library.dvdq_packed_fused_linear(
                layer_struct(layer), sm, prologue_struct(prologue), x, pre_quant, weight_struct(weight), rows, y, tokens,
                workspace, workspace_bytes, stream,
            )
        )  # fmt: skip

    def rope_quantize(self, rope: RopePointers, x: int, out: int, tokens: int, stream: int) -> None:
        """Take q or k through norm, rope and rotation to e4m3 codes or 16 bits.

        Args:
            rope: The norm, the rope and the rotation.
            x: Address of bf16 or fp16 [M, channels] at ``rope.stride``, aligned to 16 bytes.
            out: Address of [M, channels], packed: bytes of codes, or values of x's dtype.
            tokens: Rows M of x.
            stream: The CUDA stream.

        Raises:
            ShapeError: The sizes do not fit each other.
            UnsupportedError: The kernels do not serve the size of the heads, or there are too many channels.
        """
        self._check(self.c_library.dvdq_rope_quantize(ctypes.byref(rope_struct(rope)), x, out, tokens, stream))

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
        self._check(
            self.c_library.dvdq_search_grid(grid_struct(grid), weight, ctypes.byref(grid_out_struct(out)), stream)
        )

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
        self._check(
            self.c_library.dvdq_gptq_round(
                grid_struct(grid), weight, ctypes.byref(grid_out_struct(out)), factors, block, stream
            )
        )
