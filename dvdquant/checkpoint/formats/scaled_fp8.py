"""fp8 weights with scales: each is a weight divided by its largest magnitude, and means nothing without the factor.

ComfyUI's files have ``X.scale_weight``, newer ones and those of ModelOpt ``X.weight_scale``. What scales activations
(``X.scale_input``, ``X.input_scale``) is of no use here. The factor is applied in fp32 when the weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dvdquant.checkpoint.formats.stored import ShardTensor, Stored
from dvdquant.errors import CheckpointError
from dvdquant.system.files import strict_json
from dvdquant.text import shown

__all__ = ["is_modelopt_fp8", "pair_scales"]

MARKER = "scaled_fp8"
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
ACTIVATION_SCALES = (".scale_input", ".input_scale")
LABEL = ".comfy_quant"
LABELS = ("float8_e4m3fn", "float8_e5m2")
# Beside the format, a label may say how ComfyUI multiplies, which changes no weight.
LABEL_KEYS = {"format", "full_precision_matrix_mult", "dynamic", "orig_dtype", "orig_shape"}
MAX_LABEL = 4096
FIX = "use the model's 16-bit checkpoint, or its fp8 file with scale_weight or weight_scale"
_FLOATS = ("F32", "F16", "BF16")


def is_modelopt_fp8(quantized: Any) -> bool:
    """Return whether the ``quantization_config`` of a config.json is ModelOpt's for fp8 with one scale a tensor or a row.

    Args:
        quantized: The value of the field, whatever it is.
    """
    if not isinstance(quantized, dict):
        return False
    method, algorithm = quantized.get("quant_method"), quantized.get("quant_algo")
    return method in ("modelopt", "modelopt_fp8") and algorithm in ("FP8", "fp8", "FP8_PER_CHANNEL_PER_TOKEN")


def pair_scales(
    tensors: Mapping[str, ShardTensor],
    metadata: Mapping[str, str],
    place: str,
    read: Callable[[ShardTensor], bytes],
) -> dict[str, ShardTensor]:
    """Return the tensors without scales, labels and markers, each weight with its scale.

    Args:
        tensors: The tensors by their names in the file.
        metadata: The metadata of the file's header.
        place: The file, for errors.
        read: A function that returns the bytes of a small tensor.

    Raises:
        CheckpointError: A scale lacks its weight, a weight lacks its scale, or scales are of another kind.
    """
    _check_labels(tensors, metadata, place, read)
    scales: dict[str, ShardTensor] = {}
    kept: dict[str, ShardTensor] = {}
    scaled = False
    for name, info in tensors.items():
        if name.rpartition(".")[2] == MARKER:
            scaled = True
        elif suffix := next((end for end in WEIGHT_SCALES if name.endswith(end)), None):
            weight = f"{name.removesuffix(suffix)}.weight"
            if weight in scales:
                raise CheckpointError(f"{place} holds two scales of {shown(weight)!r}", fix=FIX)
            scales[weight] = info
        elif not name.endswith((LABEL, *ACTIVATION_SCALES)):
            kept[name] = info
    if not scaled and not scales:
        return kept
    for weight, scale in scales.items():
        if weight not in kept:
            raise CheckpointError(f"{place} holds the scale {shown(scale.name)!r} of no weight", fix=FIX)
        kept[weight] = _with_scale(kept[weight], scale, place)
    bare = [name for name, info in kept.items() if info.dtype.startswith("F8")]
    if bare:
        raise CheckpointError(
            f"{place} is said to hold fp8 weights with scales, and {len(bare)} of its weights have none, such as "
            f"{shown(bare[0])!r}",
            fix=FIX,
        )
    return kept


def _with_scale(weight: ShardTensor, scale: ShardTensor, place: str) -> ShardTensor:
    if weight.stored is not None or not weight.dtype.startswith(("F", "BF")) or weight.dtype == "F64":
        raise CheckpointError(
            f"{place}: {shown(weight.name)!r} is stored as {weight.dtype} with a scale, which is already quantized",
            available="fp8 with scales",
            fix=FIX,
        )
    count, first = math.prod(scale.shape), weight.shape[0] if weight.shape else 0
    by_row = count == first and scale.shape[:1] == (first,)
    if scale.dtype not in _FLOATS or not (count == 1 or by_row):
        raise CheckpointError(
            f"{place}: {shown(scale.name)!r} is {scale.dtype} {list(scale.shape)[:4]}: scales of blocks, or of another kind "
            f"than one for the tensor or for each of its {first} rows",
            fix=FIX,
        )
    return replace(weight, dtype="F32", stored=Stored(weight.dtype, scale=scale))


def _check_labels(
    tensors: Mapping[str, ShardTensor],
    metadata: Mapping[str, str],
    place: str,
    read: Callable[[ShardTensor], bytes],
) -> None:
    """Refuse labels of ComfyUI's other formats."""
    labels: dict[str, Any] = {}
    text = metadata.get("_quantization_metadata")
    try:
        if text is not None:
            layers = strict_json(text.encode()).get("layers", {})
            labels.update(layers)
        for name, info in tensors.items():
            if name.endswith(LABEL):
                if info.dtype != "U8" or info.nbytes > MAX_LABEL:
                    raise ValueError(f"{shown(name)!r} is no label")
                labels[name.removesuffix(LABEL)] = strict_json(read(info))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{place}: its labels of quantized layers cannot be read: {error!s:.300}", fix=FIX
        ) from error
    for layer, label in labels.items():
        known = isinstance(label, dict) and label.get("format") in LABELS
        if not known or not label.keys() <= LABEL_KEYS:
            said = json.dumps(label)
            raise CheckpointError(
                f"{place} is a checkpoint quantized for ComfyUI: {shown(layer)!r} is labelled {shown(said, 120)}",
                available=[f"the format {name}" for name in LABELS],
                fix=FIX,
            )
