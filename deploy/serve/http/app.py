"""The HTTP interface: OpenAI's ``/v1/videos``, and what operators need."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from dvdquant.deploy.serve.http.gate import BodyTooLargeError, BodyTooSlowError, Gate, UploadsBusyError, problem
from dvdquant.deploy.serve.http.openapi import MAX_WAIT, openapi_document, readable_page
from dvdquant.deploy.serve.http.stored_clip import stored_clip
from dvdquant.deploy.serve.http.videos import deleted_json, list_json, video_json
from dvdquant.deploy.serve.jobs import VIDEO_ID, Job, QueueFullError
from dvdquant.deploy.serve.request.pictures import PICTURES, take_pictures
from dvdquant.deploy.serve.request.requests import read_request
from dvdquant.deploy.serve.request.wording import public_error
from dvdquant.deploy.serve.service import DiskFullError, Service
from dvdquant.deploy.serve.store.files import FilesAwayError
from dvdquant.errors import DvdquantError, ShapeError, UnsupportedError
from dvdquant.system.files import strict_json
from dvdquant.text import shown

__all__ = ["make_app"]

log = logging.getLogger(__name__)

_JSON = "application/json"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_STATIC = {"page.js": "text/javascript", "page.css": "text/css", "docs.css": "text/css", "icon.svg": "image/svg+xml"}
_WITH_PICTURES = ("/v1/videos", "/preflight")
_MAX_LIST = 100
_DRAIN_SECONDS = 5
_START_SECONDS = 2


def make_app(service: Service) -> Any:
    """Return the ASGI application.

    Args:
        service: What is behind the routes.
    """
    routes = _Routes(service)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/static/{name}", routes.static),
            Route("/docs", routes.docs),
            Route("/openapi.json", routes.openapi),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/preflight", routes.preflight, methods=["POST"]),
            Route("/v1/models", routes.list_models),
            Route("/v1/models/{name:path}", routes.get_model),
            Route("/v1/videos", routes.create_video, methods=["POST"]),
            Route("/v1/videos", routes.list_videos),
            Route("/v1/videos/{video}", routes.get_video),
            Route("/v1/videos/{video}", routes.delete_video, methods=["DELETE"]),
            Route("/v1/videos/{video}/content", routes.get_content),
            Route("/v1/videos/{video}/cancel", routes.cancel_video, methods=["POST"]),
            Route("/v1/videos/{video}/remix", routes.remix_video, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _http_error,
            QueueFullError: routes.queue_full,
            DiskFullError: _disk_full,
            DvdquantError: _bad_request,
            BodyTooLargeError: _too_large,
            BodyTooSlowError: _too_slow,
            UploadsBusyError: _uploads_busy,
            ClientDisconnect: _gone,
            FilesAwayError: _files_away,
            Exception: _our_fault,
        },
    )

    def body_limit(scope: Mapping[str, Any]) -> int:
        limits = service.settings.limits
        larger = scope["path"] in _WITH_PICTURES and service.takes_pictures
        return limits.body_with_pictures if larger else limits.body

    return Gate(app, service.settings, service.metrics, body_limit)


class _Routes:
    """The functions behind the routes; each is named after what it does."""

    def __init__(self, service: Service) -> None:
        self.service = service
        document = openapi_document(service.settings.limits)
        self._document = document
        self._readable = readable_page(document)

    # ---------------------------------------------------------------------------------------------------------- videos

    async def create_video(self, request: Request) -> Response:
        """Queue a job."""
        service = self.service
        if service.draining:
            return problem(
                503, "the server is stopping and takes no more jobs", "server_error", code="draining",
                retry_after=_DRAIN_SECONDS,
            )  # fmt: skip
        values, pictures = await self._asked(request)
        checked = service.check(values, pictures)
        if pictures:  # which are not decoded for nothing
            is_full = await service.run(service.queue_is_full)
            if is_full:
                raise QueueFullError
        decoded = await service.decode(pictures)
        # One call, because each that leaves this thread waits for its turn on a busy machine.
        job, ahead = await service.run(service.create, checked, decoded, request.state.request_id)
        service.pool.tell("wake")
        return JSONResponse(video_json(job, ahead))

    async def queue_full(self, request: Request, error: Exception) -> Response:
        """Answer a job that the queue does not take."""
        del request, error
        return problem(
            429, f"{self.service.settings.limits.queue} jobs are waiting, and this server takes no more",
            "rate_limit_error", code="queue_full", fix="try again later", retry_after=self.service.retry_after(),
        )  # fmt: skip

    async def preflight(self, request: Request) -> Response:
        """Say what a request would execute, without queueing it."""
        values, pictures = await self._asked(request)
        checked = self.service.check(values, pictures)
        await self.service.decode(pictures)
        counts = await self.service.run(self.service.store.counts)
        return JSONResponse(self.service.preflight(checked, counts.get("queued", 0)))

    async def list_videos(self, request: Request) -> Response:
        """List jobs."""
        query = request.query_params
        limit = _whole(query.get("limit", "20"), "limit", 1, _MAX_LIST)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ShapeError(f"order is {shown(order, 40)!r}", available="asc, desc")
        after = query.get("after") or None
        store = self.service.store
        if after is not None and not VIDEO_ID.fullmatch(after):
            raise ShapeError("after is no id of a video", available="an id that a list gave")
        try:
            jobs = await self.service.run(store.page, after, limit + 1, ascending=order == "asc")
        except KeyError:
            raise ShapeError("after names a video that does not exist", fix="begin the list anew") from None
        return JSONResponse(list_json(jobs, limit))

    async def get_video(self, request: Request) -> Response:
        """Say how far a job is, at once or when it has ended."""
        wait = _whole(request.query_params.get("wait", "0"), "wait", 0, MAX_WAIT)
        job = await self.service.wait(_video_id(request), wait)
        if job is None:
            raise _no_video()
        ahead = await self.service.run(self.service.store.ahead_of, job) if job.status == "queued" else None
        return JSONResponse(video_json(job, ahead))

    async def get_content(self, request: Request) -> Response:
        """Send the clip, or a range of its bytes."""
        variant = request.query_params.get("variant", "video")
        if variant != "video":
            raise UnsupportedError(f"variant {shown(variant, 40)!r} is not made", available="video")
        job = await self._job(request)
        if job.status == "failed":
            return problem(404, "the video failed, and has no content", code="video_failed")
        if job.status != "completed":
            return problem(
                409, f"the video is {job.status}", code="video_not_ready", fix="ask again later", retry_after=1
            )
        files = self.service.files
        path = await self.service.run(files.path, job.id)
        if path is None:
            size = await files.size(job.id)
            if size is None:
                return problem(404, "the content of the video is gone", code="content_gone")
            link = files.link(job.id)
            if link is None:
                return stored_clip(request, files, job.id, size)
            return RedirectResponse(link, 307, {"cache-control": "no-store"})
        return _Clip(path, media_type="video/mp4", filename=f"{job.id}.mp4", content_disposition_type="inline")

    async def cancel_video(self, request: Request) -> Response:
        """Stop a job; what ended already stays as it is."""
        video = _video_id(request)
        after = await self.service.run(self.service.store.cancel, video)
        if after is None:
            raise _no_video()
        self.service.pool.tell("cancel", video=video)
        self.service.changed(video)
        return JSONResponse(video_json(after))

    async def delete_video(self, request: Request) -> Response:
        """Delete a job and its clip; a running one stops."""
        video = _video_id(request)
        try:
            found = await self.service.run(self.service.delete, video)
        except OSError:
            log.exception("the files of %s cannot be deleted", video)
            return problem(
                503, "the files of the video cannot be deleted now", "server_error", code="disk_refuses",
                fix="try again later", retry_after=10,
            )  # fmt: skip
        if not found:
            raise _no_video()
        self.service.pool.tell("cancel", video=video)
        self.service.changed(video)
        return JSONResponse(deleted_json(video))

    async def remix_video(self, request: Request) -> Response:
        """Refuse: the models have no such input."""
        del request
        return problem(
            400, "remix is not supported: no model here takes a clip as input",
            fix="create a video with the seed of the first one and a changed prompt",
        )  # fmt: skip

    async def _asked(self, request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the checked fields of a body, JSON or form, and its pictures.

        Raises:
            ShapeError: The body is out of form.
            UnsupportedError: It is of another type, or see :func:`.requests.read_request`.
        """
        service, limits = self.service, self.service.settings.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        read: Callable[[], tuple[dict[str, Any], dict[str, bytes]]]
        if kind == _JSON:
            raw = await request.body()
            size, read = len(raw), lambda: take_pictures(_json_fields(raw), limits.picture)
        elif kind in _FORMS:
            part = limits.body_with_pictures if service.takes_pictures else limits.body
            async with request.form(max_files=4, max_fields=64, max_part_size=part) as form:
                fields = await _form_fields(form)
            texts = [value for value in fields.values() if isinstance(value, str)]
            size, read = sum(map(len, texts)), lambda: take_pictures(fields, limits.picture)
        else:
            raise UnsupportedError(f"content type {shown(kind, 80)!r}", available=(_JSON, *_FORMS))
        # A picture in base64 takes a while to read, and the others need not wait for it.
        rest, pictures = await service.run(read) if size > limits.body else read()
        return read_request(rest, form=kind != _JSON), pictures

    async def _job(self, request: Request) -> Job:
        job = await self.service.run(self.service.store.get, _video_id(request))
        if job is None:
            raise _no_video()
        return job

    # ---------------------------------------------------------------------------------------------------------- models

    async def list_models(self, request: Request) -> Response:
        """List the models."""
        del request
        return JSONResponse({"object": "list", "data": self.service.model_list()})

    async def get_model(self, request: Request) -> Response:
        """Describe one model."""
        name = request.path_params["name"]
        model = next((m for m in self.service.model_list() if m["id"] == name), None)
        if model is None:
            raise HTTPException(404, "there is no model of this name")
        return JSONResponse(model)

    # ------------------------------------------------------------------------------------------------------- operators

    async def health(self, request: Request) -> Response:
        """Say that the process answers."""
        del request
        workers = {worker.label: "ready" if worker.ready else "starting" for worker in self.service.pool.workers}
        return JSONResponse({"status": "ok", "draining": self.service.draining, "workers": workers})

    async def ready(self, request: Request) -> Response:
        """Say whether jobs are taken and drawn."""
        del request
        if self.service.draining or not self.service.pool.ready:
            state = "draining" if self.service.draining else "starting"
            return JSONResponse({"status": state}, 503, {"retry-after": str(_START_SECONDS)})
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Give the figures to Prometheus."""
        del request
        counts = await self.service.run(self.service.store.counts)
        text = self.service.metrics.text(counts)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # ----------------------------------------------------------------------------------------------------------- pages

    async def openapi(self, request: Request) -> Response:
        """Give the description of the interface."""
        del request
        return JSONResponse(self._document)

    async def docs(self, request: Request) -> Response:
        """Show the description of the interface."""
        del request
        return HTMLResponse(self._readable)

    async def page(self, request: Request) -> Response:
        """Show the live page."""
        del request
        return HTMLResponse(_asset("page.html"))

    async def static(self, request: Request) -> Response:
        """Send a file of the pages."""
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404)
        return Response(_asset(name), media_type=_STATIC[name])


class _Clip(FileResponse):
    """A clip that may be deleted between the look at its file and the answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the file; 404 if it is gone."""
        try:
            await super().__call__(scope, receive, send)
        except RuntimeError:  # Starlette's, before anything is sent
            await problem(404, "the content of the video is gone", code="content_gone")(scope, receive, send)


def _json_fields(raw: bytes) -> dict[str, Any]:
    """Return the fields of a JSON body.

    Raises:
        ShapeError: It is no object.
    """
    try:
        data = strict_json(raw, max_depth=8)
    except ValueError as error:
        raise ShapeError(
            f"the body is no valid JSON: {shown(error)}",
            fix="send one JSON object with content-type application/json, or a form",
        ) from None
    if not isinstance(data, dict):
        raise ShapeError("the body is no JSON object", fix='send an object such as {"prompt": "..."}')
    return data


async def _form_fields(form: FormData) -> Mapping[str, Any]:
    """Return the fields of a form: text, and the bytes of a picture; other files in words, to be refused."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise ShapeError(f"the field {shown(name, 80)!r} appears twice", fix="send each field once")
        if isinstance(value, UploadFile):
            fields[name] = await value.read() if name in PICTURES else f"a file of {value.size} bytes"
        else:
            fields[name] = value
    return fields


def _whole(text: str, name: str, low: int, high: int) -> int:
    value = float(text) if text.isascii() and text.isdecimal() and len(text) < 10 else math.nan
    if not low <= value <= high:
        raise ShapeError(f"{name} is {shown(text, 40)!r}", available=f"{low} to {high}")
    return int(value)


def _video_id(request: Request) -> str:
    """Return the id in a path; 404 if it has not the form of one."""
    video: str = request.path_params["video"]
    if not VIDEO_ID.fullmatch(video):
        raise _no_video()
    return video


def _no_video() -> HTTPException:
    return HTTPException(404, "there is no video of this id")


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("dvdquant.deploy.serve.http") / "assets" / name).read_text(encoding="utf-8")


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the router or the form parser refuse, in the shape of all errors."""
    del request
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing of this name", 405: "this method is not allowed here"}
    plain = error.detail if error.status_code in (400, 404) and error.detail != "Not Found" else ""
    answer = problem(error.status_code, shown(plain, 300) or words.get(error.status_code, "the request is refused"))
    answer.headers.update(error.headers or {})
    return answer


async def _bad_request(request: Request, error: Exception) -> Response:
    """Answer a request that cannot be drawn."""
    del request
    assert isinstance(error, DvdquantError)
    said = public_error(error)
    return problem(400, said["message"] or "", available=said["available"], fix=said["fix"])


async def _too_large(request: Request, error: Exception) -> Response:
    """Answer a body over the limit; the rest of it is not read."""
    del request
    answer = problem(413, "the body of the request is too large", available=f"{error.args[0]} bytes")
    answer.headers["connection"] = "close"
    return answer


async def _too_slow(request: Request, error: Exception) -> Response:
    """Answer a body that has stopped to come."""
    del request, error
    answer = problem(408, "the body of the request did not come in time")
    answer.headers["connection"] = "close"
    return answer


async def _uploads_busy(request: Request, error: Exception) -> Response:
    """Answer a large body while as many of them come in as the server takes at a time."""
    del request, error
    answer = problem(
        503,
        "many pictures are being uploaded",
        "server_error",
        code="uploads_busy",
        fix="try again later",
        retry_after=5,
    )
    answer.headers["connection"] = "close"
    return answer


async def _disk_full(request: Request, error: Exception) -> Response:
    """Answer a job for whose clip there is no room."""
    del request, error
    return problem(503, "the server has no room for more clips", "server_error", code="disk_full", retry_after=60)


async def _gone(request: Request, error: Exception) -> Response:
    """Answer nobody: the client has gone; the status is for the log."""
    del request, error
    return Response(status_code=499)


async def _files_away(request: Request, error: Exception) -> Response:
    """Answer where the object store does not: the job stays as it is."""
    del request
    log.error("%s", error)
    return problem(503, "the clips cannot be reached", "server_error", code="files_away", retry_after=_START_SECONDS)


async def _our_fault(request: Request, error: Exception) -> Response:
    """Answer a request on which the server failed; its log has the traceback."""
    del error
    text = f"the server failed at this request; its log has more under {request.state.request_id}"
    return problem(500, text, "server_error", code="internal_error")
