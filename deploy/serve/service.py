"""What the HTTP interface works with: store, files, workers, limits; calls that block run on a few threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from dvdquant.deploy.serve.jobs import Job, JobStore, new_video_id
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.request.checks import CheckedRequest, ServedModel
from dvdquant.deploy.serve.request.decoding import DecodedPicture, decode_picture
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.store.files import ClipFiles
from dvdquant.errors import UnsupportedError
from dvdquant.system.files import free_bytes
from dvdquant.text import shown

__all__ = ["DiskFullError", "Service", "WorkerState", "Workers"]

P = ParamSpec("P")
R = TypeVar("R")
_THREADS = 4
_DECODERS = 2
_LOOK_SECONDS = 5.0  # between two looks at a job that somebody waits for, should a worker's message be lost
_LOOK_SHARED = 0.5  # as well, where a worker of another server may draw it


class DiskFullError(Exception):
    """The data folder has too little room for another clip."""


class WorkerState(Protocol):
    """A worker as the interface sees it."""

    @property
    def label(self) -> str:
        """Return its name in logs and metrics."""

    @property
    def ready(self) -> bool:
        """Return whether it takes jobs."""

    @property
    def facts(self) -> dict[str, Any]:
        """Return what runs each model."""


class Workers(Protocol):
    """The workers as the interface sees them: :class:`.supervisor.Pool`, or those of another scheduler."""

    @property
    def workers(self) -> Sequence[WorkerState]:
        """Return those that are known."""

    @property
    def ready(self) -> Sequence[WorkerState]:
        """Return those that take jobs."""

    def tell(self, event: str, **fields: Any) -> None:
        """Tell them to ``wake``, or to look whether a job is to ``cancel``: sooner than they would see it by themselves.

        Args:
            event: ``wake`` or ``cancel``.
            fields: What else the message says, as JSON can hold it.
        """

    def reload(self) -> None:
        """Let them open exports that have changed anew."""


class Service:
    """Everything behind the routes.

    Args:
        settings: The settings of the server.
        store: The queue, with the state of every job.
        files: The place of the clips.
        pool: The workers that draw.
        metrics: The counters that ``/metrics`` shows.
    """

    def __init__(
        self, settings: ServerSettings, store: JobStore, files: ClipFiles, pool: Workers, metrics: ServerMetrics
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
        self._decoders = concurrent.futures.ThreadPoolExecutor(_DECODERS, "decoder")
        self._waiting: dict[str, set[asyncio.Event]] = {}

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that may wait for the disk on another thread, and return what it returns.

        Args:
            call: The function.
            *args: Its arguments.
            **kwargs: Its arguments by name.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._decoders.shutdown()

    # ------------------------------------------------------------------------------------------------------- requests

    def check(self, values: dict[str, Any], pictures: Mapping[str, bytes] | None = None) -> CheckedRequest:
        """Return the request with everything filled in, before it is queued.

        Args:
            values: From :func:`.requests.read_request`.
            pictures: From :func:`.pictures.take_pictures`; only their names count.

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
        return self.models[wanted].check(values, pictures or {})

    @property
    def takes_pictures(self) -> bool:
        """Return whether a model takes pictures, so that bodies may be larger."""
        return any(set(model.pictures.values()) != {"none"} for model in self.models.values())

    async def decode(self, pictures: Mapping[str, bytes]) -> dict[str, DecodedPicture]:
        """Decode the pictures of a request, each in a process of its own, and few at the same time.

        Args:
            pictures: The files by name.

        Raises:
            ShapeError: One cannot be decoded.
        """
        loop = asyncio.get_running_loop()
        pixels = self.settings.limits.picture_pixels
        return {
            name: await loop.run_in_executor(self._decoders, decode_picture, raw, name, pixels)
            for name, raw in pictures.items()
        }

    def create(
        self, checked: CheckedRequest, pictures: Mapping[str, DecodedPicture], request_id: str
    ) -> tuple[Job, int]:
        """Queue a job, and return it with the number of jobs before it. Its pictures are on the disk before it can be drawn.

        Args:
            checked: The request.
            pictures: Its pictures.
            request_id: The id of the HTTP request.

        Raises:
            QueueFullError: Too many jobs wait.
            DiskFullError: There is no room for its clip.
        """
        if self.disk_is_full():
            raise DiskFullError
        job = self._create(checked, pictures, request_id)
        return job, self.store.ahead_of(job)

    def _create(self, checked: CheckedRequest, pictures: Mapping[str, DecodedPicture], request_id: str) -> Job:
        what = checked.job(request_id, {name: picture.facts() for name, picture in pictures.items()})
        limit = self.settings.limits.queue
        if not pictures:
            return self.store.create(what, limit)
        video = new_video_id()
        try:
            for name, picture in pictures.items():
                self.files.write_picture(video, name, picture.png)
            return self.store.create(what, limit, video)
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.delete(video)
            raise

    def queue_is_full(self) -> bool:
        """Return whether a job would be refused now."""
        return self.store.counts().get("queued", 0) >= self.settings.limits.queue

    def delete(self, video: str) -> bool:
        """Delete a job and its files. False if there is no such job.

        The files go first: if the disk refuses, the job is still there and can be deleted again.

        Args:
            video: The id of the job.

        Raises:
            OSError: The disk refuses.
        """
        if self.store.get(video) is None:
            return False
        self.files.delete(video)
        self.store.delete(video)
        self.files.delete_clip(video)  # its worker may have ended between the two
        return True

    # -------------------------------------------------------------------------------------------------------- waiting

    async def wait(self, video: str, seconds: float) -> Job | None:
        """Return a job as soon as it has ended, or as it is after some seconds; None if there is none.

        Args:
            video: The id of the job.
            seconds: The time to wait at most.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        look = _LOOK_SHARED if self.store.shared else _LOOK_SECONDS
        with self._watched(video) as changed:
            while True:
                changed.clear()
                job = await self.run(self.store.get, video)
                left = end - loop.time()
                if job is None or job.ended or left <= 0 or self.draining:
                    return job
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(left, look))

    @contextlib.contextmanager
    def _watched(self, video: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        watchers = self._waiting.setdefault(video, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers and self._waiting.get(video) is watchers:
                del self._waiting[video]

    def changed(self, video: str | None = None) -> None:
        """Let those look again who wait for a job.

        Args:
            video: The id of the job; None stands for all.
        """
        for name in [video] if video is not None else list(self._waiting):
            for event in self._waiting.get(name, ()):
                event.set()

    def retry_after(self) -> float:
        """Return the seconds after which a place in the queue is likely to be free."""
        mean = self.metrics.clip_mean()
        return min(60.0, max(1.0, mean / max(1, len(self.pool.ready))))

    def disk_is_full(self) -> bool:
        """Return whether the data folder has too little room for another clip."""
        return free_bytes(self.settings.data) < self.settings.limits.free_disk

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
        calls = checked.steps * checked.calls
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
        DvdquantError: One cannot be used, or excludes a setting.
    """
    models = {source.name: ServedModel(source, settings.limits) for source in settings.models}
    for model in models.values():
        settings.check_for(model.checker.artifact.recipe)
    return models
