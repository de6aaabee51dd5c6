"""The HTTP part of dvdq-serve on a thread of this process, without workers: nothing of it imports PyTorch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.server import http_server
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.store.files import FolderFiles
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore

__all__ = ["LocalHttp", "LocalWorkers", "local_http"]


class LocalWorkers:
    """The workers that live in the server's process; none at first."""

    def __init__(self) -> None:
        self.workers: list[Any] = []

    @property
    def ready(self) -> list[Any]:
        """Those that take jobs."""
        return [worker for worker in self.workers if worker.ready]

    def tell(self, event: str, **fields: Any) -> None:
        """Tell every worker."""
        for worker in self.workers:
            worker.tell(event, **fields)

    def reload(self) -> None:
        """They keep what they have opened."""


@dataclass(frozen=True)
class LocalHttp:
    """A server on a thread.

    Args:
        service: What is behind its routes.
        workers: Its workers.
        loop: The loop of its thread.
        url: Its address.
    """

    service: Service
    workers: LocalWorkers
    loop: asyncio.AbstractEventLoop
    url: str


@contextlib.contextmanager
def local_http(settings: ServerSettings) -> Iterator[LocalHttp]:
    """Answer requests until the end of the block; jobs wait in the store.

    Args:
        settings: The settings; their devices are not used.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    store, files = SqliteStore(settings.data / "jobs.sqlite"), FolderFiles(settings.data / "videos")
    workers = LocalWorkers()
    service = Service(settings, store, files, workers, ServerMetrics())
    http = http_server(service)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(http.serve(),), daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not http.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        port = http.servers[0].sockets[0].getsockname()[1]
        yield LocalHttp(service, workers, loop, f"http://127.0.0.1:{port}")
    finally:
        http.should_exit = True
        thread.join(60)
        service.close()
        store.close()
        loop.close()
