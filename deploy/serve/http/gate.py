"""What every request passes before it is answered: request id, host, origin, key, size, time, log, figures.

Pure ASGI, so that no body is buffered and a download streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from dvdquant.deploy.serve.http.videos import error_json
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import ServerSettings

__all__ = ["BodyTooLargeError", "BodyTooSlowError", "Gate", "UploadsBusyError", "key_digest", "problem"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_ROUTES = ("/", "/docs", "/openapi.json", "/health", "/ready")
BODY_SECONDS = 30.0  # for every part of a body
WHOLE_BODY_SECONDS = 300.0
UPLOADS = 8  # bodies with pictures that come in at the same time; they are held in memory
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)

log = logging.getLogger(__name__)


class BodyTooLargeError(Exception):
    """A body is larger than the server takes, which is ``args[0]`` bytes."""


class BodyTooSlowError(Exception):
    """A body has stopped to come."""


class UploadsBusyError(Exception):
    """The server takes no more large bodies at the moment."""


def key_digest(key: str) -> bytes:
    """Return what the server keeps of an API key: its SHA-256.

    Args:
        key: The key.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def problem(status: int, message: str, kind: str = "invalid_request_error", **more: Any) -> JSONResponse:
    """Return an error as an answer.

    Args:
        status: The HTTP status.
        message: What was wrong.
        kind: See :func:`.videos.error_json`.
        more: ``code``, ``available`` and ``fix`` of that function, and ``retry_after`` in seconds.
    """
    retry = more.pop("retry_after", None)
    headers = {} if retry is None else {"retry-after": str(max(1, round(retry)))}
    return JSONResponse(error_json(message, kind, **more), status, headers)


class Gate:
    """The outermost layer of the application.

    Args:
        app: What is behind it.
        settings: Limits, keys and host names.
        metrics: Counts requests.
        body_limit: Gives the most bytes of a request's body.
    """

    def __init__(
        self, app: Any, settings: ServerSettings, metrics: ServerMetrics, body_limit: Callable[[Scope], int]
    ) -> None:
        self.app = app
        self.body_limit = body_limit
        self._uploads = 0
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it.

        Args:
            scope: The request's line and headers; anything else than HTTP is left alone.
            receive: A function that gives the next part of the request's body.
            send: A function that takes the next part of the answer.
        """
        if scope["type"] != "http":
            return  # no websockets, no lifespan
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, whole = time.perf_counter(), 0, False
        body = _Body(self, scope, receive)

        async def answer(message: Message) -> None:
            nonlocal status, whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = [(b"x-request-id", request_id.encode())]
                there = {name for name, _ in message.get("headers", [])}
                ours += [(name, value) for name, value in _HEADERS if name not in there]
                message = {**message, "headers": [*message.get("headers", []), *ours]}
            await send(message)

        try:
            refused = self._refuse(scope, headers)
            await (self.app if refused is None else refused)(scope, body.take, answer)
        except Exception as error:
            # The application has answered every fault that came before its answer. A fault that came later must break
            # the connection, or the client takes a part for the whole.
            log_event(
                log, "request_failed", level=logging.ERROR, text="a request failed", error=error, request=request_id
            )
            if not whole:
                raise
        finally:
            body.done()
        self._note(scope, request_id, status, time.perf_counter() - started)

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> JSONResponse | None:
        """Return the refusal of a request that must not go further, or None."""
        host = headers.get("host", "")
        allowed = self.settings.allowed_hosts
        if allowed and _host_name(host) not in allowed:
            return problem(421, "this server does not answer to that name", available=", ".join(allowed))
        origin = headers.get("origin")
        # A page of another site may send forms here without asking; nothing of ours does.
        if origin is not None and origin.partition("://")[2] != host:
            return problem(403, "requests of pages of other sites are refused")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            return problem(403, "requests of pages of other sites are refused")
        path = scope["path"]
        if not self.settings.api_keys or path in OPEN_ROUTES or path.startswith("/static/"):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = key_digest(key.strip() if kind.lower() == "bearer" else "")
        # All keys are compared, so that the time tells nothing.
        same = [hmac.compare_digest(digest, known) for known in self.settings.api_keys]
        if not any(same):
            answer = problem(
                401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key",
                fix="send it as: Authorization: Bearer KEY",
            )  # fmt: skip
            answer.headers["www-authenticate"] = "Bearer"
            return answer
        return None

    def begin_upload(self) -> bool:
        """Take one of the places for large bodies; False if there is none."""
        if self._uploads >= UPLOADS:
            return False
        self._uploads += 1
        return True

    def end_upload(self) -> None:
        """Give the place back."""
        self._uploads -= 1

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = _route(scope)
        self.metrics.requests.labels(_method(scope), route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in ("health", "ready", "metrics") else logging.INFO
        log_event(
            log,
            "request",
            level=level,
            request=request_id,
            method=_method(scope),
            path=scope["path"][:200],
            status=status,
            milliseconds=round(1000 * seconds, 2),
        )


class _Body:
    """The body of one request, with limits on its bytes and on waiting for them."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive) -> None:
        self.gate, self.receive = gate, receive
        self.most, self.usual = gate.body_limit(scope), gate.settings.limits.body
        self.taken, self.whole, self.large = 0, False, False
        self.end = time.monotonic() + WHOLE_BODY_SECONDS

    async def take(self) -> Message:
        """Return the next part."""
        if self.whole:
            return await self.receive()  # waits for the end of the connection
        try:
            seconds = min(BODY_SECONDS, self.end - time.monotonic())
            message = await asyncio.wait_for(self.receive(), max(0.0, seconds))
        except TimeoutError:
            raise BodyTooSlowError from None
        if message["type"] == "http.request":
            self.taken += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.taken > self.most:
                raise BodyTooLargeError(self.most)
            if self.taken > self.usual and not self.large:
                self.large = self.gate.begin_upload()
                if not self.large:
                    raise UploadsBusyError
        return message

    def done(self) -> None:
        """End the request."""
        if self.large:
            self.large = False
            self.gate.end_upload()


def _headers(scope: Scope) -> dict[str, str]:
    """Return the headers by their names in lower case; of several of one name the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """Return the host of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _method(scope: Scope) -> str:
    """Return the method as a label; strangers can make up any number of them."""
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"


def _route(scope: Scope) -> str:
    """Return the name of the function that answered as a label, or ``other``."""
    return str(getattr(scope.get("endpoint"), "__name__", "other"))
