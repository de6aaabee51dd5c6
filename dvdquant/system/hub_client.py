"""The hub's client, and how long it waits for an answer. Its own limits leave some requests out, and these wait for ever."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dvdquant.system.hooks import hook

__all__ = ["EndlessAnswerError", "limit_waiting", "one_listing"]

REQUIREMENT = "huggingface_hub>=1.0,<3"
_WHY = "to let requests of the hub end"

SILENCE = 120.0  # seconds
LONGEST_PAUSE = 600  # seconds
# Of what is no file. A list of files that is silent six times, as often as the client asks, takes 12.5 minutes.
LONGEST_ANSWER = 900.0  # seconds
LARGEST_ANSWER = 64 << 20  # bytes as they are sent; a page of 1000 files has less than one MiB
MOST_ANSWERS = 200  # for one list of files, with those that failed
_lock = threading.Lock()
_API = re.compile(r"/api/")
_LISTING = re.compile(r"/api/models/[^/]+(/[^/]+)?(/(tree|revision)/.*)?$")


class EndlessAnswerError(Exception):
    """The hub answers, and does not come to an end."""


@dataclass
class _Listing:
    """The bytes and the time that one list of files may still take."""

    until: float = field(default_factory=lambda: time.monotonic() + LONGEST_ANSWER)
    answers: int = 0


_listing: ContextVar[_Listing | None] = ContextVar("listing", default=None)


@contextmanager
def one_listing() -> Iterator[None]:
    """Let the hub's client list the files of one repository in the ``with`` block, which has an end.

    Without it a hub that names a next page for ever is asked for ever. What the client fetches besides has no part in it.

    Raises:
        EndlessAnswerError: There were more than ``MOST_ANSWERS`` answers, or they took ``LONGEST_ANSWER`` seconds.
    """
    limit_waiting()
    token = _listing.set(_Listing())
    try:
        yield
    finally:
        _listing.reset(token)


def limit_waiting() -> None:
    """Let every request of the hub's client in this process end after ``SILENCE`` seconds without a byte.

    Requests that have a limit keep it. A server may ask for a pause of up to ``LONGEST_PAUSE`` seconds before the next
    attempt; longer ones are as if it had not asked. An answer that is no file is read for ``LONGEST_ANSWER`` seconds and
    ``LARGEST_ANSWER`` bytes, as a byte now and then is no silence. What Xet sends and fetches has the limits of its own library.

    Raises:
        UnsupportedError: The hub's client is made in another way than that of the releases we know.
    """
    import huggingface_hub

    # The client is made anew after a failed connection, so its hooks are set where it is made.
    with _lock:
        path = "huggingface_hub.utils._http:_GLOBAL_CLIENT_FACTORY"
        before = hook("huggingface_hub", path, _WHY, REQUIREMENT)
        if getattr(before, "limits_waiting", False):
            return

        def factory() -> Any:
            client = before()
            stream_class(client)  # asked before anything is sent
            client.event_hooks = {
                "request": [*client.event_hooks["request"], _limit_silence],
                "response": [*client.event_hooks["response"], _limit_pause, _limit_answer],
            }
            return client

        factory.limits_waiting = True  # type: ignore[attr-defined]
        huggingface_hub.set_client_factory(factory)


def stream_class(sent: Any) -> type[Any]:
    """Return the class of the streams of the HTTP library that a client or an answer comes from: the hub's has had two.

    Args:
        sent: The client or the answer.

    Raises:
        UnsupportedError: The library has no such class.
    """
    modules = [kind.__module__.partition(".")[0] for kind in type(sent).__mro__]
    library = next((name for name in modules if name.startswith("httpx")), modules[0])
    found: type[Any] = hook("huggingface_hub", f"{library}:SyncByteStream", _WHY, REQUIREMENT)
    return found


def _limit_silence(request: Any) -> None:
    """Give a request the limits that it does not have: some are sent with none, whatever the client's are."""
    given = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions["timeout"] = {**dict.fromkeys(("connect", "read", "write", "pool"), SILENCE), **given}


def _limit_pause(response: Any) -> None:
    """Take a pause out of an answer that nobody would wait for."""
    for name, pattern in (("retry-after", r"(\d+)"), ("ratelimit", r"\bt\s*=\s*(\d+)")):
        asked = re.search(pattern, response.headers.get(name, ""))
        if asked is not None and int(asked[1][:20]) > LONGEST_PAUSE:
            del response.headers[name]


def _limit_answer(response: Any) -> None:
    """Let an answer that is no file end, and a list of files after so many of them."""
    path = response.request.url.path
    if response.request.method in ("GET", "HEAD") and not _API.search(path):
        return  # a file, or what is said of one
    until, listing = time.monotonic() + LONGEST_ANSWER, _listing.get()
    if listing is not None and _LISTING.search(path):
        listing.answers += 1
        if listing.answers > MOST_ANSWERS:
            raise EndlessAnswerError(f"the list of files has no end after {MOST_ANSWERS} pages")
        until = listing.until
    stream = response.stream
    base = stream_class(response)

    class Limited(base):  # type: ignore[misc, valid-type]
        """The stream of an answer, until it has taken too long or too much."""

        def __iter__(self) -> Iterator[bytes]:
            taken = 0
            for block in stream:
                taken += len(block)
                if taken > LARGEST_ANSWER or time.monotonic() > until:
                    raise EndlessAnswerError(f"an answer has no end after {taken} bytes and up to {LONGEST_ANSWER:g} s")
                yield block

        def close(self) -> None:
            stream.close()

    response.stream = Limited()
