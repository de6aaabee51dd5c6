"""Checks of a session's inputs against the export. Errors name the user's own options."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dvdquant.errors import ShapeError
from dvdquant.model.families import Axis, Family, InputSpec, Sizes

__all__ = ["check_inputs", "graph_dtype"]

_OPTIONS = {"frames": "--num-frames", "height": "--height", "width": "--width"}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The dtypes in which each kind of input may arrive. It is then cast to the graph's own dtype.
_ACCEPTED = {"mask": _INTEGERS, "timestep": (*_FLOATS, *_INTEGERS[1:])}


def graph_dtype(spec: InputSpec, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a graph input: its own, or the model's for latents and embeddings.

    Args:
        spec: The graph input.
        dtype: The dtype of the model.
    """
    return spec.dtype or dtype


def check_inputs(family: Family, sizes: Sizes, inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs that are not the graph's, or have shapes that the export does not serve.

    Args:
        family: The model family.
        sizes: The sizes that the export serves.
        inputs: Tensors by name.

    Raises:
        ShapeError: An input does not fit. The error gives the size in latent units and in pixels or frames, the range
            of the export, and the option of ``dvdq-export`` that widens it.
    """
    specs = {spec.name: spec for spec in family.inputs(sizes)}
    # 1. Names.
    missing, unknown = sorted(specs.keys() - inputs.keys()), sorted(inputs.keys() - specs.keys())
    if missing or unknown:
        parts = [f"lack {', '.join(missing)}"] * bool(missing) + [f"have an unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise ShapeError(f"the inputs {' and '.join(parts)}", available=specs, fix="give each of these, and no other")
    # 2. Each input by itself. ``axes``: name of an axis -> (size, input that it was first seen in).
    axes: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        _check_one(spec, inputs[name], family, sizes, axes)
    # 3. Sizes that the inputs have in common.
    for name in ("frames", "height", "width"):
        if name in axes:
            _check_axis(name, axes[name][0], family, sizes)
    if "tokens" in axes:
        _check_tokens(axes, family, sizes)


def _check_one(spec: InputSpec, tensor: object, family: Family, sizes: Sizes, axes: dict[str, tuple[int, str]]) -> None:
    """Check type, dtype, rank and fixed sizes of one input, and write the size of each named axis into ``axes``."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{spec.name} is a {type(tensor).__name__}", available="a torch.Tensor")
    accepted = _ACCEPTED.get(spec.kind, _FLOATS)
    if tensor.dtype not in accepted:
        raise ShapeError(
            f"{spec.name} is {tensor.dtype}",
            available=[str(dtype).removeprefix("torch.") for dtype in accepted],
            fix=f"cast it: {spec.name} is a {spec.kind}",
        )
    shape = tuple(tensor.shape)
    if len(shape) != len(spec.shape):
        raise ShapeError(
            f"{spec.name} has shape {list(shape)}: {len(shape)} axes instead of {len(spec.shape)}",
            available=_described(spec),
        )
    for position, (size, wanted) in enumerate(zip(shape, spec.shape)):
        if isinstance(wanted, str):
            first, where = axes.setdefault(wanted, (size, spec.name))
            if first != size:
                raise ShapeError(
                    f"{wanted} is {size} in {spec.name} but {first} in {where}", available=_described(spec)
                )
        elif size != wanted:
            _refuse_size(spec, position, shape, sizes)


def _described(spec: InputSpec) -> str:
    return f"{spec.name} [{', '.join(map(str, spec.shape))}]"


def _refuse_size(spec: InputSpec, position: int, shape: tuple[int, ...], sizes: Sizes) -> None:
    size, wanted = shape[position], spec.shape[position]
    what = f"{spec.name} has shape {list(shape)}: {size} instead of {wanted} on axis {position}"
    fix = None
    if position == 0 and wanted == sizes.batch and len(shape) > 1:
        what = f"{spec.name} has a batch of {size}, the graphs were exported for {sizes.batch}"
        fix = f"split the request into batches of {sizes.batch}, or export with --batch {size}"
    elif wanted == sizes.text_tokens and spec.kind in ("embedding", "mask"):
        what = f"{spec.name} has {size} text tokens, the graphs were exported for {sizes.text_tokens}"
        fix = f"pad or cut the text embedding to {sizes.text_tokens} tokens, or export with --text-tokens {size}"
    raise ShapeError(what, available=_described(spec), fix=fix)


def _pixels(name: str, size: int, family: Family) -> int | None:
    """Return the number of pixels or frames that gives ``size`` latents, or None if no number does."""
    scale = family.vae_scale[("frames", "height", "width").index(name)]
    if name != "frames":
        return size * scale
    frames = (size - 1) * scale + 1
    return frames if size > 0 and family.latent_frames(frames) == size else None


def _in_text(name: str, sizes: tuple[int, ...], family: Family) -> str:
    unit = "frames" if name == "frames" else "pixels"
    pixels = [_pixels(name, size, family) for size in sizes]
    latents = "..".join(map(str, sizes)) + " latents"
    return latents if None in pixels else f"{latents} ({'..'.join(map(str, pixels))} {unit})"


def _check_axis(name: str, size: int, family: Family, sizes: Sizes) -> None:
    axis: Axis = getattr(sizes, name)
    patch = family.patch()[("frames", "height", "width").index(name)]
    served = (axis.min, axis.max) if axis.dynamic else (axis.opt,)
    if not axis.min <= size <= axis.max:
        # The export takes only multiples of the patch.
        low, high = axis.covering(size, patch)
        ends = [_pixels(name, end, family) for end in (low, high)]
        option = f"{_OPTIONS[name]} {ends[0]}:{ends[1]}" if None not in ends else f"--latent, {name} {low}:{high}"
        raise ShapeError(
            f"{name} is {_in_text(name, (size,), family)}, outside the profile of the export",
            available=f"{name} {_in_text(name, served, family)}",
            fix=f"use a size of the profile, or export again with {option}",
        )
    if size % patch:
        below = size // patch * patch
        near = [n for n in (below, below + patch) if axis.min <= n <= axis.max]
        raise ShapeError(
            f"{name} is {_in_text(name, (size,), family)}, no multiple of the patch size {patch}",
            available=[_in_text(name, (n,), family) for n in near],
            fix="use one of these sizes",
        )


def _check_tokens(axes: Mapping[str, tuple[int, str]], family: Family, sizes: Sizes) -> None:
    tokens, where = axes["tokens"]
    if {"frames", "height", "width"} <= axes.keys():
        expected = family.tokens(*(axes[name][0] for name in ("frames", "height", "width")))
        if tokens != expected:
            raise ShapeError(
                f"{where} has {tokens} tokens, the latents make {expected}", fix="make it for the size of the latents"
            )
        return
    low, high = (family.tokens(*sizes.at(which)) for which in ("min", "max"))
    if not low <= tokens <= high:
        profile = ", ".join(
            f"{name} {_in_text(name, (a.min, a.max) if a.dynamic else (a.opt,), family)}"
            for name, a in (("frames", sizes.frames), ("height", sizes.height), ("width", sizes.width))
        )
        raise ShapeError(
            f"{where} has {tokens} video tokens, outside the profile of the export",
            available=f"{low}..{high} tokens: {profile}" if low != high else f"{low} tokens: {profile}",
            fix="use a size of the profile, or export again with wider --num-frames, --height and --width",
        )
