"""QuantLinear modules, and the surgery that puts them in place of ``nn.Linear`` in a diffusers transformer.

Linear layers of one parent module that receive the very same tensor (q/k/v) are merged into one :class:`QuantLinear`, so
that x is rotated and quantized once. The merged layer is called after its members: ``attn1.to_q+to_k+to_v``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.balance import balance_input
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.quant_linear import balanced_quant_linear, quant_linear
from dvdquant.recipe import ActivationSpec
from dvdquant.system.torch_hooks import tensor_version

if TYPE_CHECKING:
    from dvdquant.ops.cuda_linear import CudaKernels

__all__ = [
    "LayerSpec",
    "QuantLinear",
    "RotationTable",
    "empty_tensor",
    "install_quant_linears",
    "prepare_layers",
    "set_activation",
]

TENSORS = ("weight", "weight_scale", "weight_factor", "weight_zero", "bias")


@dataclass(frozen=True)
class LayerSpec:
    """One quantized layer: one or several ``nn.Linear`` with a shared input.

    Args:
        name: dotted name of the (merged) layer; the last part joins the members with ``+``.
        members: dotted names of the ``nn.Linear`` it replaces, in row order.
        rows: output features of each member.
        features: input features K.
        biases: whether each member has a bias.
        rotation: the Hadamard rotation of its input.
        groups: weight groups per row (1 for a scale per row).
        floor: the least activation grid it accepts, used instead of one with fewer bits.
        balanced: whether its input is multiplied by a power of two per channel before it is rotated.
        signs: whether these powers have random signs where there is a rotation.
        shifted: whether a constant is subtracted from the input before.
        real_zero: whether there is a real zero-point per group, stored as a byte, instead of one fp32 per row.
    """

    name: str
    members: tuple[str, ...]
    rows: tuple[int, ...]
    features: int
    biases: tuple[bool, ...]
    rotation: Rotation
    groups: int
    floor: ActivationSpec | None = None
    real_zero: bool = False
    balanced: bool = False
    signs: bool = False
    shifted: bool = False

    def activation(self, asked: ActivationSpec) -> ActivationSpec:
        """The grid it runs with where the graph's is ``asked``."""
        return self.floor if self.floor is not None and asked.bits < self.floor.bits else asked

    @property
    def out_features(self) -> int:
        """N, the rows of all members together."""
        return sum(self.rows)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each packed tensor, by its full name."""
        n = self.out_features
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, (n, self.features // 2)),
            "weight_scale": (torch.float32, (n,)),
            "weight_factor": (torch.uint8, (n, self.groups)),
            "weight_zero": (torch.uint8, (n, self.groups)) if self.real_zero else (torch.float32, (n,)),
            "bias": (torch.float32, (n,)),
        }
        if self.shifted:
            shapes["pre_quant_shift"] = (torch.float32, (self.features,))
        if self.balanced:
            shapes["pre_quant_scale"] = (torch.float32, (self.features,))
        return {f"{self.name}.{key}": value for key, value in shapes.items()}


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape that occupies one element: for tracing, where only shape and dtype count."""
    return torch.zeros((), dtype=dtype).expand(shape)


class RotationTable(nn.Module):
    """The Hadamard matrices of a model, each held once and shared by the layers that use it."""

    def __init__(self, rotations: Iterable[Rotation]) -> None:
        super().__init__()
        for rotation in rotations:
            hadamard, outer = rotation.matrices(torch.float32)
            for name, matrix in ((f"hadamard_{rotation.inner}", hadamard), (f"outer_{rotation.outer}", outer)):
                if name not in self._buffers:
                    self.register_buffer(name, matrix.contiguous(), persistent=False)

    def matrices(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """(hadamard [b, b], outer [p, p]) in fp32."""
        return self.get_buffer(f"hadamard_{rotation.inner}"), self.get_buffer(f"outer_{rotation.outer}")


class QuantLinear(nn.Module):
    """A linear layer with packed 4-bit weights and online rotated, scaled activations (see ``ops/quant_linear.py``).

    Buffers: weight int8 [N, K/2], weight_scale fp32 [N], weight_factor uint8 [N, groups], weight_zero fp32 [N] or
    uint8 [N, groups], bias fp32 [N], pre_quant_shift fp32 [K] of a shifted and pre_quant_scale fp32 [K] of a balanced layer.
    The rotation matrices live in the model's :class:`RotationTable`.

    After :meth:`prepare` the first five are in ``kernel``, for the device to hold them as its kernels multiply them.
    """

    def __init__(self, spec: LayerSpec, activation: ActivationSpec, table: RotationTable) -> None:
        super().__init__()
        self.spec = spec
        self.use(activation)
        # In a list, so that the shared table is not registered as a child of every layer.
        self._table = [table]
        self.kernel: KernelLayer | None = None
        for full_name, (dtype, shape) in spec.tensors().items():
            self.register_buffer(full_name.removeprefix(spec.name + "."), empty_tensor(shape, dtype))

    def use(self, activation: ActivationSpec) -> None:
        """Switch the activation grid (but not below the layer's floor); the packed weight stays as it is."""
        chosen = self.spec.activation(activation)
        self.act_bits, self.act_group = chosen.bits, chosen.group_size

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the packed tensors by full name; ShapeError when one has another shape or dtype."""
        for full_name, (dtype, shape) in self.spec.tensors().items():
            tensor = tensors[full_name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{full_name} is {tensor.dtype} {tuple(tensor.shape)}", available=f"expected {dtype} {shape}"
                )
            setattr(self, full_name.removeprefix(self.spec.name + "."), tensor)
        self.kernel = None

    def prepare(
        self, kernels: CudaKernels, activations: Iterable[ActivationSpec], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Run these grids on the kernels of ``device``, which then holds the weight only as they multiply it.

        The packed tensors stay where they are and are no buffers any more: the module is for running, not for saving, and a
        move passes them by. :meth:`load` undoes it.

        Raises:
            UnsupportedError: the kernels do not run the layer with one of the grids; it stays as it is.
        """
        matrices = self._table[0].matrices(self.spec.rotation)
        stored = [self.get_buffer(name) for name in TENSORS] if self.kernel is None else self.kernel.packed.stored()
        packed = PackedLayer(*stored, *matrices)  # type: ignore[call-arg]
        grids = dict.fromkeys(self.spec.activation(asked) for asked in activations)
        self.kernel = KernelLayer(kernels, packed, grids, dtype, device, *self._balance())
        for name in TENSORS:
            self._buffers[name] = None

    def balance(self, x: Tensor) -> Tensor:
        """What the op receives of an input [..., K]: less the shift, its channels multiplied by powers of two."""
        return balance_input(x, *self._balance())

    def _balance(self) -> tuple[Tensor | None, Tensor | None]:
        scale, shift = (self._buffers.get(name) for name in ("pre_quant_scale", "pre_quant_shift"))
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        hadamard, outer = self._table[0].matrices(self.spec.rotation)
        y: Tensor
        if self.kernel is not None:
            y = self.kernel(x, outer, self.act_bits, self.act_group)
            return y
        rest = (self.weight, self.weight_scale, self.weight_factor, self.weight_zero, self.bias, hadamard, outer,
                self.act_bits, self.act_group)  # fmt: skip
        # Eager on a GPU a pointwise operation is a pass over memory of its own; compilers and engines fuse it.
        fused = (self.spec.balanced or self.spec.shifted) and self.spec.features % 8 == 0
        if fused and x.is_cuda and not torch.compiler.is_compiling():
            y = balanced_quant_linear(x, *self._balance(), *rest)
        else:
            y = quant_linear(self.balance(x), *rest)
        return y

    def extra_repr(self) -> str:
        """K, N, bits and block."""
        spec = self.spec
        return (
            f"{spec.features} -> {spec.out_features}, W4A{self.act_bits}, groups={spec.groups}, "
            f"block={spec.rotation.block}"
        )


class _SharedInput:
    """Runs a merged layer at its first member's call and hands the other members their rows.

    A member that is called with another tensor than the one last seen, or with that tensor changed in place, or after a
    switch of the activation bits, triggers a new call, so results are right for every order of calls; only the saving
    depends on the members being called one after the other. Threads that call the members at the same time, each with
    its own tensor, run the layer more often; none gets another's rows.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.input: Tensor | None = None
        self.state: tuple[int, int, int] | None = None
        self.pending: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model needs: the layer. A copy has rows of its own to wait for, and its own lock."""
        return {"layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layer"])  # type: ignore[misc]

    def take(self, index: int, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a trace has one thread, and a lock is nothing that can be traced
            part = self._kept(index, x, self._state(x))
            return self._run(index, x) if part is None else part
        with self._lock:
            part = self._kept(index, x, self._state(x))
        # The layer runs outside of the lock: what it takes must not stop the other threads.
        return self._run(index, x, self._lock) if part is None else part

    def _state(self, x: Tensor) -> tuple[int, int, int]:
        # A compiler sees every change in place by itself.
        version = 0 if torch.compiler.is_compiling() else tensor_version(x)
        return version, self.layer.act_bits, self.layer.act_group

    def _kept(self, index: int, x: Tensor, state: tuple[int, int, int]) -> Tensor | None:
        if self.input is not x or self.state != state or index not in self.pending:
            return None
        part = self.pending.pop(index)
        if not self.pending:
            self.input = None
        return part

    def _run(self, index: int, x: Tensor, lock: AbstractContextManager[Any] | None = None) -> Tensor:
        state = self._state(x)
        parts: dict[int, Tensor] = dict(enumerate(self.layer(x).split(list(self.layer.spec.rows), dim=-1)))
        part = parts.pop(index)
        with nullcontext() if lock is None else lock:
            # Rows are kept only if no other thread changed the input or switched the bits while the layer ran.
            keep = bool(parts) and state == self._state(x)
            self.input = x if keep else None
            self.state = state
            self.pending = parts if keep else {}
        return part


class MergedMember(nn.Module):
    """Stands where one of the merged ``nn.Linear`` stood and returns its rows of the merged output."""

    def __init__(self, shared: _SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., rows of this member]."""
        return self._shared.take(self._index, x)

    def extra_repr(self) -> str:
        """Which rows of which layer."""
        spec = self._shared.layer.spec
        return f"rows of {spec.members[self._index]} in {spec.name}"


def install_quant_linears(model: nn.Module, specs: Iterable[LayerSpec], activation: ActivationSpec) -> RotationTable:
    """Replace the members of every spec in ``model``, in place; returns the rotation table it registered.

    The packed buffers are placeholders of one element until :meth:`QuantLinear.load`.
    """
    specs = list(specs)
    table = RotationTable({spec.rotation: None for spec in specs})
    model.add_module("dvdq_rotation", table)
    for spec in specs:
        layer = QuantLinear(spec, activation, table)
        if len(spec.members) == 1:
            _replace(model, spec.name, layer)
            continue
        parent, _, child = spec.name.rpartition(".")
        model.get_submodule(parent).add_module(child, layer)
        shared = _SharedInput(layer)
        for index, member in enumerate(spec.members):
            _replace(model, member, MergedMember(shared, index))
    return table


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)):
        owner[int(child)] = new
    else:
        setattr(owner, child, new)


def set_activation(model: nn.Module, activation: ActivationSpec) -> None:
    """Switch every QuantLinear of ``model`` to ``activation``; the packed weights stay as they are."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.use(activation)


def prepare_layers(
    model: nn.Module,
    kernels: CudaKernels,
    activations: Sequence[ActivationSpec],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """:meth:`QuantLinear.prepare` of every layer of ``model``; those that stay as they are by name, with the reason.

    Move the model afterwards: what was on the device before stays there beside the prepared weights.
    """
    left = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            try:
                module.prepare(kernels, activations, dtype, device)
            except UnsupportedError as error:
                left[module.spec.name] = error.what
    return left
