"""Asking a model whether it can draw a request, and what it takes: sizes, lengths, defaults. Nothing here imports torch."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import limits
from dvdquant.deploy.generation.check import BATCHED, RequestChecker, TableChecker, open_checker
from dvdquant.deploy.generation.images import grey_picture
from dvdquant.deploy.generation.request import DISTILLED, GenerateRequest, VideoSize
from dvdquant.deploy.serve.jobs import NewJob
from dvdquant.deploy.serve.request.pictures import PICTURES
from dvdquant.deploy.serve.request.requests import frames_of_seconds, generate_request
from dvdquant.deploy.serve.settings import Limits, ModelSource
from dvdquant.errors import ShapeError

__all__ = ["CheckedRequest", "ServedModel", "calls_a_step"]


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be drawn, with everything filled in.

    Args:
        model: The name of the model.
        values: The fields of the request; ``seconds`` has become ``num_frames``.
        steps: The number of denoising steps.
        guidance: The guidance scale.
        frames: The number of frames.
        height: The height in pixels.
        width: The width in pixels.
        fps: Frames per second.
        calls: Calls of the transformer in a step.
        mode: ``switch``, ``planned``, ``a4`` or ``a8``.
    """

    model: str
    values: dict[str, Any]
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    fps: float
    calls: int
    mode: str

    def job(self, request_id: str, pictures: Mapping[str, Mapping[str, Any]] | None = None) -> NewJob:
        """Return what is queued.

        Args:
            request_id: The id of the HTTP request.
            pictures: What is known of each picture, by its name.
        """
        seconds = round(self.frames / self.fps, 3)
        values = {**self.values, **(pictures or {})}
        return NewJob(self.model, values, self.steps, (self.width, self.height), seconds, request_id)


class ServedModel:
    """A model as the server knows it: its manifest and configs are read, no weight and no framework is loaded.

    Args:
        source: Where it comes from.
        most: What one request may ask for.

    Raises:
        DvdquantError: The export or the model of its pipeline cannot be used.
    """

    def __init__(self, source: ModelSource, most: Limits) -> None:
        self.source = source
        self.checker: RequestChecker = open_checker(
            Artifact.open(source.out),
            pipeline=source.pipeline,
            limits=limits.Limits(steps=most.steps, pixels=most.pixels, prompt=most.prompt),
        )

    @functools.cached_property
    def pictures(self) -> dict[str, str]:
        """Return for each picture of a request whether the model takes it: ``none``, ``optional`` or ``required``."""
        taken = self.checker.images_taken()
        return {name: taken[field] for name, field in PICTURES.items()}

    def check(self, values: Mapping[str, Any], pictures: Collection[str] = ()) -> CheckedRequest:
        """Return the request with everything filled in.

        Args:
            values: From :func:`.requests.read_request`.
            pictures: The names of its pictures, which are not looked at here.

        Raises:
            DvdquantError: The model cannot draw it, or it is over a limit.
        """
        filled = dict(values)
        if (seconds := filled.pop("seconds", None)) is not None:
            taken = self._pixels()["frames"]
            fps = filled.get("fps") or self.checker.fps(taken["default"])
            filled["num_frames"] = frames_of_seconds(seconds, fps, taken)
        given = {name: grey_picture() for name in pictures}
        request = self.checker.check(generate_request(filled, self.checker.artifact.manifest, self.source, given))
        frames, height, width = request.num_frames, request.height, request.width
        steps, guidance = request.steps, request.guidance
        if steps is None or guidance is None or frames is None or height is None or width is None:
            raise ShapeError(
                "the request leaves something open that the model does not fill in",
                fix="send size, seconds or num_frames, and num_inference_steps in the request",
            )
        return CheckedRequest(
            model=self.source.name,
            values=filled,
            steps=steps,
            guidance=guidance,
            frames=frames,
            height=height,
            width=width,
            fps=filled.get("fps") or self.checker.fps(frames),
            calls=calls_a_step(self.checker, request),
            mode=request.mode,
        )

    def facts(self) -> dict[str, Any]:
        """Return what ``/v1/models`` says of the model."""
        checker = self.checker
        bits = checker.artifact.bits(checker.artifact.components[0])
        words = checker.words if isinstance(checker, TableChecker) else None
        return {
            "family": checker.family.name,
            "recipe": checker.artifact.manifest.recipe["name"],
            "modes": [*(("switch",) if len(bits) > 1 else ()), *(f"a{b}" for b in bits)],
            "schedules": sorted(self.source.schedules),
            "pictures": self.pictures,
            **self._pixels(),
            "example": None if words is None else words.example(),
            "words": None if words is None else words.describe(),
        }

    def _pixels(self) -> dict[str, dict[str, int]]:
        """Return the sizes that the model takes: least, greatest and usual one, and the step between two."""
        sizes = self.checker.artifact.sizes
        usual = self.checker.size_of(GenerateRequest(""))
        found = {}
        for i, name in enumerate(("frames", "height", "width")):
            axis = (sizes.frames, sizes.height, sizes.width)[i]
            pixels = (usual.frames, usual.height, usual.width)[i]
            found[name] = {
                "default": pixels,
                **_range(usual, i, pixels, axis.min, axis.max, self._scale(i), self._patch(i)),
            }
        return found

    def _scale(self, axis: int) -> int:
        """Return the pixels of a latent unit along an axis."""
        return 1 if isinstance(self.checker, TableChecker) else self.checker.family.vae_scale[axis]

    def _patch(self, axis: int) -> int:
        """Return the latent units that the transformer takes at once; of the frames a pipeline fills the last patch."""
        return 1 if axis == 0 and not isinstance(self.checker, TableChecker) else self.checker.family.patch()[axis]


def calls_a_step(checker: RequestChecker, request: GenerateRequest) -> int:
    """Return how often a step calls the transformer, as runs do.

    Args:
        checker: The model.
        request: A request that it has filled in.
    """
    family, batch = checker.family.name, checker.artifact.sizes.batch
    # A table's loop leaves guidance out at 1 alone; pipelines do below 1, too.
    guided = request.guidance != 1 if isinstance(checker, TableChecker) else request.guided
    two = guided and family not in DISTILLED
    return 1 if not two or (family in BATCHED and batch > 1) else 2


def _range(usual: VideoSize, axis: int, pixels: int, low: int, high: int, scale: int, patch: int) -> dict[str, int]:
    """Return ``min``, ``max`` and ``step`` in pixels: sizes are linear in latent units, and the usual one is known."""
    units = usual.latent[axis]
    return {"min": pixels - (units - low) * scale, "max": pixels + (high - units) * scale, "step": scale * patch}
