"""A quantized layer as the kernels hold it: on their device lies only what they multiply."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import WeightForm
from dvdquant.ops.cuda_linear import CACHE, CudaKernels
from dvdquant.ops.packed_layer import PackedLayer, check_channels, packed_shape
from dvdquant.ops.prepared_cache import refuse_capture, synchronize
from dvdquant.ops.prepared_linear import handle_of, packed_linear, prepared_linear
from dvdquant.ops.repack import LayerShape
from dvdquant.ops.smooth import pack_pre_quant
from dvdquant.recipe import ActivationSpec

__all__ = ["KernelLayer"]


class KernelLayer:
    """The weight of one layer on its device, made when a call first needs it.

    ``packed``: one copy of half a byte a weight for all activation grids. It is what 4-bit paths multiply; for the
    others, it is expanded in the workspace of each call. After that the layer holds no tensor of where it was stored,
    which may be closed.

    ``expanded``: as each path multiplies it. The packed tensors stay where they are, a mapped copy of an export's files
    for instance, until :meth:`forget_stored`. On an 8-bit path, which most GPUs take, a weight has one byte on the device,
    half of bf16; with the packed weight beside it, it would be three quarters. Activation grids whose paths hold weights in
    the same form share them.

    Args:
        kernels: The kernels of the device.
        packed: The stored tensors and rotation factors, on any device.
        grids: The activation grids that the layer will be called with.
        dtype: bf16 or fp16, the dtype of the model.
        device: The device the layer runs on.
        scale: pre_quant_scale, fp32 [K], or None.
        shift: pre_quant_shift, fp32 [K], or None.
        form: ``packed`` or ``expanded``. The outputs are the same.

    Raises:
        UnsupportedError: The kernels lack one of the grids, the shape, the dtype or the rotation.
    """

    def __init__(
        self,
        kernels: CudaKernels,
        packed: PackedLayer,
        grids: Iterable[ActivationSpec],
        dtype: torch.dtype,
        device: torch.device,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        form: WeightForm = "expanded",
    ) -> None:
        CACHE.require_sylvester(packed.hadamard)
        shapes = {
            (grid.bits, grid.group_size): packed_shape(packed, dtype, grid.bits, grid.group_size) for grid in grids
        }
        try:
            self._runs = {
                grid: (shape, (form, 0) if form == "packed" else kernels.plan(shape).form)
                for grid, shape in shapes.items()
            }
        except ShapeError as error:
            # Of the layer, not of a call: PyTorch computes it all the same.
            raise UnsupportedError(error.what) from error
        self._packed: PackedLayer | None = packed
        self.dtype, self.device, self.form = dtype, device, form
        self._kernels, self._parts = kernels, (scale, shift)
        self._handle = handle_of(kernels)
        self._make_outside = _make_outside_of_traces()
        self._weights: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self._pre_quant: Tensor | None = None

    def __call__(self, x: Tensor, outer: Tensor, act_bits: int, act_group: int) -> Tensor:
        """Compute y [..., N] of x's dtype, without gradients.

        In a model that is being compiled the layer is one operation, ``dvdquant::prepared_linear``. Its weight must be
        there by then (:meth:`make_weight`): else the compiled function has a break.

        Args:
            x: [..., K] on the layer's device; another dtype than the model's is rounded to the model's first.
            outer: The outer rotation factor, fp32 [p, p] on x's device.
            act_bits: Bits of the activation codes, of one of the layer's grids.
            act_group: Channels per activation scale of that grid; 0 for the whole token.

        Raises:
            ShapeError: x has another number of channels, or it is on another device.
            UnsupportedError: The layer was not made for this grid.
            KernelError: A weight would have to be prepared while a CUDA graph is being captured.
        """
        if (act_bits, act_group) not in self._runs:
            raise UnsupportedError(
                f"the layer is not made for {act_bits}-bit activations in groups of {act_group}",
                available=[f"{bits} bits, groups of {group}" for bits, group in self._runs],
                fix="open the session with these bits",
            )
        shape, _ = self._runs[act_bits, act_group]
        check_channels(x, shape.k)
        if x.device.type != self.device.type or self.device.index not in (None, x.device.index):
            raise ShapeError(f"the layer is on {self.device}, x on {x.device}", fix="move x there with .to(device)")
        weight = self.make_weight(act_bits, act_group)
        if torch.compiler.is_compiling():
            return self._traced(x, outer, weight, shape)
        tokens = x.to(self.dtype).reshape(x.numel() // shape.k, shape.k)
        matrix = outer.contiguous()
        if self.form == "packed":
            codes, rows = weight
            y = self._kernels.packed_linear(shape, tokens, matrix, codes, rows, self._pre_quant)
        else:
            (prepared,) = weight
            y = self._kernels.quant_linear(shape, tokens, matrix, prepared, self._pre_quant)
        return y.reshape(*x.shape[:-1], shape.n).to(x.dtype)

    def _traced(self, x: Tensor, outer: Tensor, weight: tuple[Tensor, ...], shape: LayerShape) -> Tensor:
        grid = (shape.weight_groups, shape.float_zero_point, shape.block, shape.act_bits, shape.act_group)
        here = (x.to(self.dtype), outer, *weight, self._pre_quant, self._handle)
        packed = self.form == "packed"
        y: Tensor = packed_linear(*here, *grid) if packed else prepared_linear(*here, shape.n, *grid)
        return y.to(x.dtype)

    def with_rows(self, rows: int) -> KernelLayer:
        """Return a layer of the first output features of this one, without bias, on its grids and in its form: for a self-test.

        Args:
            rows: At most so many.
        """
        weight, scale, group_scale, zero, bias = (tensor[:rows] for tensor in self.packed.stored())
        packed = replace(
            self.packed, weight=weight, scale=scale, group_scale=group_scale, zero=zero, bias=torch.zeros_like(bias)
        )
        grids = [ActivationSpec(bits, group) for bits, group in self._runs]
        return KernelLayer(self._kernels, packed, grids, self.dtype, self.device, *self._parts, self.form)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Return shape and grids of the layer, for each activation grid that it was made for."""
        return tuple(shape for shape, _ in self._runs.values())

    @property
    def has_pre_quant(self) -> bool:
        """Return whether x is multiplied, or something is added to it, before the rotation."""
        return any(part is not None for part in self._parts)

    @property
    def pre_quant(self) -> Tensor | None:
        """Return what x is multiplied by and what is added to it, [K/8, 2, 8]; None before a weight is made."""
        return self._pre_quant

    def make_weight(self, act_bits: int, act_group: int) -> tuple[Tensor, ...]:
        """Return the weight for an activation grid, made at the first call.

        Returns:
            The prepared weight, uint8 [bytes]; or of one that stays packed its codes, int8 [N, K/2], and rows, uint8 [bytes].

        Args:
            act_bits: The bits of the activations: 4, 6 or 8.
            act_group: The group size of the activations, 0 for one scale per token.
        """
        form = self._runs[act_bits, act_group][1]
        if form not in self._weights:
            self._make_outside(self, act_bits, act_group)
        return self._weights[form]

    def _make_weight(self, act_bits: int, act_group: int) -> None:
        shape, form = self._runs[act_bits, act_group]
        refuse_capture(self.device, "its weight is prepared at the first call")
        here = tuple(tensor.to(self.device) for tensor in self.packed.stored())
        if self.form == "packed":
            made: tuple[Tensor, ...] = self._kernels.make_rows(shape, here)
            # Nothing of the files is held any more: the codes are here, and the rest is small.
            kept = dict(zip(("scale", "group_scale", "zero", "bias"), (t.clone() for t in self.packed.stored()[1:])))
            self._packed = replace(self.packed, weight=made[0], **kept)
        else:
            made = (self._kernels.prepare(shape, here),)
        if self._pre_quant is None and any(part is not None for part in self._parts):
            scale, shift = (None if part is None else part.to(self.device) for part in self._parts)
            self._pre_quant = pack_pre_quant(scale, shift, self.dtype)
        synchronize(made[-1])
        self._weights[form] = made

    @property
    def packed(self) -> PackedLayer:
        """Return the stored tensors and rotation factors.

        Raises:
            UnsupportedError: The layer has let go of them.
        """
        if self._packed is None:
            raise UnsupportedError(
                "the layer holds its weight only as its kernels multiply it",
                fix="load its tensors again, then prepare it",
            )
        return self._packed

    def forget_stored(self) -> None:
        """Let go of the stored tensors where the weights of all grids are made; a packed weight stays, on the device."""
        if not all(form in self._weights for _, form in self._runs.values()):
            return
        self._parts = (None, None)
        if self.form == "expanded":
            self._packed = None

    @property
    def nbytes(self) -> int:
        """Return the bytes on the device: weights and pre-quant rows."""
        pre_quant = 0 if self._pre_quant is None else self._pre_quant.nbytes
        return pre_quant + sum(part.nbytes for weight in self._weights.values() for part in weight)

    def workspace_bytes(self, tokens: int) -> int:
        """Return the bytes of scratch of one call, at the most demanding grid; what a weight is expanded into is in them.

        Args:
            tokens: Rows M of x.
        """
        shapes = [shape for shape, _ in self._runs.values()]
        library = self._kernels.library
        ask = library.packed_workspace_bytes if self.form == "packed" else library.workspace_bytes
        return max(ask(shape, self._kernels.sm, tokens) for shape in shapes)


@functools.cache
def _make_outside_of_traces() -> Callable[[KernelLayer, int, int], None]:
    """Return what makes a weight, and is never traced.

    Not a decorator: that would import PyTorch's compiler in every process, also where there is no layer like this.
    """
    make: Callable[[KernelLayer, int, int], None] = torch.compiler.disable(KernelLayer._make_weight)  # type: ignore[no-untyped-call]
    return make
