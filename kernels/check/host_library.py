"""The kernel library's C ABI on host memory, computed by PyTorch and numpy from the definitions.

It takes the same addresses as ``dvdquant.ops.cuda.library.KernelLibrary`` and writes what a correct library would. So the
torch binding and every check of ``gpu_check.py`` run on a machine without a GPU. Made wrong on purpose, it shows that
each check can fail.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.activation_grid import quantize_activation
from dvdquant.numerics.hadamard import hadamard_matrix
from dvdquant.ops.attention.rope import Rope, apply_rope
from dvdquant.ops.cuda.arguments import (
    GridPointers,
    GridShape,
    LayerPlan,
    ProloguePointers,
    RopePointers,
    WeightPointers,
)
from dvdquant.ops.fused import Prologue, apply_prologue
from dvdquant.ops.linear_gemm import decode_codes
from dvdquant.ops.packed_layer import DTYPES
from dvdquant.ops.packed_rows import expand, group_bytes, make_rows, rows_bytes
from dvdquant.ops.paths import choose_path, form_of
from dvdquant.ops.reference import rotate_by_matrices
from dvdquant.ops.repack import LayerShape, dequantize, from_bytes, prepare, prepared_bytes, to_bytes
from dvdquant.ops.rotate_quantize import encode_codes
from dvdquant.ops.smooth import apply_pre_quant
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight
from dvdquant.quantize.gptq import ErrorFeedback
from dvdquant.recipe import WeightSpec


class HostLibrary:
    """A drop-in for ``KernelLibrary``; streams are ignored. Addresses are integers, sizes are in bytes."""

    architectures = ("host",)

    def plan_layer(self, layer: LayerShape, sm: int) -> LayerPlan:
        """Return the plan of a layer, from :func:`dvdquant.ops.paths.choose_path`.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
        """
        path = choose_path(layer, sm)
        s4 = path.startswith("s4")
        return LayerPlan(
            path,
            form_of(path),
            layer.k // layer.act_group if layer.act_group else 1,
            s4,
            prepared_bytes(layer, path),
            layer.k // 2 if s4 else layer.k,
        )

    def workspace_bytes(self, layer: LayerShape, sm: int, tokens: int) -> int:
        """Return the size of codes, scales and sums, so that callers that pass too little are found.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            tokens: M, the number of tokens.
        """
        plan = self.plan_layer(layer, sm)
        return tokens * (plan.codes_bytes_per_token + 8 * plan.scale_rows)

    def prepare_weight(
        self, layer: LayerShape, sm: int, weight: WeightPointers, prepared: int, size: int, stream: int
    ) -> None:
        """Write ``dvdquant.ops.repack.prepare`` into the buffer.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            weight: The addresses of the packed tensors.
            prepared: The address of the buffer.
            size: Its size.
            stream: Ignored.

        Raises:
            ShapeError: The buffer is too small.
        """
        plan = self.plan_layer(layer, sm)
        _write(prepared, size, to_bytes(prepare(layer, plan.path, *_stored(layer, weight))))

    def rows_bytes(self, layer: LayerShape, sm: int) -> int:
        """Return the size of the rows of a layer that stays packed.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
        """
        self.plan_layer(layer, sm)
        return rows_bytes(layer)

    def make_rows(self, layer: LayerShape, sm: int, weight: WeightPointers, rows: int, size: int, stream: int) -> None:
        """Write ``dvdquant.ops.packed_rows.make_rows`` into the buffer.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            weight: The addresses of the packed tensors.
            rows: The address of the buffer.
            size: Its size.
            stream: Ignored.

        Raises:
            ShapeError: The buffer is too small.
        """
        self.plan_layer(layer, sm)
        _write(rows, size, make_rows(layer, *_stored(layer, weight)))

    def expand_weight(
        self, layer: LayerShape, sm: int, weight: WeightPointers, rows: int, prepared: int, size: int, stream: int
    ) -> None:
        """Write ``dvdquant.ops.packed_rows.expand`` into the buffer.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            weight: The addresses of the packed tensors; scale and bias are not read.
            rows: The address of the rows.
            prepared: The address of the buffer.
            size: Its size.
            stream: Ignored.

        Raises:
            ShapeError: The buffer is too small.
            UnsupportedError: The path multiplies the packed weight itself.
        """
        plan = self.plan_layer(layer, sm)
        if plan.codes == "s4":
            raise UnsupportedError(f"path {plan.path} multiplies the packed weight itself: there is nothing to expand")
        _write(prepared, size, self.expanded_bytes(layer, plan, weight, rows))

    def expanded_bytes(self, layer: LayerShape, plan: LayerPlan, weight: WeightPointers, rows: int) -> bytes:
        """Return the bytes of the prepared weight that a packed one expands to.

        Args:
            layer: The layer.
            plan: Its plan for the GPU.
            weight: The stored weight, in host memory.
            rows: The address of its rows, as :meth:`make_rows` writes them.
        """
        codes = host_view(weight.codes, (layer.n, layer.k // 2), torch.int8)
        cells, (scales, zeros) = (layer.n, layer.weight_groups), group_bytes(layer)
        group_scale = host_view(weight.group_scale, cells, torch.uint8) if scales else None
        zero = host_view(weight.zero, cells, torch.uint8) if zeros else None
        return to_bytes(expand(layer, plan.path, codes, ctypes.string_at(rows, rows_bytes(layer)), group_scale, zero))

    def packed_workspace_bytes(self, layer: LayerShape, sm: int, tokens: int) -> int:
        """Return the size of codes, scales, sums and the expanded weight.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            tokens: M, the number of tokens.
        """
        plan = self.plan_layer(layer, sm)
        return self.workspace_bytes(layer, sm, tokens) + (0 if plan.codes == "s4" else plan.prepared_bytes)

    def packed_linear(
        self, layer: LayerShape, sm: int, x: int, outer: int, weight: WeightPointers, rows: int, y: int, m: int,
        workspace: int, size: int, stream: int, pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Expand the weight and do what :meth:`quant_linear` does.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            x: The address of the input [M, K].
            outer: The address of the outer matrix, fp32 [p, p].
            weight: The addresses of the packed tensors; scale and bias are not read.
            rows: The address of its rows.
            y: The address of the output [M, N].
            m: M, the number of tokens.
            workspace: The address of the workspace.
            size: The size of the workspace.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.

        Raises:
            ShapeError: The workspace is too small.
        """
        plan = self.plan_layer(layer, sm)
        if size < self.packed_workspace_bytes(layer, sm, m):
            raise ShapeError(f"a workspace of {size} bytes is too small")
        before = self.workspace_bytes(layer, sm, m)
        raw = self.expanded_bytes(layer, plan, weight, rows)
        if plan.codes == "s4":
            held = ctypes.create_string_buffer(raw, len(raw))
            prepared = ctypes.addressof(held)
        else:
            # In the workspace, whose size is the caller's to get right.
            prepared = workspace + before
            ctypes.memmove(prepared, raw, len(raw))
        self.quant_linear(layer, sm, x, outer, prepared, y, m, workspace, before, stream, pre_quant)

    def rotate_quantize(
        self, layer: LayerShape, sm: int, x: int, outer: int, codes: int, scales: int, sums: int, m: int, stream: int,
        pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Write codes, scales and sums in the path's layout.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            x: The address of the input [M, K].
            outer: The address of the outer matrix, fp32 [p, p].
            codes: The address of the codes, in the path's layout.
            scales: The address of the scales, fp32 [groups, M].
            sums: The address of the sums of the codes, fp32 [groups, M]; 0 for none.
            m: M, the number of tokens.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.
        """
        plan, dtype = self.plan_layer(layer, sm), DTYPES[layer.dtype]
        tokens = host_view(x, (m, layer.k), dtype)
        if pre_quant:
            tokens = apply_pre_quant(tokens, host_view(pre_quant, (layer.k // 8, 2, 8), dtype))
        values, scale = self.quantize(layer, tokens, self.outer(layer, outer))
        host_view(codes, (m, plan.codes_bytes_per_token), torch.uint8).copy_(encode_codes(values, plan.path))
        host_view(scales, (plan.scale_rows, m), torch.float32).copy_(scale.T)
        if sums:
            totals = values.reshape(m, plan.scale_rows, -1).sum(dim=-1)
            host_view(sums, (plan.scale_rows, m), torch.float32).copy_(totals.T)

    def linear_gemm(
        self, layer: LayerShape, sm: int, codes: int, scales: int, sums: int, prepared: int, y: int, m: int,
        workspace: int, size: int, stream: int,
    ) -> None:  # fmt: skip
        """Write y from the codes and the prepared buffer.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            codes: The address of the codes, in the path's layout.
            scales: The address of the scales, fp32 [groups, M].
            sums: Ignored; the sums follow from the codes.
            prepared: The address of the prepared buffer.
            y: The address of the output [M, N].
            m: M, the number of tokens.
            workspace: The address of the workspace.
            size: The size of the workspace.
            stream: Ignored.

        Raises:
            ShapeError: The workspace is too small.
        """
        plan = self.plan_layer(layer, sm)
        if size < self.workspace_bytes(layer, sm, m):
            raise ShapeError(f"a workspace of {size} bytes is too small")
        raw = host_view(codes, (m, plan.codes_bytes_per_token), torch.uint8)
        scale = host_view(scales, (plan.scale_rows, m), torch.float32)
        buffer = ctypes.string_at(prepared, plan.prepared_bytes)
        host_view(y, (m, layer.n), DTYPES[layer.dtype]).copy_(self.multiply(layer, plan.path, raw, scale, buffer))

    def quant_linear(
        self, layer: LayerShape, sm: int, x: int, outer: int, prepared: int, y: int, m: int, workspace: int, size: int,
        stream: int, pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Do both, with the codes in the workspace.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            x: The address of the input [M, K].
            outer: The address of the outer matrix, fp32 [p, p].
            prepared: The address of the prepared buffer.
            y: The address of the output [M, N].
            m: M, the number of tokens.
            workspace: The address of the workspace.
            size: The size of the workspace.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.

        Raises:
            ShapeError: The workspace is too small.
        """
        plan = self.plan_layer(layer, sm)
        if size < self.workspace_bytes(layer, sm, m):
            raise ShapeError(f"a workspace of {size} bytes is too small")
        # Scales first: they need 4-byte alignment, which an odd number of codes would break.
        scales, sums = workspace, workspace + 4 * m * plan.scale_rows
        codes = sums + 4 * m * plan.scale_rows
        self.rotate_quantize(layer, sm, x, outer, codes, scales, sums, m, stream, pre_quant)
        self.linear_gemm(layer, sm, codes, scales, sums, prepared, y, m, workspace, size, stream)

    def fused_quantize(
        self, layer: LayerShape, sm: int, prologue: ProloguePointers, x: int, codes: int, scales: int, sums: int, m: int,
        stream: int, pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Apply the prologue by its definition, then :meth:`rotate_quantize`.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            prologue: What becomes of x first.
            x: The address of the input [M, K].
            codes: The address of the codes, in the path's layout.
            scales: The address of the scales, fp32 [groups, M].
            sums: The address of the sums of the codes, fp32 [groups, M]; 0 for none.
            m: M, the number of tokens.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.

        Raises:
            UnsupportedError: The rotation has an outer factor.
        """
        z = self.prologue(layer, prologue, x, m)
        self.rotate_quantize(layer, sm, z.data_ptr(), 0, codes, scales, sums, m, stream, pre_quant)

    def fused_linear(
        self, layer: LayerShape, sm: int, prologue: ProloguePointers, x: int, prepared: int, y: int, m: int,
        workspace: int, size: int, stream: int, pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Apply the prologue by its definition, then :meth:`quant_linear`.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            prologue: What becomes of x first.
            x: The address of the input [M, K].
            prepared: The address of the prepared buffer.
            y: The address of the output [M, N].
            m: M, the number of tokens.
            workspace: The address of the workspace.
            size: The size of the workspace.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.

        Raises:
            UnsupportedError: The rotation has an outer factor.
        """
        z = self.prologue(layer, prologue, x, m)
        self.quant_linear(layer, sm, z.data_ptr(), 0, prepared, y, m, workspace, size, stream, pre_quant)

    def packed_fused_linear(
        self, layer: LayerShape, sm: int, prologue: ProloguePointers, x: int, weight: WeightPointers, rows: int, y: int, m: int,
        workspace: int, size: int, stream: int, pre_quant: int = 0,
    ) -> None:  # fmt: skip
        """Apply the prologue by its definition, then :meth:`packed_linear`.

        Args:
            layer: The layer.
            sm: The compute capability, major · 10 + minor.
            prologue: What becomes of x first.
            x: The address of the input [M, K].
            weight: The addresses of the packed tensors; scale and bias are not read.
            rows: The address of its rows.
            y: The address of the output [M, N].
            m: M, the number of tokens.
            workspace: The address of the workspace.
            size: The size of the workspace.
            stream: Ignored.
            pre_quant: The address of the packed pre_quant_scale and pre_quant_shift [K/8, 2, 8]; 0 for none.

        Raises:
            ShapeError: The workspace is too small.
            UnsupportedError: The rotation has an outer factor.
        """
        z = self.prologue(layer, prologue, x, m)
        self.packed_linear(layer, sm, z.data_ptr(), 0, weight, rows, y, m, workspace, size, stream, pre_quant)

    def prologue(self, layer: LayerShape, prologue: ProloguePointers, x: int, m: int) -> Tensor:
        """Return what a prologue makes of x [M, K], and write h where it is wanted.

        Args:
            layer: The layer.
            prologue: The addresses.
            x: The address of the input [M, K].
            m: M, the number of tokens.

        Raises:
            UnsupportedError: The rotation has an outer factor.
        """
        if layer.outer != 1:
            raise UnsupportedError(f"rotation with an outer factor of {layer.outer}: a prologue is fused without one")
        dtype = DTYPES[layer.dtype]

        def rows(address: int, tokens: int, stride: int) -> Tensor | None:
            if not address:
                return None
            count = 1 if tokens == 0 else math.ceil(m / tokens)
            flat = host_view(address, ((count - 1) * stride + layer.k,), torch.float32)
            return flat.as_strided((count, layer.k), (stride, 1))

        z, hidden = apply_prologue(
            host_view(x, (m, layer.k), dtype),
            Prologue(
                host_view(prologue.y, (m, layer.k), dtype) if prologue.y else None,
                rows(prologue.gate, prologue.gate_tokens, prologue.gate_stride),
                rows(prologue.multiplier, prologue.modulate_tokens, prologue.modulate_stride),
                rows(prologue.addend, prologue.modulate_tokens, prologue.modulate_stride),
                prologue.norm,
                prologue.gelu,
                prologue.eps,
            ),
        )
        if prologue.hidden:
            host_view(prologue.hidden, (m, layer.k), dtype).copy_(hidden)
        return z

    def rope_quantize(self, rope: RopePointers, x: int, out: int, m: int, stream: int) -> None:
        """Write what the definition makes of x.

        Args:
            rope: What q or k goes through.
            x: The address of the input [M, channels] at ``rope.stride``.
            out: The address of the result, packed.
            m: M, the number of tokens.
            stream: Ignored.
        """
        dtype, size = DTYPES[rope.dtype], rope.channels if rope.norm == "all" else rope.head
        tokens = host_view(x, ((m - 1) * rope.stride + rope.channels,), dtype).as_strided(
            (m // rope.period, rope.period, rope.channels), (rope.period * rope.stride, rope.stride, 1)
        )
        table = (rope.rope_tokens, rope.rope_channels // (1 if rope.per_channel else 2))
        cosines, sines = (
            host_view(at, table, torch.float32) if rope.rope_channels else None for at in (rope.cosines, rope.sines)
        )
        weight, bias = (host_view(at, (size,), torch.float32) if at else None for at in (rope.weight, rope.bias))
        bound = host_view(rope.bound, (1,), torch.float32) if rope.bound else None
        made = apply_rope(
            tokens,
            Rope(
                rope.head, rope.norm, rope.eps, rope.rotated, weight, cosines, sines, bound, bias, rope.rope_first,
                rope.per_channel,
            ),
        )  # fmt: skip
        host_view(out, tuple(made.shape), made.dtype).copy_(made)

    def search_grid(self, grid: GridShape, weight: int, out: GridPointers, stream: int) -> None:
        """Search the grid of a weight with the compiled loops.

        Args:
            grid: The shape and the kind of the grid.
            weight: The address of the weight, fp32 [N, K].
            out: The addresses of the result.
            stream: Ignored.
        """
        group = grid.k // grid.groups if grid.groups > 1 else 0
        spec = WeightSpec(group, grid.zero_point, grid.solver)  # type: ignore[arg-type]
        found = quantize_weight(host_view(weight, (grid.n, grid.k), torch.float32), spec)
        for view, tensor in zip(_grid_views(grid, out), (found.codes, found.scale, found.group_scale, found.zero)):
            view.copy_(tensor)

    def gptq_round(
        self, grid: GridShape, weight: int, out: GridPointers, factors: int, block: int, stream: int
    ) -> None:
        """Round codes with GPTQ by the compiled loop.

        Args:
            grid: The shape and the kind of the grid.
            weight: The address of the weight, fp32 [N, K].
            out: The addresses of the grid and of the codes, which are written.
            factors: The address of those of GPTQ's error feedback, fp32 [K/block, block, block].
            block: The size of the blocks.
            stream: Ignored.
        """
        views = _grid_views(grid, out)
        gptq = ErrorFeedback.of_factors(host_view(factors, (grid.k // block, block, block), torch.float32).double())
        w = host_view(weight, (grid.n, grid.k), torch.float32)
        views[0].copy_(gptq.round(w, QuantizedWeight(*views)).codes)

    def outer(self, layer: LayerShape, address: int) -> Tensor:
        """Return the outer matrix that a caller passed, fp32 [p, p], or [1, 1] if the layer has none.

        Args:
            layer: The layer.
            address: The address of the matrix.
        """
        return host_view(address, (layer.outer, layer.outer), torch.float32) if layer.outer > 1 else torch.ones(1, 1)

    def quantize(self, layer: LayerShape, x: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes, int8 [M, K], and the scales, fp32 [M, groups].

        Args:
            layer: The layer.
            x: The input [M, K], smoothed.
            outer: The outer matrix, fp32 [p, p].
        """
        hadamard = hadamard_matrix(layer.block, torch.float32)
        return quantize_activation(rotate_by_matrices(x.float(), hadamard, outer), layer.act_bits, layer.act_group)

    def multiply(self, layer: LayerShape, path: str, codes: Tensor, scales: Tensor, prepared: bytes) -> Tensor:
        """Return y [M, N] in float64.

        Args:
            layer: The layer.
            path: The kernel path.
            codes: The codes, uint8 [M, bytes per token], in the path's layout.
            scales: The scales, fp32 [groups, M].
            prepared: The bytes of the prepared buffer.
        """
        weight = from_bytes(layer, path, prepared)
        values = decode_codes(codes.clone(), path).reshape(len(codes), len(scales), -1) * scales.T[:, :, None]
        w = torch.from_numpy(dequantize(layer, weight))
        bias = torch.from_numpy(weight.bias.astype(np.float64))
        return torch.nn.functional.linear(values.reshape(len(codes), layer.k), w, bias)


def _stored(layer: LayerShape, weight: WeightPointers) -> tuple[Tensor | None, ...]:
    """Return the tensors of a packed weight: codes, scale, group scale, zero and bias, which may be None."""
    n, groups = layer.n, layer.weight_groups
    zero_shape, zero_type = ((n, groups), torch.uint8) if layer.float_zero_point else ((n,), torch.float32)
    return (
        host_view(weight.codes, (n, layer.k // 2), torch.int8),
        host_view(weight.scale, (n,), torch.float32),
        host_view(weight.group_scale, (n, groups), torch.uint8),
        host_view(weight.zero, zero_shape, zero_type),
        host_view(weight.bias, (n,), torch.float32) if weight.bias else None,
    )


def _grid_views(grid: GridShape, out: GridPointers) -> list[Tensor]:
    """Return tensors over the memory of a grid's result: codes, scale, group scale and zero."""
    float_zero = grid.zero_point == "float"
    shape = (grid.n, grid.groups)
    return [
        host_view(out.codes, (grid.n, grid.k), torch.int8),
        host_view(out.scale, (grid.n,), torch.float32),
        host_view(out.group_scale, shape, torch.uint8),
        host_view(out.zero, shape if float_zero else (grid.n,), torch.uint8 if float_zero else torch.float32),
    ]


def _write(address: int, size: int, raw: bytes) -> None:
    """Write bytes into a caller's buffer.

    Args:
        address: The address of the buffer.
        size: Its size.
        raw: What is written.

    Raises:
        ShapeError: The buffer is too small.
    """
    if size < len(raw):
        raise ShapeError(f"a buffer of {size} bytes", available=f"{len(raw)} bytes")
    ctypes.memmove(address, raw, len(raw))


def host_view(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor over host memory.

    Args:
        address: The address of its first byte.
        shape: Its shape.
        dtype: Its dtype.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    # torch.frombuffer wants a writable buffer: ctypes arrays are.
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).reshape(shape)
