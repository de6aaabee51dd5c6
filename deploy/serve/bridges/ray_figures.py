"""What the events of a worker change in Ray's metrics, which Ray's own exporter gives to Prometheus (``ray_dvdq_…``)."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Histogram

from dvdquant.deploy.serve.metrics import CLIP_SECONDS, STEP_SECONDS

__all__ = ["RayFigures"]


class RayFigures:
    """The figures of one worker, under the names that :class:`.metrics.ServerMetrics` has."""

    def __init__(self) -> None:
        model, steps, clips = ("model",), list(STEP_SECONDS), list(CLIP_SECONDS)
        self._steps = Histogram("dvdq_step_seconds", "One call of the transformer", steps, ("model", "bits"))
        self._skipped = Counter("dvdq_steps_skipped", "Calls that reused an earlier output", model)
        self._retried = Counter("dvdq_step_retries", "Calls that failed and ran again on the high engine", model)
        self._clips = Counter("dvdq_clips", "Attempts that ended", ("model", "status"))
        self._clip_seconds = Histogram("dvdq_clip_seconds", "Drawing a clip", clips, model)
        self._waited = Histogram("dvdq_wait_seconds", "From the creation of a job to its start", clips, model)

    def take(self, message: dict[str, Any]) -> None:
        """Count an event.

        Args:
            message: The event, see :mod:`.worker`.
        """
        kind, tags = message["event"], {"model": message.get("model", "")}
        if kind == "started":
            self._waited.observe(message["waited"], tags)
        elif kind == "step":
            if message["bits"] == "skip":
                self._skipped.inc(1, tags)
            else:
                self._steps.observe(message["seconds"], {**tags, "bits": message["bits"]})
            if message["retried"]:
                self._retried.inc(1, tags)
        elif kind == "ended":
            self._clips.inc(1, {**tags, "status": message["status"]})
            if message["status"] == "completed":
                self._clip_seconds.observe(message["seconds"], tags)
