"""The model that an export was made of, with random weights: what a user could run instead, to be timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dvdquant.deploy.sessions.attention import MASK, AttentionState, install_attention
from dvdquant.deploy.sessions.compiled import compile_blocks, repeated_blocks
from dvdquant.model.families import Family
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import build_skeleton
from dvdquant.system.devices import current_device

__all__ = ["OriginalModel", "fill_parameters", "share_blocks"]


class OriginalModel:
    """A diffusers transformer with random weights, for its time alone.

    Blocks of one kind share their weights, so that a model can be timed whose weights would not fit the device.

    Args:
        family: The model's family, with its config.
        dtype: The dtype of the parameters that diffusers does not keep in fp32.
        device: Where it runs.
        compiled: Compile its blocks with torch.compile. That happens at the first call.
        cut: Cut padded words off instead of masking them, which is the same function. A mask makes PyTorch take slower kernels
            on a GPU, where sessions cut, too.

    Raises:
        UnsupportedError: It has no repeated blocks to compile.
    """

    def __init__(self, family: Family, dtype: torch.dtype, device: torch.device, compiled: bool, cut: bool) -> None:
        model = build_skeleton(family.config, dtype)
        share_blocks(model)
        fill_parameters(model, device)
        model.to(device)  # the buffers
        self._device = device
        self._state: AttentionState | None = install_attention(model, None) if cut else None
        if compiled:
            compile_blocks(model, dynamic=False)
        self._model = GraphWrapper(model, family)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run one call.

        Args:
            inputs: The inputs of the export's graph by name, on the device.

        Returns:
            The output of the transformer, of no meaning.
        """
        if self._state is not None and MASK in inputs:
            inputs = self._state.cut(inputs)
        with current_device(self._device), torch.inference_mode():
            output: Tensor = self._model(inputs)
        return output


def share_blocks(model: nn.Module) -> None:
    """Give all repeated blocks of one class and shape the parameters of the first of them.

    Args:
        model: A diffusers transformer, which is changed in place.
    """
    firsts: dict[Any, nn.Module] = {}
    for block in repeated_blocks(model):
        kind = (type(block), *((name, value.shape, value.dtype) for name, value in block.named_parameters()))
        first = firsts.setdefault(kind, block)
        for module, of_first in zip(block.modules(), first.modules(), strict=True):
            for name, parameter in list(of_first.named_parameters(recurse=False)):
                setattr(module, name, parameter)


def fill_parameters(model: nn.Module, device: torch.device) -> None:
    """Put random parameters into a model, of sizes that keep activations near 1. Shared ones stay shared.

    Args:
        model: The skeleton, which is changed in place.
        device: The device of the parameters.
    """
    generator = torch.Generator(device).manual_seed(0)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                spread = 0.02 if parameter.ndim > 1 else 1.0
                value = torch.randn(parameter.shape, device=device, generator=generator).mul_(spread)
                made[parameter] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)
            setattr(module, name, made[parameter])
