"""The worker processes as the server sees them: started, watched, started again, and told what to do."""

from __future__ import annotations

import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from dvdquant.deploy.serve.channel import Channel
from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.worker import settings_json

__all__ = ["WORKER_COMMAND", "Pool", "WorkerProcess"]

WORKER_COMMAND = (sys.executable, "-m", "dvdquant.deploy.serve.worker")
_LONGEST_PAUSE = 30.0  # seconds between two starts of a worker that always fails
_LAST_SECONDS = 10.0  # between the end of the channel and the end of the process

log = logging.getLogger(__name__)
Refused = Callable[[dict[str, Any]], None]


class WorkerProcess:
    """One device: its worker process, and a thread that starts it again whenever it ends.

    Args:
        label: Its name in logs and metrics.
        device: Its device.
        settings: The server's settings.
        store: The store, in which jobs of a dead process are put back.
        metrics: Counts its events.
        command: What starts a worker; the number of the socket follows.
        refused: Called if the first process says that it cannot start.
    """

    def __init__(
        self,
        label: str,
        device: str,
        settings: ServerSettings,
        store: JobStore,
        metrics: ServerMetrics,
        command: Sequence[str],
        refused: Refused,
    ) -> None:
        self.label = label
        self.device = device
        self.settings = settings
        self.store = store
        self.metrics = metrics
        self.command = tuple(command)
        self.refused = refused
        self.ready = False
        self.facts: dict[str, Any] = {}
        self.pid: int | None = None
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._ever_ready = False
        self._pause = 0.0
        self._thread = threading.Thread(target=self._supervise, name=f"worker {label}", daemon=True)

    # ---------------------------------------------------------------------------------------------- what the server says

    def start(self) -> None:
        """Start the process and its watch."""
        self.metrics.ready.labels(self.label).set(0)
        self.metrics.restarts.labels(self.label)
        self._thread.start()

    def tell(self, event: str, **fields: Any) -> None:
        """Send a message to the process, if there is one."""
        channel = self._channel
        if channel is not None:
            channel.send(event, **fields)

    def stop(self) -> None:
        """Let the process finish its job, and do not start it again."""
        self._ending.set()
        self.tell("stop")

    def let_go(self) -> None:
        """As :meth:`stop`, but put the job back into the queue."""
        self._ending.set()
        self.tell("let_go")

    def reload(self) -> None:
        """Let the process finish its job, and start it again: it opens its exports anew."""
        self._pause = 0.0
        self.tell("stop")

    def join(self, seconds: float) -> bool:
        """Wait for the end of the process and its watch; False if it goes on."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """End the process at once."""
        self._ending.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    # ------------------------------------------------------------------------------------------------------- the watch

    def _supervise(self) -> None:
        starts = 0
        while not self._ending.is_set():
            if starts:
                self.metrics.restarts.labels(self.label).inc()
                self._ending.wait(self._pause)
                if self._ending.is_set():
                    break
            starts += 1
            try:
                if self._live_once() is False:
                    return
            except OSError as error:
                log.error("worker %s cannot be started: %s", self.label, error)
                self._pause = _LONGEST_PAUSE

    def _live_once(self) -> bool:
        """Run one process to its end. False if it cannot start at all, and never could."""
        name = f"{self.label}-{secrets.token_hex(4)}"
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*self.command, str(number)],
                stdin=subprocess.DEVNULL,
                pass_fds=(number,),
                start_new_session=True,  # Ctrl-C is for the server, which tells the worker
            )
        started = time.monotonic()
        self.pid = self._process.pid
        self._channel = Channel(ours)
        self._channel.send("settings", settings=settings_json(self.settings.worker(name, self.device)))
        log_event(log, "worker_started", worker=name, pid=self.pid)
        refusal = self._listen(self._channel)
        code = self._wait()
        # Nobody else may hold jobs of this name now.
        self.ready = False
        self.metrics.ready.labels(self.label).set(0)
        channel, self._channel = self._channel, None
        channel.close()
        lost = self._abandon(name)
        level = logging.INFO if code == 0 else logging.ERROR
        log_event(log, "worker_ended", level=level, worker=name, pid=self.pid, code=code, jobs_put_back=lost)
        if refusal is not None and not self._ever_ready:
            self.refused(refusal)
            return False
        # A process that lived for a while failed for another reason than the last one.
        grown = min(_LONGEST_PAUSE, max(0.5, 2 * self._pause))
        self._pause = 0.0 if code == 0 or time.monotonic() - started > 60 else grown
        return True

    def _abandon(self, name: str) -> int:
        """Put back the jobs of a process that has ended. Return how many there were."""
        try:
            return self.store.abandon(name)
        except Exception:  # of sqlite3 or psycopg; the leases run out, and the next process is needed all the more
            log.exception("the jobs of worker %s could not be put back", name)
            return 0

    def _listen(self, channel: Channel) -> dict[str, Any] | None:
        """Take messages until the process is gone. Return its refusal to start, or None."""
        refusal = None
        for message in channel:
            kind = message["event"]
            if kind == "ready":
                self.facts = message["models"]
                self._ever_ready = self.ready = True
                self.metrics.ready.labels(self.label).set(1)
            elif kind == "refused":
                refusal = message
            elif kind == "gone":
                self.ready = False
            if kind == "ended" and message["status"] == "completed":
                self._pause = 0.0
            self.metrics.take(self.label, message)
        return refusal

    def _wait(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Pool:
    """All workers of a server.

    Args:
        settings: The server's settings.
        store: The store.
        metrics: The figures.
        command: What starts a worker.
        refused: Called if a worker cannot start at all.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: JobStore,
        metrics: ServerMetrics,
        command: Sequence[str],
        refused: Refused,
    ) -> None:
        self.workers = [
            WorkerProcess(_label(device, i), device, settings, store, metrics, command, refused)
            for i, device in enumerate(settings.devices)
        ]

    def start(self) -> None:
        """Start all workers."""
        for worker in self.workers:
            worker.start()

    @property
    def ready(self) -> list[WorkerProcess]:
        """Return the workers that take jobs."""
        return [worker for worker in self.workers if worker.ready]

    def tell(self, event: str, **fields: Any) -> None:
        """Send a message to every worker."""
        for worker in self.workers:
            worker.tell(event, **fields)

    def reload(self) -> None:
        """Start every worker again, once it has finished its job."""
        for worker in self.workers:
            worker.reload()

    def stop(self) -> None:
        """Let every worker finish its job."""
        for worker in self.workers:
            worker.stop()

    def let_go(self) -> None:
        """Let every worker put its job back."""
        for worker in self.workers:
            worker.let_go()

    def join(self, seconds: float) -> bool:
        """Wait until all workers have ended; False if one goes on."""
        end = time.monotonic() + seconds
        ended = [worker.join(max(0.0, end - time.monotonic())) for worker in self.workers]
        return all(ended)

    def kill(self) -> None:
        """End every worker at once."""
        for worker in self.workers:
            worker.kill()


def _label(device: str, index: int) -> str:
    """Return a name for logs and metrics; several workers may share a device."""
    return f"{device.replace(':', '')}-{index}"
