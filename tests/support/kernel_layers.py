"""A small layer, tokens for it, and the kernels' double, which is the library of kernels/check."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dvdquant.model.layers import TENSORS, LayerSpec, QuantLinear, RotationTable
from dvdquant.numerics.hadamard import Rotation
from dvdquant.ops.cuda_linear import CudaKernels
from dvdquant.ops.repack import LayerShape
from dvdquant.recipe import ActivationSpec

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels" / folder) for folder in ("", "bench", "check")]

import check_ops  # noqa: E402
from check_cases import make_tokens, make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402

__all__ = ["CPU", "ROTATION", "double", "small_layer", "tokens"]

CPU = torch.device("cpu")
ROTATION = Rotation.for_features(256, "auto")


def double(sm: int) -> CudaKernels:
    return CudaKernels(HostLibrary(), sm)  # type: ignore[arg-type]


def small_layer(bits: int = 8, smoothed: bool = False) -> QuantLinear:
    spec = LayerSpec("layer", ("layer",), (16,), 256, (True,), ROTATION, 1, smoothed=smoothed, shifted=smoothed)
    layer = QuantLinear(spec, ActivationSpec(bits), RotationTable([ROTATION]))
    shape = LayerShape(16, 256, 1, False, ROTATION.inner, ROTATION.outer)
    packed = make_weight(shape, "midrise", CPU, seed=3)
    tensors = {f"layer.{name}": tensor for name, tensor in zip(TENSORS, packed.stored())}
    if smoothed:
        scale, shift = check_ops.make_pre_quant(shape, CPU)
        tensors |= {"layer.pre_quant_scale": scale, "layer.pre_quant_shift": shift}
    layer.load(tensors)
    return layer


def tokens(count: int = 5) -> torch.Tensor:
    return make_tokens(LayerShape(16, 256), count, CPU, 1)
