"""Limits that whoever runs a server sets for its requests, tighter than what the export could make."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.number_checks import is_whole
from dvdquant.errors import ShapeError
from dvdquant.system.records import brief

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """The largest request that is served; None sets no limit beyond what the export can make.

    Args:
        steps: Denoising steps.
        pixels: Frames · height · width of a clip.
        prompt: Characters of the prompt, and of the negative prompt.

    Raises:
        ShapeError: A limit is no whole number from 1 up.
    """

    steps: int | None = None
    pixels: int | None = None
    prompt: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (not is_whole(value) or value < 1):
                raise ShapeError(
                    f"the limit of {field.name} is {brief(value)}", available="a whole number from 1 up, or none"
                )

    def check(self, request: GenerateRequest) -> None:
        """Refuse a request beyond a limit.

        Args:
            request: The request, with steps and size filled in.

        Raises:
            ShapeError: The request is beyond a limit. The error names it.
        """
        if self.prompt is not None:
            for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
                if len(text) > self.prompt:
                    raise ShapeError(
                        f"the {name} has {len(text)} characters",
                        available=f"up to {self.prompt} here",
                        fix="say it shorter",
                    )
        if self.steps is not None and (request.steps or 0) > self.steps:
            raise ShapeError(f"{request.steps} steps", available=f"up to {self.steps} here", fix="ask for fewer steps")
        size = (request.num_frames or 0, request.height or 0, request.width or 0)
        pixels = size[0] * size[1] * size[2]
        if self.pixels is not None and pixels > self.pixels:
            raise ShapeError(
                f"{size[0]} frames of {size[1]} × {size[2]} are {pixels} pixels",
                available=f"up to {self.pixels} here",
                fix="ask for a smaller or shorter clip",
            )
