"""The server as a process: data folder, workers, HTTP, signals."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from dvdquant import errors
from dvdquant.deploy.serve.expiry import expire_for_ever
from dvdquant.deploy.serve.http.app import make_app
from dvdquant.deploy.serve.http.uvicorn_hooks import ServerWithoutSignals
from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.logs import log_event, setup_server_log
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.service import Service
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.store.files import ClipFiles
from dvdquant.deploy.serve.store.stores import open_store
from dvdquant.deploy.serve.workers.supervisor import WORKER_COMMAND, Pool
from dvdquant.errors import DvdquantError, OutputError
from dvdquant.system.files import disk_error

__all__ = ["ServerRun", "http_server", "serve"]

_CONNECTIONS = 1000
_LAST_SECONDS = 30.0  # that workers get after their time to drain is over
_HEAD_BYTES = 1 << 16

log = logging.getLogger(__name__)


def serve(
    settings: ServerSettings,
    *,
    worker_command: Sequence[str] = WORKER_COMMAND,
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running jobs finish.

    Args:
        settings: The settings.
        worker_command: What starts a worker; the number of its socket follows.
        listening: Called with the address once the server listens.

    Raises:
        OutputError: The address or the data folder cannot be used, or another server uses it.
        DvdquantError: No worker can start; the error is the worker's.
    """
    setup_server_log(settings.log_format, settings.verbose)
    with (
        _data_folder(settings.data, shared=settings.store is not None),
        _socket(settings.host, settings.port) as listener,
    ):
        store, files = open_store(settings.data, settings.keep, settings.store, settings.files)
        metrics = ServerMetrics()
        run = ServerRun(settings, store, files, metrics, worker_command)
        try:
            run.recover()
            address = _address(listener)
            log_event(log, "listening", text=f"listening on {address}", address=address)
            if listening is not None:
                listening(address)
            asyncio.run(run.until_stopped(listener))
        finally:
            run.pool.kill()
            run.pool.join(_LAST_SECONDS)
            run.service.close()
            store.close()
    if run.refusal is not None:
        raise _refusal_error(run.refusal)


class ServerRun:
    """One life of the server.

    Args:
        settings: Its settings.
        store: Queue and state.
        files: The place for clips.
        metrics: What is counted.
        worker_command: The command of a worker.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: JobStore,
        files: ClipFiles,
        metrics: ServerMetrics,
        worker_command: Sequence[str],
    ) -> None:
        self.settings = settings
        self.store = store
        self.files = files
        self.refusal: dict[str, Any] | None = None
        self.metrics = metrics
        self.pool = Pool(settings, store, metrics, worker_command, self._refused, self._changed)
        self.service = Service(settings, store, files, self.pool, metrics)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    def recover(self) -> None:
        """Go on with the workers of a server that was killed, put back what others drew, and delete orphaned files."""
        if self.store.shared:
            return  # other servers are at work: leases tell what is dead, and files may belong to their jobs
        alive = self.pool.adopt()
        again = self.store.interrupt(alive)
        self.files.sweep()
        orphans = 0
        for video in self.files.ids() if self.files.exclusive else ():
            job = self.store.get(video)
            # Of a job that waits, a worker may have written the file just before the server was killed: it is made anew.
            if job is None or job.status == "failed":
                with contextlib.suppress(OSError):
                    (self.files.delete if job is None else self.files.delete_clip)(video)
                orphans += job is None
        log_event(log, "recovered", workers=alive, jobs_put_back=again, files_deleted=orphans, jobs=self.store.counts())

    async def until_stopped(self, listener: socket.socket) -> None:
        """Serve until a signal, then drain.

        Args:
            listener: The socket to serve on.
        """
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        http = http_server(self.service)
        self.pool.start()
        tasks = [loop.create_task(expire_for_ever(self.service)), loop.create_task(http.serve([listener]))]
        await self._stop.wait()
        await self._drain()
        http.should_exit = True
        await tasks[1]
        tasks[0].cancel()

    async def _drain(self) -> None:
        """Let running jobs finish, for a time; then put them back."""
        self.service.draining = True
        self.service.changed()
        log_event(log, "draining", seconds=self.settings.drain)
        self.pool.stop()
        end = time.monotonic() + self.settings.drain
        while not self._now.is_set() and time.monotonic() < end:
            if await asyncio.to_thread(self.pool.join, 0.2):
                return
        self.pool.let_go()
        if not await asyncio.to_thread(self.pool.join, _LAST_SECONDS):
            self.pool.kill()

    def _changed(self, video: str | None) -> None:
        """Wake up those who wait for a job. Called on the threads of the workers."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.service.changed, video)

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._now.set()  # the second one: at once
        self._stop.set()

    def _reload(self) -> None:
        try:
            self.service.reload()
        except DvdquantError as error:
            log.error("the exports are not opened anew: %s", error)
        else:
            log_event(log, "reloading")

    def _refused(self, refusal: dict[str, Any]) -> None:
        """End the server: a worker cannot start at all. Called on a worker's thread."""
        self.refusal = refusal
        self.pool.let_go()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signalled)


def http_server(service: Service) -> uvicorn.Server:
    """Return what answers HTTP requests, on the sockets that it is told to serve.

    Args:
        service: What is behind the routes.
    """
    config = uvicorn.Config(
        make_app(service),
        port=0,  # unless it is given a socket
        log_config=None,
        access_log=False,
        http="h11",  # with its limits, though another package may have brought httptools
        server_header=False,
        lifespan="off",
        ws="none",
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=5,
    )
    return ServerWithoutSignals(config)


@contextlib.contextmanager
def _data_folder(folder: Path, *, shared: bool) -> Iterator[None]:
    """Make the data folder, readable for its owner only, and hold its lock; servers with one store share it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{folder} is used by another server", fix="stop it, or name another folder with --data"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _socket(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the address.

    Raises:
        OutputError: Nobody may listen there, or somebody else does.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol named, or asyncio would not switch Nagle's algorithm off, and every answer took 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(place[:2])
            listener.listen(512)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"the server cannot listen on {host}, port {port}: {reason}", fix="name another with --host or --port"
        ) from error
    with listener:
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal_error(refusal: dict[str, Any]) -> DvdquantError:
    """Return the error that a worker ended with."""
    kind = getattr(errors, refusal["kind"], DvdquantError)
    error = kind(refusal["what"], available=refusal["available"], fix=refusal["fix"])
    assert isinstance(error, DvdquantError)
    return error
