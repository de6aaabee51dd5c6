"""The hub's client, and how long it waits for an answer. Its own limits leave some requests out, and these wait for ever."""

from __future__ import annotations

import re
import threading
from typing import Any

__all__ = ["limit_waiting"]

SILENCE = 120.0  # seconds
LONGEST_PAUSE = 600  # seconds
_lock = threading.Lock()


def limit_waiting() -> None:
    """Let every request of the hub's client in this process end after ``SILENCE`` seconds without a byte.

    Requests that have a limit keep it. A server may ask for a pause of up to ``LONGEST_PAUSE`` seconds before the next
    attempt; longer ones are as if it had not asked. What Xet sends and fetches has the limits of its own library.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http

    # The client is made anew after a failed connection, so its hooks are set where it is made.
    with _lock:
        before = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
        if getattr(before, "limits_waiting", False):
            return

        def factory() -> Any:
            client = before()
            client.event_hooks = {
                "request": [*client.event_hooks["request"], _limit_silence],
                "response": [*client.event_hooks["response"], _limit_pause],
            }
            return client

        factory.limits_waiting = True  # type: ignore[attr-defined]
        huggingface_hub.set_client_factory(factory)


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
