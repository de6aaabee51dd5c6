"""How many workers Ray Serve runs: as many as jobs wait or run, within its bounds.

Ray's own rule counts its requests, and jobs are none: they wait in the store. The rule runs in Ray's controller, which must not
wait for a database, so a thread asks the store.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Any

from dvdquant.deploy.serve.jobs import JobStore

__all__ = ["STORE_VARIABLE", "QueuePolicy"]

STORE_VARIABLE = "DVDQ_STORE"
LOOK_SECONDS = 1.0
_STALE_SECONDS = 30.0  # after which a count says nothing about now

log = logging.getLogger(__name__)


class QueuePolicy:
    """A rule of ``ray.serve.config.AutoscalingPolicy``. Ray applies the bounds, and its delays, to what it says.

    Args:
        jobs_per_worker: Jobs that wait or run for each worker.
        store: The store; None opens the one that the environment names, on the thread that asks it.
    """

    def __init__(self, jobs_per_worker: float = 1.0, store: JobStore | None = None) -> None:
        self.jobs_per_worker = jobs_per_worker
        self._store = store
        self._jobs = 0
        self._asked = -math.inf
        self._thread: threading.Thread | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas that is wanted, and an empty state.

        Args:
            context: Ray's ``AutoscalingContext``.
        """
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look_for_ever, name="queue", daemon=True)
            self._thread.start()
        if time.monotonic() - self._asked > _STALE_SECONDS:
            return context.target_num_replicas, {}  # nobody knows how many jobs there are: all stays as it is
        return math.ceil(self._jobs / self.jobs_per_worker), {}

    def look(self) -> None:
        """Ask the store."""
        if self._store is None:
            from dvdquant.deploy.serve.store.postgres_store import PostgresStore

            self._store = PostgresStore(os.environ[STORE_VARIABLE])
        counts = self._store.counts()
        self._jobs = counts.get("queued", 0) + counts.get("in_progress", 0)
        self._asked = time.monotonic()

    def _look_for_ever(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:  # noqa: BLE001  of psycopg; a store that is away comes back
                log.warning("the store does not say how many jobs wait: %s", type(error).__name__)
            time.sleep(LOOK_SECONDS)
