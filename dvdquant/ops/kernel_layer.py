"""A quantized layer as the kernels hold it: what they multiply, and nothing besides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..recipe import ActivationSpec
from ..repack import LayerShape
from .cuda_linear import CACHE, CudaKernels, PackedLayer, packed_shape
from .quant_linear import pack_balance

__all__ = ["KernelLayer"]


class KernelLayer:
    """The prepared weights of one layer, one per path that its activation grids run on, on the device of ``packed``.

    It keeps nothing of ``packed`` but the outer rotation factor, so that the 4-bit weight can go. On 8-bit paths, which most
    GPUs take, the prepared weight has half the bytes of a bf16 one; with the packed weight beside it that were three quarters.

    Args:
        packed: the stored tensors and rotation factors, on one device.
        grids: the activation grids it will be called with.
        dtype: bf16 or fp16, of the model.
        scale, shift: pre_quant_scale and pre_quant_shift, fp32 [K], on the same device.

    Raises:
        UnsupportedError: the kernels lack one of the grids, the dtype or the rotation.
    """

    def __init__(
        self,
        kernels: CudaKernels,
        packed: PackedLayer,
        grids: Iterable[ActivationSpec],
        dtype: torch.dtype,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        if not CACHE.is_sylvester(packed.hadamard):
            raise UnsupportedError("the kernels rotate by Sylvester matrices, and the hadamard input is another one")
        shapes = {
            (grid.bits, grid.group_size): packed_shape(packed, dtype, grid.bits, grid.group_size) for grid in grids
        }
        # Before anything is allocated: a layer is taken whole or not at all.
        keys = {shape: (plan.path, plan.prepared_bytes) for shape in shapes.values() for plan in (kernels.plan(shape),)}
        weights: dict[tuple[str, int], Tensor] = {}
        for shape, key in keys.items():
            if key not in weights:
                weights[key] = kernels.prepare(shape, packed.stored())
        self.dtype, self.device = dtype, packed.weight.device
        self._kernels = kernels
        self._outer = packed.outer.contiguous()
        self._balance = None if scale is None and shift is None else pack_balance(scale, shift, dtype)
        self._runs = {grid: (shape, weights[keys[shape]]) for grid, shape in shapes.items()}
        if self.device.type == "cuda":
            # Made on this stream, used on any.
            torch.cuda.current_stream(self.device).synchronize()

    def __call__(self, x: Tensor, act_bits: int, act_group: int) -> Tensor:
        """x [..., K] to y [..., N] of x's dtype; another dtype than the model's is rounded to it first.

        Raises:
            ShapeError: x has another number of channels, or is on another device.
            UnsupportedError: a grid that was not prepared.
        """
        if (act_bits, act_group) not in self._runs:
            raise UnsupportedError(
                f"the layer was not prepared for {act_bits}-bit activations in groups of {act_group}",
                available=[f"{bits} bits, groups of {group}" for bits, group in self._runs],
                fix="open the session with these bits",
            )
        shape, prepared = self._runs[act_bits, act_group]
        if x.ndim == 0 or x.shape[-1] != shape.k:
            raise ShapeError(f"a layer of {shape.k} channels got a tensor of shape {tuple(x.shape)}")
        if x.device != self.device:
            raise ShapeError(f"the layer is on {self.device}, x on {x.device}", fix="move x there with .to(device)")
        tokens = x.to(self.dtype).reshape(x.numel() // shape.k, shape.k)
        y = self._kernels.quant_linear(shape, tokens, self._outer, prepared, self._balance)
        return y.reshape(*x.shape[:-1], shape.n).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of prepared weights and balance."""
        weights = {prepared.data_ptr(): prepared.nbytes for _, prepared in self._runs.values()}
        return sum(weights.values()) + (0 if self._balance is None else self._balance.nbytes)

    def workspace_bytes(self, tokens: int) -> int:
        """Scratch of a call with so many tokens, at the most demanding grid."""
        shapes: list[LayerShape] = [shape for shape, _ in self._runs.values()]
        return max(self._kernels.library.workspace_bytes(shape, self._kernels.sm, tokens) for shape in shapes)
