"""Jobs and the interface of the store that keeps them: queue and state of a server in one place.

A job is claimed by one worker at a time, with a lease that the worker renews. A lease that runs out, or a worker that is
known to be dead, puts the job back into the queue, at most :data:`MAX_ATTEMPTS` times. A worker that ended together with its
server, as with the power of the machine, says nothing of its job: such attempts do not count, :data:`MAX_INTERRUPTIONS` times.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "CANCELLED",
    "MAX_ATTEMPTS",
    "MAX_INTERRUPTIONS",
    "VIDEO_ID",
    "Beat",
    "Failure",
    "Job",
    "JobStore",
    "NewJob",
    "QueueFullError",
    "Status",
    "ending",
    "job_from_row",
    "new_video_id",
    "worker_lost",
]

MAX_ATTEMPTS = 2
MAX_INTERRUPTIONS = 3
VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")

Status = Literal["queued", "in_progress", "completed", "failed"]
Beat = Literal["ok", "cancelled", "lost"]


def new_video_id() -> str:
    """Return a new id; nobody can guess it."""
    return f"video_{secrets.token_hex(16)}"


class QueueFullError(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Failure:
    """The reason why a job ended without a clip.

    Args:
        code: A word for programs, such as ``cancelled``.
        message: A sentence for people, without any path of this machine.
    """

    code: str
    message: str


CANCELLED = Failure("cancelled", "the job was cancelled")


def worker_lost(attempts: int) -> Failure:
    """Return the reason of a job whose worker died as often as it was tried.

    Args:
        attempts: How often it was tried.
    """
    return Failure("worker_lost", f"the worker process died in each of {attempts} attempts at this job")


def ending(failure: Failure, *, cancelled: bool, attempts: int, final: bool = False) -> Failure | None:
    """Return how a job ends whose attempt came to nothing, or None where it waits for another attempt.

    Args:
        failure: Why the attempt came to nothing.
        cancelled: Somebody asked to cancel the job.
        attempts: The attempts so far that count; :data:`MAX_ATTEMPTS` is the last one.
        final: No other attempt would help.
    """
    if cancelled:
        return CANCELLED
    return failure if final or attempts >= MAX_ATTEMPTS else None


@dataclass(frozen=True)
class NewJob:
    """A request that was checked and is to be queued.

    Args:
        model: The name of the model.
        request: The request as the client sent it, in names of the interface.
        steps: The number of denoising steps, filled in.
        size: Width and height in pixels.
        seconds: The length of the clip.
        request_id: The id of the HTTP request, for the logs.
    """

    model: str
    request: dict[str, Any]
    steps: int
    size: tuple[int, int]
    seconds: float
    request_id: str = ""


@dataclass(frozen=True)
class Job:
    """A job as the store keeps it. Times are seconds since 1970.

    Args:
        id: Its id, ``video_`` and 32 hexadecimal digits.
        seq: Its place in the order of creation.
        status: ``queued``, ``in_progress``, ``completed`` or ``failed``.
        what: What was asked for.
        created_at: The time of its creation.
        started_at: The time of the last claim, or None.
        completed_at: The time when it ended, or None.
        expires_at: The time when it will be deleted, or None before it ended.
        progress: Percent, 0 to 100.
        bits: A character for each step so far: a digit of activation bits, ``s`` for a skipped step, ``f`` for 16 bit.
        attempts: The number of claims that count.
        worker: The worker that claimed it last, or None.
        token: The secret of the current claim, or None; only its holder may change the job.
        cancelled: True if somebody asked to cancel it.
        failure: The reason of a failure, or None.
        summary: Figures of the clip that was made, or None.
    """

    id: str
    seq: int
    status: Status
    what: NewJob
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    progress: int = 0
    bits: str = ""
    attempts: int = 0
    worker: str | None = None
    token: str | None = None
    cancelled: bool = False
    failure: Failure | None = None
    summary: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Return whether nothing more will happen to the job."""
        return self.status in ("completed", "failed")


def job_from_row(value: Callable[[str], Any]) -> Job:
    """Return the job of a row of a database; all stores have the same columns.

    Args:
        value: Gives the value of a column. ``what``, ``failure`` and ``summary`` are JSON.
    """
    what = json.loads(value("what"))
    failure, summary = value("failure"), value("summary")
    same = (
        "id",
        "seq",
        "status",
        "created_at",
        "started_at",
        "completed_at",
        "expires_at",
        "progress",
        "bits",
        "attempts",
    )
    return Job(
        **{name: value(name) for name in (*same, "worker", "token")},
        what=NewJob(**{**what, "size": tuple(what["size"])}),
        cancelled=bool(value("cancelled")),
        failure=None if failure is None else Failure(**json.loads(failure)),
        summary=None if summary is None else json.loads(summary),
    )


class JobStore(ABC):
    """Queue and state. Every method is one transaction; threads and processes may call at the same time.

    Attributes:
        shared: True if other servers may use the same jobs: then only leases tell whether a worker is dead.
    """

    shared = False

    @abstractmethod
    def create(self, what: NewJob, limit: int, video: str | None = None) -> Job:
        """Queue a job. When the method returns, the job survives a crash of the process and of the machine.

        Args:
            what: The request.
            limit: The greatest number of jobs that may wait.
            video: Its id, from :func:`new_video_id`, where files of it are there already; None makes one.

        Raises:
            QueueFullError: ``limit`` jobs wait already.
        """

    @abstractmethod
    def get(self, video: str) -> Job | None:
        """Return a job, or None if there is none of this id.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    def page(self, after: str | None, limit: int, *, ascending: bool = False) -> list[Job]:
        """Return up to ``limit`` jobs in the order of their creation.

        Args:
            after: The id of the job before the first one, or None to begin at the start.
            limit: The greatest number of jobs.
            ascending: The oldest first; otherwise the newest first.

        Raises:
            KeyError: There is no job ``after``.
        """

    @abstractmethod
    def ahead_of(self, job: Job) -> int:
        """Return the number of jobs that wait before a queued one.

        Args:
            job: A job of this store.
        """

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each status; those with none are left out."""

    @abstractmethod
    def claim(self, worker: str, models: tuple[str, ...], lease: float) -> Job | None:
        """Take the oldest job that waits, or None. Jobs whose lease ran out are put back first.

        Args:
            worker: The name of the worker.
            models: The models that it runs.
            lease: Seconds after which the job is free again unless :meth:`beat` renews the lease.
        """

    @abstractmethod
    def beat(self, video: str, token: str, lease: float, progress: int, bits: str) -> Beat:
        """Renew a lease and tell how far the job is.

        Args:
            video: The job.
            token: The secret of the claim.
            lease: Seconds from now.
            progress: The share of the job that is done, in percent.
            bits: See :class:`Job`.

        Returns:
            ``ok``; ``cancelled`` if somebody wants it to stop; ``lost`` if the job belongs to another claim or is deleted.
        """

    @abstractmethod
    def complete(self, video: str, token: str, summary: dict[str, Any], keep: float, bits: str) -> bool:
        """Say that the clip is there. False if the job belongs to another claim, is deleted, or was cancelled.

        Args:
            video: The job.
            token: The secret of the claim.
            summary: Figures of the clip.
            keep: Seconds until it expires.
            bits: See :class:`Job`; those of the last steps may be in no beat.
        """

    @abstractmethod
    def fail(self, video: str, token: str, failure: Failure, keep: float, *, final: bool) -> Job | None:
        """Say that an attempt failed: the job waits again, or has failed after the last attempt.

        Args:
            video: The job.
            token: The secret of the claim.
            failure: The reason.
            keep: Seconds until the failed job expires.
            final: True where another attempt would fail, too.

        Returns:
            The job as it is now, or None if it belongs to another claim or is deleted.
        """

    @abstractmethod
    def release(self, video: str, token: str) -> bool:
        """Put a job back that was not worked on to its end for no fault of its own; the attempt does not count.

        Args:
            video: The id of the job, ``video_…``.
            token: The token of the claim; one that no longer holds changes nothing.
        """

    @abstractmethod
    def abandon(self, worker: str) -> int:
        """Put back the jobs of a worker that died while its server lived. Return how many there were.

        Args:
            worker: The name that the worker claimed its jobs by.
        """

    @abstractmethod
    def interrupt(self, alive: Collection[str] = ()) -> int:
        """Put back the jobs of workers that ended with their server; the attempts do not count. Return how many there were.

        Args:
            alive: The workers that go on.
        """

    @abstractmethod
    def cancel(self, video: str) -> Job | None:
        """End a job that waits, and ask the worker of a running one to stop. Return the job, or None if there is none.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    def delete(self, video: str) -> bool:
        """Delete a job in any status; its worker stops at its next beat. False if there is none.

        Args:
            video: The id of the job, ``video_…``.
        """

    @abstractmethod
    def expire(self, now: float) -> list[str]:
        """Return the ids of jobs that expired before ``now``, the oldest first and a thousand at most.

        Args:
            now: Seconds since 1970, by the clock of the store's users.
        """

    @abstractmethod
    def keep_until(self, video: str, until: float) -> None:
        """Let a job that has ended expire at another time.

        Args:
            video: The id of the job, ``video_…``.
            until: Seconds since 1970.
        """

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""
