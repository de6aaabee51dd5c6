"""Limits of the weights that an export can hold, checked as they are read; errors name the tensor and its value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvdquant.errors import CheckpointError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["Magnitudes", "largest"]

_FP32_MAX = torch.finfo(torch.float32).max
# Of what a weight is multiplied by before it is rotated (dvdquant.quantize.hessian.smooth_scale_of).
_MOST_SMOOTH_SCALE = 2.0**12


def largest(tensor: Tensor) -> float:
    """Return the largest magnitude among the finite values of a tensor, in one pass where all are finite; 0 for none.

    Args:
        tensor: A tensor of any floating dtype and shape.
    """
    most = 0.0
    flat, step = tensor.reshape(-1), 1 << 22
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part = part.float() if part.element_size() == 1 else part
        low, high = (float(value) for value in torch.aminmax(part))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = part[torch.isfinite(part)]
            low, high = (float(value) for value in torch.aminmax(finite)) if finite.numel() else (0.0, 0.0)
        most = max(most, -low, high)
    return most


class Magnitudes:
    """The limits of every tensor of a checkpoint, for one plan.

    A tensor that stays as it is has to be finite in the dtype it is stored in, and so do the bias and the weight of a
    quantized layer: their products are formed in 16 bit on some engines. The squares of a quantized weight are summed
    in fp32 over rows and columns, after they were multiplied by up to 2¹².

    Args:
        plan: The plan of the model: layers, kept tensors, dtype.
    """

    def __init__(self, plan: ModelPlan) -> None:
        self._plan = plan
        self._layer_of = {member: spec for spec in plan.layers for member in spec.members}

    def check(self, checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
        """Refuse a tensor that the export cannot hold; its NaN and infinities do not count here.

        Args:
            checkpoint: Its checkpoint, for the message.
            name: Name of the tensor in the checkpoint.
            tensor: Its value, as stored.

        Raises:
            CheckpointError: A finite value that the export cannot hold; the message says the way out.
        """
        if not tensor.dtype.is_floating_point:
            return
        value, member = largest(tensor), name.rpartition(".")[0]
        if name in self._plan.kept:
            self._check_dtype(checkpoint, name, value, self._plan.kept[name][0])
            return
        spec = self._layer_of.get(member)
        if spec is None:
            return
        self._check_dtype(checkpoint, name, value, self._plan.dtype)
        if name.endswith(".weight"):
            limit = _FP32_MAX**0.5 / _MOST_SMOOTH_SCALE / (spec.features * spec.out_features) ** 0.5
            if value > limit:
                raise CheckpointError(
                    f"{checkpoint.root}: {name:.200} holds {value:.3g}, and weights beyond {limit:.2g} cannot be "
                    "quantized: their squares do not fit into fp32",
                    fix=f"check the checkpoint; --keep '{member}' leaves the layer in 16 bit",
                )

    def check_rotated(self, checkpoint: Checkpoint, spec: LayerSpec, member: str, rotated: Tensor) -> None:
        """Refuse rows that fit into the dtype before they are rotated, and not afterwards.

        Args:
            checkpoint: The checkpoint, for the message.
            spec: The layer.
            member: The member of the layer that the rows are of.
            rotated: fp32 [N, K], the rotated rows. A grid reaches up to twice as far as its weights.

        Raises:
            CheckpointError: A value is more than half of what the dtype holds.
        """
        value = largest(rotated)
        if value > torch.finfo(self._plan.dtype).max / 2:
            raise CheckpointError(
                f"{checkpoint.root}: {member:.200}.weight comes to {value:.3g} in the rotation of {spec.name}, "
                f"more than {_name(self._plan.dtype)} holds",
                fix=self._fix(value, f"--keep '{member}' leaves the layer as it is"),
            )

    def check_bias(self, checkpoint: Checkpoint, spec: LayerSpec, bias: Tensor) -> None:
        """Refuse the bias of a merged layer, to which its shift was added, if the dtype cannot hold it.

        Args:
            checkpoint: The checkpoint, for the message.
            spec: The layer.
            bias: fp32 [N].

        Raises:
            CheckpointError: A value is not finite, or more than the dtype holds.
        """
        value = largest(bias)
        if not bool(torch.isfinite(bias).all()) or value > torch.finfo(self._plan.dtype).max:
            raise CheckpointError(
                f"{checkpoint.root}: the bias of {spec.name} comes to {value:.3g} with the shift of its input, more than "
                f"{_name(self._plan.dtype)} holds",
                fix=self._fix(value, f"--keep '{spec.members[0]}' leaves the layer as it is"),
            )

    def _check_dtype(self, checkpoint: Checkpoint, name: str, value: float, dtype: torch.dtype) -> None:
        # As the conversion rounds: a little beyond the largest number is still finite.
        if math.isfinite(float(torch.tensor(value, dtype=torch.float64).to(dtype))):
            return
        raise CheckpointError(
            f"{checkpoint.root}: {name:.200} holds {value:.3g}, which {_name(dtype)} cannot represent",
            fix=self._fix(value, "check the checkpoint: no trained weight is that large"),
        )

    def _fix(self, value: float, otherwise: str) -> str:
        fits = self._plan.dtype == torch.float16 and value < torch.finfo(torch.bfloat16).max / 2
        return "export with --dtype bf16" if fits else otherwise


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
