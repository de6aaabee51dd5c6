"""A model that checks requests and draws clips in this process, for servers that keep their own queue: Triton and Dynamo."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.cancel import CancelSignal
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.video import write_mp4
from dvdquant.deploy.serve.request.checks import CheckedRequest, ServedModel
from dvdquant.deploy.serve.request.decoding import decode_picture
from dvdquant.deploy.serve.request.pictures import take_pictures
from dvdquant.deploy.serve.request.requests import generate_request, read_request
from dvdquant.deploy.serve.settings import Limits, ModelSource, SessionSettings
from dvdquant.deploy.switching.controller import OnStep

__all__ = ["DirectModel", "DrawnClip"]


@dataclass(frozen=True)
class DrawnClip:
    """A clip as a file.

    Args:
        mp4: The file.
        fps: Frames per second.
    """

    mp4: bytes
    fps: float


class DirectModel:
    """An export that is open in this process.

    Args:
        source: The export and the model of its pipeline.
        sessions: How its sessions are opened.
        limits: What one request may ask for.

    Raises:
        DvdquantError: The export or its model cannot be used.
    """

    def __init__(self, source: ModelSource, sessions: SessionSettings, limits: Limits | None = None) -> None:
        self.source = source
        self.limits = limits or Limits()
        self.served = ServedModel(source, self.limits)
        self.generator = open_generator(Artifact.open(source.out), pipeline=source.pipeline, **sessions.arguments())

    def check(self, fields: Mapping[str, Any]) -> tuple[CheckedRequest, dict[str, bytes]]:
        """Return a request that can be drawn, and the files of its pictures.

        Args:
            fields: The request in the names of ``/v1/videos``, pictures included; ``model`` is left to the caller.

        Raises:
            DvdquantError: A field is unknown or out of range, or the model cannot draw the request.
        """
        rest, pictures = take_pictures(fields, self.limits.picture)
        values = read_request(rest, form=False)
        values.pop("model", None)
        return self.served.check(values, pictures), pictures

    def draw(
        self,
        checked: CheckedRequest,
        pictures: Mapping[str, bytes],
        on_step: OnStep | None = None,
        cancel: CancelSignal | None = None,
    ) -> DrawnClip:
        """Draw a clip.

        Args:
            checked: The request, as :meth:`check` returned it.
            pictures: The files of its pictures. They are decoded in a process of their own.
            on_step: A callback that gets the record of every call of the transformer; see :class:`Generator`.
            cancel: An event that ends the work soon after it is set, or None.

        Raises:
            DvdquantError: A picture cannot be decoded, an engine failed, or the clip cannot be written.
            Cancelled: The event is set.
        """
        decoded = {name: decode_picture(raw, name, self.limits.picture_pixels).png for name, raw in pictures.items()}
        wanted = generate_request(checked.values, self.generator.artifact.manifest, self.source, decoded)
        result = self.generator.generate(wanted, on_step, cancel=cancel)
        fps = checked.values.get("fps") or self.generator.fps(len(result.frames))
        with tempfile.TemporaryDirectory(prefix="dvdq-") as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(path, result.frames, fps)
            return DrawnClip(path.read_bytes(), fps)

    def close(self) -> None:
        """Free the engines."""
        self.generator.close()
