"""One (merged) layer: read, rotate, quantize in blocks of rows, pack."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvdquant.artifact.entries import LayerEntry
from dvdquant.errors import CheckpointError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.numerics.packing import pack_int4
from dvdquant.quantize.backends.numba_rows import for_row_parts, hadamard_rows, pack_rows
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.error_table import ErrorSums
from dvdquant.quantize.layer_inputs import LayerInputs
from dvdquant.quantize.magnitudes import Magnitudes

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = [
    "CHUNK_WEIGHTS",
    "SAMPLED_ROWS",
    "pack_codes",
    "quantize_layer",
    "read_counted",
    "rotate_rows",
    "rotated_weight",
    "stored_shift",
    "zeroed",
]

# Weights rotated and refined at a time: 32 MiB of fp32.
CHUNK_WEIGHTS = 1 << 23
# Rows of a layer whose output error goes into the table; at most twice as many.
SAMPLED_ROWS = 512


def read_counted(
    checkpoint: Checkpoint, name: str, limits: Magnitudes, allow_nonfinite: bool
) -> tuple[Tensor, list[str]]:
    """Read one tensor, finite and within the limits; return it, and its name if it had NaN or Inf, which are 0 now.

    fp8 comes as bf16, which holds all of its values: few operations know fp8, and so an export is the same as that of the
    converted checkpoint.

    Args:
        checkpoint: The checkpoint that holds the tensor.
        name: The name of the tensor.
        limits: The magnitudes that kernels can handle.
        allow_nonfinite: Whether NaN and infinities count as 0.

    Raises:
        CheckpointError: A value is not finite or too large.
    """
    tensor = checkpoint.read(name)
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:
        tensor = tensor.to(torch.bfloat16)
    found = []
    try:
        checkpoint.check_finite(name, tensor)
    except CheckpointError:
        if not allow_nonfinite:
            raise
        found, tensor = [name], zeroed(tensor)
    limits.check(checkpoint, name, tensor)
    return tensor, found


def zeroed(tensor: Tensor) -> Tensor:
    """Put 0 in the place of NaN and infinities.

    Args:
        tensor: A tensor of any shape and floating dtype.
    """
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros((), dtype=tensor.dtype))


def quantize_layer(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    spec: LayerSpec,
    known: LayerInputs | None,
    limits: Magnitudes,
    allow_nonfinite: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], LayerEntry, list[str]]:
    """Return the packed tensors of one (merged) layer, its line of the error table, and its non-finite tensors.

    Args:
        checkpoint: The checkpoint that holds the layer.
        plan: The plan of the model.
        spec: The layer.
        known: What is known of its inputs, or None.
        limits: The magnitudes that kernels can handle.
        allow_nonfinite: Whether NaN and infinities count as 0.
        device: Where it is quantized.

    Raises:
        CheckpointError: A value is not finite or too large.
    """
    packed, scales, group_scales, zeros, biases = [], [], [], [], []
    bad: list[str] = []
    if known is not None and device.type != "cpu":
        known = replace(known, smooth_scale=known.smooth_scale.to(device), hessian=known.hessian.to(device))
    # As the graph subtracts it, so that what is added to the bias is the same.
    shift = None if known is None or known.shift is None else stored_shift(known.shift, plan.dtype).to(device)
    sums = ErrorSums(known, max(1, spec.out_features // SAMPLED_ROWS))
    for member, rows, has_bias in zip(spec.members, spec.rows, spec.biases):
        weight, found = read_counted(checkpoint, f"{member}.weight", limits, allow_nonfinite)
        bad += found
        # 1. In chunks of rows: W·shift, smooth, rotate, quantize (BGR), round with feedback, add up errors, pack.
        shifted = []
        step = max(1, CHUNK_WEIGHTS // spec.features)
        for start in range(0, rows, step):
            part = weight[start : start + step].to(device, torch.float32, copy=True)
            if shift is not None:
                shifted.append(part.double() @ shift)
            if known is not None:
                part *= known.smooth_scale
            rotated = rotate_rows(part, spec.rotation)
            limits.check_rotated(checkpoint, spec, member, rotated)
            quantized = quantize_weight(rotated, plan.recipe.weight)
            if known is not None:
                quantized = known.gptq.round(rotated, quantized)
            if spec.regular:
                quantized.codes.clamp_(min=-7)  # whose signs change on the way to the regular order: −8 has no opposite
            sums.add(rotated, quantized, plan, start)
            packed.append(pack_codes(quantized.codes))
            scales.append(quantized.scale)
            group_scales.append(quantized.group_scale)
            zeros.append(quantized.zero)
        # 2. The bias of this member, with W·shift.
        bias = torch.zeros(rows)
        if has_bias:
            stored, found = read_counted(checkpoint, f"{member}.bias", limits, allow_nonfinite)
            bias = stored.float()
            bad += found
        # W·x = W·(x − shift) + W·shift, the second with the weight as it was.
        biases.append((bias.double() + torch.cat(shifted).cpu()).float() if shifted else bias)
    # 3. Members of a merged layer, one below the other.
    parts = (packed, scales, group_scales, zeros, biases)
    tensors = dict(zip(spec.tensors(), (torch.cat(p).cpu() for p in parts)))
    limits.check_bias(checkpoint, spec, tensors[f"{spec.name}.bias"])
    if spec.shifted:
        assert shift is not None
        tensors[f"{spec.name}.pre_quant_shift"] = shift.float().cpu()
    if spec.smoothed:
        assert known is not None
        tensors[f"{spec.name}.pre_quant_scale"] = 1 / known.smooth_scale.cpu()
    return tensors, sums.entry(checkpoint, spec), bad


def stored_shift(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the constants [K] that are subtracted from a layer's inputs, as the graph has them; fp64.

    Any constants are correct. Channels whose mean is more than half of what ``dtype`` holds keep theirs (the constant
    is 0): what is left of them might not fit.

    Args:
        mean: fp32 [K], the predicted means of the inputs.
        dtype: The dtype of the inputs, in which the constants are stored.
    """
    fits = mean.abs() <= torch.finfo(dtype).max / 2
    return torch.where(fits, mean, torch.zeros_like(mean)).to(dtype).double()


def rotate_rows(weight: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the rows of an fp32 weight; in place where the transform allows it, so pass a tensor of your own.

    Args:
        weight: fp32 [N, K]; it may be overwritten.
        rotation: The rotation of the input channels.

    Returns:
        The rotated weight, fp32 [N, K].
    """
    if rotation.identity:
        return weight
    if rotation.outer > 1 or not weight.is_contiguous() or weight.device.type != "cpu":
        return rotate(weight, rotation, torch.float32)
    rows = weight.numpy()
    scale = rotation.inner**-0.5
    for_row_parts(len(rows), lambda part: hadamard_rows(rows[part], rotation.inner, scale))
    return weight


def pack_codes(codes: Tensor) -> Tensor:
    """Pack the codes of a layer, two to a byte; they come from our own solver, so their range is not checked again.

    Args:
        codes: int8 [N, K], −8 to 7, K even.

    Returns:
        The packed codes, int8 [N, K/2].
    """
    if codes.device.type != "cpu":
        return pack_int4(codes).view(torch.int8)
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.int8)
    source, target = codes.numpy(), packed.numpy()
    for_row_parts(len(source), lambda part: pack_rows(source[part], target[part]))
    return packed


def rotated_weight(checkpoint: Checkpoint, spec: LayerSpec, pre_quant_scale: Tensor | None = None) -> Tensor:
    """Return the rotated weight [N, K] of a (merged) layer in fp32, for quantizers other than ours.

    Args:
        checkpoint: The checkpoint that holds the layer; NaN and infinities count as 0.
        spec: The layer.
        pre_quant_scale: fp32 [K], by which columns are divided where the layer is smoothed; None where it is not.
    """
    parts = []
    for member in spec.members:
        weight = zeroed(checkpoint.read(f"{member}.weight").to(torch.float32, copy=True))
        parts.append(rotate_rows(weight if pre_quant_scale is None else weight.div_(pre_quant_scale), spec.rotation))
    return torch.cat(parts)
