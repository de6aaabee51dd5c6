"""A worker: it pulls jobs from the store, draws them on one device, and encodes the clips.

Threads: the engine (the main thread), the encoder, the keeper of leases, and the one that reads what the server says
(:mod:`.worker_process`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dvdquant.deploy.faults import Fault, fault_of
from dvdquant.deploy.serve.jobs import CANCELLED, Job, JobStore
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.request.pictures import PICTURES
from dvdquant.deploy.serve.request.wording import failure_of
from dvdquant.deploy.serve.settings import ModelSource, WorkerSettings
from dvdquant.deploy.serve.store.files import ClipFiles
from dvdquant.errors import Cancelled, OutputError, ResourceError
from dvdquant.system.out_of_memory import causes, ran_out_of_memory

if TYPE_CHECKING:
    from dvdquant.deploy.generation.generator import Generator
    from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult
    from dvdquant.deploy.generation.session_options import WrapSession
    from dvdquant.deploy.switching.controller import StepRecord

__all__ = ["BROKEN", "DrawnClip", "HeldJob", "Worker", "memory_facts", "open_model"]

BROKEN = 75  # exit code of a worker that cannot go on: EX_TEMPFAIL
STALLED = 76
IDLE_SECONDS = 0.25  # between two looks at the store, where nothing wakes the worker
_ADMIT_SECONDS = 60.0  # that a job waits for memory, which another process may give back
_BEAT_SECONDS = 0.02  # between two looks at the store while steps are faster
_MARKS = {None: "s", 16: "f"}

log = logging.getLogger(__name__)


@dataclass
class HeldJob:
    """A job that this worker holds.

    Args:
        job: The job, with the token of the claim.
        stop: Set where the drawing must stop.
        why: ``cancelled``, ``lost`` or ``released`` once ``stop`` is set.
        drawing: True until the frames are there.
        sign: The time of the last sign of life.
        looked: The time of the last look at the store.
        progress: The share of the steps that are done, in percent.
        bits: The bits of the steps that are done, a letter or digit each.
    """

    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""
    drawing: bool = True
    sign: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    progress: int = 0
    bits: str = ""

    @property
    def token(self) -> str:
        """Return the secret of the claim."""
        return self.job.token or ""

    def end(self, why: str) -> None:
        """Ask the drawing to stop.

        Args:
            why: ``cancelled``, ``lost`` or ``released``.
        """
        if not self.stop.is_set():
            self.why = why
            self.stop.set()


@dataclass(frozen=True)
class DrawnClip:
    """A clip whose frames are there, on its way to the encoder.

    Args:
        running: The job.
        result: The frames and how they were drawn.
        fps: Frames a second.
        seconds: How long it was drawn.
    """

    running: HeldJob
    result: GenerateResult
    fps: float
    seconds: float


class Worker:
    """Draws jobs of a store until it is told to stop.

    Args:
        settings: Its settings.
        store: Queue and state.
        files: The place for clips.
        tell: Called with every event for the server, from any thread.
        wrap_session: Applied to every engine session as soon as it is open, to watch or replace what it runs.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        store: JobStore,
        files: ClipFiles,
        tell: Callable[..., Any],
        wrap_session: WrapSession | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.files = files
        self.tell = tell
        self.wrap_session = wrap_session
        self.generators: dict[str, Generator] = {}
        self.awake = threading.Event()
        self.stopping = threading.Event()
        self.alone = threading.Event()
        self.reloading = threading.Event()
        self._ready: dict[str, Any] | None = None
        self.code = 0
        self.held: dict[str, HeldJob] = {}
        self._holding = threading.Lock()
        self.drawn: queue.Queue[DrawnClip | None] = queue.Queue(2)  # frames of two clips wait at most
        self.gone = threading.Event()

    # ---------------------------------------------------------------------------------------------- what others call

    def wake(self) -> None:
        """Look at the store now."""
        self.awake.set()

    def stop(self) -> None:
        """Finish what is being drawn, take nothing more."""
        self.stopping.set()
        self.awake.set()

    def reload(self) -> None:
        """Open exports that have changed anew, between two jobs."""
        self.reloading.set()
        self.awake.set()

    def begin_alone(self) -> None:
        """Finish what is being drawn, and take nothing more until there is a server again."""
        self.alone.set()

    def end_alone(self) -> None:
        """Go on with another server, which may have read other exports than this worker."""
        self.alone.clear()
        if self._ready is not None:
            self.tell("ready", **self._ready)
        self.reload()

    def let_go(self) -> None:
        """Stop at once; jobs go back into the queue."""
        self.stop()
        with self._holding:
            for running in self.held.values():
                running.end("released")

    def cancel(self, video: str) -> None:
        """Stop drawing a job that the store says is cancelled or deleted, without waiting for the next beat.

        Args:
            video: The id of the job, ``video_…``.
        """
        with self._holding:
            running = self.held.get(video)
        if running is not None:
            self._beat(running)

    # ------------------------------------------------------------------------------------------------------ the start

    def open(self) -> None:
        """Open every model, load its engines, and draw a short clip with each.

        Raises:
            DvdquantError: An export or its model cannot be used.
        """
        started = time.perf_counter()
        for source in self.settings.models:
            self.generators[source.name] = generator = open_model(self.settings, source, self.wrap_session)
            self._warm_up(generator)
        self._say_ready(time.perf_counter() - started)

    def _say_ready(self, seconds: float) -> None:
        facts = {name: _executed(generator) for name, generator in self.generators.items()}
        self._ready = {"models": facts, "seconds": round(seconds, 3), **memory_facts()}
        log_event(log, "worker_ready", seconds=round(seconds, 3), models=sorted(facts))
        self.tell("ready", **self._ready)

    def _warm_up(self, generator: Generator) -> None:
        base = generator.checker.example_request()
        artifact = generator.artifact
        for bits in artifact.bits(artifact.components[0]):
            generator.prepare(dataclasses.replace(base, mode=f"a{bits}", steps=2))
        if self.settings.warm_up:
            seconds = generator.warm_up(base)
            log_event(log, "warmed_up", seconds={mode: round(each, 3) for mode, each in seconds.items()})

    def _reload(self) -> None:
        """Open exports anew that have changed; what cannot be opened leaves the old one at work.

        Where both do not fit into memory, the process ends, and the next one opens the new export alone.
        """
        from dvdquant.deploy.generation.generate import reload_generator

        self.reloading.clear()
        started, changed = time.perf_counter(), []
        for name, old in list(self.generators.items()):
            try:
                if old.is_stale():
                    self.generators[name] = reload_generator(old)
                    changed.append(name)
                    self._warm_up(self.generators[name])
            except Exception as error:  # noqa: BLE001  whatever a new export does, the old one or a new process serves
                room = ran_out_of_memory(error) or any(isinstance(e, ResourceError) for e in causes(error))
                log_event(log, "reload_failed", level=logging.ERROR, text="reload failed", error=error, model=name)
                self.tell("reload_failed", model=name, restarts=room)
                if room or fault_of(error) == "process":
                    self.stop()
                    return
        if changed:
            log_event(log, "reloaded", models=changed)
            self._say_ready(time.perf_counter() - started)

    # ------------------------------------------------------------------------------------------------------- the work

    def run(self) -> int:
        """Draw jobs until :meth:`stop`; return the exit code of the process."""
        threads = [threading.Thread(target=work, daemon=True) for work in (self.keep_leases, self.encode_all)]
        for thread in threads:
            thread.start()
        models = tuple(self.generators)
        while not self.stopping.is_set():
            self.awake.clear()
            if self.reloading.is_set():
                self._reload()
                continue
            if self.alone.is_set():
                self.awake.wait(IDLE_SECONDS)
                continue
            try:
                job = self.store.claim(self.settings.name, models, self.settings.lease)
            except Exception:  # a store that is away comes back, or the server gives up
                log.exception("the store does not answer")
                time.sleep(1)
                continue
            if job is None:
                self.awake.wait(IDLE_SECONDS)
                continue
            with self.hold(job) as running:
                self.draw(running)
        self.drawn.put(None)
        threads[1].join()
        self.gone.set()
        threads[0].join()
        return self.code

    @contextlib.contextmanager
    def hold(self, job: Job) -> Iterator[HeldJob]:
        """Keep the lease of a job for the time of the block; afterwards the encoder has it, or nobody.

        Args:
            job: The job, which this worker has claimed.
        """
        running = HeldJob(job)
        with self._holding:
            self.held[job.id] = running
        try:
            yield running
        finally:
            if running.drawing:
                self.drop(running)

    def drop(self, running: HeldJob) -> None:
        """Renew the lease of a claim no longer.

        Args:
            running: The job as it was claimed.
        """
        with self._holding:
            # This worker may have claimed the job again, after its lease ran out: that claim goes on.
            if self.held.get(running.job.id) is running:
                del self.held[running.job.id]

    def draw(self, running: HeldJob) -> None:
        """Draw one job, on the main thread.

        Args:
            running: The job.
        """
        job = running.job
        fields: dict[str, Any] = {
            "video": job.id,
            "request": job.what.request_id,
            "model": job.what.model,
            "attempt": job.attempts,
        }
        log_event(log, "job_started", **fields)
        self.tell("started", video=job.id, model=job.what.model, waited=max(0.0, time.time() - job.created_at))
        started = time.perf_counter()
        try:
            generator = self.generators[job.what.model]
            request = self._request(job)
            self._admit(generator, request, running)
            result = generator.generate(request, lambda record: self._step(running, record), cancel=running.stop)
            fps = job.what.request.get("fps") or generator.fps(len(result.frames))
        except BaseException as error:
            if not isinstance(error, Exception):
                self.store.release(job.id, running.token)
                raise
            self._failed(running, error)
            return
        running.drawing = False
        self.drawn.put(DrawnClip(running, result, fps, time.perf_counter() - started))

    def _request(self, job: Job) -> GenerateRequest:
        """Return the request of a job for the generator, with its pictures."""
        from dvdquant.deploy.serve.request.requests import generate_request

        source = next(model for model in self.settings.models if model.name == job.what.model)
        pictures = {}
        for name in PICTURES:
            if name in job.what.request:
                picture = self.files.picture(job.id, name)
                if picture is None:
                    raise OutputError(f"the {name} of the job is gone", fix="create the video again")
                pictures[name] = picture
        return generate_request(job.what.request, self.generators[source.name].artifact.manifest, source, pictures)

    def _admit(self, generator: Generator, request: GenerateRequest, running: HeldJob) -> None:
        """Wait until there is memory for a job, for a time.

        Raises:
            ShapeError: It never fits the device.
            ResourceError: It does not fit what is free.
            Cancelled: The job must stop.
        """
        end = time.monotonic() + _ADMIT_SECONDS
        while True:
            try:
                generator.admit(request)
                return
            except ResourceError:
                if time.monotonic() > end:
                    raise
                log_event(log, "job_waits_for_memory", level=logging.WARNING, video=running.job.id)
            running.sign = time.monotonic()
            if running.stop.wait(1):
                raise Cancelled("the job was stopped")

    def _step(self, running: HeldJob, record: StepRecord) -> None:
        """Note one call of the transformer; Cancelled where the job must stop."""
        running.sign = time.monotonic()
        if record.step >= len(running.bits):
            running.bits += _MARKS.get(record.bits, str(record.bits))
        # The last percent is the decoder's and the encoder's.
        running.progress = min(99, 100 * (record.step + 1) // max(1, running.job.what.steps))
        self.tell(
            "step",
            model=running.job.what.model,
            bits="skip" if record.bits is None else str(record.bits),
            seconds=record.seconds,
            retried=record.retried,
        )
        if running.sign - running.looked > _BEAT_SECONDS:
            running.looked = running.sign
            self._beat(running)
        if running.stop.is_set():
            raise Cancelled("the job was stopped")

    def _failed(self, running: HeldJob, error: Exception) -> None:
        """Note how a job ended that has no clip, and end the process where the error means so."""
        fault = fault_of(error)
        try:
            self._say_failed(running, error, fault)
        except Exception:  # of a store that is away: the lease of the job runs out, and it is drawn again
            log.exception("how a job ended could not be kept")
        error.__traceback__ = None  # it holds the tensors of the clip
        if fault == "process":
            log_event(log, "worker_broken", level=logging.ERROR, text="this process cannot go on and will be restarted")
            self.code = BROKEN
            self.stop()

    def _say_failed(self, running: HeldJob, error: Exception, fault: Fault) -> None:
        """Say in the store how a job ended that has no clip."""
        job, keep = running.job, self.settings.keep
        fields: dict[str, Any] = {"video": job.id, "request": job.what.request_id, "attempt": job.attempts}
        if running.why == "lost":
            log_event(log, "job_lost", **fields)
            return
        if running.why == "released":
            self.store.release(job.id, running.token)
            log_event(log, "job_released", **fields)
            return
        if running.why == "cancelled" and fault == "request":
            self.store.fail(job.id, running.token, CANCELLED, keep, final=True)
            log_event(log, "job_cancelled", **fields)
            self.tell("ended", video=job.id, status="cancelled", model=job.what.model)
            return
        failure = failure_of(error)
        after = self.store.fail(job.id, running.token, failure, keep, final=fault == "request")
        again = after is not None and after.status == "queued"
        fields.update(code=failure.code, again=again, fault=fault)
        log_event(log, "job_failed", level=logging.ERROR, text="job failed", error=error, **fields)
        self.tell("ended", video=job.id, status="retried" if again else "failed", model=job.what.model)

    # ---------------------------------------------------------------------------------------------------- the encoder

    def encode_all(self) -> None:
        """Encode clips beside the engine, on a thread of its own."""
        while (drawn := self.drawn.get()) is not None:
            try:
                self.encode(drawn)
            except Exception as error:  # noqa: BLE001  one clip that cannot be written must not end the encoder
                self._failed(drawn.running, error)
            finally:
                self.drop(drawn.running)
                del drawn

    def encode(self, drawn: DrawnClip) -> None:
        """Write a clip to its place and complete its job; the clip of a job that nobody wants any more is deleted.

        Args:
            drawn: The clip.
        """
        from dvdquant.deploy.generation.video import write_mp4

        running, job = drawn.running, drawn.running.job
        if running.stop.is_set():
            raise Cancelled("the job was stopped")
        started = time.perf_counter()
        size = self.files.write(job.id, lambda path: write_mp4(path, drawn.result.frames, drawn.fps))
        seconds = time.perf_counter() - started
        summary = _summary(drawn, size, seconds)
        if not self.store.complete(job.id, running.token, summary, self.settings.keep, running.bits):
            self._delete_unwanted(running)
            self._beat(running)
            self._failed(running, Cancelled("the job was stopped"))
            return
        log_event(
            log,
            "job_completed",
            video=job.id,
            request=job.what.request_id,
            seconds=round(drawn.seconds, 3),
            encode_seconds=round(seconds, 3),
            bits=running.bits,
            bytes=size,
        )
        self.tell(
            "ended",
            video=job.id,
            status="completed",
            model=job.what.model,
            seconds=drawn.seconds,
            encode_seconds=seconds,
            **memory_facts(),
        )

    def _delete_unwanted(self, running: HeldJob) -> None:
        """Delete the clip of a job that it did not complete, unless the file is another claim's by now."""
        after = self.store.get(running.job.id)
        if after is None:
            self.files.delete(running.job.id)
        elif after.token == running.token or (after.ended and after.status != "completed"):
            self.files.delete_clip(running.job.id)

    # ----------------------------------------------------------------------------------------------------- the leases

    def keep_leases(self) -> None:
        """Renew the leases, ask whether a job is cancelled, and end the process where the engine hangs."""
        pause = min(0.5, self.settings.lease / 4)
        while not self.gone.wait(pause):
            with self._holding:
                held = list(self.held.values())
            for running in held:
                if running.drawing and time.monotonic() - running.sign > self.settings.stall:
                    log_event(
                        log, "worker_stalled", level=logging.CRITICAL, video=running.job.id, seconds=self.settings.stall
                    )
                    os._exit(STALLED)  # the engine does not answer, so nothing else would end the process
                self._beat(running)

    def _beat(self, running: HeldJob) -> None:
        try:
            answer = self.store.beat(running.job.id, running.token, self.settings.lease, running.progress, running.bits)
        except Exception:  # the lease lasts for some more tries
            log.exception("the lease of a job could not be renewed")
            return
        if answer != "ok":
            running.end(answer)


def open_model(settings: WorkerSettings, source: ModelSource, wrap_session: WrapSession | None = None) -> Generator:
    """Return the generator of a model; its engines are loaded later.

    Args:
        settings: The settings of the worker.
        source: The model.
        wrap_session: See :class:`Worker`.

    Raises:
        DvdquantError: The export or its model cannot be used.
    """
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.generate import open_generator

    return open_generator(
        Artifact.open(source.out),
        pipeline=source.pipeline,
        **settings.arguments(),
        wrap_session=wrap_session,
    )


def _executed(generator: Generator) -> dict[str, Any]:
    """Return backend, device and dtype of what is loaded."""
    from dvdquant.deploy.generation.executed import executed_session

    return next((executed_session(session) for session in generator.sessions().values()), {})


def _summary(drawn: DrawnClip, size: int, encode_seconds: float) -> dict[str, Any]:
    """Return the figures of a clip that are kept with its job."""
    result = drawn.result
    computed = [record.bits for record in result.trace if record.bits is not None]
    return {
        "seconds": round(drawn.seconds, 4),
        "encode_seconds": round(encode_seconds, 4),
        "bytes": size,
        "fps": drawn.fps,
        "frames": len(result.frames),
        "average_bits": round(sum(computed) / len(computed), 3) if computed else None,
        "backend": result.executed.get("backend"),
        "device": result.executed.get("device"),
    }


def memory_facts() -> dict[str, int]:
    """Return the bytes that this process holds in memory, and on its device."""
    import psutil

    found = {"resident_bytes": int(psutil.Process().memory_info().rss)}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            found["device_bytes"] = int(torch.cuda.memory_reserved())
    return found
