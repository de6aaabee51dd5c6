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
from dvdquant.numerics.packing import pack_int4
from dvdquant.ops.reference import dequantize_weight
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.recipe import WeightSpec

__all__ = ["FourBitLinear", "four_bit_config", "pack"]

_METHOD = "dvdquant-4-bit"
_PART = 1 << 22  # weights that are expanded at a time


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
        features: Input channels K. rows: Output channels N. bias: Whether it has one.
        dtype: The dtype of the bias. device: Where its tensors lie; ``meta`` until they are loaded.
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
        step = max(1, _PART // self.in_features)
        starts = range(0, self.out_features, step)
        parts = [functional.linear(x, self.dequantized(slice(s, s + step)).to(x.dtype)) for s in starts]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def four_bit_config() -> Any:
    """Return the configuration with which transformers loads a model with such layers, tensor by tensor."""
    return _registered()()


@functools.cache
def _registered() -> type[Any]:
    """Tell transformers of the method, once in a process; the class of its configuration."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Pack(ConversionOps):
        """A weight as the checkpoint has it -> its packed rows."""

        def convert(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Tensor]:
            del more
            found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            return {name: nn.Parameter(pack(value), requires_grad=False) for name, value in found.items()}

    @register_quantization_config(_METHOD)
    class Config(QuantizationConfigMixin):
        """Nothing is to be said: all linear layers are packed that can be."""

        def __init__(self, **more: Any) -> None:
            del more
            self.quant_method = _METHOD

    @register_quantizer(_METHOD)
    class Quantizer(HfQuantizer):
        """Replaces linear layers before their weights are loaded."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
            del more
            output = model.get_output_embeddings()  # of a language model: no text encoder computes it
            for name, module in list(model.named_modules()):
                fits = type(module) is nn.Linear and module.in_features % FOUR_BIT_GROUP == 0
                if fits and module is not output:
                    weight = module.weight
                    packed = FourBitLinear(
                        module.in_features, module.out_features, module.bias is not None, weight.dtype, weight.device
                    )
                    model.set_submodule(name, packed)

        def param_needs_quantization(self, model: nn.Module, param_name: str, **more: Any) -> bool:
            del more
            owner, _, kind = param_name.rpartition(".")
            return kind == "weight" and isinstance(model.get_submodule(owner), FourBitLinear)

        def get_quantize_ops(self) -> Any:
            return Pack()

        def is_serializable(self, **more: Any) -> bool:
            del more
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return Config
