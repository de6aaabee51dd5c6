"""The error table: how far the quantized weights of a layer, or its outputs, are from the original ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dvdquant.artifact.entries import LayerEntry
from dvdquant.errors import CheckpointError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.packing import expand_zero
from dvdquant.quantize.backends.numba_rows import for_row_parts, squared_errors
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight
from dvdquant.quantize.gptq import output_energy
from dvdquant.quantize.layer_inputs import LayerInputs

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["ErrorSums", "squared_errors_of"]


class ErrorSums:
    """Adds up the squared errors of a layer, and those of min-max, over its blocks of rows.

    They are errors of the weights, or of the outputs where something is known of the inputs. Output errors take only
    every ``stride``-th row, as the sum over all rows takes longer than quantizing them.

    Args:
        known: What is known of the layer's inputs, or None.
        stride: Of how many rows one counts in output errors.
    """

    def __init__(self, known: LayerInputs | None, stride: int) -> None:
        self.known, self.stride = known, stride
        self.energy = self.error = self.minmax = 0.0
        self.weight_energy = self.weight_error = 0.0

    def add(self, weight: Tensor, quantized: QuantizedWeight, plan: ModelPlan, start: int) -> None:
        """Add rows ``start`` and following of one member.

        Args:
            weight: The rotated rows, fp32 [n, K].
            quantized: Their codes and scales.
            plan: The plan of the model.
            start: The first of them, in the member.
        """
        minmax = replace(plan.recipe.weight, solver="minmax")
        energy, error = squared_errors_of(weight, quantized)
        self.weight_energy += energy
        self.weight_error += error
        if self.known is not None:
            rows = slice(-start % self.stride, None, self.stride)
            some, hessian = weight[rows].contiguous(), self.known.hessian
            if len(some):
                self.energy += output_energy(some, hessian)
                self.error += output_energy(some - quantized.rows(rows).dequantize(), hessian)
                self.minmax += output_energy(some - quantize_weight(some, minmax).dequantize(), hessian)
            return
        baseline = quantize_weight(weight, minmax)
        self.energy += energy
        self.error += error
        self.minmax += squared_errors_of(weight, baseline)[1]

    def entry(self, checkpoint: Checkpoint, spec: LayerSpec) -> LayerEntry:
        """Return the line of a layer in the error table.

        Args:
            checkpoint: The checkpoint, for the error.
            spec: The layer.

        Raises:
            CheckpointError: The sums overflowed.
        """
        if not all(map(math.isfinite, (self.energy, self.error, self.minmax))):
            raise CheckpointError(
                f"{checkpoint.root}: the error of {spec.name} cannot be computed: its weights, or the inputs predicted for it, "
                "are too large",
                fix=f"check the checkpoint; --keep '{spec.members[0]}' leaves the layer in 16 bit",
            )

        def relative(error: float) -> float | None:
            return error / self.energy if self.energy else None

        entry = LayerEntry(
            name=spec.name,
            members=list(spec.members),
            features_in=spec.features,
            features_out=spec.out_features,
            rotation_block=spec.rotation.block,
            relative_mse=relative(self.error),
            relative_mse_minmax=relative(self.minmax),
        )
        if self.known is not None and self.weight_energy:
            entry["weight_mse"] = self.weight_error / self.weight_energy
        return entry


def squared_errors_of(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Return (‖w‖², ‖w − ŵ‖²).

    Args:
        weight: W, fp32 [N, K], on the device of ``quantized``.
        quantized: Its codes and scales.
    """
    if weight.device.type != "cpu":
        difference = weight - quantized.dequantize()
        return float(weight.double().square().sum()), float(difference.double().square().sum())
    rows = weight.numpy()
    codes, scale, group_scale, zero = (
        t.numpy() for t in (quantized.codes, quantized.scale, quantized.group_scale, expand_zero(quantized.zero))
    )
    sums: list[np.ndarray] = []

    def work(part: slice) -> None:
        out = np.zeros(2)
        squared_errors(rows[part], codes[part], scale[part], group_scale[part], zero[part], out)
        sums.append(out)

    for_row_parts(len(rows), work)
    energy, error = np.sum(sums, axis=0)
    return float(energy), float(error)
