"""The store of jobs: one owner a job, two attempts at most, nothing lost, whatever order things happen in."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dvdquant.deploy.serve.jobs import (
    MAX_INTERRUPTIONS,
    VIDEO_ID,
    Failure,
    Job,
    JobStore,
    NewJob,
    QueueFullError,
    new_video_id,
)
from dvdquant.deploy.serve.store.files import FolderFiles
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
from dvdquant.errors import OutputError, UnsupportedError
from tests.support.exporting import REPOSITORY
from tests.support.postgres import postgres

WHAT = NewJob("wan", {"prompt": "a cat ☃"}, 4, (24, 16), 2.0, "request-1")
FAULT = Failure("engine_error", "it failed")
HOUR = 3600.0


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A database without tables."""
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """An empty store of either kind; every test below holds for both."""
    store: JobStore
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "jobs.sqlite", keep=HOUR)
    else:
        from dvdquant.deploy.serve.store.postgres_store import PostgresStore

        store = PostgresStore(request.getfixturevalue("database"), keep=HOUR)
        while page := store.page(None, 100):
            for job in page:
                store.delete(job.id)
    yield store
    store.close()


def _claimed(store: JobStore, lease: float = 60, worker: str = "w") -> Job:
    job = store.claim(worker, ("wan",), lease)
    assert job is not None
    return job


def _token(job: Job) -> str:
    assert job.token is not None
    return job.token


def test_a_job_lives_from_queue_to_clip(store: JobStore) -> None:
    made = store.create(WHAT, 10)
    assert VIDEO_ID.fullmatch(made.id)
    assert store.get(made.id) == made
    job = _claimed(store)
    assert (job.id, job.status, job.attempts, job.worker, job.what) == (made.id, "in_progress", 1, "w", WHAT)
    assert store.claim("other", ("wan",), 60) is None
    assert store.beat(job.id, _token(job), 60, 50, "84s") == "ok"
    half = store.get(job.id)
    assert half is not None
    assert (half.progress, half.bits) == (50, "84s")
    assert store.complete(job.id, _token(job), {"bytes": 7}, HOUR, "84s8")
    done = store.get(job.id)
    assert done is not None
    assert (done.status, done.progress, done.summary, done.token) == ("completed", 100, {"bytes": 7}, None)
    assert done.bits == "84s8"  # of steps after the last beat, too
    assert done.expires_at == pytest.approx(time.time() + HOUR, abs=60)
    assert store.counts() == {"completed": 1}


def test_oldest_first_and_only_models_that_the_worker_has(store: JobStore) -> None:
    other = NewJob("big", {"prompt": "x"}, 4, (24, 16), 2.0)
    ids = [store.create(what, 10).id for what in (other, WHAT, WHAT)]
    assert [_claimed(store).id for _ in range(2)] == ids[1:]
    assert store.claim("w", ("wan",), 60) is None
    both = store.claim("w", ("wan", "big"), 60)
    assert both is not None
    assert both.id == ids[0]


def test_the_queue_has_a_limit_that_running_jobs_do_not_count_for(store: JobStore) -> None:
    for _ in range(3):
        store.create(WHAT, 3)
    with pytest.raises(QueueFullError):
        store.create(WHAT, 3)
    _claimed(store)
    store.create(WHAT, 3)


def test_a_failure_is_tried_twice_unless_it_is_final(store: JobStore) -> None:
    store.create(WHAT, 10)
    for attempt, status in ((1, "queued"), (2, "failed")):
        job = _claimed(store)
        assert job.attempts == attempt
        after = store.fail(job.id, _token(job), FAULT, HOUR, final=False)
        assert after is not None
        assert after.status == status
    assert after.failure == FAULT
    store.create(WHAT, 10)
    job = _claimed(store)
    final = store.fail(job.id, _token(job), FAULT, HOUR, final=True)
    assert final is not None
    assert (final.status, final.attempts) == ("failed", 1)


def test_a_lease_that_ran_out_frees_the_job_once(store: JobStore) -> None:
    store.create(WHAT, 10)
    first = _claimed(store, lease=-1)
    second = _claimed(store, lease=-1, worker="v")
    assert (second.id, second.attempts) == (first.id, 2)
    assert store.beat(first.id, _token(first), 60, 99, "") == "lost"
    assert not store.complete(first.id, _token(first), {}, HOUR, "8")
    assert store.fail(first.id, _token(first), FAULT, HOUR, final=True) is None
    assert not store.release(first.id, _token(first))
    assert store.claim("u", ("wan",), 60) is None
    lost = store.get(first.id)
    assert lost is not None
    assert lost.failure is not None
    assert (lost.status, lost.failure.code) == ("failed", "worker_lost")


def test_jobs_of_a_dead_worker_go_back_at_once(store: JobStore) -> None:
    for _ in range(3):
        store.create(WHAT, 10)
    mine, theirs = _claimed(store, worker="a"), _claimed(store, worker="b")
    assert store.abandon("a") == 1
    again = store.get(mine.id)
    assert again is not None
    assert (again.status, again.attempts, again.worker) == ("queued", 1, None)
    assert store.beat(theirs.id, _token(theirs), 60, 1, "") == "ok"
    assert store.interrupt(alive=["b"]) == 0
    assert store.interrupt() == 1
    assert store.counts() == {"queued": 3}


def test_an_end_together_with_the_server_does_not_count_a_few_times(store: JobStore) -> None:
    video = store.create(WHAT, 10).id
    for _ in range(MAX_INTERRUPTIONS):
        assert _claimed(store).attempts == 1
        assert store.interrupt() == 1
    for attempts in (1, 2):
        assert _claimed(store).attempts == attempts
        assert store.interrupt() == 1
    ended = store.get(video)
    assert ended is not None
    assert ended.failure is not None
    assert (ended.status, ended.failure.code) == ("failed", "worker_lost")
    cancelled = store.create(WHAT, 10).id
    _claimed(store)
    store.cancel(cancelled)
    store.interrupt()
    assert store.counts() == {"failed": 2}


def test_a_store_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    first = SqliteStore(path)
    video = first.create(WHAT, 10).id
    first.close()
    with sqlite3.connect(path) as db:
        db.execute("alter table jobs drop column interrupted")
    store = SqliteStore(path)
    assert _claimed(store).id == video
    assert store.interrupt() == 1
    store.close()


def test_a_released_attempt_does_not_count(store: JobStore) -> None:
    store.create(WHAT, 10)
    for _ in range(5):
        job = _claimed(store)
        assert job.attempts == 1
        assert store.release(job.id, _token(job))


def test_cancel_in_every_state(store: JobStore) -> None:
    waiting = store.create(WHAT, 10)
    after = store.cancel(waiting.id)
    assert after is not None
    assert after.failure is not None
    assert (after.status, after.failure.code) == ("failed", "cancelled")
    assert after.expires_at is not None
    store.create(WHAT, 10)
    for end in ("fail", "release", "abandon", "complete"):
        running = _claimed(store)
        flagged = store.cancel(running.id)
        assert flagged is not None
        assert flagged.status == "in_progress"
        assert store.beat(running.id, _token(running), 60, 1, "") == "cancelled"
        if end == "complete":
            assert not store.complete(running.id, _token(running), {}, HOUR, "8")
            store.fail(running.id, _token(running), FAULT, HOUR, final=False)
        elif end == "fail":
            store.fail(running.id, _token(running), FAULT, HOUR, final=False)
        elif end == "release":
            store.release(running.id, _token(running))
        else:
            store.abandon("w")
        ended = store.get(running.id)
        assert ended is not None
        assert ended.failure is not None
        assert (ended.status, ended.failure.code) == ("failed", "cancelled"), end
        store.create(WHAT, 10)
    assert store.cancel(new_video_id()) is None


def test_a_deleted_job_is_lost_to_its_worker(store: JobStore) -> None:
    store.create(WHAT, 10)
    job = _claimed(store)
    assert store.delete(job.id)
    assert store.beat(job.id, _token(job), 60, 1, "") == "lost"
    assert not store.complete(job.id, _token(job), {}, HOUR, "8")
    assert not store.delete(job.id)


def test_pages_cover_every_job_once_in_both_orders(store: JobStore) -> None:
    ids = [store.create(WHAT, 100).id for _ in range(7)]
    for ascending, wanted in ((True, ids), (False, ids[::-1])):
        seen: list[str] = []
        while page := store.page(seen[-1] if seen else None, 3, ascending=ascending):
            seen += [job.id for job in page]
        assert seen == wanted
    with pytest.raises(KeyError):
        store.page(new_video_id(), 3)
    job = store.get(ids[3])
    assert job is not None
    assert store.ahead_of(job) == 3


def test_what_expired_is_named_and_nothing_else(store: JobStore) -> None:
    store.create(WHAT, 10)
    job = _claimed(store)
    store.complete(job.id, _token(job), {}, 10, "8")
    waiting = store.create(WHAT, 10).id
    assert store.expire(time.time()) == []
    assert store.expire(time.time() + 11) == [job.id]
    store.keep_until(job.id, time.time() + 100)
    assert store.expire(time.time() + 11) == []
    store.keep_until(waiting, 0)
    assert store.expire(time.time() + 11) == []


def test_it_survives_a_kill_in_the_middle_of_everything(tmp_path: Path) -> None:
    """A process that creates, claims and completes is killed; what it said was done is there."""
    code = """
import sys
from pathlib import Path
from dvdquant.deploy.serve.jobs import NewJob
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
store = SqliteStore(Path(sys.argv[1]))
while True:
    made = store.create(NewJob("wan", {"prompt": "x"}, 1, (2, 2), 1.0), 10**6).id
    job = store.claim("w", ("wan",), 60)
    store.complete(job.id, job.token, {}, 3600, "8")
    print(job.id, flush=True)
"""
    path = tmp_path / "jobs.sqlite"
    for round_ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(REPOSITORY)},
        )
        assert child.stdout is not None
        said = [child.stdout.readline().strip() for _ in range(5 + 7 * round_)]
        child.kill()
        child.wait()
        child.stdout.close()
        store = SqliteStore(path)
        for video in said:
            job = store.get(video)
            assert job is not None
            assert job.status == "completed"
        store.interrupt()
        assert store.counts().get("in_progress", 0) == 0
        while (job := store.claim("w", ("wan",), 60)) is not None:
            store.complete(job.id, _token(job), {}, 3600, "8")
        store.close()


def test_a_database_that_is_not_there_or_of_a_later_version_is_refused(database: str) -> None:
    import psycopg

    from dvdquant.deploy.serve.store.postgres_store import PostgresStore
    from dvdquant.deploy.serve.store.stores import open_store

    with pytest.raises(OutputError, match="cannot be used"):
        PostgresStore("postgresql://nobody@/none?host=/nowhere")
    with pytest.raises(UnsupportedError, match="no address"):
        open_store("data", HOUR, "mysql://x")
    PostgresStore(database).close()
    with psycopg.connect(database) as db:
        db.execute("update dvdq_format set format = 99")
    with pytest.raises(OutputError, match="later version"):
        PostgresStore(database)
    with psycopg.connect(database) as db:
        db.execute("update dvdq_format set format = 1")


def test_a_connection_that_broke_is_opened_again(database: str) -> None:
    import psycopg

    from dvdquant.deploy.serve.store.postgres_store import PostgresStore

    store = PostgresStore(database)
    made = store.create(WHAT, 10**6)
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
    with pytest.raises(psycopg.OperationalError):
        store.get(made.id)
    assert store.get(made.id) == made
    store.delete(made.id)
    store.close()


def test_threads_never_get_the_same_job(store: JobStore) -> None:
    ids = {store.create(WHAT, 1000).id for _ in range(60)}
    got: list[str] = []

    def take(name: str) -> None:
        while (job := store.claim(name, ("wan",), 60)) is not None:
            got.append(job.id)
            assert store.complete(job.id, _token(job), {}, HOUR, "8")

    threads = [threading.Thread(target=take, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


def test_a_later_format_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    later, broken = tmp_path / "later.sqlite", tmp_path / "broken.sqlite"
    with sqlite3.connect(later) as db:
        db.execute("pragma user_version = 99")
    db.close()
    with pytest.raises(OutputError, match="later version"):
        SqliteStore(later)
    broken.write_bytes(b"this is no database, and long enough to look like one" * 100)
    with pytest.raises(OutputError, match="cannot be used"):
        SqliteStore(broken)


# ---------------------------------------------------------------------------------------------------------------- files


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    from dvdquant.system.whole_file import write_whole

    files = FolderFiles(tmp_path / "videos")
    video = new_video_id()
    assert files.path(video) is None
    assert list(files.ids()) == []
    assert files.write(video, lambda path: write_whole(path, b"clip")) == 4
    path = files.path(video)
    assert path is not None
    assert path.read_bytes() == b"clip"
    assert list(files.ids()) == [video]
    files.delete(video)
    files.delete(video)
    assert files.path(video) is None


@pytest.mark.parametrize("video", ["../../etc/passwd", "video_", "video_" + "g" * 32, "video_" + "0" * 32 + "/..", ""])
def test_no_other_name_reaches_the_disk(video: str, tmp_path: Path) -> None:
    files = FolderFiles(tmp_path)
    for call in (files.path, files.delete, lambda name: files.write(name, lambda path: None)):
        with pytest.raises(ValueError):
            call(video)
    assert list(tmp_path.iterdir()) == []
