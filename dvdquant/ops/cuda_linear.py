"""The CUDA side of the ops: tensors to the kernel library's addresses, prepared weights kept per weight tensor.

A layer runs on the kernels when the library is built, x is bf16 or fp16, activations have 4 or 8 bits, and the library
has a path for the layer on that device. Anything else on a CUDA device computes the PyTorch reference, slower and in
fp32, and logs a warning once per reason; with ``reference_policy("raise")`` it is an UnsupportedError instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dvdquant.errors import UnsupportedError
from dvdquant.ops.cuda.arguments import LayerPlan, WeightPointers
from dvdquant.ops.cuda.errors import BUILD, KernelError
from dvdquant.ops.cuda.find import find_library, load_library
from dvdquant.ops.cuda.library import KernelLibrary
from dvdquant.ops.packed_layer import DTYPES, PackedLayer, layer_shape
from dvdquant.ops.packed_rows import group_bytes
from dvdquant.ops.prepared_cache import PreparedCache
from dvdquant.ops.repack import LayerShape
from dvdquant.system.devices import cuda_sm

__all__ = [
    "CudaKernels",
    "aligned",
    "kernels_for",
    "notice_reference",
    "pointer_of",
    "reference_policy",
    "run_quant_linear",
    "stream_of",
    "usable_kernels",
]

log = logging.getLogger(__name__)

# Loads and the copy engine work on 16 bytes at a time.
_ALIGNMENT = 16
_policy: Literal["log", "raise"] = "log"


class CudaKernels:
    """The library's calls on tensors of one device.

    Buffers come from :meth:`allocate` (torch's caching allocator, so they are ordered by the stream). Work goes to the
    device's current stream. Plans are cached per layer shape.

    Args:
        library: :class:`KernelLibrary`, or anything with its methods.
        sm: major · 10 + minor of the device.
    """

    def __init__(self, library: KernelLibrary, sm: int) -> None:
        self.library, self.sm = library, sm
        self.plan = functools.lru_cache(maxsize=4096)(functools.partial(self._plan))

    def _plan(self, layer: LayerShape) -> LayerPlan:
        return self.library.plan_layer(layer, self.sm)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor.

        Args:
            shape: Sizes of the tensor.
            dtype: Its dtype.
            device: Its device.
        """
        return torch.empty(shape, dtype=dtype, device=device)

    def prepare(self, layer: LayerShape, packed: tuple[Tensor, ...]) -> Tensor:
        """Return the prepared weight of a layer, uint8 [plan.prepared_bytes].

        Args:
            layer: Shape and grids of the layer.
            packed: (weight, scale, group_scale, zero, bias), as :meth:`PackedLayer.stored` gives them.
        """
        size = self.plan(layer).prepared_bytes
        tensors = [t.contiguous() for t in packed]
        prepared = self.allocate((size,), torch.uint8, tensors[0].device)
        with stream_of(prepared) as stream:
            pointers = WeightPointers(*(t.data_ptr() for t in tensors))
            self.library.prepare_weight(layer, self.sm, pointers, prepared.data_ptr(), size, stream)
        return prepared

    def rotate_quantize(
        self, layer: LayerShape, x: Tensor, outer: Tensor, pre_quant: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate x and quantize it.

        Args:
            layer: Shape and grids of the layer.
            x: bf16 or fp16 [M, K].
            outer: The outer rotation factor, fp32 [p, p], contiguous.
            pre_quant: [K/8, 2, 8] of x's dtype, or None.

        Returns:
            Codes uint8 [M, bytes per token], scales fp32 [scale rows, M], token sums fp32 [scale rows, M].
        """
        plan = self.plan(layer)
        x, tokens = aligned(x), len(x)
        codes = self.allocate((tokens, plan.codes_bytes_per_token), torch.uint8, x.device)
        scales = self.allocate((plan.scale_rows, tokens), torch.float32, x.device)
        sums = self.allocate((plan.scale_rows, tokens), torch.float32, x.device)
        if tokens:
            with stream_of(x) as stream:
                self.library.rotate_quantize(
                    layer,
                    self.sm,
                    x.data_ptr(),
                    _outer_pointer(layer, outer),
                    codes.data_ptr(),
                    scales.data_ptr(),
                    sums.data_ptr(),
                    tokens,
                    stream,
                    pointer_of(pre_quant),
                )
        return codes, scales, sums

    def linear_gemm(self, layer: LayerShape, codes: Tensor, scales: Tensor, sums: Tensor, prepared: Tensor) -> Tensor:
        """Multiply codes with a prepared weight; return y [M, N] of the layer's dtype.

        Args:
            layer: Shape and grids of the layer.
            codes: uint8 [M, bytes per token], from :meth:`rotate_quantize`.
            scales: fp32 [scale rows, M], from :meth:`rotate_quantize`.
            sums: fp32 [scale rows, M], from :meth:`rotate_quantize`.
            prepared: uint8 [bytes], from :meth:`prepare`.
        """
        tokens = len(codes)
        y = self.allocate((tokens, layer.n), DTYPES[layer.dtype], codes.device)
        if tokens:
            workspace = self.workspace(layer, tokens, codes.device)
            with stream_of(codes) as stream:
                self.library.linear_gemm(
                    layer,
                    self.sm,
                    codes.data_ptr(),
                    scales.data_ptr(),
                    sums.data_ptr() if self.plan(layer).needs_sums else 0,
                    prepared.data_ptr(),
                    y.data_ptr(),
                    tokens,
                    workspace.data_ptr(),
                    workspace.numel(),
                    stream,
                )
        return y

    def quant_linear(
        self, layer: LayerShape, x: Tensor, outer: Tensor, prepared: Tensor, pre_quant: Tensor | None = None
    ) -> Tensor:
        """Compute y [M, N] of x's dtype in one call, which a CUDA graph can capture.

        Args:
            layer: Shape and grids of the layer.
            x: bf16 or fp16 [M, K].
            outer: The outer rotation factor, fp32 [p, p], contiguous.
            prepared: uint8 [bytes], from :meth:`prepare`.
            pre_quant: [K/8, 2, 8] of x's dtype, or None.
        """
        x, tokens = aligned(x), len(x)
        y = self.allocate((tokens, layer.n), x.dtype, x.device)
        if tokens:
            workspace = self.workspace(layer, tokens, x.device)
            with stream_of(x) as stream:
                self.library.quant_linear(
                    layer,
                    self.sm,
                    x.data_ptr(),
                    _outer_pointer(layer, outer),
                    prepared.data_ptr(),
                    y.data_ptr(),
                    tokens,
                    workspace.data_ptr(),
                    workspace.numel(),
                    stream,
                    pointer_of(pre_quant),
                )
        return y

    def make_rows(self, layer: LayerShape, packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return what a weight that stays packed needs on the device: its codes int8 [N, K/2], and the rest of it uint8.

        The rest is the rows of the library, and the scales and byte zero-points of groups behind them.

        Args:
            layer: Shape and grids of the layer.
            packed: (weight, scale, group_scale, zero, bias), as :meth:`PackedLayer.stored` gives them. The codes are the weight
                itself, unless the kernels cannot read it where it is.
        """
        size = self.library.rows_bytes(layer, self.sm)
        scales, zeros = group_bytes(layer)
        codes, *rest = (aligned(packed[0]), *(t.contiguous() for t in packed[1:]))
        rows = self.allocate((size + scales + zeros,), torch.uint8, codes.device)
        with stream_of(rows) as stream:
            pointers = WeightPointers(codes.data_ptr(), *(t.data_ptr() for t in rest))
            self.library.make_rows(layer, self.sm, pointers, rows.data_ptr(), size, stream)
            if scales:
                rows[size : size + scales] = rest[1].flatten()
            if zeros:
                rows[size + scales :] = rest[2].flatten()
        return codes, rows

    def packed_pointers(self, layer: LayerShape, codes: Tensor, rows: Tensor) -> WeightPointers:
        """Return the addresses of what a product reads of a packed weight beside its rows.

        Args:
            layer: Shape and grids of the layer.
            codes: int8 [N, K/2], from :meth:`make_rows`.
            rows: uint8 [bytes], from :meth:`make_rows`.
        """
        scales, zeros = group_bytes(layer)
        last = rows.data_ptr() + rows.numel()
        return WeightPointers(codes.data_ptr(), 0, last - zeros - scales if scales else 0, last - zeros if zeros else 0)

    def expand(self, layer: LayerShape, codes: Tensor, rows: Tensor) -> Tensor:
        """Return the prepared weight, uint8 [plan.prepared_bytes], of one that stays packed.

        Args:
            layer: Shape and grids of the layer, whose path multiplies 8 bits.
            codes: int8 [N, K/2], from :meth:`make_rows`.
            rows: uint8 [bytes], from :meth:`make_rows`.

        Raises:
            UnsupportedError: The path multiplies the packed weight itself.
        """
        prepared = self.allocate((self.plan(layer).prepared_bytes,), torch.uint8, codes.device)
        with stream_of(prepared) as stream:
            self.library.expand_weight(
                layer,
                self.sm,
                self.packed_pointers(layer, codes, rows),
                rows.data_ptr(),
                prepared.data_ptr(),
                prepared.numel(),
                stream,
            )
        return prepared

    def packed_linear(
        self,
        layer: LayerShape,
        x: Tensor,
        outer: Tensor,
        codes: Tensor,
        rows: Tensor,
        pre_quant: Tensor | None = None,
    ) -> Tensor:
        """Compute :meth:`quant_linear` on a weight that stays packed; a CUDA graph can capture it.

        The scratch that the weight is expanded into is a part of the call's workspace, which torch's allocator gives to the
        next layer of the same stream and to no other stream.

        Args:
            layer: Shape and grids of the layer.
            x: bf16 or fp16 [M, K].
            outer: The outer rotation factor, fp32 [p, p], contiguous.
            codes: int8 [N, K/2], from :meth:`make_rows`.
            rows: uint8 [bytes], from :meth:`make_rows`.
            pre_quant: [K/8, 2, 8] of x's dtype, or None.
        """
        x, tokens = aligned(x), len(x)
        y = self.allocate((tokens, layer.n), x.dtype, x.device)
        if tokens:
            workspace = self.packed_workspace(layer, tokens, x.device)
            with stream_of(x) as stream:
                self.library.packed_linear(
                    layer,
                    self.sm,
                    x.data_ptr(),
                    _outer_pointer(layer, outer),
                    self.packed_pointers(layer, codes, rows),
                    rows.data_ptr(),
                    y.data_ptr(),
                    tokens,
                    workspace.data_ptr(),
                    workspace.numel(),
                    stream,
                    pointer_of(pre_quant),
                )
        return y

    def workspace(self, layer: LayerShape, tokens: int, device: torch.device) -> Tensor:
        """Return the workspace of one call on a prepared weight, uint8 [bytes].

        Args:
            layer: Shape and grids of the layer.
            tokens: Rows M of x.
            device: The device of x.
        """
        return self.allocate((self.library.workspace_bytes(layer, self.sm, tokens),), torch.uint8, device)

    def packed_workspace(self, layer: LayerShape, tokens: int, device: torch.device) -> Tensor:
        """Return the workspace of one call on a weight that stays packed, uint8 [bytes].

        Args:
            layer: Shape and grids of the layer.
            tokens: Rows M of x.
            device: The device of x.
        """
        return self.allocate((self.library.packed_workspace_bytes(layer, self.sm, tokens),), torch.uint8, device)


CACHE = PreparedCache()


def run_quant_linear(
    kernels: CudaKernels,
    cache: PreparedCache,
    x: Tensor,
    packed: PackedLayer,
    act_bits: int,
    act_group: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute ``dvdquant::smooth_quant_linear`` on the kernels; return y [..., N] of x's dtype.

    Args:
        kernels: The kernels of x's device.
        cache: Where prepared weights, and rows of scale and shift, are kept.
        x: bf16 or fp16 [..., K].
        packed: The tensors of the layer.
        act_bits: Bits of the activation codes.
        act_group: Channels per activation scale; 0 for the whole token.
        scale: fp32 [K] of :func:`smooth_input`, or None.
        shift: fp32 [K] of :func:`smooth_input`, or None.

    Raises:
        ShapeError: x has another number of channels, or the tensors are on several devices.
        UnsupportedError: Only the reference can compute this layer.
        KernelError: A weight would have to be prepared while a CUDA graph is being captured.
    """
    layer = layer_shape(x, packed, act_bits, act_group)
    kernels.plan(layer)
    cache.require_sylvester(packed.hadamard)
    prepared = cache.get(kernels, layer, packed)
    outer = packed.outer.contiguous()
    pre_quant = cache.pre_quant(scale, shift, x.dtype)
    y = kernels.quant_linear(layer, x.reshape(x.numel() // layer.k, layer.k), outer, prepared, pre_quant)
    return y.reshape(*x.shape[:-1], layer.n)


def kernels_for(device: torch.device) -> CudaKernels | None:
    """Return the kernels of a CUDA device, looked for once per process; None if the library is not built.

    Args:
        device: A CUDA device; without an index, the current one.

    Raises:
        KernelError: There is a library, but it cannot be used.
    """
    return _kernels_for(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=64)
def _kernels_for(index: int) -> CudaKernels | None:
    if find_library() is None:
        return None
    return CudaKernels(load_library(), cuda_sm(index))


def usable_kernels(device: torch.device) -> CudaKernels | None:
    """Return the kernels of a device; None for a CPU, without a library, and where it is built for other GPUs.

    Args:
        device: Any device.

    Raises:
        KernelError: There is a library, but it cannot be used.
    """
    kernels = kernels_for(device) if device.type == "cuda" else None
    return kernels if kernels is not None and kernels.library.serves(kernels.sm) else None


def require_kernels(device: torch.device) -> CudaKernels:
    """Return the kernels of a CUDA device, or raise an error that names the build command.

    Args:
        device: A CUDA device; without an index, the current one.

    Raises:
        KernelError: The library is not built, or it cannot be used.
    """
    kernels = kernels_for(device)
    if kernels is None:
        raise KernelError("the CUDA kernel library is not built", fix=BUILD)
    return kernels


def quant_linear_cuda(
    x: Tensor,
    packed: PackedLayer,
    act_bits: int,
    act_group: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor | None:
    """Compute y on the kernels; return None where the reference has to compute it (logged once per reason).

    Args:
        x: [..., K] on a CUDA device.
        packed: The tensors of the layer.
        act_bits: Bits of the activation codes.
        act_group: Channels per activation scale; 0 for the whole token.
        scale: fp32 [K] of :func:`smooth_input`, or None.
        shift: fp32 [K] of :func:`smooth_input`, or None.

    Raises:
        UnsupportedError: No kernel runs this layer, under ``reference_policy("raise")``.
    """
    kernels = kernels_for(x.device)
    reason = f"the CUDA kernel library is not built; {BUILD}"
    if kernels is not None:
        try:
            return run_quant_linear(kernels, CACHE, x, packed, act_bits, act_group, scale, shift)
        except UnsupportedError as error:
            reason = str(error)
    if _policy == "raise":
        raise UnsupportedError(
            f"no CUDA kernel runs this layer: {reason}",
            fix='take reference_policy("log"), which computes such layers in PyTorch, or a recipe that the kernels serve',
        )
    notice_reference(reason)
    return None


@contextmanager
def reference_policy(policy: Literal["log", "raise"]) -> Iterator[None]:
    """Set, within this context, what happens on a CUDA device where only the PyTorch reference can compute a layer.

    Args:
        policy: ``log`` computes the reference and warns once per reason; ``raise`` raises UnsupportedError.
    """
    global _policy
    before, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = before


@functools.lru_cache(maxsize=256)
def notice_reference(reason: str) -> None:
    """Warn once that layers are computed by the PyTorch reference on a GPU.

    Args:
        reason: Why no kernel runs them.
    """
    log.warning("quant_linear computes the slow PyTorch reference on the GPU: %s", reason)


def layer_with_path(kernels: CudaKernels, layer: LayerShape, path: str, **choices: tuple[Any, ...]) -> LayerShape:
    """Return the first layer, over all combinations of the given field values, that runs on ``path``.

    Args:
        kernels: The kernels of the device.
        layer: The layer whose other fields are fixed.
        path: One of :data:`dvdquant.ops.repack.PATHS`.
        **choices: Field of :class:`LayerShape` to the values that are tried, in this order.

    Raises:
        UnsupportedError: No combination runs on ``path``.
    """
    found: dict[str, None] = {}
    candidates = [layer]
    for name, values in choices.items():
        candidates = [replace(c, **{name: v}) for c in candidates for v in values]
    for candidate in candidates:
        try:
            chosen = kernels.plan(candidate).path
        except UnsupportedError:
            continue
        if chosen == path:
            return candidate
        found[chosen] = None
    raise UnsupportedError(f"SM {kernels.sm / 10} does not run such a layer on {path}", available=found)


def aligned(x: Tensor) -> Tensor:
    """Return a tensor with its elements one after the other, at an address that the kernels can load from.

    Args:
        x: Any tensor.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def pointer_of(tensor: Tensor | None) -> int:
    """Return the address of a tensor's first element; 0 for None.

    Args:
        tensor: Any tensor, or None.
    """
    return 0 if tensor is None else tensor.data_ptr()


def _outer_pointer(layer: LayerShape, outer: Tensor) -> int:
    return outer.data_ptr() if layer.outer > 1 else 0


@contextmanager
def stream_of(tensor: Tensor) -> Iterator[int]:
    """Make the tensor's device the current one within this context, and yield its current stream; 0 on the CPU.

    Args:
        tensor: A tensor on the device where work is queued.
    """
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream(tensor.device).cuda_stream
