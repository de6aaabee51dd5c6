"""All quantized layers of a model: their installation in place of ``nn.Linear``, their grids and their kernels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dvdquant.errors import UnsupportedError
from dvdquant.hardware.weights import WeightForm
from dvdquant.model.layers import LayerSpec, QuantLinear, RotationTable
from dvdquant.model.merged_layer import MergedMember, SharedInput
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.recipe import ActivationSpec

if TYPE_CHECKING:
    from dvdquant.ops.cuda_linear import CudaKernels

__all__ = [
    "forget_stored",
    "install_quant_linears",
    "kernel_layers",
    "make_weights",
    "prepare_layers",
    "prepared_bytes",
    "quant_linears",
    "set_activation",
]


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers of ``model`` by name, in module order.

    Args:
        model: The quantized model.
    """
    return {m.spec.name: m for m in model.modules() if isinstance(m, QuantLinear)}


def kernel_layers(model: nn.Module) -> list[KernelLayer]:
    """Return what the kernels run of ``model``, in module order.

    Args:
        model: A model after :func:`prepare_layers`.
    """
    return [layer.kernel for layer in quant_linears(model).values() if layer.kernel is not None]


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
        shared = SharedInput(layer)
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
    for layer in quant_linears(model).values():
        layer.use(activation)


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
    for name, layer in quant_linears(model).items():
        try:
            layer.prepare(kernels, activations, dtype, device, "expanded" if name in expanded else form)
        except UnsupportedError as error:
            left[name] = error.what
    return left


def make_weights(model: nn.Module) -> None:
    """Make the prepared weight of every layer of ``model`` for its current activation grid, where kernels run it.

    A compiled model cannot make one while it runs.

    Args:
        model: The quantized model.
    """
    for layer in quant_linears(model).values():
        if layer.kernel is not None:
            layer.kernel.make_weight(layer.act_bits, layer.act_group)


def forget_stored(model: nn.Module) -> None:
    """Let go of the stored tensors of every layer of ``model`` whose kernels have made all that they multiply.

    Args:
        model: The quantized model.
    """
    for kernel in kernel_layers(model):
        kernel.forget_stored()


def prepared_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that the kernels of all layers of ``model`` have made so far.

    Args:
        model: The quantized model.
    """
    return sum(kernel.nbytes for kernel in kernel_layers(model))
