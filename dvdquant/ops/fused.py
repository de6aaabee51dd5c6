"""What comes before a quantized layer, computed with its rotation and its codes: residual, norm and modulation, or GELU.

Each of these operations reads and writes all of x when it runs by itself. The kernel (``kernels/csrc/fused_strip.cuh``) does
them in registers, on the way to the codes. :func:`apply_prologue` is the definition that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.ops.cuda.arguments import ProloguePointers
from dvdquant.ops.cuda_linear import CudaKernels, aligned, pointer_of, stream_of
from dvdquant.ops.packed_layer import DTYPES, check_channels
from dvdquant.ops.prepared_linear import opened
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.rotate_quantize import quantizing_layer, rotate_quantize
from dvdquant.ops.smooth import apply_pre_quant

__all__ = [
    "MAX_CHANNELS",
    "Prologue",
    "apply_prologue",
    "fused_linear",
    "fused_quantize",
    "run_fused_linear",
    "run_fused_quantize",
    "run_packed_fused_linear",
]

MAX_CHANNELS = 32768
"""The kernels hold a row of this many channels in registers (kernels/csrc/plan.h)."""


@dataclass(frozen=True)
class Prologue:
    """The operations on x [M, K] before its rotation.

    ``h = x + gate · y``, then ``multiplier · norm(h) + addend``; or GELU (by tanh) of x, and nothing else. Rows of [R, K] serve
    M/R tokens each, one after the other; R = 1 serves all.

    Args:
        y: [M, K] of x's dtype, or None.
        gate: fp32 [R, K], or None for ones.
        multiplier: fp32 [R, K], or None for ones.
        addend: fp32 [R, K] with the R of the multiplier, or None for zeros.
        norm: ``none``, ``layer`` or ``rms``, over the K channels of a token.
        gelu: Whether it is GELU alone.
        eps: What the norm adds to the variance.
    """

    y: Tensor | None = None
    gate: Tensor | None = None
    multiplier: Tensor | None = None
    addend: Tensor | None = None
    norm: str = "none"
    gelu: bool = False
    eps: float = 1e-6


def apply_prologue(x: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor]:
    """Return what a layer gets in place of x, and h.

    Sums and norms are in fp32. h and the result are rounded to x's dtype. float64 is computed in float64 throughout.

    Args:
        x: [M, K] of a floating dtype.
        prologue: What becomes of it.

    Returns:
        [M, K] and h [M, K] of x's dtype; h is x itself where nothing is added.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if prologue.gelu:
        return F.gelu(x.to(wide), approximate="tanh").to(x.dtype), x
    hidden = x
    if prologue.y is not None:
        y = prologue.y.to(wide)
        hidden = (x.to(wide) + (y if prologue.gate is None else y * _spread(prologue.gate, x))).to(x.dtype)
    z = hidden.to(wide)
    if prologue.norm == "layer":
        z = z - z.mean(-1, keepdim=True)
    if prologue.norm != "none":
        z = z / (z.square().mean(-1, keepdim=True) + prologue.eps).sqrt()
    if prologue.multiplier is not None:
        z = z * _spread(prologue.multiplier, x)
    if prologue.addend is not None:
        z = z + _spread(prologue.addend, x)
    return z.to(x.dtype), hidden


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    """Return the row of every token, [M, K] or [1, K]."""
    return rows if len(rows) == 1 else rows.repeat_interleave(_tokens_per_row(rows, len(x)), 0)


def _tokens_per_row(rows: Tensor, tokens: int) -> int:
    """Return how many tokens read one row.

    Raises:
        ShapeError: The rows do not divide the tokens.
    """
    if not len(rows) or tokens % len(rows):
        raise ShapeError(f"{len(rows)} rows of a prologue for {tokens} tokens", available="a number that divides them")
    return tokens // len(rows)


# ------------------------------------------------------------------------------------------------------ on the kernels


def run_fused_quantize(
    kernels: CudaKernels, layer: LayerShape, x: Tensor, prologue: Prologue, pre_quant: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate and quantize what a prologue makes of x, in one kernel.

    Args:
        kernels: The kernels of x's device.
        layer: Shape and grids of the layer.
        x: bf16 or fp16 [M, K].
        prologue: What becomes of x first.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.

    Returns:
        Codes, scales and token sums as :meth:`.CudaKernels.rotate_quantize` gives them, and h [M, K], or x where nothing is
        added.

    Raises:
        ShapeError: Tensors do not fit each other.
        UnsupportedError: The rotation has an outer factor, or a row is too long.
    """
    x, pointers, hidden, _held = _arguments(kernels, layer, x, prologue)
    plan, tokens = kernels.plan(layer), len(x)
    codes = kernels.allocate((tokens, plan.codes_bytes_per_token), torch.uint8, x.device)
    scales = kernels.allocate((plan.scale_rows, tokens), torch.float32, x.device)
    sums = kernels.allocate((plan.scale_rows, tokens), torch.float32, x.device)
    if tokens:
        with stream_of(x) as stream:
            kernels.library.fused_quantize(
                layer, kernels.sm, pointers, x.data_ptr(), codes.data_ptr(), scales.data_ptr(), sums.data_ptr(), tokens,
                stream, pointer_of(pre_quant),
            )  # fmt: skip
    return codes, scales, sums, hidden


def run_fused_linear(
    kernels: CudaKernels,
    layer: LayerShape,
    x: Tensor,
    prologue: Prologue,
    prepared: Tensor,
    pre_quant: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a layer of what a prologue makes of x, in one call, which a CUDA graph can capture.

    Args:
        kernels: The kernels of x's device.
        layer: Shape and grids of the layer.
        x: bf16 or fp16 [M, K].
        prologue: What becomes of x first.
        prepared: uint8 [bytes], from :meth:`.CudaKernels.prepare`.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.

    Returns:
        [M, N] of x's dtype, and h [M, K], or x where nothing is added.

    Raises:
        ShapeError: Tensors do not fit each other.
        UnsupportedError: The rotation has an outer factor, or a row is too long.
    """
    call, weight = kernels.library.fused_linear, (prepared.data_ptr(),)
    return _fused(kernels, layer, x, prologue, pre_quant, kernels.workspace, call, weight)


def run_packed_fused_linear(
    kernels: CudaKernels,
    layer: LayerShape,
    x: Tensor,
    prologue: Prologue,
    codes: Tensor,
    rows: Tensor,
    pre_quant: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`run_fused_linear` on a weight that stays packed; a CUDA graph can capture it.

    Args:
        kernels: The kernels of x's device.
        layer: Shape and grids of the layer.
        x: bf16 or fp16 [M, K].
        prologue: What becomes of x first.
        codes: int8 [N, K/2], from :meth:`.CudaKernels.make_rows`.
        rows: uint8 [bytes], from :meth:`.CudaKernels.make_rows`.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.

    Returns:
        [M, N] of x's dtype, and h [M, K], or x where nothing is added.

    Raises:
        ShapeError: Tensors do not fit each other.
        UnsupportedError: The rotation has an outer factor, or a row is too long.
    """
    call, weight = kernels.library.packed_fused_linear, (kernels.packed_pointers(layer, codes, rows), rows.data_ptr())
    return _fused(kernels, layer, x, prologue, pre_quant, kernels.packed_workspace, call, weight)


def _fused(
    kernels: CudaKernels,
    layer: LayerShape,
    x: Tensor,
    prologue: Prologue,
    pre_quant: Tensor | None,
    workspace_of: Callable[[LayerShape, int, torch.device], Tensor],
    call: Callable[..., None],
    weight: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Compute a fused layer by a call of the library; return y and h.

    Args:
        kernels: The kernels of x's device.
        layer: Shape and grids of the layer.
        x: bf16 or fp16 [M, K].
        prologue: What becomes of x first.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.
        workspace_of: Gives the workspace that the call takes.
        call: The call.
        weight: Its arguments that name the weight.
    """
    x, pointers, hidden, _held = _arguments(kernels, layer, x, prologue)
    tokens = len(x)
    y = kernels.allocate((tokens, layer.n), x.dtype, x.device)
    if tokens:
        workspace = workspace_of(layer, tokens, x.device)
        with stream_of(x) as stream:
            call(
                layer, kernels.sm, pointers, x.data_ptr(), *weight, y.data_ptr(), tokens, workspace.data_ptr(),
                workspace.numel(), stream, pointer_of(pre_quant),
            )  # fmt: skip
    return y, hidden


def _arguments(
    kernels: CudaKernels, layer: LayerShape, x: Tensor, prologue: Prologue
) -> tuple[Tensor, ProloguePointers, Tensor, list[Tensor]]:
    """Return x and h as the kernel takes them, the pointers, and the tensors they point to."""
    check_channels(x, layer.k)
    if x.dtype != DTYPES[layer.dtype]:
        raise ShapeError(
            f"x is {x.dtype}, the layer {layer.dtype}", fix="convert x, or prepare the layer in the dtype of x"
        )
    x, held = aligned(x), []
    pointers: dict[str, Any] = {"norm": prologue.norm, "gelu": prologue.gelu, "eps": prologue.eps}
    hidden = x
    if prologue.y is not None:
        if prologue.y.shape != x.shape or prologue.y.dtype != x.dtype:
            raise ShapeError(
                f"y is {prologue.y.dtype} {tuple(prologue.y.shape)}", available=f"{x.dtype} {tuple(x.shape)}"
            )
        held.append(aligned(prologue.y))
        hidden = kernels.allocate(tuple(x.shape), x.dtype, x.device)
        pointers |= {"y": held[-1].data_ptr(), "hidden": hidden.data_ptr()}
    strides = set()
    for name, kind in (("gate", "gate"), ("multiplier", "modulate"), ("addend", "modulate")):
        rows: Tensor | None = getattr(prologue, name)
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != layer.k or rows.dtype != torch.float32:
            raise ShapeError(f"{name} is {rows.dtype} {tuple(rows.shape)}", available=f"float32 rows of {layer.k}")
        per_row = 0 if len(rows) == 1 else _tokens_per_row(rows, len(x))
        if rows.stride(1) != 1 or rows.data_ptr() % 16 or (per_row and rows.stride(0) % 4):
            rows = aligned(rows)
        stride = rows.stride(0) if per_row else 0
        held.append(rows)
        pointers |= {name: rows.data_ptr(), f"{kind}_tokens": per_row, f"{kind}_stride": stride}
        if kind == "modulate":
            strides.add((per_row, stride))
    if len(strides) > 1:  # one stride serves both
        packed = {name: aligned(getattr(prologue, name)) for name in ("multiplier", "addend")}
        if len({tuple(rows.shape) for rows in packed.values()}) > 1:
            raise ShapeError(
                "the multiplier and the addend have different numbers of rows",
                available=", ".join(str(tuple(rows.shape)) for rows in packed.values()),
            )
        held += packed.values()
        pointers |= {name: rows.data_ptr() for name, rows in packed.items()} | {"modulate_stride": layer.k}
    return x, ProloguePointers(**pointers), hidden, held


# ----------------------------------------------------------------------------------------------------------- operations


@torch.library.custom_op("dvdquant::fused_quantize", mutates_args=())
def fused_quantize(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    norm: str,
    gelu: bool,
    eps: float,
    pre_quant: Tensor | None,
    hadamard: Tensor,
    act_bits: int,
    act_group: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate what a prologue makes of x, and round it to codes.

    Args:
        x: [M, K] float32 (CPU only), float16 or bfloat16.
        y: As in :class:`Prologue`.
        gate: As in :class:`Prologue`.
        multiplier: As in :class:`Prologue`.
        addend: As in :class:`Prologue`.
        norm: As in :class:`Prologue`.
        gelu: As in :class:`Prologue`.
        eps: As in :class:`Prologue`.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.
        hadamard: The rotation, fp32 [b, b]; on CUDA the Sylvester matrix / √b.
        act_bits: Bits of the activation codes: 4 or 8.
        act_group: Channels per scale; 0 for the whole token.
        path: One of :data:`dvdquant.ops.repack.PATHS`; on CUDA one that the device runs.

    Returns:
        Codes, scales and token sums of ``dvdquant::rotate_quantize``, and h [M, K], empty where nothing is added.
    """
    z, hidden = apply_prologue(x, Prologue(y, gate, multiplier, addend, norm, gelu, eps))
    if pre_quant is not None:
        z = apply_pre_quant(z, pre_quant)
    codes, scales, sums = rotate_quantize(z, hadamard, hadamard.new_ones(1, 1), act_bits, act_group, path)
    return codes, scales, sums, hidden if y is not None else x.new_empty(0)


@fused_quantize.register_fake
def _fused_quantize_fake(
    x: Tensor, y: Tensor | None, gate: Tensor | None, multiplier: Tensor | None, addend: Tensor | None, norm: str,
    gelu: bool, eps: float, pre_quant: Tensor | None, hadamard: Tensor, act_bits: int, act_group: int, path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, features = x.shape
    groups = features // act_group if act_group else 1
    codes = x.new_empty((tokens, features // 2 if path.startswith("s4") else features), dtype=torch.uint8)
    scales, sums = (x.new_empty((groups, tokens), dtype=torch.float32) for _ in range(2))
    return codes, scales, sums, x.new_empty(0 if y is None else x.shape)


@fused_quantize.register_kernel("cuda")
def _fused_quantize_cuda(
    x: Tensor, y: Tensor | None, gate: Tensor | None, multiplier: Tensor | None, addend: Tensor | None, norm: str,
    gelu: bool, eps: float, pre_quant: Tensor | None, hadamard: Tensor, act_bits: int, act_group: int, path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernels, layer = quantizing_layer(x, hadamard, 1, act_bits, act_group, path)
    prologue = Prologue(y, gate, multiplier, addend, norm, gelu, eps)
    codes, scales, sums, hidden = run_fused_quantize(kernels, layer, x, prologue, pre_quant)
    return codes, scales, sums, hidden if y is not None else x.new_empty(0)


@torch.library.custom_op("dvdquant::fused_linear", mutates_args=())
def fused_linear(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    norm: str,
    gelu: bool,
    eps: float,
    prepared: Tensor,
    weight_rows: Tensor | None,
    pre_quant: Tensor | None,
    kernels: int,
    rows: int,
    weight_groups: int,
    float_zero_point: bool,
    block: int,
    act_bits: int,
    act_group: int,
) -> tuple[Tensor, Tensor]:
    """Compute a layer with a prepared weight of what a prologue makes of x.

    Args:
        x: [..., K] bf16 or fp16.
        y: [..., K] of x's dtype, or None; see :class:`Prologue` for this and the next.
        gate: [..., K] fp32 of one row, or of rows that serve as many tokens each; or None.
        multiplier: In the same form.
        addend: In the same form.
        norm: As in :class:`Prologue`.
        gelu: As in :class:`Prologue`.
        eps: As in :class:`Prologue`.
        prepared: As of ``dvdquant::prepared_linear``, and so are the rest. Or the codes of ``dvdquant::packed_linear``.
        weight_rows: The rows of ``dvdquant::packed_linear``, or None where the weight is prepared.
        pre_quant: [K/8, 2, 8] of x's dtype, or None.
        kernels: The number of the kernels.
        rows: N, or -1 to take it from codes.
        weight_groups: Scales per row of the weight.
        float_zero_point: Whether the weight has a zero-point per group.
        block: The order of the Hadamard matrix; there is no outer factor.
        act_bits: 4 or 8.
        act_group: Channels per activation scale, 0 for the whole token.

    Returns:
        [..., N] of x's dtype, and h [..., K], empty where nothing is added.

    Raises:
        KernelError: The kernels of this number are gone.
    """
    features = x.shape[-1]
    rows = prepared.shape[0] if rows < 0 else rows
    library, layer = opened(kernels, x, 1, rows, weight_groups, float_zero_point, block, act_bits, act_group)
    flat = [None if part is None else part.reshape(-1, features) for part in (y, gate, multiplier, addend)]
    prologue = Prologue(flat[0], flat[1], flat[2], flat[3], norm, gelu, eps)
    tokens = x.reshape(-1, features)
    if weight_rows is None:
        out, hidden = run_fused_linear(library, layer, tokens, prologue, prepared, pre_quant)
    else:
        out, hidden = run_packed_fused_linear(library, layer, tokens, prologue, prepared, weight_rows, pre_quant)
    return out.reshape(*x.shape[:-1], rows), hidden.reshape(x.shape) if y is not None else x.new_empty(0)


@fused_linear.register_fake
def _fused_linear_fake(
    x: Tensor, y: Tensor | None, gate: Tensor | None, multiplier: Tensor | None, addend: Tensor | None, norm: str,
    gelu: bool, eps: float, prepared: Tensor, weight_rows: Tensor | None, pre_quant: Tensor | None, kernels: int, rows: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = prepared.shape[0] if rows < 0 else rows
    return x.new_empty((*x.shape[:-1], rows)), x.new_empty(0 if y is None else x.shape)
