"""Checkpoint → packed weights, one layer at a time.

Of the checkpoint, one tensor is in memory; of its fp32 copy, a block of rows. What is finished is written at its final
offset and journaled, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvdquant.artifact.entries import LayerEntry
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import CheckpointError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.numerics.packing import expand_zero, pack_int4
from dvdquant.quantize.backends.numba_rows import for_row_parts, hadamard_rows, pack_rows, squared_errors
from dvdquant.quantize.bgr import QuantizedWeight, quantize_weight
from dvdquant.quantize.gptq import output_energy
from dvdquant.quantize.layer_inputs import LayerInputs, predict_inputs
from dvdquant.quantize.magnitudes import Magnitudes
from dvdquant.system.files import FileEntry
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_io import StreamingWriter, TensorInfo

if TYPE_CHECKING:
    from dvdquant.checkpoint.formats.stored import ShardTensor
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = [
    "PackedWeights",
    "check_weights",
    "left_out_text",
    "plan_shards",
    "quantize_checkpoint",
    "reading_bytes",
    "rotate_rows",
    "rotated_weight",
]

SHARD_BYTES = 5 << 30
# Weights rotated and refined at a time: 32 MiB of fp32.
CHUNK_WEIGHTS = 1 << 23
# Kept tensors journaled together.
BATCH_BYTES = 64 << 20
# Rows of a layer whose output error goes into the table; at most twice as many.
SAMPLED_ROWS = 512

Planned = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class PackedWeights:
    """The written weight files.

    Args:
        tensors: Name -> (path relative to the export, place in that file).
        files: Relative path -> size and SHA-256.
        layers: The error table of the manifest.
        nonfinite: Names of tensors that held NaN or Inf and were accepted.
    """

    tensors: Mapping[str, tuple[str, TensorInfo]]
    files: Mapping[str, FileEntry]
    layers: tuple[LayerEntry, ...]
    nonfinite: tuple[str, ...]


def plan_shards(plan: ModelPlan, component: str, shard_bytes: int = SHARD_BYTES) -> dict[str, list[Planned]]:
    """Return the weight files of one transformer: relative path -> tensors in file order.

    Args:
        plan: The plan of the model.
        component: Name of the transformer, which the file names begin with.
        shard_bytes: Size at which files are split, in bytes; a larger tensor has a file of its own.
    """
    tensors: list[Planned] = [(n, d, s) for spec in plan.layers for n, (d, s) in spec.tensors().items()]
    tensors += [(name, dtype, shape) for name, (dtype, shape) in plan.kept.items()]
    shards: list[list[Planned]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += nbytes
    if len(shards) == 1:
        return {f"onnx/{component}.safetensors": shards[0]}
    count = len(shards)
    return {f"onnx/{component}-{i + 1:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards)}


def check_weights(checkpoint: Checkpoint, plan: ModelPlan) -> None:
    """Refuse a checkpoint that does not hold exactly the planned tensors, all of a floating dtype.

    Args:
        checkpoint: The checkpoint.
        plan: The plan of its model; tensors that it leaves out are not checked.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is not floating-point.
    """
    unused = set(plan.left_out(checkpoint.tensors))
    checkpoint.check_shapes(plan.shapes, unused)
    for name, info in checkpoint.tensors.items():
        if name not in unused and not info.dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"{info.path}: tensor {name!r} is stored as {info.dtype}, which is already quantized or no weight",
                available="floating-point weights",
                fix="use the original checkpoint in bf16, fp16 or fp32",
            )


def quantize_checkpoint(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    transaction: ExportTransaction,
    progress: Progress,
    component: str = "transformer",
    allow_nonfinite: bool = False,
    device: torch.device | str = "cpu",
) -> PackedWeights:
    """Quantize every planned layer of ``checkpoint`` and store what stays, into ``transaction``'s tree.

    Args:
        checkpoint: The checkpoint of one transformer.
        plan: The plan of its model: layers, kept tensors, recipe.
        transaction: The export; its journal says which steps are finished.
        progress: Where stages and messages are shown.
        component: Name of the transformer in the export.
        allow_nonfinite: Replace NaN and Inf by 0 instead of refusing them.
        device: Where inputs are predicted, and rows rotated and searched. Codes at rounding ties depend on it.

    Returns:
        The written files and the error table.

    Raises:
        CheckpointError: A missing or misshapen tensor, NaN/Inf without ``allow_nonfinite``, or a value that the export
            cannot hold.
        ResourceError: The disk is full.
    """
    check_weights(checkpoint, plan)
    if unused := plan.left_out(checkpoint.tensors):
        progress.say(left_out_text(checkpoint, unused))
    limits = Magnitudes(plan)
    with _Files(plan, transaction, component) as files:
        # 1. Predict the inputs, unless an earlier run finished all layers.
        finished = [files.finished(f"{component}:layer:{spec.name}", spec.tensors()) for spec in plan.layers]
        predicted = None
        if not all(finished):
            predicted = predict_inputs(checkpoint, plan, transaction, progress, component, device)
        # 2. Quantize the layers that are not finished, one after another.
        layers, nonfinite = [], []
        total = plan.quantized_weights
        with progress.stage("quantize", total, "weights") as stage:
            for spec, ready in zip(plan.layers, finished):
                step = f"{component}:layer:{spec.name}"
                stage.update(0, spec.name)
                if not ready:
                    known = predicted.layer(spec) if predicted else None
                    tensors, entry, bad = _quantize_layer(
                        checkpoint, plan, spec, known, limits, allow_nonfinite, torch.device(device)
                    )
                    files.store(step, tensors, {"entry": entry, "nonfinite": bad})
                data = transaction.data(step)
                layers.append(data["entry"])
                nonfinite += data["nonfinite"]
                stage.update(spec.out_features * spec.features, spec.name)
        # 3. Store the tensors that stay as they are, in batches.
        for index, batch in enumerate(_batches(plan)):
            step = f"{component}:kept:{index}"
            if not files.finished(step, batch):
                kept, bad = {}, []
                for name in batch:
                    kept[name], found = _converted(checkpoint, name, limits, allow_nonfinite, plan.kept[name][0])
                    bad += found
                files.store(step, kept, {"nonfinite": bad})
            nonfinite += transaction.data(step)["nonfinite"]
        # 4. Close the files and take their checksums.
        entries = files.finish(progress)
        return PackedWeights(files.places, entries, tuple(layers), tuple(nonfinite))


def reading_bytes(info: ShardTensor) -> int:
    """Return the bytes of memory that one tensor takes while it is read.

    Args:
        info: The tensor's entry in its file.
    """
    return info.reading_bytes


def left_out_text(checkpoint: Checkpoint, names: list[str]) -> str:
    """Return the message about the tensors that a checkpoint holds and its class does not use.

    Args:
        checkpoint: The checkpoint.
        names: The tensors that are left out; the first three are named.
    """
    return (
        f"{len(names)} tensors are left out, as diffusers does, because {checkpoint.class_name} does not use them: "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    )


class _Files:
    """The shard writers of one component, resumed or new."""

    def __init__(self, plan: ModelPlan, transaction: ExportTransaction, component: str) -> None:
        self._transaction = transaction
        self._writers: dict[str, StreamingWriter] = {}
        crcs: dict[str, int] = {}
        for step, data in transaction.steps.items():
            if step.startswith((f"{component}:layer:", f"{component}:kept:")):
                crcs.update(data["crc"])
        try:
            for relative, tensors in plan_shards(plan, component).items():
                existing = transaction.tree / relative
                done = {name: crcs[name] for name, _, _ in tensors if name in crcs}
                if existing.exists():
                    self._writers[relative] = StreamingWriter.resume(existing, tensors, done)
                else:
                    self._writers[relative] = StreamingWriter(transaction.path(relative, resumable=True), tensors)
        except BaseException:
            self.__exit__()  # the disk has room for the first of the files only: no descriptor of theirs stays open
            raise
        self.places = {n: (relative, info) for relative, w in self._writers.items() for n, info in w.tensors.items()}

    def finished(self, step: str, names: Mapping[str, Any] | list[str]) -> bool:
        """Return whether a step is in the journal and all its tensors are in the files."""
        return self._transaction.is_done(step) and all(n in self._writers[self.places[n][0]].written for n in names)

    def store(self, step: str, tensors: Mapping[str, Tensor], data: dict[str, Any]) -> None:
        """Write the tensors of a step, sync their files, and then put the step with ``data`` into the journal."""
        crcs, touched = {}, set()
        for name, tensor in tensors.items():
            writer = self._writers[self.places[name][0]]
            writer.written.discard(name)  # a tensor of an unfinished step is written again
            crcs[name] = writer.write(name, tensor)
            touched.add(self.places[name][0])
        for relative in touched:
            self._writers[relative].sync()
        self._transaction.done(step, {**data, "crc": crcs})

    def finish(self, progress: Progress) -> dict[str, FileEntry]:
        """Finish all files; return relative path -> size and SHA-256."""
        with progress.stage("hash", sum(w.nbytes for w in self._writers.values()), "B") as stage:
            entries = {}
            for relative, writer in self._writers.items():
                entries[relative] = writer.finish()
                stage.update(writer.nbytes, relative)
        return entries

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_exc: object) -> None:
        for writer in self._writers.values():
            writer.close()


def _batches(plan: ModelPlan) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name, (dtype, shape) in plan.kept.items():
        batch.append(name)
        size += dtype.itemsize * torch.Size(shape).numel()
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(checkpoint: Checkpoint, name: str, limits: Magnitudes, allow_nonfinite: bool) -> tuple[Tensor, list[str]]:
    """Read one tensor, finite and within the limits; return it, and its name if it had NaN or Inf, which are 0 now.

    fp8 comes as bf16, which holds all of its values: few operations know fp8, and so an export is the same as that of the
    converted checkpoint.
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
        found, tensor = [name], _zeroed(tensor)
    limits.check(checkpoint, name, tensor)
    return tensor, found


def _converted(
    checkpoint: Checkpoint, name: str, limits: Magnitudes, allow_nonfinite: bool, dtype: torch.dtype
) -> tuple[Tensor, list[str]]:
    """Read one tensor that stays, in the dtype it is stored in; return it, and its name if it had NaN or infinities."""
    tensor, found = _read(checkpoint, name, limits, allow_nonfinite)
    return tensor.to(dtype), found


def _zeroed(tensor: Tensor) -> Tensor:
    """Put 0 in the place of NaN and infinities."""
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros((), dtype=tensor.dtype))


def _quantize_layer(
    checkpoint: Checkpoint,
    plan: ModelPlan,
    spec: LayerSpec,
    known: LayerInputs | None,
    limits: Magnitudes,
    allow_nonfinite: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], LayerEntry, list[str]]:
    """Return the packed tensors of one (merged) layer, its line of the error table, and its non-finite tensors."""
    packed, scales, group_scales, zeros, biases = [], [], [], [], []
    bad: list[str] = []
    if known is not None and device.type != "cpu":
        known = replace(known, smooth_scale=known.smooth_scale.to(device), hessian=known.hessian.to(device))
    # As the graph subtracts it, so that what is added to the bias is the same.
    shift = None if known is None or known.shift is None else _shift(known.shift, plan.dtype).to(device)
    sums = _ErrorSums(known, max(1, spec.out_features // SAMPLED_ROWS))
    for member, rows, has_bias in zip(spec.members, spec.rows, spec.biases):
        weight, found = _read(checkpoint, f"{member}.weight", limits, allow_nonfinite)
        bad += found
        # 1. In chunks of rows: W·shift, balance, rotate, quantize (BGR), round with feedback, add up errors, pack.
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
            packed.append(_packed(quantized.codes))
            scales.append(quantized.scale)
            group_scales.append(quantized.group_scale)
            zeros.append(quantized.zero)
        # 2. The bias of this member, with W·shift.
        bias = torch.zeros(rows)
        if has_bias:
            stored, found = _read(checkpoint, f"{member}.bias", limits, allow_nonfinite)
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


def _shift(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the constants [K] that are subtracted from a layer's inputs, as the graph has them; fp64.

    Any constants are correct. Channels whose mean is more than half of what ``dtype`` holds keep theirs (the constant
    is 0): what is left of them might not fit.
    """
    fits = mean.abs() <= torch.finfo(dtype).max / 2
    return torch.where(fits, mean, torch.zeros_like(mean)).to(dtype).double()


class _ErrorSums:
    """Squared errors of a layer and of min-max, summed over its chunks.

    They are errors of the weights, or of the outputs where something is known of the inputs. Output errors take only
    every ``stride``-th row, as the sum over all rows takes longer than quantizing them.
    """

    def __init__(self, known: LayerInputs | None, stride: int) -> None:
        self.known, self.stride = known, stride
        self.energy = self.error = self.minmax = 0.0
        self.weight_energy = self.weight_error = 0.0

    def add(self, weight: Tensor, quantized: QuantizedWeight, plan: ModelPlan, start: int) -> None:
        """Add rows ``start`` and following of one member."""
        minmax = replace(plan.recipe.weight, solver="minmax")
        energy, error = _squared_errors(weight, quantized)
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
        self.minmax += _squared_errors(weight, baseline)[1]

    def entry(self, checkpoint: Checkpoint, spec: LayerSpec) -> LayerEntry:
        """Return the line of ``spec`` in the error table.

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


def _packed(codes: Tensor) -> Tensor:
    """Pack int8 [N, K] to int8 [N, K/2]; the codes come from our own solver, so their range is not checked again."""
    if codes.device.type != "cpu":
        return pack_int4(codes).view(torch.int8)
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.int8)
    source, target = codes.numpy(), packed.numpy()
    for_row_parts(len(source), lambda part: pack_rows(source[part], target[part]))
    return packed


def _squared_errors(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Return (‖w‖², ‖w − ŵ‖²)."""
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


def rotated_weight(checkpoint: Checkpoint, spec: LayerSpec, pre_quant_scale: Tensor | None = None) -> Tensor:
    """Return the rotated weight [N, K] of a (merged) layer in fp32, for quantizers other than ours.

    Args:
        checkpoint: The checkpoint that holds the layer; NaN and infinities count as 0.
        spec: The layer.
        pre_quant_scale: fp32 [K], by which columns are divided where the layer is balanced; None where it is not.
    """
    parts = []
    for member in spec.members:
        weight = _zeroed(checkpoint.read(f"{member}.weight").to(torch.float32, copy=True))
        parts.append(rotate_rows(weight if pre_quant_scale is None else weight.div_(pre_quant_scale), spec.rotation))
    return torch.cat(parts)
