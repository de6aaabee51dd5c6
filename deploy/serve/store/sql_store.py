"""What the stores in a database of either kind share: a connection for each thread, and how attempts end."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

from dvdquant.deploy.serve.jobs import (
    CANCELLED,
    MAX_INTERRUPTIONS,
    Failure,
    Job,
    JobStore,
    ending,
    job_from_row,
    worker_lost,
)

__all__ = ["SqlRow", "SqlStore"]


class SqlRow(Protocol):
    """A row of the table of jobs."""

    def __getitem__(self, column: str, /) -> Any:
        """Return the value of a column."""


class _Closable(Protocol):
    def close(self) -> None: ...


Db = TypeVar("Db", bound=_Closable)


class SqlStore(JobStore, Generic[Db]):
    """See :class:`JobStore`.

    Args:
        keep: Seconds until a job expires that ends without a worker.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self._local = threading.local()
        self._open: list[Db] = []
        self._opening = threading.RLock()  # held where _take() is called, too

    def fail(self, video: str, token: str, failure: Failure, keep: float, *, final: bool) -> Job | None:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            row = self._held(db, video, token)
            if row is None:
                return None
            end = ending(failure, cancelled=row["cancelled"], attempts=row["attempts"], final=final)
            self._settle(db, video, end, keep)
            after = self._row(db, video)
        return None if after is None else job_from_row(after.__getitem__)

    def release(self, video: str, token: str) -> bool:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            row = self._held(db, video, token)
            if row is None:
                return False
            self._settle(db, video, CANCELLED if row["cancelled"] else None, self.keep, counted=False)
            return True

    def interrupt(self, alive: Collection[str] = ()) -> int:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            rows = [row for row in self._running(db) if row["worker"] not in alive]
            for row in rows:
                if row["interrupted"] >= MAX_INTERRUPTIONS:
                    self._put_back(db, [row])
                else:
                    self._interrupt(db, row["id"])
                    self._settle(db, row["id"], CANCELLED if row["cancelled"] else None, self.keep, counted=False)
        return len(rows)

    def close(self) -> None:
        """See :class:`JobStore`."""
        with self._opening:
            for connection in self._open:
                connection.close()
            self._open.clear()
            self._local = threading.local()

    def _own(self) -> Db | None:
        """Return the connection of this thread, or None before its first one."""
        connection: Db | None = getattr(self._local, "connection", None)
        return connection

    def _take(self, connection: Db) -> None:
        """Keep a new connection as that of this thread, until :meth:`close`, which another thread may call."""
        with self._opening:
            self._open.append(connection)
            self._local.connection = connection

    def _put_back(self, db: Db, rows: Sequence[SqlRow]) -> int:
        """Queue the jobs of dead workers again, or end those that were tried too often. Return how many there were."""
        for row in rows:
            lost = worker_lost(row["attempts"])
            end = ending(lost, cancelled=row["cancelled"], attempts=row["attempts"])
            self._settle(db, row["id"], end, self.keep)
        return len(rows)

    def _settle(self, db: Db, video: str, end: Failure | None, keep: float, *, counted: bool = True) -> None:
        """End a job, or queue it again where there is no end; an attempt that is not counted is taken back."""
        if end is None:
            self._queue(db, video, counted=counted)
        else:
            self._end(db, video, end, keep)

    @abstractmethod
    def _transaction(self, *, durable: bool = False) -> AbstractContextManager[Db]:
        """Run the block as one transaction on the connection of this thread.

        Args:
            durable: The transaction, and all before it, is on the disk before the block is left.
        """

    @abstractmethod
    def _row(self, db: Db, video: str) -> SqlRow | None:
        """Return the row of a job."""

    @abstractmethod
    def _held(self, db: Db, video: str, token: str) -> SqlRow | None:
        """Return the row of a job that this claim holds; nobody else changes it before the end of the transaction."""

    @abstractmethod
    def _running(self, db: Db) -> Sequence[SqlRow]:
        """Return the rows of all jobs that a worker has; nobody else changes them before the end of the transaction."""

    @abstractmethod
    def _interrupt(self, db: Db, video: str) -> None:
        """Count an interruption."""

    @abstractmethod
    def _queue(self, db: Db, video: str, *, counted: bool) -> None:
        """Let a job wait again."""

    @abstractmethod
    def _end(self, db: Db, video: str, failure: Failure, keep: float) -> None:
        """Let a job fail for good."""
