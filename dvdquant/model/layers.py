"""One quantized linear layer: its description, the rotation matrices of its model, and the module that computes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dvdquant.errors import ShapeError
from dvdquant.hardware.weights import WeightForm
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.ops.packed_layer import PackedLayer
from dvdquant.ops.quant_linear import quant_linear, smooth_quant_linear
from dvdquant.ops.smooth import smooth_input
from dvdquant.recipe import ActivationSpec

if TYPE_CHECKING:
    from dvdquant.ops.cuda_linear import CudaKernels

__all__ = ["LayerSpec", "QuantLinear", "RotationTable", "empty_tensor"]

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
            asked: The grid of the graph. If it has fewer bits than the layer's floor, the floor replaces it.
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
        matrices = self.rotation_matrices()
        stored = [self.get_buffer(name) for name in TENSORS] if self.kernel is None else self.kernel.packed.stored()
        packed = PackedLayer(*stored, *matrices)  # type: ignore[call-arg]
        grids = dict.fromkeys(self.spec.activation(asked) for asked in activations)
        self.kernel = KernelLayer(kernels, packed, grids, dtype, device, *self._pre_quant(), form)
        for name in TENSORS:
            setattr(self, name, None)

    def rotation_matrices(self) -> tuple[Tensor, Tensor]:
        """Return the matrices of the layer's rotation, fp32 [b, b] and [m, m], with b · m the size of a rotated block.

        They are those of the model's table, which all layers share.
        """
        return self._table[0].matrices(self.spec.rotation)

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
        hadamard, outer = self.rotation_matrices()
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
