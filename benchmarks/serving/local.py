"""The HTTP part of dvdq-serve on a thread of this process, without workers: nothing of it imports PyTorch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from dvdquant.deploy.serve.app import make_app
from dvdquant.deploy.serve.files import FolderFiles
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.server import _Http
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.sqlite_store import SqliteStore
from dvdquant.deploy.serve.supervisor import Pool

__all__ = ["LocalHttp", "local_http"]


@dataclass(frozen=True)
class LocalHttp:
    """A server on a thread.

    Args:
        service: What is behind its routes.
        loop: The loop of its thread.
        url: Its address.
    """

    service: Service
    loop: asyncio.AbstractEventLoop
    url: str


@contextlib.contextmanager
def local_http(settings: ServerSettings) -> Iterator[LocalHttp]:
    """Answer requests until the end of the block; jobs wait in the store.

    Args:
        settings: The settings; their devices are not used.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    store, files, metrics = (
        SqliteStore(settings.data / "jobs.sqlite"),
        FolderFiles(settings.data / "videos"),
        ServerMetrics(),
    )
    service = Service(settings, store, files, Pool(settings, store, metrics, ("none",), lambda _: None), metrics)
    http = _Http(uvicorn.Config(make_app(service), port=0, lifespan="off", log_config=None, access_log=False))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(http.serve(),), daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not http.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        port = http.servers[0].sockets[0].getsockname()[1]
        yield LocalHttp(service, loop, f"http://127.0.0.1:{port}")
    finally:
        http.should_exit = True
        thread.join(60)
        service.close()
        store.close()
        loop.close()
