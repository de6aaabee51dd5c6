"""Prediction about every layer's input, kept beside the work of an export until its layers are quantized.

The run that predicts it takes as long as reading the checkpoint and one forward. An export that is resumed reads what
the first one found, so that it ends with the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.regular_hadamard import regular_signs
from dvdquant.quantize.gptq import ErrorFeedback
from dvdquant.quantize.hessian import (
    InputHessian,
    random_signs_of,
    rotated_hessian,
    smooth_scale_of,
    synthetic_hessians,
    triangles_shape,
)
from dvdquant.quantize.magnitudes import Magnitudes
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import TensorInfo, read_header, read_tensor
from dvdquant.system.safetensors_writer import StreamingWriter

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["LayerInputs", "PredictedInputs", "layer_inputs", "noise_levels", "predict_inputs"]

# How far predicted moments are trusted: they are not those of a real clip, however many tokens they come from.
DAMPING = 0.05
# Multiplications and additions of the run, and tokens per noise level.
MOST_FLOPS, ITEM_TOKENS = 3e13, 128
KINDS = ("triangles", "energy", "mean", "tokens")


@dataclass(frozen=True)
class LayerInputs:
    """Facts about the input of one layer that its quantization uses.

    Args:
        smooth_scale: fp32 [K], powers of two, with a sign each where the layer has signs and is rotated; the shifted input is
            divided by them and the weight's columns are multiplied. Their magnitudes are 1 where the layer is not
            smoothed.
        hessian: fp32 [K/b, b, b] of the divided and rotated input. The mean is not subtracted: feedback then minds how
            far the shift is from the mean of real inputs. That was no worse on predicted inputs and better on real
            ones.
        damping: λ of :class:`dvdquant.quantize.gptq.ErrorFeedback`.
        shift: fp32 [K], subtracted from the input, its product with the weight added to the bias; or None.
    """

    smooth_scale: Tensor
    hessian: Tensor
    damping: float
    shift: Tensor | None = None

    @cached_property
    def gptq(self) -> ErrorFeedback:
        """Return the feedback of these moments, worked out once."""
        return ErrorFeedback(self.hessian, self.damping)


def layer_inputs(found: InputHessian, spec: LayerSpec) -> LayerInputs:
    """Return what quantizing ``spec`` uses of its predicted moments.

    Args:
        found: Prediction about the layer's inputs, not rotated.
        spec: The layer.
    """
    if spec.regular:
        smooth_scale = regular_signs(spec.rotation.block, spec.features)
    else:
        smooth_scale = smooth_scale_of(found) if spec.smoothed else torch.ones(spec.features)
    if spec.random_signs and not spec.rotation.identity:
        smooth_scale = smooth_scale * random_signs_of(spec.name, spec.features)
    # Moments of few tokens have few directions; the others must not count as free of error.
    damping = DAMPING + found.block / max(1, found.tokens)
    return LayerInputs(
        smooth_scale, rotated_hessian(found, spec, smooth_scale), damping, found.mean if spec.shifted else None
    )


class PredictedInputs:
    """The predictions of one transformer, in a file.

    Args:
        path: The safetensors file that :func:`predict_inputs` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, TensorInfo] = dict(read_header(path).tensors)

    def layer(self, spec: LayerSpec) -> LayerInputs:
        """Read the predictions of one layer.

        Args:
            spec: The layer.
        """
        triangles, energy, mean, tokens = (self._read(f"{spec.name}.{kind}") for kind in KINDS)
        return layer_inputs(InputHessian(triangles, energy, mean, int(tokens)), spec)

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._path, self._tensors[name])


def noise_levels(plan: ModelPlan) -> int:
    """Return how many noise levels the run uses: 16, or fewer, but at least 4, to keep it to minutes on a few cores.

    Args:
        plan: The plan of the model.
    """
    return max(4, min(16, int(MOST_FLOPS / (2 * plan.all_weights * ITEM_TOKENS))))


def predict_inputs(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    transaction: ExportTransaction,
    progress: Progress,
    component: str,
    device: torch.device | str = "cpu",
) -> PredictedInputs | None:
    """Predict, or read what an interrupted export predicted; return None for a recipe that ignores inputs.

    Args:
        checkpoint: The checkpoint of one transformer.
        plan: The plan of its model.
        transaction: The export; the predictions lie beside its tree.
        progress: Where the stage is shown.
        component: Name of the transformer in the export.
        device: Where the model runs.

    Raises:
        CheckpointError: A tensor cannot be used, or the transformer does not run.
        ResourceError: The disk is full, or the moments do not fit into memory.
    """
    if plan.recipe.inputs != "synthetic" or not plan.layers:
        return None
    path, step = transaction.tree.parent / f"{component}.hessian.safetensors", f"{component}:hessian"
    if not (transaction.is_done(step) and path.exists()):
        path.unlink(missing_ok=True)
        limits, levels = Magnitudes(plan), noise_levels(plan)
        found = synthetic_hessians(checkpoint, plan, progress, levels=levels, device=device, limits=limits)
        planned = []
        for spec in plan.layers:
            planned += [
                (f"{spec.name}.triangles", torch.float32, triangles_shape(spec)),
                (f"{spec.name}.energy", torch.float32, (spec.features,)),
                (f"{spec.name}.mean", torch.float32, (spec.features,)),
                (f"{spec.name}.tokens", torch.float32, ()),
            ]
        with StreamingWriter(path, planned) as writer:
            for spec in plan.layers:
                hessian = found.pop(spec.name)
                writer.write(f"{spec.name}.triangles", hessian.triangles)
                writer.write(f"{spec.name}.energy", hessian.weight_energy)
                writer.write(f"{spec.name}.mean", hessian.mean)
                writer.write(f"{spec.name}.tokens", torch.tensor(float(hessian.tokens)))
            writer.finish()
        transaction.done(step)
    return PredictedInputs(path)
