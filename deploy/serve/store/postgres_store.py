"""The store in a Postgres database, for servers on several machines that share one queue."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.rows import dict_row

from dvdquant.deploy.serve.jobs import CANCELLED, Beat, Failure, Job, NewJob, QueueFullError, job_from_row, new_video_id
from dvdquant.deploy.serve.store.sql_store import SqlStore
from dvdquant.errors import OutputError
from dvdquant.text import message_of

__all__ = ["PostgresStore"]

FORMAT = 1
_CREATING = 0x64766471  # the advisory lock of those who count the queue and add to it
_NOW = "extract(epoch from clock_timestamp())"  # the clock of the database: those of the machines may differ
_TABLES = f"""
create table if not exists dvdq_format(format integer not null);
create table if not exists dvdq_jobs(
    id text primary key, seq bigint generated always as identity unique, status text not null, model text not null,
    what text not null, created_at double precision not null default {_NOW}, started_at double precision,
    completed_at double precision, expires_at double precision, progress integer not null default 0,
    bits text not null default '', attempts integer not null default 0, worker text, token text, lease double precision,
    cancelled integer not null default 0, failure text, summary text, interrupted integer not null default 0
);
alter table dvdq_jobs add column if not exists interrupted integer not null default 0;
create index if not exists dvdq_jobs_status on dvdq_jobs(status, seq);
create index if not exists dvdq_jobs_expiry on dvdq_jobs(expires_at) where expires_at is not null;
"""
Row = dict[str, Any]
Connection = psycopg.Connection[Row]


class PostgresStore(SqlStore[Connection]):
    """See :class:`JobStore`. Each thread has a connection of its own, which is opened again when it breaks.

    Args:
        url: ``postgresql://user:password@host/database``; the user may create tables, or they exist.
        keep: Seconds until a job expires that ends without a worker.

    Raises:
        OutputError: The database cannot be reached or used, or a later version made its tables.
    """

    shared = True

    def __init__(self, url: str, keep: float = 86400.0) -> None:
        super().__init__(keep)
        self.url = url
        try:
            with self._transaction() as db:
                db.execute("select pg_advisory_xact_lock(%s)", (_CREATING,))
                db.execute(_TABLES)
                row = db.execute("select format from dvdq_format").fetchone()
                if row is None:
                    db.execute("insert into dvdq_format values(%s)", (FORMAT,))
                elif row["format"] != FORMAT:
                    raise OutputError(
                        f"the tables of the store are of a later version (format {row['format']})",
                        available=f"format {FORMAT}",
                        fix="serve it with that version, or name another database",
                    )
        except psycopg.Error as error:
            self.close()
            raise OutputError(
                f"the database cannot be used as store of jobs: {message_of(error, 300)}",
                fix="check --store, and that its user may create tables",
            ) from error

    # ------------------------------------------------------------------------------------------------------ the server

    def create(self, what: NewJob, limit: int, video: str | None = None) -> Job:
        """See :class:`JobStore`."""
        with self._transaction() as db:
            db.execute("select pg_advisory_xact_lock(%s)", (_CREATING,))
            waiting = self._one(db, "select count(*) as n from dvdq_jobs where status = 'queued'")
            if waiting is None or waiting["n"] >= limit:
                raise QueueFullError
            row = self._one(
                db,
                "insert into dvdq_jobs(id, status, model, what) values(%s, 'queued', %s, %s) returning *",
                video or new_video_id(),
                what.model,
                json.dumps(dataclasses.asdict(what)),
            )
        assert row is not None
        return job_from_row(row.__getitem__)

    def get(self, video: str) -> Job | None:
        """See :class:`JobStore`."""
        with self._connection() as db:
            row = self._row(db, video)
        return None if row is None else job_from_row(row.__getitem__)

    def page(self, after: str | None, limit: int, *, ascending: bool = False) -> list[Job]:
        """See :class:`JobStore`."""
        order, beyond = ("asc", ">") if ascending else ("desc", "<")
        with self._transaction() as db:
            where, values = "", [limit]
            if after is not None:
                row = self._one(db, "select seq from dvdq_jobs where id = %s", after)
                if row is None:
                    raise KeyError(after)
                where, values = f"where seq {beyond} %s", [row["seq"], limit]
            rows = db.execute(f"select * from dvdq_jobs {where} order by seq {order} limit %s", values).fetchall()
        return [job_from_row(row.__getitem__) for row in rows]

    def ahead_of(self, job: Job) -> int:
        """See :class:`JobStore`."""
        with self._connection() as db:
            row = self._one(db, "select count(*) as n from dvdq_jobs where status = 'queued' and seq < %s", job.seq)
        return 0 if row is None else int(row["n"])

    def counts(self) -> dict[str, int]:
        """See :class:`JobStore`."""
        with self._connection() as db:
            rows = db.execute("select status, count(*) as n from dvdq_jobs group by status").fetchall()
        return {row["status"]: row["n"] for row in rows}

    def cancel(self, video: str) -> Job | None:
        """See :class:`JobStore`."""
        with self._transaction() as db:
            row = self._one(db, "select * from dvdq_jobs where id = %s for update", video)
            if row is None:
                return None
            if row["status"] == "queued":
                self._end(db, video, CANCELLED, self.keep)
            elif row["status"] == "in_progress":
                db.execute("update dvdq_jobs set cancelled = 1 where id = %s", (video,))
            after = self._row(db, video)
        return None if after is None else job_from_row(after.__getitem__)

    def delete(self, video: str) -> bool:
        """See :class:`JobStore`."""
        with self._connection() as db:
            return db.execute("delete from dvdq_jobs where id = %s", (video,)).rowcount > 0

    def expire(self, now: float) -> list[str]:
        """See :class:`JobStore`."""
        with self._connection() as db:
            text = "select id from dvdq_jobs where expires_at < %s order by expires_at limit 1000"
            return [row["id"] for row in db.execute(text, (now,)).fetchall()]

    def keep_until(self, video: str, until: float) -> None:
        """See :class:`JobStore`."""
        with self._connection() as db:
            db.execute("update dvdq_jobs set expires_at = %s where id = %s and expires_at is not null", (until, video))

    # ------------------------------------------------------------------------------------------------------ the workers

    def claim(self, worker: str, models: tuple[str, ...], lease: float) -> Job | None:
        """See :class:`JobStore`."""
        # Most calls find nothing; they need no transaction.
        text = f"select 1 from dvdq_jobs where status = 'queued' or (status = 'in_progress' and lease < {_NOW}) limit 1"
        with self._connection() as db:
            if self._one(db, text) is None:
                return None
        with self._transaction() as db:
            self._put_back(db, self._dead(db, f"status = 'in_progress' and lease < {_NOW}"))
            row = self._one(
                db,
                f"update dvdq_jobs set status = 'in_progress', worker = %s, token = %s, lease = {_NOW} + %s, "
                f"started_at = {_NOW}, progress = 0, bits = '', attempts = attempts + 1 where id = (select id from "
                "dvdq_jobs where status = 'queued' and model = any(%s) order by seq limit 1 for update skip locked) returning *",
                worker,
                secrets.token_hex(16),
                lease,
                list(models),
            )
        return None if row is None else job_from_row(row.__getitem__)

    def beat(self, video: str, token: str, lease: float, progress: int, bits: str) -> Beat:
        """See :class:`JobStore`."""
        with self._connection() as db:
            row = self._one(
                db,
                f"update dvdq_jobs set lease = {_NOW} + %s, progress = greatest(progress, %s), bits = %s "
                "where id = %s and token = %s returning cancelled",
                lease,
                progress,
                bits,
                video,
                token,
            )
        return "lost" if row is None else "cancelled" if row["cancelled"] else "ok"

    def complete(self, video: str, token: str, summary: dict[str, Any], keep: float, bits: str) -> bool:
        """See :class:`JobStore`."""
        with self._connection() as db:
            done = db.execute(
                f"update dvdq_jobs set status = 'completed', progress = 100, completed_at = {_NOW}, "
                f"expires_at = {_NOW} + %s, summary = %s, bits = %s, token = null, lease = null "
                "where id = %s and token = %s and cancelled = 0",
                (keep, json.dumps(summary), bits, video, token),
            )
            return done.rowcount > 0

    def abandon(self, worker: str) -> int:
        """See :class:`JobStore`."""
        with self._transaction() as db:
            return self._put_back(db, self._dead(db, "status = 'in_progress' and worker = %s", worker))

    # ----------------------------------------------------------------------------------------------------- the database

    def _row(self, db: Connection, video: str) -> Row | None:
        return self._one(db, "select * from dvdq_jobs where id = %s", video)

    def _held(self, db: Connection, video: str, token: str) -> Row | None:
        return self._one(db, "select * from dvdq_jobs where id = %s and token = %s for update", video, token)

    @staticmethod
    def _dead(db: Connection, where: str, *values: Any) -> list[Row]:
        """Return the jobs of dead workers that nobody else is putting back."""
        return db.execute(f"select * from dvdq_jobs where {where} for update skip locked", values).fetchall()

    def _running(self, db: Connection) -> list[Row]:
        return self._dead(db, "status = 'in_progress'")

    def _interrupt(self, db: Connection, video: str) -> None:
        db.execute("update dvdq_jobs set interrupted = interrupted + 1 where id = %s", (video,))

    def _queue(self, db: Connection, video: str, *, counted: bool) -> None:
        db.execute(
            "update dvdq_jobs set status = 'queued', progress = 0, bits = '', worker = null, token = null, lease = null, "
            "started_at = null, attempts = attempts - %s where id = %s",
            (0 if counted else 1, video),
        )

    def _end(self, db: Connection, video: str, failure: Failure, keep: float) -> None:
        db.execute(
            f"update dvdq_jobs set status = 'failed', completed_at = {_NOW}, expires_at = {_NOW} + %s, failure = %s, "
            "token = null, lease = null where id = %s",
            (keep, json.dumps(dataclasses.asdict(failure)), video),
        )

    @staticmethod
    def _one(db: Connection, text: str, *values: Any) -> Row | None:
        return db.execute(text, values).fetchone()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Give the connection of this thread, on which each statement is a transaction."""
        connection = self._own()
        if connection is None or connection.closed:
            connection = psycopg.connect(self.url, row_factory=dict_row, connect_timeout=10, autocommit=True)
            with self._opening:
                self._open[:] = [each for each in self._open if not each.closed]
                self._take(connection)
        try:
            yield connection
        except psycopg.OperationalError:
            connection.close()  # the next call opens another one
            raise

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[Connection]:
        """See :class:`SqlStore`; every transaction is durable here."""
        del durable
        with self._connection() as connection, connection.transaction():
            yield connection
