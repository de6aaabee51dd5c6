"""QuantLinear modules, and their installation in place of ``nn.Linear`` in a diffusers transformer.

Linear layers of one parent module that receive the very same tensor (q/k/v) are merged into one :class:`QuantLinear`,
so that x is rotated and quantized once. The merged layer is called after its members: ``attn1.to_q+to_k+to_v``.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hardware.weights import WeightForm
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.quant_linear import quant_linear, smooth_quant_linear
from dvdquant.ops.smooth import smooth_input
from dvdquant.recipe import ActivationSpec
from dvdquant.system.torch_hooks import tensor_version

if TYPE_CHECKING:
    from dvdquant.ops.cuda_linear import CudaKernels

__all__ = [
    "LayerSpec",
    "QuantLinear",
    "RotationTable",
    "empty_tensor",
    "forget_stored",
    "install_quant_linears",
    "make_weights",
    "prepare_layers",
    "prepared_bytes",
    "set_activation",
]

TENSORS = ("weight", "weight_scale", "weight_group_scale", "weight_zero", "bias")


@dataclass(frozen=True)
class LayerSpec:
    """The description of one quantized layer: one or several ``nn.Linear`` with a shared input.

    Args:
        name: The dotted name of the (merged) layer; the last part joins the members with ``+``.
        members: The dotted names of the ``nn.Linear`` that it replaces, in row order.
        rows: The number of output features of each member.
        features: K, the number of input features.
        biases: True for each member that has a bias.
        rotation: The Hadamard rotation of its input.
        groups: The number of weight groups per row (1 for a scale per row).
        floor: The least activation grid that it accepts, used instead of one with fewer bits; None accepts all.
        float_zero_point: True for a float zero-point per group, stored as a byte, instead of one in fp32 per row.
        smoothed: True if the input is multiplied by a power of two per channel before it is rotated.
        random_signs: True if these powers of two have random signs, provided that there is a rotation.
        shifted: True if a constant per channel is subtracted from the input before.
        regular: True if these powers of two are the signs that make the rotation the regular one, and nothing else; codes
            are then −7 to 7.
    """

    name: str
    members: tuple[str, ...]
    rows: tuple[int, ...]
    features: int
    biases: tuple[bool, ...]
    rotation: Rotation
    groups: int
    floor: ActivationSpec | None = None
    float_zero_point: bool = False
    smoothed: bool = False
    random_signs: bool = False
    shifted: bool = False
    regular: bool = False

    def activation(self, asked: ActivationSpec) -> ActivationSpec:
        """Return the activation grid that the layer runs with.

        Args:
            asked: The grid of the graph. The layer's floor replaces it if it has fewer bits.
        """
        return self.floor if self.floor is not None and asked.bits < self.floor.bits else asked

    @property
    def out_features(self) -> int:
        """Return N, the number of rows of all members together."""
        return sum(self.rows)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and the shape of each packed tensor, by its full name."""
        n = self.out_features
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, (n, self.features // 2)),
            "weight_scale": (torch.float32, (n,)),
            "weight_group_scale": (torch.uint8, (n, self.groups)),
            "weight_zero": (torch.uint8, (n, self.groups)) if self.float_zero_point else (torch.float32, (n,)),
            "bias": (torch.float32, (n,)),
        }
        if self.shifted:
            shapes["pre_quant_shift"] = (torch.float32, (self.features,))
        if self.smoothed:
            shapes["pre_quant_scale"] = (torch.float32, (self.features,))
        return {f"{self.name}.{key}": value for key, value in shapes.items()}


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that occupies one element whatever its shape, for tracing, where only shape and dtype count.

    Args:
        shape: The shape.
        dtype: The dtype.
    """
    return torch.zeros((), dtype=dtype).expand(shape)


class RotationTable(nn.Module):
    """The Hadamard matrices of a model, each held once and shared by the layers that use it.

    Args:
        rotations: The rotations of all layers.
    """

    def __init__(self, rotations: Iterable[Rotation]) -> None:
        super().__init__()
        for rotation in rotations:
            hadamard, outer = rotation.matrices(torch.float32)
            for name, matrix in ((f"hadamard_{rotation.inner}", hadamard), (f"outer_{rotation.outer}", outer)):
                if not hasattr(self, name):
                    self.register_buffer(name, matrix.contiguous(), persistent=False)

    def matrices(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return (hadamard [b, b], outer [p, p]) in fp32.

        Args:
            rotation: One of the rotations of the table.
        """
        return self.get_buffer(f"hadamard_{rotation.inner}"), self.get_buffer(f"outer_{rotation.outer}")


class QuantLinear(nn.Module):
    """A linear layer with packed 4-bit weights and online rotated, scaled activations (see ``ops/quant_linear.py``).

    The rotation matrices are in the model's :class:`RotationTable`. After :meth:`prepare`, the first five buffers are
    in ``kernel``, so that the device holds them as its kernels multiply them.

    Args:
        spec: The description of the layer.
        activation: The activation grid of the graph.
        table: The rotation matrices of the model.

    Attributes:
        weight: The packed codes, int8 [N, K/2].
        weight_scale: The scales of the rows, fp32 [N].
        weight_group_scale: The scales of the groups in 255ths of their row's, uint8 [N, groups].
        weight_zero: The zero-points, fp32 [N] or uint8 [N, groups].
        bias: The bias, fp32 [N].
        pre_quant_shift: The constant that is subtracted from the input, fp32 [K]; a shifted layer has it.
        pre_quant_scale: The power of two of each input channel, fp32 [K]; a smoothed layer has it.
        act_bits: The bits of the activations.
        act_group: The number of channels that share an activation scale; 0 means the whole token.
        kernel: The prepared weights, or None before :meth:`prepare`.
    """

    def __init__(self, spec: LayerSpec, activation: ActivationSpec, table: RotationTable) -> None:
        super().__init__()
        self.spec = spec
        self.use(activation)
        # The table is in a list, so that it is not registered as a child of every layer.
        self._table = [table]
        self.kernel: KernelLayer | None = None
        for full_name, (dtype, shape) in spec.tensors().items():
            self.register_buffer(full_name.removeprefix(spec.name + "."), empty_tensor(shape, dtype))

    def use(self, activation: ActivationSpec) -> None:
        """Switch the activation grid, but not below the layer's floor; the packed weight stays unchanged.

        Args:
            activation: The activation grid of the graph.
        """
        chosen = self.spec.activation(activation)
        self.act_bits, self.act_group = chosen.bits, chosen.group_size

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the packed tensors.

        Args:
            tensors: The tensors by full name. More than the layer's own may be there.

        Raises:
            ShapeError: A tensor has another shape or dtype.
            KeyError: A tensor is missing.
        """
        for full_name, (dtype, shape) in self.spec.tensors().items():
            tensor = tensors[full_name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{full_name} is {tensor.dtype} {tuple(tensor.shape)}", available=f"expected {dtype} {shape}"
                )
            setattr(self, full_name.removeprefix(self.spec.name + "."), tensor)
        self.kernel = None

    def prepare(
        self,
        kernels: CudaKernels,
        activations: Iterable[ActivationSpec],
        dtype: torch.dtype,
        device: torch.device,
        form: WeightForm = "expanded",
    ) -> None:
        """Prepare the layer to run these grids on the kernels of ``device``.

        The device then holds the weight only in the form that the kernels multiply, or once, packed. The packed tensors
        stay where they are and are no buffers any more. So the module is for running, not for saving, and moving the
        module does not move them. :meth:`load` undoes it.

        Args:
            kernels: The kernels.
            activations: The activation grids of the graphs that will run.
            dtype: The dtype of the model, bf16 or fp16.
            device: The device that it runs on.
            form: How the device holds the weight, ``packed`` or ``expanded`` (:class:`.KernelLayer`).

        Raises:
            UnsupportedError: The kernels do not run the layer with one of the grids; the layer stays unchanged.
        """
        matrices = self._table[0].matrices(self.spec.rotation)
        stored = [self.get_buffer(name) for name in TENSORS] if self.kernel is None else self.kernel.packed.stored()
        packed = PackedLayer(*stored, *matrices)  # type: ignore[call-arg]
        grids = dict.fromkeys(self.spec.activation(asked) for asked in activations)
        self.kernel = KernelLayer(kernels, packed, grids, dtype, device, *self._pre_quant(), form)
        for name in TENSORS:
            setattr(self, name, None)

    def smooth(self, x: Tensor) -> Tensor:
        """Return the input of the op: ``x`` minus the shift, its channels multiplied by powers of two.

        Args:
            x: The input of the layer [..., K], floating point.
        """
        return smooth_input(x, *self._pre_quant())

    def _pre_quant(self) -> tuple[Tensor | None, Tensor | None]:
        """Return pre_quant_scale and pre_quant_shift, fp32 [K]; None for one that the layer does not have."""
        scale, shift = (getattr(self, name, None) for name in ("pre_quant_scale", "pre_quant_shift"))
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: The input [..., K], floating point.

        Returns:
            The output [..., N].
        """
        hadamard, outer = self._table[0].matrices(self.spec.rotation)
        y: Tensor
        if self.kernel is not None:
            y = self.kernel(x, outer, self.act_bits, self.act_group)
            return y
        rest = (self.weight, self.weight_scale, self.weight_group_scale, self.weight_zero, self.bias, hadamard, outer,
                self.act_bits, self.act_group)  # fmt: skip
        # In eager mode on a GPU, every pointwise operation is a pass over memory of its own. Compilers and engines fuse
        # it.
        fused = (self.spec.smoothed or self.spec.shifted) and self.spec.features % 8 == 0
        if fused and x.is_cuda and not torch.compiler.is_compiling():
            y = smooth_quant_linear(x, *self._pre_quant(), *rest)
        else:
            y = quant_linear(self.smooth(x), *rest)
        return y

    def extra_repr(self) -> str:
        """Return K, N, bits, groups and block for the printed module."""
        spec = self.spec
        return (
            f"{spec.features} -> {spec.out_features}, W4A{self.act_bits}, groups={spec.groups}, "
            f"block={spec.rotation.block}"
        )


class _SharedInput:
    """The shared state of the members of a merged layer: it runs the layer at the first call and keeps the other rows.

    A new call runs if a member is called with another tensor than the last one, with that tensor changed in place, or
    after a switch of the activation bits. So results are right for every order of calls, and only the saving depends on
    the members being called one after the other. Threads that call the members at the same time, each with its own
    tensor, run the layer more often; none gets another's rows.

    Args:
        layer: The merged layer.
    """

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.input: Tensor | None = None
        self.state: tuple[int, int, int] | None = None
        self.pending: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that a copy of the model needs: the layer alone.

        A copy waits for rows of its own, and has its own lock.
        """
        return {"layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layer"])  # type: ignore[misc]

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return the rows of one member, [..., rows of the member].

        Args:
            index: The number of the member.
            x: The input [..., K], floating point.
        """
        if torch.compiler.is_compiling():  # a trace has one thread, and a lock cannot be traced
            part = self._kept(index, x, self._state(x))
            return self._run(index, x) if part is None else part
        with self._lock:
            part = self._kept(index, x, self._state(x))
        # The layer runs outside of the lock, so that its time does not stop the other threads.
        return self._run(index, x, self._lock) if part is None else part

    def _state(self, x: Tensor) -> tuple[int, int, int]:
        """Return what must not change while rows are kept: the version of the input, the bits and the group size."""
        # A compiler sees every change in place by itself.
        version = 0 if torch.compiler.is_compiling() else tensor_version(x)
        return version, self.layer.act_bits, self.layer.act_group

    def _kept(self, index: int, x: Tensor, state: tuple[int, int, int]) -> Tensor | None:
        """Take the kept rows of one member, or return None if they are not those of this input and state."""
        if self.input is not x or self.state != state or index not in self.pending:
            return None
        part = self.pending.pop(index)
        if not self.pending:
            self.input = None
        return part

    def _run(self, index: int, x: Tensor, lock: AbstractContextManager[Any] | None = None) -> Tensor:
        """Run the layer, keep the rows of the other members, and return those of one.

        Args:
            index: The number of the member.
            x: The input [..., K], floating point.
            lock: The lock for the kept rows, or None while tracing.
        """
        state = self._state(x)
        parts: dict[int, Tensor] = dict(enumerate(self.layer(x).split(list(self.layer.spec.rows), dim=-1)))
        part = parts.pop(index)
        with nullcontext() if lock is None else lock:
            # Rows are kept only if no other thread changed the input or switched the bits while the layer ran.
            # Not bool(parts): PyTorch 2.11 cannot trace it.
            keep = len(parts) > 0 and state == self._state(x)
            self.input = x if keep else None
            self.state = state
            self.pending = parts if keep else {}
        return part


class MergedMember(nn.Module):
    """The module in place of one merged ``nn.Linear``; it returns the rows of that layer from the merged output.

    Args:
        shared: The shared state of the merged layer.
        index: The number of the member.
    """

    def __init__(self, shared: _SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of this member.

        Args:
            x: The input [..., K], floating point.

        Returns:
            The output [..., rows of this member].
        """
        return self._shared.take(self._index, x)

    def extra_repr(self) -> str:
        """Return the names of the member and of its layer for the printed module."""
        spec = self._shared.layer.spec
        return f"rows of {spec.members[self._index]} in {spec.name}"


def install_quant_linears(model: nn.Module, specs: Iterable[LayerSpec], activation: ActivationSpec) -> RotationTable:
    """Replace the members of every spec in ``model``, in place.

    The packed buffers are placeholders of one element until :meth:`QuantLinear.load`.

    Args:
        model: The diffusers transformer.
        specs: The layers to quantize.
        activation: The activation grid of the graph.

    Returns:
        The table of the rotation matrices, which is registered in the model.
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
    """Put ``new`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)):
        owner[int(child)] = new
    else:
        setattr(owner, child, new)


def set_activation(model: nn.Module, activation: ActivationSpec) -> None:
    """Switch every QuantLinear of ``model`` to another activation grid; the packed weights stay unchanged.

    Args:
        model: The quantized model.
        activation: The activation grid.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.use(activation)


def prepare_layers(
    model: nn.Module,
    kernels: CudaKernels,
    activations: Sequence[ActivationSpec],
    dtype: torch.dtype,
    device: torch.device,
    form: WeightForm = "expanded",
    expanded: Collection[str] = (),
) -> dict[str, str]:
    """Prepare every layer of ``model`` with :meth:`QuantLinear.prepare`.

    Move the model afterwards: buffers that were on the device before stay there beside the prepared weights.

    Args:
        model: The quantized model.
        kernels: The kernels.
        activations: The activation grids of the graphs that will run.
        dtype: The dtype of the model, bf16 or fp16.
        device: The device that it runs on.
        form: How the device holds the weights, ``packed`` or ``expanded``.
        expanded: The names of layers that it holds expanded in any case.

    Returns:
        The names of the layers that stay unchanged, with the reason.
    """
    left = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            try:
                chosen: WeightForm = "expanded" if module.spec.name in expanded else form
                module.prepare(kernels, activations, dtype, device, chosen)
            except UnsupportedError as error:
                left[module.spec.name] = error.what
    return left


def make_weights(model: nn.Module) -> None:
    """Make the prepared weight of every layer of ``model`` for its current activation grid, where kernels run it.

    A compiled model cannot make one while it runs.

    Args:
        model: The quantized model.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.kernel is not None:
            module.kernel.make_weight(module.act_bits, module.act_group)


def forget_stored(model: nn.Module) -> None:
    """Let go of the stored tensors of every layer of ``model`` whose kernels have made all that they multiply.

    Args:
        model: The quantized model.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.kernel is not None:
            module.kernel.forget_stored()


def prepared_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that the kernels of all layers of ``model`` have made so far.

    Args:
        model: The quantized model.
    """
    layers = (module for module in model.modules() if isinstance(module, QuantLinear))
    return sum(layer.kernel.nbytes for layer in layers if layer.kernel is not None)
