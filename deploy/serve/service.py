"""What the HTTP interface works with: store, files, workers, limits; calls that block run on a few threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from dvdquant.deploy.serve.checks import CheckedRequest, ServedModel
from dvdquant.deploy.serve.files import ClipFiles
from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.supervisor import Pool
from dvdquant.errors import UnsupportedError
from dvdquant.system.files import free_bytes
from dvdquant.text import shown

__all__ = ["EXPIRE_SECONDS", "Service"]

EXPIRE_SECONDS = 60.0

P = ParamSpec("P")
R = TypeVar("R")
_THREADS = 4

log = logging.getLogger(__name__)


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
        self, settings: ServerSettings, store: JobStore, files: ClipFiles, pool: Pool, metrics: ServerMetrics
    ) -> None:
        self.settings = settings
        self.store = store
        self.files = files
        self.pool = pool
        self.metrics = metrics
        self.models = open_models(settings)
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

    def check(self, values: dict[str, Any]) -> CheckedRequest:
        """Return the request with everything filled in, before it is queued.

        Args:
            values: From :func:`.requests.read_request`.

        Raises:
            DvdquantError: The model cannot make it, or it is over a limit of this server.
        """
        names = sorted(self.models)
        wanted = values.pop("model", None)
        if wanted is None and len(names) == 1:
            wanted = names[0]
        if wanted not in self.models:
            what = "model is missing" if wanted is None else f"there is no model {shown(wanted, 80)!r}"
            raise UnsupportedError(what, available=names, fix="name one of these")
        return self.models[wanted].check(values)

    def retry_after(self) -> float:
        """Return the seconds after which a place in the queue is likely to be free."""
        mean = self.metrics.clip_mean()
        return min(60.0, max(1.0, mean / max(1, len(self.pool.ready))))

    def disk_is_full(self) -> bool:
        """Return whether the data folder has too little room for another clip."""
        return free_bytes(self.settings.data) < self.settings.limits.free_disk

    async def expire_for_ever(self, seconds: float = EXPIRE_SECONDS) -> None:
        """Delete what has expired, now and again.

        Args:
            seconds: Between two looks.
        """
        while True:
            try:
                expired = await self.run(self.store.expire, time.time())
            except Exception:  # of sqlite3 or psycopg; a store that is away comes back
                log.exception("the store does not say what has expired")
                expired = []
            for video in expired:
                try:
                    await self.run(self.files.delete, video)
                except OSError:
                    log.exception("the clip of %s, which has expired, cannot be deleted", video)
                else:
                    log_event(log, "video_expired", video=video)
            await asyncio.sleep(seconds)

    # ---------------------------------------------------------------------------------------------------------- models

    def model_list(self) -> list[dict[str, Any]]:
        """Return the models as ``/v1/models`` lists them, with what the workers say of them."""
        ready = self.pool.ready
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "dvdquant",
                "dvdquant": {**model.facts(), "executed": ready[0].facts.get(name, {}) if ready else {}},
            }
            for name, model in self.models.items()
        ]

    def reload(self) -> None:
        """Open the exports anew, and let every worker do so once its job has ended.

        Raises:
            DvdquantError: An export cannot be used; everything stays as it is.
        """
        self.models = open_models(self.settings)
        self.pool.reload()

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
            "executed": ready[0].facts.get(checked.model, {}) if ready else {},
            "queue": {"waiting": waiting, "limit": self.settings.limits.queue, "workers_ready": len(ready)},
        }


def open_models(settings: ServerSettings) -> dict[str, ServedModel]:
    """Return the models by name.

    Args:
        settings: The server's settings.

    Raises:
        DvdquantError: One cannot be used.
    """
    return {source.name: ServedModel(source, settings.limits) for source in settings.models}
