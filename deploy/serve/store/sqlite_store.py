"""The store in one SQLite file, for one machine: the server and its worker processes open it side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvdquant.deploy.serve.jobs import CANCELLED, Beat, Failure, Job, NewJob, QueueFullError, job_from_row, new_video_id
from dvdquant.deploy.serve.store.sql_store import SqlStore
from dvdquant.errors import OutputError

__all__ = ["SqliteStore"]

FORMAT = 1
BUSY_SECONDS = 30.0  # how long a transaction waits for another process

_TABLE = """
create table if not exists jobs(
    id text primary key, seq integer not null unique, status text not null, model text not null, what text not null,
    created_at real not null, started_at real, completed_at real, expires_at real,
    progress integer not null default 0, bits text not null default '', attempts integer not null default 0,
    worker text, token text, lease real, cancelled integer not null default 0, failure text, summary text,
    interrupted integer not null default 0
)
"""
_INDEXES = (
    "create index if not exists by_status on jobs(status, seq)",
    "create index if not exists by_expiry on jobs(expires_at) where expires_at is not null",
)


class SqliteStore(SqlStore[sqlite3.Connection]):
    """See :class:`JobStore`.

    Write-ahead log, so that readers wait for nobody. Creating, ending and deleting a job is on the disk before the method
    returns; claims and beats may be lost with the power, and then the job runs again.

    Args:
        path: The file; it is made if it does not exist.
        keep: Seconds until a job expires that ends without a worker.

    Raises:
        OutputError: The file is no store, one of a later version, or cannot be opened.
    """

    def __init__(self, path: Path, keep: float = 86400.0) -> None:
        super().__init__(keep)
        self.path = path
        try:
            with self._transaction(durable=True) as db:
                (version,) = db.execute("pragma user_version").fetchone()
                if version not in (0, FORMAT):
                    raise OutputError(
                        f"{path} was written by a later version (format {version})",
                        available=f"format {FORMAT}",
                        fix="serve it with that version, or name another --data",
                    )
                db.execute(_TABLE)
                if "interrupted" not in {row["name"] for row in db.execute("pragma table_info(jobs)")}:
                    db.execute("alter table jobs add column interrupted integer not null default 0")
                for index in _INDEXES:
                    db.execute(index)
                db.execute(f"pragma user_version = {FORMAT}")
        except sqlite3.Error as error:
            self.close()
            raise OutputError(
                f"{path} cannot be used as store of jobs: {error}",
                fix="restore it from a backup, or name another --data",
            ) from error

    # ------------------------------------------------------------------------------------------------------ the server

    def create(self, what: NewJob, limit: int, video: str | None = None) -> Job:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            (waiting,) = db.execute("select count(*) from jobs where status = 'queued'").fetchone()
            if waiting >= limit:
                raise QueueFullError
            (last,) = db.execute("select coalesce(max(seq), 0) from jobs").fetchone()
            job = Job(video or new_video_id(), last + 1, "queued", what, time.time())
            db.execute(
                "insert into jobs(id, seq, status, model, what, created_at) values(?, ?, ?, ?, ?, ?)",
                (job.id, job.seq, job.status, what.model, json.dumps(dataclasses.asdict(what)), job.created_at),
            )
        return job

    def get(self, video: str) -> Job | None:
        """See :class:`JobStore`."""
        row = self._row(self._connection(), video)
        return None if row is None else _job(row)

    def page(self, after: str | None, limit: int, *, ascending: bool = False) -> list[Job]:
        """See :class:`JobStore`."""
        order, beyond = ("asc", ">") if ascending else ("desc", "<")
        where, values = "", [limit]
        if after is not None:
            row = self._connection().execute("select seq from jobs where id = ?", (after,)).fetchone()
            if row is None:
                raise KeyError(after)
            where, values = f"where seq {beyond} ?", [row["seq"], limit]
        rows = self._connection().execute(f"select * from jobs {where} order by seq {order} limit ?", values)
        return [_job(row) for row in rows.fetchall()]

    def ahead_of(self, job: Job) -> int:
        """See :class:`JobStore`."""
        text = "select count(*) from jobs where status = 'queued' and seq < ?"
        (count,) = self._connection().execute(text, (job.seq,)).fetchone()
        return int(count)

    def counts(self) -> dict[str, int]:
        """See :class:`JobStore`."""
        rows = self._connection().execute("select status, count(*) from jobs group by status").fetchall()
        return {row[0]: row[1] for row in rows}

    def cancel(self, video: str) -> Job | None:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            row = self._row(db, video)
            if row is None:
                return None
            if row["status"] == "queued":
                self._end(db, row["id"], CANCELLED, self.keep)
            elif row["status"] == "in_progress":
                db.execute("update jobs set cancelled = 1 where id = ?", (video,))
            return _job(db.execute("select * from jobs where id = ?", (video,)).fetchone())

    def delete(self, video: str) -> bool:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            return db.execute("delete from jobs where id = ?", (video,)).rowcount > 0

    def expire(self, now: float) -> list[str]:
        """See :class:`JobStore`."""
        text = "select id from jobs where expires_at < ? order by expires_at limit 1000"
        return [row["id"] for row in self._connection().execute(text, (now,)).fetchall()]

    def keep_until(self, video: str, until: float) -> None:
        """See :class:`JobStore`."""
        with self._transaction() as db:
            db.execute("update jobs set expires_at = ? where id = ? and expires_at is not null", (until, video))

    # ------------------------------------------------------------------------------------------------------ the workers

    def claim(self, worker: str, models: tuple[str, ...], lease: float) -> Job | None:
        """See :class:`JobStore`."""
        # Most calls find nothing; they need not wait for a writer.
        text = "select 1 from jobs where status = 'queued' or (status = 'in_progress' and lease < ?) limit 1"
        if self._connection().execute(text, (time.time(),)).fetchone() is None:
            return None
        with self._transaction() as db:
            now = time.time()
            dead = db.execute("select * from jobs where status = 'in_progress' and lease < ?", (now,))
            self._put_back(db, dead.fetchall())
            marks = ", ".join("?" * len(models))
            row = db.execute(
                f"select id from jobs where status = 'queued' and model in ({marks}) order by seq limit 1", models
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "update jobs set status = 'in_progress', worker = ?, token = ?, lease = ?, started_at = ?, progress = 0, "
                "bits = '', attempts = attempts + 1 where id = ?",
                (worker, secrets.token_hex(16), now + lease, now, row["id"]),
            )
            return _job(db.execute("select * from jobs where id = ?", (row["id"],)).fetchone())

    def beat(self, video: str, token: str, lease: float, progress: int, bits: str) -> Beat:
        """See :class:`JobStore`."""
        with self._transaction() as db:
            row = db.execute(
                "update jobs set lease = ?, progress = max(progress, ?), bits = ? where id = ? and token = ? returning cancelled",
                (time.time() + lease, progress, bits, video, token),
            ).fetchone()
        return "lost" if row is None else "cancelled" if row["cancelled"] else "ok"

    def complete(self, video: str, token: str, summary: dict[str, Any], keep: float, bits: str) -> bool:
        """See :class:`JobStore`."""
        now = time.time()
        with self._transaction(durable=True) as db:
            done = db.execute(
                "update jobs set status = 'completed', progress = 100, completed_at = ?, expires_at = ?, summary = ?, "
                "bits = ?, token = null, lease = null where id = ? and token = ? and cancelled = 0",
                (now, now + keep, json.dumps(summary), bits, video, token),
            )
            return done.rowcount > 0

    def abandon(self, worker: str) -> int:
        """See :class:`JobStore`."""
        with self._transaction(durable=True) as db:
            text = "select * from jobs where status = 'in_progress' and worker = ?"
            return self._put_back(db, db.execute(text, (worker,)).fetchall())

    # -------------------------------------------------------------------------------------------------------- the file

    def _row(self, db: sqlite3.Connection, video: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = db.execute("select * from jobs where id = ?", (video,)).fetchone()
        return row

    def _held(self, db: sqlite3.Connection, video: str, token: str) -> sqlite3.Row | None:
        text = "select * from jobs where id = ? and token = ?"
        row: sqlite3.Row | None = db.execute(text, (video, token)).fetchone()
        return row

    def _running(self, db: sqlite3.Connection) -> list[sqlite3.Row]:
        return db.execute("select * from jobs where status = 'in_progress'").fetchall()

    def _interrupt(self, db: sqlite3.Connection, video: str) -> None:
        db.execute("update jobs set interrupted = interrupted + 1 where id = ?", (video,))

    def _queue(self, db: sqlite3.Connection, video: str, *, counted: bool) -> None:
        db.execute(
            "update jobs set status = 'queued', progress = 0, bits = '', worker = null, token = null, lease = null, "
            "started_at = null, attempts = attempts - ? where id = ?",
            (0 if counted else 1, video),
        )

    def _end(self, db: sqlite3.Connection, video: str, failure: Failure, keep: float) -> None:
        now = time.time()
        db.execute(
            "update jobs set status = 'failed', completed_at = ?, expires_at = ?, failure = ?, token = null, lease = null "
            "where id = ?",
            (now, now + keep, json.dumps(dataclasses.asdict(failure)), video),
        )

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this thread."""
        connection = self._own()
        if connection is None:
            with self._opening:
                connection = sqlite3.connect(
                    self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
                )
                connection.row_factory = sqlite3.Row
                connection.execute("pragma journal_mode = wal")
                connection.execute("pragma synchronous = normal")
                self._take(connection)
        return connection

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """See :class:`SqlStore`; the transaction is alone in the file."""
        db = self._connection()
        db.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
        db.execute("begin immediate")
        try:
            yield db
        except BaseException:
            db.execute("rollback")
            raise
        db.execute("commit")


def _job(row: sqlite3.Row) -> Job:
    return job_from_row(row.__getitem__)
