"""Checkpoint → packed weights, one layer at a time.

Of the checkpoint, one tensor is in memory; of its fp32 copy, a block of rows. What is finished is written at its final
offset and journaled, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvdquant.artifact.entries import LayerEntry
from dvdquant.artifact.layout import weight_paths
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import CheckpointError
from dvdquant.model.plan import ModelPlan
from dvdquant.quantize.layer import quantize_layer, read_counted
from dvdquant.quantize.layer_inputs import predict_inputs
from dvdquant.quantize.magnitudes import Magnitudes
from dvdquant.system.files import FileEntry
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import TensorInfo
from dvdquant.system.safetensors_writer import StreamingWriter

if TYPE_CHECKING:
    from dvdquant.checkpoint.reader import Checkpoint

__all__ = ["PackedWeights", "check_weights", "left_out_text", "plan_shards", "quantize_checkpoint", "read_kept"]

SHARD_BYTES = 5 << 30
# Kept tensors journaled together.
BATCH_BYTES = 64 << 20

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
    return dict(zip(weight_paths(component, len(shards)), shards))


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
                    tensors, entry, bad = quantize_layer(
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
                    kept[name], found = read_kept(checkpoint, name, limits, allow_nonfinite, plan.kept[name][0])
                    bad += found
                files.store(step, kept, {"nonfinite": bad})
            nonfinite += transaction.data(step)["nonfinite"]
        # 4. Close the files and take their checksums.
        entries = files.finish(progress)
        return PackedWeights(files.places, entries, tuple(layers), tuple(nonfinite))


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


def read_kept(
    checkpoint: Checkpoint, name: str, limits: Magnitudes, allow_nonfinite: bool, dtype: torch.dtype
) -> tuple[Tensor, list[str]]:
    """Read one tensor that stays, in the dtype it is stored in; return it, and its name if it had NaN or infinities.

    Args:
        checkpoint: The open checkpoint.
        name: The name of the tensor.
        limits: The magnitudes that kernels can handle.
        allow_nonfinite: Whether NaN and infinities count as 0.
        dtype: The dtype that it is stored in.
    """
    tensor, found = read_counted(checkpoint, name, limits, allow_nonfinite)
    return tensor.to(dtype), found
