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

from dvdquant.deploy.serve.jobs import JobStore
from dvdquant.deploy.serve.logs import log_event
from dvdquant.deploy.serve.metrics import ServerMetrics
from dvdquant.deploy.serve.settings import ServerSettings
from dvdquant.deploy.serve.workers.channel import Channel
from dvdquant.deploy.serve.workers.left_workers import LeftWorker, find_left, remove
from dvdquant.deploy.serve.workers.worker_process import settings_json, workers_folder

__all__ = ["WORKER_COMMAND", "Pool", "Spare", "WorkerProcess"]

WORKER_COMMAND = (sys.executable, "-m", "dvdquant.deploy.serve.workers.worker_process")
_LONGEST_PAUSE = 30.0  # seconds between two starts of a worker that always fails
_LAST_SECONDS = 10.0  # between the end of the channel and the end of the process
_LEAVE_SECONDS = 30.0  # that a worker of the last server gets to let go of its job

log = logging.getLogger(__name__)
Refused = Callable[[dict[str, Any]], None]
Changed = Callable[[str | None], None]


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Channel]:
    """Start a process that waits for its first message."""
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        try:
            process = subprocess.Popen(
                [*command, str(number)],
                stdin=subprocess.DEVNULL,
                pass_fds=(number,),
                start_new_session=True,  # Ctrl-C is for the server, which tells the worker
            )
        except OSError:
            ours.close()
            raise
    return process, Channel(ours)


class Spare:
    """A process that has imported what workers import, and takes the place of the next one that dies.

    It holds no model and touches no device.

    Args:
        settings: The server's settings.
        command: What starts a worker.
    """

    def __init__(self, settings: ServerSettings, command: Sequence[str]) -> None:
        self.settings, self.command = settings, command
        self._lock = threading.Lock()
        self._held: tuple[subprocess.Popen[bytes], Channel] | None = None
        self._closed = not settings.spare

    def prepare(self) -> None:
        """Start the process, if there is none."""
        with self._lock:
            if self._closed or (self._held is not None and self._held[0].poll() is None):
                return
            try:
                process, channel = self._held = _start(self.command)
            except OSError as error:
                log.error("a spare worker cannot be started: %s", error)
                return
        channel.send("hold", settings=settings_json(self.settings.worker("spare", self.settings.devices[0])))
        log_event(log, "spare_started", pid=process.pid)

    def take(self) -> tuple[subprocess.Popen[bytes], Channel] | None:
        """Return the process and the channel to it; None if there is none."""
        with self._lock:
            held, self._held = self._held, None
        if held is None or held[0].poll() is None:
            return held
        held[1].close()
        return None

    def close(self) -> None:
        """End the process, and start no other."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, None
        if held is not None:
            held[1].close()
            held[0].kill()
            held[0].wait()


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
        spare: Gives a process that is nearly ready.
        changed: Called with the id of a job that has ended or waits again; with None if all may have changed.
        clear: Called before a process is started; it returns when no worker of the last server is in the way.
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
        spare: Spare,
        changed: Changed,
        clear: Callable[[], None],
    ) -> None:
        self.spare, self.changed, self.clear = spare, changed, clear
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
        self._process: subprocess.Popen[bytes] | LeftWorker | None = None
        self._left: LeftWorker | None = None
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
        """Send a message to the process, if there is one.

        Args:
            event: The name of the message.
            fields: What else it says, as JSON can hold it.
        """
        channel = self._channel
        if channel is not None:
            channel.send(event, **fields)

    def stop(self) -> None:
        """Let the process finish its job, and do not start it again."""
        self._ending.set()
        self.tell("stop")

    def let_go(self) -> None:
        """Let the process put its job back into the queue and end, and do not start it again."""
        self._ending.set()
        self.tell("let_go")

    def reload(self) -> None:
        """Let the process open exports that have changed anew, after its job."""
        self._pause = 0.0
        self.tell("reload")

    def adopt(self, left: LeftWorker) -> bool:
        """Go on with a worker of the last server; False if it has other settings, or does not answer.

        Args:
            left: The worker.
        """
        settings = self.settings.worker(left.name, self.device)
        answer = left.ask("settings", settings=settings_json(settings))
        if answer is None or answer["event"] != "goes_on":
            return False
        self._left = left
        return True

    def join(self, seconds: float) -> bool:
        """Wait for the end of the process and its watch; False if it goes on.

        Args:
            seconds: The longest time to wait.
        """
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
        started = time.monotonic()
        name, channel = self._begin()
        self._channel = channel
        if self._ending.is_set():
            channel.send("stop")
        refusal = self._listen(channel)
        self.ready = False
        code = self._wait()
        # Nobody else may hold jobs of this name now.
        self.metrics.ready.labels(self.label).set(0)
        self._channel = None
        channel.close()
        remove(workers_folder(self.settings.data), name)
        lost = self._abandon(name)
        self.changed(None)
        level = logging.INFO if code == 0 else logging.ERROR
        log_event(log, "worker_ended", level=level, worker=name, pid=self.pid, code=code, jobs_put_back=lost)
        if refusal is not None and not self._ever_ready:
            self.refused(refusal)
            return False
        # A process that lived for a while failed for another reason than the last one.
        grown = min(_LONGEST_PAUSE, max(0.5, 2 * self._pause))
        self._pause = 0.0 if code == 0 or time.monotonic() - started > 60 else grown
        return True

    def _begin(self) -> tuple[str, Channel]:
        """Return the name of a process and the channel to it: of one that is there, of the spare one, or of a new one."""
        left, self._left = self._left, None
        if left is not None and left.channel is not None:
            self._process, self.pid = left, left.pid
            log_event(log, "worker_adopted", worker=left.name, pid=left.pid)
            return left.name, left.channel
        self.clear()
        name = f"{self.label}-{secrets.token_hex(4)}"
        spare = self.spare.take()
        self._process, channel = spare or _start(self.command)
        self.pid = self._process.pid
        channel.send("settings", settings=settings_json(self.settings.worker(name, self.device)))
        log_event(log, "worker_started", worker=name, pid=self.pid, spare=spare is not None)
        return name, channel

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
                self.spare.prepare()
            elif kind == "refused":
                refusal = message
            elif kind == "gone":
                self.ready = False
            if kind == "ended" and message["status"] == "completed":
                self._pause = 0.0
            self.metrics.take(self.label, message)
            if kind == "ended":
                self.changed(message["video"])
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
        changed: Called from any thread, see :class:`WorkerProcess`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: JobStore,
        metrics: ServerMetrics,
        command: Sequence[str],
        refused: Refused,
        changed: Changed = lambda _: None,
    ) -> None:
        self.settings = settings
        self.spare = Spare(settings, command)
        self._leaving: list[LeftWorker] = []
        self._clearing = threading.Lock()
        self.workers = [
            WorkerProcess(
                _label(device, i), device, settings, store, metrics, command, refused, self.spare, changed, self._clear
            )
            for i, device in enumerate(settings.devices)
        ]

    def adopt(self) -> list[str]:
        """Go on with the workers that the last server has left; return their names. The others are told to end."""
        found = find_left(workers_folder(self.settings.data))
        kept = []
        for worker in self.workers:
            for left in found:
                if left.name.rpartition("-")[0] == worker.label and worker.adopt(left):
                    found.remove(left)
                    kept.append(left.name)
                    break
        for left in found:
            left.ask("let_go")
        self._leaving = found
        return kept

    def _clear(self) -> None:
        """Wait until the workers of the last server that are not kept have ended: their memory is needed."""
        with self._clearing:
            end = time.monotonic() + _LEAVE_SECONDS
            for left in self._leaving:
                try:
                    left.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.error("the worker %s of the last server does not end, and is killed", left.name)
                    left.kill()
                    left.wait()
                remove(left.folder, left.name)
            self._leaving = []

    def start(self) -> None:
        """Start all workers."""
        for worker in self.workers:
            worker.start()

    @property
    def ready(self) -> list[WorkerProcess]:
        """Return the workers that take jobs."""
        return [worker for worker in self.workers if worker.ready]

    def tell(self, event: str, **fields: Any) -> None:
        """Send a message to every worker.

        Args:
            event: The name of the message.
            fields: What else it says, as JSON can hold it.
        """
        for worker in self.workers:
            worker.tell(event, **fields)

    def reload(self) -> None:
        """Let every worker open exports that have changed anew, once it has finished its job."""
        for worker in self.workers:
            worker.reload()

    def stop(self) -> None:
        """Let every worker finish its job."""
        self.spare.close()
        for worker in self.workers:
            worker.stop()

    def let_go(self) -> None:
        """Let every worker put its job back."""
        self.spare.close()
        for worker in self.workers:
            worker.let_go()

    def join(self, seconds: float) -> bool:
        """Wait until all workers have ended; False if one goes on.

        Args:
            seconds: The longest time to wait for all of them together.
        """
        end = time.monotonic() + seconds
        ended = [worker.join(max(0.0, end - time.monotonic())) for worker in self.workers]
        return all(ended)

    def kill(self) -> None:
        """End every worker at once."""
        self.spare.close()
        for worker in self.workers:
            worker.kill()


def _label(device: str, index: int) -> str:
    """Return a name for logs and metrics; several workers may share a device."""
    return f"{device.replace(':', '')}-{index}"
