"""``dvdq-serve`` within the test's process: HTTP on a thread, and the worker on another, so that nothing is imported twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving.local import local_http
from benchmarks.serving.process import Clients
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import Limits, ModelSource, ServerSettings
from dvdquant.deploy.serve.workers.worker import Worker


class LocalServer(Clients):
    """The address of a server, and what is behind it.

    Args:
        out: The export.
        service: What is behind the routes.
        url: Its address.
    """

    def __init__(self, out: Path, service: Service, url: str) -> None:
        self.out, self.service, self.url = out, service, url


class _WorkerHere:
    """In the place of a worker's process: what the server says to it reaches the worker on its thread."""

    label, ready = "local", True

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.facts: dict[str, Any] = {}

    def tell(self, event: str, **fields: Any) -> None:
        """Tell the worker."""
        {"wake": self.worker.wake, "cancel": self.worker.cancel}[event](**fields)


@contextlib.contextmanager
def local_server(
    out: Path,
    data: Path,
    pipeline: Path | None = None,
    limits: Limits | None = None,
    draws: bool = True,
    backend: str = "onnxruntime",
) -> Iterator[LocalServer]:
    """Serve an export on the CPU; its name is ``model``.

    Args:
        out: The export.
        data: The data folder.
        pipeline: The model of the export.
        limits: What a request may ask for.
        draws: Run a worker; without one, jobs wait.
        backend: What runs the export.
    """
    settings = ServerSettings(
        (ModelSource("model", str(out), None if pipeline is None else str(pipeline)),),
        data,
        devices=(),
        backend=backend,
        limits=limits or Limits(),
        allowed_hosts=("127.0.0.1", "localhost"),
        spare=False,
        warm_up=False,
    )
    with local_http(settings) as http:
        service = http.service

        def tell(event: str, **fields: Any) -> None:
            service.metrics.take("local", {"event": event, **fields})
            if event == "ready":
                here.facts = fields["models"]
            elif event == "ended":
                http.loop.call_soon_threadsafe(service.changed, fields["video"])

        worker = Worker(settings.worker("local", "cpu"), service.store, service.files, tell)
        here, thread = _WorkerHere(worker), threading.Thread(target=worker.run, daemon=True)
        if draws:
            worker.open()
            http.workers.workers.append(here)
            thread.start()
        try:
            yield LocalServer(out, service, http.url)
        finally:
            if draws:
                worker.stop()
                thread.join(60)
            for generator in worker.generators.values():
                generator.close()
