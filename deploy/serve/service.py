"""What the HTTP interface works with: store, files, workers, limits; calls that block run on a few threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from dvdquant.deploy.serve.files import VideoFiles
from dvdquant.deploy.serve.jobs import JobStore, NewJob
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.supervisor import Pool
from dvdquant.errors import DvdquantError, ShapeError, UnsupportedError
from dvdquant.text import shown

__all__ = ["CheckedRequest", "NotReadyError", "Service"]

P = ParamSpec("P")
R = TypeVar("R")
_THREADS = 4
_CHECK_SECONDS = 30.0


class NotReadyError(Exception):
    """No worker can answer at the moment."""


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be drawn, with everything filled in.

    Args:
        model: The name of the model.
        values: The fields of the request; ``seconds`` has become ``num_frames``.
        steps: Denoising steps.
        guidance: Guidance scale.
        frames: Frames.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        branches: Calls of the transformer in a step.
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
    branches: int
    mode: str

    def job(self, request_id: str) -> NewJob:
        """Return what is queued.

        Args:
            request_id: The id of the HTTP request.
        """
        seconds = round(self.frames / self.fps, 3)
        return NewJob(self.model, self.values, self.steps, (self.width, self.height), seconds, request_id)


class Service:
    """Everything behind the routes.

    Args:
        settings: The server's settings.
        store: Queue and state.
        files: Clips.
        pool: Workers.
        metrics: Figures.
    """

    def __init__(
        self, settings: ServerSettings, store: JobStore, files: VideoFiles, pool: Pool, metrics: ServerMetrics
    ) -> None:
        self.settings = settings
        self.store = store
        self.files = files
        self.pool = pool
        self.metrics = metrics
        self.draining = False
        # Few threads: each keeps a connection to the store.
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "store")

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that may wait for the disk on another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    # ------------------------------------------------------------------------------------------------------- requests

    async def check(self, values: dict[str, Any]) -> CheckedRequest:
        """Return the request with everything filled in, before it is queued.

        Args:
            values: From :func:`.requests.read_request`.

        Raises:
            DvdquantError: The model cannot make it, or it is over a limit of this server.
            NotReadyError: No worker can say at the moment.
        """
        limits = self.settings.limits
        model = self._model(values)
        for name in ("prompt", "negative_prompt"):
            if len(values.get(name, "")) > limits.prompt:
                raise ShapeError(f"{name} has {len(values[name])} characters", available=f"up to {limits.prompt}")
        _at_most("num_inference_steps", values.get("num_inference_steps"), limits.steps)
        checked = await self._ask(model, values)
        _at_most("num_inference_steps", checked.steps, limits.steps)
        if limits.pixels is not None:
            pixels = checked.frames * checked.height * checked.width
            _at_most("frames x height x width", pixels, limits.pixels)
        return checked

    def _model(self, values: dict[str, Any]) -> str:
        names = [model.name for model in self.settings.models]
        wanted = values.pop("model", None)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted not in names:
            what = "model is missing" if wanted is None else f"there is no model {shown(wanted, 80)!r}"
            raise UnsupportedError(what, available=names, fix="name one of these")
        return str(wanted)

    async def _ask(self, model: str, values: dict[str, Any]) -> CheckedRequest:
        ready = self.pool.ready
        if not ready:
            raise NotReadyError
        question = asyncio.wrap_future(ready[0].ask("check", model=model, values=values))
        try:
            answer = await asyncio.wait_for(question, _CHECK_SECONDS)
        except (ConnectionError, TimeoutError):
            raise NotReadyError from None
        if (error := answer.get("error")) is not None:
            raise DvdquantError(error["what"], available=error["available"], fix=error["fix"])
        return CheckedRequest(model=model, **answer["checked"])

    def retry_after(self) -> float:
        """Return the seconds after which a place in the queue is likely to be free."""
        mean = self.metrics.clip_mean()
        return min(60.0, max(1.0, mean / max(1, len(self.pool.ready))))

    def disk_is_full(self) -> bool:
        """Return whether the data folder has too little room for another clip."""
        info = os.statvfs(self.settings.data)
        return info.f_bavail * info.f_frsize < self.settings.limits.free_disk

    # ---------------------------------------------------------------------------------------------------------- models

    def models(self) -> list[dict[str, Any]]:
        """Return the models as ``/v1/models`` lists them, with what the workers say of them."""
        ready = self.pool.ready
        return [
            {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": "dvdquant",
                "dvdquant": {
                    "schedules": sorted(model.schedules),
                    **(ready[0].facts.get(model.name, {}) if ready else {}),
                },
            }
            for model in self.settings.models
        ]

    def preflight(self, checked: CheckedRequest, waiting: int) -> dict[str, Any]:
        """Return what a request would execute, and what it would cost.

        Args:
            checked: The request.
            waiting: The number of jobs in the queue.
        """
        calls = checked.steps * checked.branches
        means = self.metrics.step_means(checked.model)
        cost = {bits: round(mean * calls, 4) for bits, mean in means.items()}
        ready = self.pool.ready
        facts = ready[0].facts.get(checked.model, {}) if ready else {}
        return {
            "object": "video.preflight",
            "model": checked.model,
            "mode": checked.mode,
            "num_inference_steps": checked.steps,
            "guidance_scale": checked.guidance,
            "num_frames": checked.frames,
            "size": f"{checked.width}x{checked.height}",
            "fps": checked.fps,
            "seconds": f"{checked.frames / checked.fps:g}",
            "transformer_calls": calls,
            # What all calls would take at one bit-width, from calls that this server has timed; empty before the first.
            "transformer_seconds_by_bits": cost,
            "executed": facts.get("executed", {}),
            "queue": {"waiting": waiting, "limit": self.settings.limits.queue, "workers_ready": len(ready)},
        }


def _at_most(name: str, value: float | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ShapeError(f"{name} is {value:.0f}", available=f"up to {limit} on this server")
