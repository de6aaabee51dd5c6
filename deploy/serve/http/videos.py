"""The answers of the interface: a job as OpenAI's ``Video`` with our own figures beside it, lists, and errors."""

from __future__ import annotations

from typing import Any

from dvdquant.deploy.serve.jobs import Job

__all__ = ["deleted_json", "error_json", "list_json", "video_json"]

_BITS = {"s": None, "f": 16}


def video_json(job: Job, ahead: int | None = None) -> dict[str, Any]:
    """Return a job as ``Video``; ``dvdquant`` holds what OpenAI's type has no place for.

    Args:
        job: The job.
        ahead: The number of jobs that wait before it, if it waits.
    """
    what = job.what
    failure = job.failure
    return {
        "id": job.id,
        "object": "video",
        "model": what.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "prompt": what.request["prompt"],
        "seconds": f"{what.seconds:g}",
        "size": f"{what.size[0]}x{what.size[1]}",
        "remixed_from_video_id": None,
        "error": None if failure is None else {"code": failure.code, "message": failure.message},
        "dvdquant": {
            "request": {name: value for name, value in what.request.items() if name not in ("prompt", "model")},
            "steps": what.steps,
            "bits": [_BITS[mark] if mark in _BITS else int(mark) for mark in job.bits],
            "attempts": job.attempts,
            "queue_position": ahead,
            "summary": job.summary,
        },
    }


def list_json(jobs: list[Job], limit: int) -> dict[str, Any]:
    """Return a page of jobs.

    Args:
        jobs: The jobs, one more than ``limit`` if there are more.
        limit: The size of the page.
    """
    page = jobs[:limit]
    return {
        "object": "list",
        "data": [video_json(job) for job in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(jobs) > limit,
    }


def deleted_json(video: str) -> dict[str, Any]:
    """Return the answer to a deletion.

    Args:
        video: The id.
    """
    return {"id": video, "object": "video.deleted", "deleted": True}


def error_json(
    message: str, kind: str, *, code: str | None = None, available: str | None = None, fix: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's shape. Its message is whole; ``available`` and ``fix`` stand beside it for programs.

    Args:
        message: What was wrong.
        kind: ``invalid_request_error``, ``rate_limit_error``, ``authentication_error`` or ``server_error``.
        code: A word for programs.
        available: What exists.
        fix: What to do.
    """
    lines = [message, f"available: {available}" if available else "", f"fix: {fix}" if fix else ""]
    text = "; ".join(line for line in lines if line)
    return {"error": {"message": text, "type": kind, "param": None, "code": code, "available": available, "fix": fix}}
