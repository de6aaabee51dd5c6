"""The description of the interface: an OpenAPI document, and the same as a page without scripts."""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

from dvdquant import __version__
from dvdquant.deploy.serve.request.pictures import about_pictures
from dvdquant.deploy.serve.request.requests import VideoRequest
from dvdquant.deploy.serve.settings import Limits

__all__ = ["MAX_WAIT", "openapi_document", "readable_page"]

MAX_WAIT = 60  # seconds that a request waits for the end of a job

_ID = {
    "name": "video",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "The id of a video.",
}
_NULLABLE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_NULLABLE_INT: dict[str, Any] = {"type": ["integer", "null"]}
_WHY = {
    "400": "The request cannot be drawn; the error says what was wrong, what is available, and how to fix it.",
    "401": "The API key is missing or wrong.",
    "403": "The request comes from a page of another site.",
    "404": "There is nothing of this id.",
    "408": "The body did not come in time.",
    "409": "The clip is not there yet.",
    "413": "The body is too large.",
    "416": "The range is outside of the file.",
    "421": "The server does not answer to the name in the Host header.",
    "429": "Too many jobs wait; `Retry-After` says when to come back.",
    "503": "The server starts, stops or is full; `Retry-After` says when to come back.",
}
_ALWAYS = ("401", "403", "421")


def openapi_document(limits: Limits) -> dict[str, Any]:
    """Return the description as OpenAPI 3.1.

    Args:
        limits: The limits of the server, which the fields name.
    """
    request = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    request["properties"]["prompt"]["maxLength"] = limits.prompt
    steps = next(each for each in request["properties"]["num_inference_steps"]["anyOf"] if each["type"] == "integer")
    steps["maximum"] = limits.steps
    form = copy.deepcopy(request)
    form["title"] = "VideoForm"
    request["properties"] |= about_pictures(form=False)
    form["properties"] |= about_pictures(form=True)
    bodies = {
        "application/json": {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/VideoForm"}},
    }
    creating = ("400", "408", "413", "429", "503")
    body = {"required": True, "content": bodies}
    list_query = [
        _query("after", {"type": "string"}, "The last id of the page before."),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "The size of a page."),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}, "Oldest or newest first."),
    ]
    paths: dict[str, Any] = {
        "/v1/videos": {
            "post": _does("Create a video", "createVideo", _ok("Video"), creating, requestBody=body),
            "get": _does("List videos", "listVideos", _ok("VideoList"), ("400",), parameters=list_query),
        },
        "/v1/videos/{video}": {
            "parameters": [_ID],
            "get": _does(
                "Ask for a video's state, at once or when its job has ended", "getVideo", _ok("Video"), ("400", "404"),
                parameters=[_query(
                    "wait", {"type": "integer", "minimum": 0, "maximum": MAX_WAIT, "default": 0},
                    "Seconds to wait for the end of the job, at most.",
                )],
            ),
            "delete": _does(
                "Delete a video; a running job stops", "deleteVideo", _ok("VideoDeleted"), ("404", "503")
            ),
        },
        "/v1/videos/{video}/content": {
            "parameters": [_ID],
            "get": _does(
                "Download the clip; ranges of bytes are served", "getContent", _clip(), ("400", "404", "409", "416"),
                parameters=[_query("variant", {"enum": ["video"], "default": "video"}, "Which file.")],
            ),
        },
        "/v1/videos/{video}/cancel": {
            "parameters": [_ID],
            "post": _does("Cancel a job", "cancelVideo", _ok("Video"), ("404", "408", "413")),
        },
        "/v1/videos/{video}/remix": {
            "parameters": [_ID],
            "post": _does("Refused: no model here takes a clip as input", "remixVideo", {}, ("400", "408", "413")),
        },
        "/v1/models": {"get": _does("List the models", "listModels", _ok("ModelList"), ())},
        "/v1/models/{name}": {
            "parameters": [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "A model."}
            ],
            "get": _does("Describe a model", "getModel", _ok("Model"), ("404",)),
        },
        "/preflight": {
            "post": _does(
                "Say what a request would execute and cost, without queueing it", "preflight", _ok("Preflight"),
                tuple(code for code in creating if code != "429"), requestBody=body,
            ),
        },
        "/health": {"get": _does("Whether the process answers", "health", _ok("Health"), ())},
        "/ready": {"get": _does("Whether jobs are taken and drawn", "ready", _ok("Ready"), ("503",))},
        "/metrics": {"get": _does("Figures for Prometheus", "metrics", _text(), ())},
    }  # fmt: skip
    paths["/ready"]["get"]["responses"]["503"] = _ok("Ready")["200"]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dvdq-serve",
            "version": __version__,
            "description": "Video by exports of dvdquant. The paths below `/v1` are those of OpenAI's video API.",
        },
        "paths": paths,
        "components": {
            "schemas": {"VideoRequest": request, "VideoForm": form, **_schemas()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def readable_page(document: dict[str, Any]) -> str:
    """Return the document as HTML; nothing is loaded from elsewhere, and no script runs.

    Args:
        document: The OpenAPI document.
    """
    import jinja2

    text = (resources.files("dvdquant.deploy.serve.http") / "assets" / "docs.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(document=document, fields=_field_rows(document))


def _field_rows(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return the fields of a request: name, type and what it is."""
    rows = []
    for name, schema in document["components"]["schemas"]["VideoRequest"]["properties"].items():
        kinds = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
        words = [" | ".join(k["enum"]) if "enum" in k else k.get("type", "text") for k in kinds]
        first = kinds[0]
        low, high = first.get("minimum"), first.get("maximum")
        bounds = (
            f" {low} to {high}" if low is not None and high is not None else f" from {low}" if low is not None else ""
        )
        rows.append({"name": name, "type": " or ".join(words) + bounds, "text": schema.get("description", "")})
    return rows


def _does(summary: str, name: str, good: dict[str, Any], problems: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Return an operation: what it answers if all is well, and which errors it may answer."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    bad = {code: {"description": _WHY[code], "content": error} for code in sorted({*problems, *_ALWAYS})}
    return {"summary": summary, "operationId": name, "responses": {**good, **bad}, **more}


def _ok(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"200": {"description": schema, "content": content}}


def _clip() -> dict[str, Any]:
    content = {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "200": {"description": "The clip", "content": content},
        "206": {"description": "A part of it", "content": content},
    }


def _text() -> dict[str, Any]:
    return {"200": {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _query(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _schemas() -> dict[str, Any]:
    """Return the types of the answers."""
    text, whole, anything = {"type": "string"}, {"type": "integer"}, {"type": "object"}
    error = _object(["code", "message"], code=text, message=text)
    video = _object(
        ["id", "object", "model", "status", "progress", "created_at", "prompt", "seconds", "size", "error", "dvdquant"],
        id=text,
        object={"const": "video"},
        model=text,
        status={"enum": ["queued", "in_progress", "completed", "failed"]},
        progress={"type": "integer", "minimum": 0, "maximum": 100},
        created_at=whole,
        completed_at=_NULLABLE_INT,
        expires_at=_NULLABLE_INT,
        prompt=text,
        seconds=text,
        size=text,
        remixed_from_video_id={"type": "null"},
        error={"anyOf": [error, {"type": "null"}]},
        dvdquant=_object(
            ["request", "steps", "bits", "attempts", "queue_position", "summary"],
            request=anything,
            steps=whole,
            bits={
                "type": "array",
                "items": _NULLABLE_INT,
                "description": "Activation bits of each step; null is skipped.",
            },
            attempts=whole,
            queue_position=_NULLABLE_INT,
            summary={"type": ["object", "null"]},
        ),
    )
    model = _object(
        ["id", "object", "created", "owned_by", "dvdquant"],
        id=text,
        object={"const": "model"},
        created=whole,
        owned_by=text,
        dvdquant=anything,
    )
    video_list = _object(
        ["object", "data", "first_id", "last_id", "has_more"],
        object={"const": "list"},
        data={"type": "array", "items": {"$ref": "#/components/schemas/Video"}},
        first_id=_NULLABLE_TEXT,
        last_id=_NULLABLE_TEXT,
        has_more={"type": "boolean"},
    )
    return {
        "Video": video,
        "VideoList": video_list,
        "VideoDeleted": _object(["id", "object", "deleted"], id=text, object={"const": "video.deleted"}, deleted={"const": True}),
        "Model": model,
        "ModelList": _object(
            ["object", "data"],
            object={"const": "list"},
            data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        ),
        "Preflight": _object(
            ["object", "model", "mode", "num_inference_steps", "num_frames", "size", "transformer_calls", "executed", "queue"],
            object={"const": "video.preflight"},
            model=text,
            mode=text,
            num_inference_steps=whole,
            guidance_scale={"type": "number"},
            num_frames=whole,
            size=text,
            fps={"type": "number"},
            seconds=text,
            transformer_calls=whole,
            transformer_seconds_by_bits=anything,
            executed=anything,
            queue=anything,
        ),
        "Health": _object(["status", "draining", "workers"], status=text, draining={"type": "boolean"}, workers=anything),
        "Ready": _object(["status"], status=text),
        "Error": _object(
            ["error"],
            error=_object(
                ["message", "type", "param", "code", "available", "fix"],
                message=text,
                type=text,
                param=_NULLABLE_TEXT,
                code=_NULLABLE_TEXT,
                available=_NULLABLE_TEXT,
                fix=_NULLABLE_TEXT,
            ),
        ),
    }  # fmt: skip
