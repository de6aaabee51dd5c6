"""JSON lines in both directions between the server and one of its workers, over a pair of sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Channel", "Link"]

log = logging.getLogger(__name__)


class Channel:
    """One end of the pair. Any thread may send; one thread reads.

    Args:
        end: The socket; it is closed with the channel.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lines = end.makefile("rb")
        self._sending = threading.Lock()

    def send(self, event: str, **fields: Any) -> bool:
        """Send a message. False if the other end is gone.

        Args:
            event: Its kind.
            fields: Its values, as JSON takes them.
        """
        line = json.dumps({"event": event, **fields}, allow_nan=False).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            return False
        return True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield messages until the other end is gone, or sends what is no message."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed here
            for line in self._lines:
                if not line.endswith(b"\n"):
                    return  # the other end was killed in the middle of it
                try:
                    message = json.loads(line)
                except ValueError:
                    log.error("the channel ends, because the other process has sent what is no JSON: %r", line[:200])
                    return
                if isinstance(message, dict):
                    yield message

    def is_closed(self) -> bool:
        """Return whether the other end is gone; no message is taken."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def close(self) -> None:
        """Close this end; a thread that reads here ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._lines.close()
            self._socket.close()


class Link:
    """The messages of a worker to its server, whichever that is now; while there is none, they are lost.

    Args:
        channel: The channel to the first server.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel: Channel | None = channel

    def send(self, event: str, **fields: Any) -> bool:
        """Send a message, see :meth:`Channel.send`.

        Args:
            event: Its kind.
            fields: Its values.
        """
        channel = self.channel
        return channel is not None and channel.send(event, **fields)
