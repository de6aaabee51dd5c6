"""What the server answers: jobs as OpenAI knows them, the page of its interface, and a queue or a disk that is full."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.local import local_http
from dvdquant.deploy.serve.http.openapi import openapi_document, readable_page
from dvdquant.deploy.serve.http.videos import error_json, list_json, video_json
from dvdquant.deploy.serve.jobs import Failure, Job, NewJob, QueueFullError
from dvdquant.deploy.serve.service import DiskFullError, Service
from dvdquant.deploy.serve.settings import Limits, ServerSettings


def test_a_job_as_openai_knows_it() -> None:
    job = Job("video_1", 1, "in_progress", NewJob("wan", {"prompt": "x", "seed": 1}, 4, (24, 16), 2.0), 10.6)
    job = dataclasses.replace(job, progress=50, bits="84sf", attempts=1)
    said = video_json(job)
    assert (said["size"], said["seconds"], said["created_at"], said["error"]) == ("24x16", "2", 10, None)
    assert said["dvdquant"]["bits"] == [8, 4, None, 16]
    assert said["dvdquant"]["request"] == {"seed": 1}
    failed = dataclasses.replace(job, status="failed", failure=Failure("cancelled", "it was"))
    assert video_json(failed)["error"] == {"code": "cancelled", "message": "it was"}
    page = list_json([job, failed], 1)
    assert (page["first_id"], page["last_id"], page["has_more"], len(page["data"])) == ("video_1", "video_1", True, 1)
    assert list_json([], 5)["first_id"] is None
    assert error_json("a", "b", available="c", fix="d")["error"]["message"] == "a; available: c; fix: d"


def test_the_page_of_the_interface_shows_every_field_and_path() -> None:
    document = openapi_document(Limits(steps=77))
    page = readable_page(document)
    for name in document["components"]["schemas"]["VideoRequest"]["properties"]:
        assert f"<code>{name}</code>" in page
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page
    assert "1 to 77" in page
    assert "http:" not in page
    assert "<script" not in page


def test_a_job_without_room_is_answered_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full: list[Exception] = [QueueFullError(), DiskFullError()]

    def create(*_: Any) -> Any:
        raise full.pop(0)

    monkeypatch.setattr(Service, "check", lambda *_: None)
    monkeypatch.setattr(Service, "create", create)
    with local_http(ServerSettings((), tmp_path, devices=(), spare=False, limits=Limits(queue=7))) as server:
        answers = [httpx.post(f"{server.url}/v1/videos", json={"prompt": "a cat"}) for _ in range(2)]
    errors = [answer.json()["error"] for answer in answers]
    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(429, "1"), (503, "60")]
    assert [(error["code"], error["type"]) for error in errors] == [
        ("queue_full", "rate_limit_error"),
        ("disk_full", "server_error"),
    ]
    assert errors[0]["message"].startswith("7 jobs are waiting")
