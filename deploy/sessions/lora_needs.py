"""What LoRAs beside the weights need of a session, before anything is loaded: bytes, and a backend that has a place for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dvdquant.checkpoint.lora.fuse import read_loras
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.checkpoint.lora.terms import Loras, Term
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.lora_inputs import LoraInputs
from dvdquant.errors import UnsupportedError
from dvdquant.model.lora_inputs import lora_input_shapes

__all__ = ["lora_bytes", "read_beside", "without_place"]


def read_beside(artifact: Artifact, beside: Mapping[str, Sequence[LoraSpec]]) -> dict[str, Loras]:
    """Return the changes that LoRAs make, by transformer; one without a LoRA is left out.

    Args:
        artifact: The export.
        beside: The LoRAs of each transformer.

    Raises:
        CheckpointError: A file is no LoRA of its transformer.
    """
    found = {}
    for component, specs in beside.items():
        if specs:
            class_name = str(artifact.config(component)["_class_name"])
            found[component] = read_loras(class_name, artifact.plan(component).shapes, specs)
    return found


def without_place(artifact: Artifact, component: str, loras: Loras) -> str | None:
    """Return why graphs and engines have no place for LoRAs, in words; None where they have.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        loras: The LoRAs of the transformer.
    """
    if not artifact.manifest.lora_rank:
        return "the export has no place for a LoRA: it was made without --lora-rank"
    try:
        LoraInputs(artifact, component).check(loras)
    except UnsupportedError as error:
        return error.what
    return None


def lora_bytes(artifact: Artifact, component: str, loras: Loras | None, backend: str) -> int:
    """Return the bytes that LoRAs take on the device in a session: reserved inputs, branches, and changed copies.

    Args:
        artifact: The export.
        component: The name of one transformer of the export.
        loras: The LoRAs that run beside its weights, or None.
        backend: ``onnxruntime``, ``pytorch``, ``tensorrt_rtx`` (or ``rtx``) or ``tensorrt``.
    """
    plan = artifact.plan(component)
    layers = {member for spec in plan.layers for member in spec.members}
    terms = {} if loras is None else loras.terms
    quantized = {name: found for name, found in terms.items() if name.rpartition(".")[0] in layers}
    changed = sum(
        plan.kept[name][0].itemsize * math.prod(plan.kept[name][1])
        for name in terms.keys() - quantized.keys()
        if name in plan.kept
    )
    if backend == "pytorch":
        elements = 0
        for name, found in quantized.items():
            shape = plan.shapes[name]
            # Changes of a bias are summed into one, of the rows that they are about.
            elements += shape[0] if len(shape) == 1 else sum(_elements(term, shape) for term in found)
        return plan.dtype.itemsize * elements + changed
    room = sum(math.prod(shape) for shape in lora_input_shapes(plan.layers, artifact.manifest.lora_rank).values())
    if backend == "onnxruntime":
        # It computes bfloat16 in float32, and what stays is bound as it was beside its changed copy.
        return room * (4 if plan.dtype == torch.bfloat16 else plan.dtype.itemsize) + changed
    return room * plan.dtype.itemsize  # engines read what changes where it lies already


def _elements(term: Term, shape: Sequence[int]) -> int:
    """Return the elements of a change to a weight of this shape, as a branch holds it."""
    rows = shape[0] if term.place.rows is None else sum(stop - start for start, stop in term.place.rows)
    features = math.prod(shape[1:])
    if term.down is None:
        return rows * features
    rank = term.down.shape[0]
    return rank * (rows + features)
