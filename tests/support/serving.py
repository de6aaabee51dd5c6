"""``dvdq-serve`` within the test's process: HTTP on a thread, and the worker on another, so that nothing is imported twice."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from dvdquant.deploy.serve.app import make_app
from dvdquant.deploy.serve.files import FolderFiles
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.server import _Http
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import Limits, ModelSource, ServerSettings
from dvdquant.deploy.serve.sqlite_store import SqliteStore
from dvdquant.deploy.serve.supervisor import Pool
from dvdquant.deploy.serve.worker import Worker


class LocalServer:
    """The address of a server, and what is behind it.

    Args:
        service: What is behind the routes.
        url: Its address.
    """

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url

    def client(self) -> httpx.Client:
        """A client that knows the address."""
        return httpx.Client(base_url=self.url, timeout=240)


@contextlib.contextmanager
def local_server(
    out: Path, data: Path, pipeline: Path | None = None, limits: Limits | None = None, draws: bool = True
) -> Iterator[LocalServer]:
    """Serve an export on the CPU; its name is ``model``.

    Args:
        out: The export.
        data: The data folder.
        pipeline: The model of the export.
        limits: What a request may ask for.
        draws: Run a worker; without one, jobs wait.
    """
    data.mkdir(parents=True, exist_ok=True)
    source = ModelSource("model", str(out), None if pipeline is None else str(pipeline))
    settings = ServerSettings(
        (source,),
        data,
        devices=(),
        backend="onnxruntime",
        limits=limits or Limits(),
        spare=False,
        warm_up=False,
    )
    store, files, metrics = SqliteStore(data / "jobs.sqlite"), FolderFiles(data / "videos"), ServerMetrics()
    service = Service(settings, store, files, Pool(settings, store, metrics, ("none",), lambda _: None), metrics)
    http = _Http(uvicorn.Config(make_app(service), port=0, lifespan="off", log_config=None))
    loop = asyncio.new_event_loop()
    threads = [threading.Thread(target=loop.run_until_complete, args=(http.serve(),), daemon=True)]

    def tell(event: str, **fields: Any) -> None:
        metrics.take("local", {"event": event, **fields})
        if event == "ended":
            loop.call_soon_threadsafe(service.changed, fields["video"])

    worker = Worker(settings.worker("local", "cpu"), store, files, tell)
    if draws:
        worker.open()
        threads.append(threading.Thread(target=worker.run, daemon=True))
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while not http.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield LocalServer(service, f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}")
    finally:
        http.should_exit = True
        worker.stop()
        for thread in threads:
            thread.join(60)
        for generator in worker.generators.values():
            generator.close()
        service.close()
        store.close()
        loop.close()
