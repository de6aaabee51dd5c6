"""Asking a model whether it can draw a request, and what it takes: sizes, lengths, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dvdquant.deploy.serve.requests import frames_of_seconds, generate_request

if TYPE_CHECKING:
    from dvdquant.deploy.generation.generator import Generator
    from dvdquant.deploy.serve.settings import ModelSource
    from dvdquant.model.families import Axis

__all__ = ["check_values", "model_facts"]


def check_values(generator: Generator, source: ModelSource, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`.service.CheckedRequest` but the model's name.

    Args:
        generator: The model.
        source: Where it comes from, with its schedules.
        values: From :func:`.requests.read_request`.

    Raises:
        DvdquantError: The model cannot draw it.
    """
    from dvdquant.deploy.generation.request import GenerateRequest

    filled = dict(values)
    if (seconds := filled.pop("seconds", None)) is not None:
        usual = generator.check(GenerateRequest(values["prompt"]))
        fps = filled.get("fps") or generator.fps(usual.num_frames or 1)
        filled["num_frames"] = frames_of_seconds(seconds, fps, _pixels(generator)["frames"])
    request = generator.check(generate_request(filled, generator.artifact.manifest, source))
    guided = request.guidance != 1 and generator.artifact.family().name != "hunyuan-video"
    frames = request.num_frames or 1
    return {
        "values": filled,
        "steps": request.steps,
        "guidance": request.guidance,
        "frames": frames,
        "height": request.height,
        "width": request.width,
        "fps": filled.get("fps") or generator.fps(frames),
        "branches": 2 if guided else 1,
        "mode": request.mode,
    }


def model_facts(generator: Generator) -> dict[str, Any]:
    """Return what ``/v1/models`` says of a model.

    Args:
        generator: The model.
    """
    artifact = generator.artifact
    bits = artifact.bits(artifact.components[0])
    table = getattr(generator, "table", None)
    return {
        "family": artifact.family().name,
        "recipe": artifact.manifest.recipe["name"],
        "modes": [*(("switch",) if len(bits) > 1 else ()), *(f"a{b}" for b in bits)],
        **_pixels(generator),
        "example": None if table is None else table.example(),
        "words": None if table is None else table.describe(),
    }


def _pixels(generator: Generator) -> dict[str, dict[str, int]]:
    """Return the sizes that a model takes: least, greatest and usual one, and the step between two."""
    artifact = generator.artifact
    family, sizes = artifact.family(), artifact.sizes
    if hasattr(generator, "table"):
        scale, patch, causal = (1, 1, 1), family.patch(), False
    else:
        # Of the frames a pipeline fills the last patch itself; the first frame has a latent of its own.
        scale, patch, causal = family.vae_scale, (1, *family.patch()[1:]), True
    axes = (("frames", sizes.frames), ("height", sizes.height), ("width", sizes.width))
    return {
        name: _axis(axis, scale[i], patch[i], int(causal and name == "frames")) for i, (name, axis) in enumerate(axes)
    }


def _axis(axis: Axis, scale: int, patch: int, offset: int) -> dict[str, int]:
    def pixels(units: int) -> int:
        return (units - offset) * scale + offset

    return {"min": pixels(axis.min), "max": pixels(axis.max), "default": pixels(axis.opt), "step": scale * patch}
