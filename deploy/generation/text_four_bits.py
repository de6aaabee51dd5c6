"""Text encoders in 4 bits: linear layers whose weights stay packed, on every device and without another library.

A weight [N, K] has a scale and a zero-point for each 32 channels: the min-max grid, which takes seconds for a whole text
encoder. A call expands a few rows at a time to the dtype of x and multiplies them, so that the scratch is small whatever
the layer. The bytes of a row lie in one int8 tensor, since transformers loads a layer's weight as one tensor, and leaves an
int8 one as it is where it casts the input of a layer to the dtype of its weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvdquant.deploy.generation.memory_plan import FOUR_BIT_GROUP, four_bit_bytes
from dvdquant.deploy.generation.transformers_hooks import lost_packing, register_packing
from dvdquant.numerics.packing import pack_int4
from dvdquant.ops.reference import dequantize_weight
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.recipe import WeightSpec

__all__ = ["FourBitLinear", "check_packed", "four_bit_config", "pack", "put_layers_in"]

_METHOD = "dvdquant-4-bit"
EXPANDED_AT_ONCE = 1 << 22
"""The number of weights that are expanded at a time."""


def pack(weight: Tensor) -> Tensor:
    """Return the rows of a weight, int8 [N, :func:`.memory_plan.four_bit_bytes` of one row].

    Args:
        weight: [N, K], of a floating dtype, K a multiple of :data:`.memory_plan.FOUR_BIT_GROUP`.

    Raises:
        CheckpointError: It has NaN or infinities.
    """
    found = quantize_weight(weight.detach(), WeightSpec(FOUR_BIT_GROUP, "float", "minmax"))
    scale = found.scale.view(torch.uint8).reshape(len(weight), 4)
    return torch.cat([pack_int4(found.codes), found.group_scale, found.zero, scale], dim=1).view(torch.int8)


class FourBitLinear(nn.Module):
    """A linear layer with a packed weight: y = x Wᵀ + bias.

    Args:
        features: The number of input channels, K.
        rows: The number of output channels, N.
        bias: Whether it has a bias.
        dtype: The dtype of the bias.
        device: The device of its tensors; ``meta`` until they are loaded.
    """

    def __init__(self, features: int, rows: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = features, rows
        empty = torch.empty(rows, four_bit_bytes(features, 1), dtype=torch.int8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False) if bias else None

    def dequantized(self, part: slice = slice(None)) -> Tensor:
        """Return rows of the weight in fp32.

        Args:
            part: The rows.
        """
        half, groups = self.in_features // 2, self.in_features // FOUR_BIT_GROUP
        codes, group_scale, zero, scale = torch.split(
            self.weight[part].view(torch.uint8), [half, groups, groups, 4], dim=1
        )
        return dequantize_weight(codes, scale.contiguous().view(torch.float32).flatten(), group_scale, zero)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] of x's dtype.

        Args:
            x: [..., K].
        """
        step = max(1, EXPANDED_AT_ONCE // self.in_features)
        starts = range(0, self.out_features, step)
        parts = [functional.linear(x, self.dequantized(slice(s, s + step)).to(x.dtype)) for s in starts]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def four_bit_config() -> Any:
    """Return the configuration with which transformers loads a model with such layers, tensor by tensor.

    Raises:
        UnsupportedError: This transformers does not load packed weights in the way we know.
    """
    return _registered()()


@functools.cache
def _registered() -> type[Any]:
    """Tell transformers of the method, once in a process; the class of its configuration."""
    return register_packing(_METHOD, pack, put_layers_in, FourBitLinear)


def put_layers_in(model: nn.Module) -> None:
    """Replace the linear layers that can be packed by packed ones, before their weights are loaded.

    Args:
        model: A text encoder of transformers; it is changed.
    """
    for name, module in _fitting(model):
        weight = module.weight
        packed = FourBitLinear(
            module.in_features, module.out_features, module.bias is not None, weight.dtype, weight.device
        )
        model.set_submodule(name, packed)


def _fitting(model: Any) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers that can be packed, by name."""
    output = model.get_output_embeddings()  # of a language model: no text encoder computes it
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.in_features % FOUR_BIT_GROUP == 0 and module is not output
    ]


def check_packed(model: nn.Module) -> None:
    """Refuse a text encoder that was to be loaded in 4 bits and whose layers are as they were.

    Args:
        model: The text encoder, loaded.

    Raises:
        UnsupportedError: Transformers did not ask the method that four_bit_config names.
    """
    if _fitting(model):
        raise lost_packing(type(model).__name__)
