"""ConvRot W4A4 as ComfyUI loads it: the codes of an export on its grid, in the order and under the names that it knows.

A layer ``L`` is ``L.weight`` (two codes a byte, the even channel in the low half), ``L.weight_scale`` (fp32, a row each) and
``L.comfy_quant`` (JSON as bytes: the format, the block of the rotation, and whether activations have 4 or 8 bits). comfy-kitchen
multiplies it. No weight is quantized again: a code changes its place within its block, and its sign
(:mod:`dvdquant.numerics.regular_hadamard`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvdquant.checkpoint.formats.scheme import Scheme
from dvdquant.checkpoint.formats.translate import SCHEMES
from dvdquant.errors import UnsupportedError
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan
from dvdquant.numerics.packing import pack_int4, unpack_int4
from dvdquant.numerics.regular_hadamard import regular_order
from dvdquant.system.files import FileEntry
from dvdquant.system.safetensors_writer import StreamingWriter

__all__ = [
    "BLOCKS",
    "GROUP",
    "comfy_bytes",
    "comfy_names",
    "comfy_path",
    "regular_codes",
    "write_comfy",
]

BLOCKS = (16, 64, 256)
"""The blocks that ComfyUI and SGLang rotate in."""
GROUP = 64
"""Their kernels take input channels by so many."""
_MULTIPLY = {"comfy": "int4", "comfy-a8": "int8"}
_CHUNK_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class _Member:
    """A linear layer of the model in the file.

    Args:
        name: Its name there.
        spec: The layer of the export that holds its rows.
        rows: Which rows of that layer it is.
        bias: It has a bias.
    """

    name: str
    spec: LayerSpec
    rows: slice
    bias: bool


def comfy_path(component: str, layout: str) -> str:
    """Return the place of a file in the export.

    Args:
        component: The transformer.
        layout: ``comfy`` or ``comfy-a8``.
    """
    return f"comfy/{component}_{'w4a4' if layout == 'comfy' else 'w4a8'}.safetensors"


def comfy_names(plan: ModelPlan) -> dict[str, str]:
    """Return the names that ComfyUI gives the modules, and the tensors outside of modules, of a transformer.

    Args:
        plan: The plan of the model.

    Returns:
        diffusers' name of a linear layer or of a kept tensor -> that of ComfyUI.

    Raises:
        UnsupportedError: ComfyUI's names of this family are not known, or its layers are cut in another way there.
    """
    class_name = str(plan.family.config.get("_class_name"))
    scheme = next((each for each in SCHEMES if each.class_name == class_name), None)
    members = [member for spec in plan.layers for member in spec.members]
    names = {name: _theirs(scheme, name) for name in (*members, *plan.kept)} if scheme is not None else {}
    if scheme is None or not _leads_back(scheme, plan, names):
        raise UnsupportedError(
            f"--also-write comfy: {class_name} has other layers in ComfyUI",
            available=", ".join(each.title for each in SCHEMES if not any(s.joined for s in each.names.stacks)),
            fix="leave --also-write out",
        )
    return names


def _theirs(scheme: Scheme, name: str) -> str:
    """Return the first name that others give a module or a tensor; the same where they have no other."""
    if (whole := next(scheme.names.theirs(name), None)) is not None:
        return whole
    module, dot, parameter = name.rpartition(".")
    known = next(scheme.names.theirs(module), module)
    return f"{known}{dot}{parameter}"


def _leads_back(scheme: Scheme, plan: ModelPlan, names: Mapping[str, str]) -> bool:
    """Return whether a reader of these names finds every tensor of the model again, whole and under its own name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in plan.layers:
        shapes |= {f"{names[member]}.weight": (rows, spec.features) for member, rows in zip(spec.members, spec.rows)}
    shapes |= {names[name]: shape for name, (_, shape) in plan.kept.items()}
    wanted = {f"{member}.weight" for spec in plan.layers for member in spec.members} | set(plan.kept)
    pieces = [piece for found in scheme.pieces(shapes).values() for piece in found]
    whole = all(piece.rows is None and not piece.swapped for piece in pieces)
    return whole and len(shapes) == len(wanted) and {piece.name for piece in pieces} == wanted


def regular_codes(packed: Tensor, block: int) -> Tensor:
    """Return the codes of rotated weights in the order and with the signs of the regular rotation.

    Args:
        packed: Two codes a byte, none of them −8, int8 [N, K/2].
        block: The channels of a block.

    Returns:
        int8 [N, K/2].
    """
    places, signs = regular_order(block)
    codes = unpack_int4(packed).reshape(len(packed), -1, block)
    return pack_int4((codes[..., places] * signs).flatten(-2)).view(torch.int8)


def _marker(spec: LayerSpec, layout: str) -> Tensor:
    """Return the description of a layer, uint8."""
    facts = {"format": "convrot_w4a4", "convrot_groupsize": spec.rotation.block, "linear_dtype": _MULTIPLY[layout]}
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def _members(plan: ModelPlan, names: Mapping[str, str]) -> list[_Member]:
    """Return the linear layers of the file; ``names`` are those of :func:`comfy_names`."""
    found = []
    for spec in plan.layers:
        start = 0
        for member, rows, bias in zip(spec.members, spec.rows, spec.biases):
            found.append(_Member(names[member], spec, slice(start, start + rows), bias))
            start += rows
    return found


def _planned(plan: ModelPlan, layout: str, names: Mapping[str, str]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return (name, dtype, shape) of every tensor of the file, those of the widest dtype first, so that all are aligned."""
    tensors = []
    for member in _members(plan, names):
        rows = member.rows.stop - member.rows.start
        tensors += [
            (f"{member.name}.weight_scale", torch.float32, (rows,)),
            (f"{member.name}.weight", torch.int8, (rows, member.spec.features // 2)),
            (f"{member.name}.comfy_quant", torch.uint8, tuple(_marker(member.spec, layout).shape)),
        ]
        tensors += [(f"{member.name}.bias", torch.float32, (rows,))] * member.bias
    tensors += [(names[name], dtype, shape) for name, (dtype, shape) in plan.kept.items()]
    return sorted(tensors, key=lambda tensor: -tensor[1].itemsize)


def comfy_bytes(plan: ModelPlan, layout: str) -> int:
    """Return the bytes of the tensors of a file.

    Args:
        plan: The plan of the model.
        layout: ``comfy`` or ``comfy-a8``.
    """
    return sum(
        dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in _planned(plan, layout, comfy_names(plan))
    )


def write_comfy(
    path: Path,
    plan: ModelPlan,
    layout: str,
    read: Callable[[str], Tensor],
    update: Callable[[int, str], None],
) -> FileEntry:
    """Write one transformer.

    Args:
        path: The file.
        plan: The plan of the model, whose recipe has the regular rotation.
        layout: ``comfy`` or ``comfy-a8``.
        read: Returns a stored tensor of the export by its name.
        update: Called with (weights that were written, name).

    Returns:
        Size and SHA-256.

    Raises:
        ResourceError: The disk is full.
        OutputError: Another write failed.
    """
    names = comfy_names(plan)
    writer = StreamingWriter(path, _planned(plan, layout, names), {"format": "pt"}, alignment=1)
    try:
        for member in _members(plan, names):
            spec, rows = member.spec, member.rows
            packed = read(f"{spec.name}.weight")[rows]
            step = max(1, _CHUNK_WEIGHTS // spec.features)
            parts = [
                regular_codes(packed[first : first + step], spec.rotation.block)
                for first in range(0, len(packed), step)
            ]
            writer.write(f"{member.name}.weight", torch.cat(parts))
            writer.write(f"{member.name}.weight_scale", read(f"{spec.name}.weight_scale")[rows].contiguous())
            writer.write(f"{member.name}.comfy_quant", _marker(spec, layout))
            if member.bias:
                writer.write(f"{member.name}.bias", read(f"{spec.name}.bias")[rows].contiguous())
            update(len(packed) * spec.features, member.name)
        for name in plan.kept:
            writer.write(names[name], read(name))
        return writer.finish()
    finally:
        writer.close()
