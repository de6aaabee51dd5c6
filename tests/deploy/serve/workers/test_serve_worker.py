"""The threads of a worker and of its server, one at a time: what they do where the store or the disk refuses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.serving.local import LocalWorkers
from dvdquant.deploy.serve.jobs import Failure, Job, NewJob
from dvdquant.deploy.serve.settings import ModelSource, ServerSettings, WorkerSettings
from dvdquant.deploy.serve.store.files import FolderFiles
from dvdquant.deploy.serve.store.sqlite_store import SqliteStore
from dvdquant.deploy.serve.workers import left_workers
from dvdquant.deploy.serve.workers.channel import Channel
from dvdquant.deploy.serve.workers.worker import BROKEN, DrawnClip, HeldJob, Worker
from dvdquant.system.whole_file import write_whole

WHAT = NewJob("wan", {"prompt": "a cat"}, 4, (24, 16), 2.0, "request-1")
HOUR = 3600.0
GONE = sqlite3.OperationalError("disk I/O error")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """An empty store."""
    store = SqliteStore(tmp_path / "jobs.sqlite", keep=HOUR)
    yield store
    store.close()


@pytest.fixture
def files(tmp_path: Path) -> FolderFiles:
    """An empty place for clips."""
    return FolderFiles(tmp_path / "videos")


@pytest.fixture
def worker(store: SqliteStore, files: FolderFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker without models, whose encoder writes the word that it gets as frames."""
    monkeypatch.setattr(
        "dvdquant.deploy.generation.video.write_mp4", lambda path, frames, fps: write_whole(path, frames)
    )
    settings = WorkerSettings(name="w", models=(), data=str(tmp_path), lease=0.2)
    return Worker(settings, store, files, lambda *_, **__: None)


def _claimed(store: SqliteStore, lease: float = 60, worker: str = "w") -> Job:
    job = store.claim(worker, ("wan",), lease)
    assert job is not None
    return job


def _drawn(job: Job, frames: bytes = b"mine") -> DrawnClip:
    result: Any = SimpleNamespace(frames=frames, trace=[], executed={})
    return DrawnClip(HeldJob(job, drawing=False), result, 8.0, 1.0)


def _bytes(files: FolderFiles, video: str) -> bytes | None:
    path = files.path(video)
    return None if path is None else path.read_bytes()


# ---------------------------------------------------------------------------------------------------------- the worker


def test_an_old_claim_leaves_the_renewal_of_the_next_one(worker: Worker, store: SqliteStore) -> None:
    """The worker claims a job again while its clip of the first claim is still encoded."""
    store.create(WHAT, 10)
    old = HeldJob(_claimed(store, lease=-1), drawing=False)
    new = HeldJob(_claimed(store), drawing=True)
    assert old.job.id == new.job.id
    worker.held[new.job.id] = new
    worker.drop(old)
    assert worker.held == {new.job.id: new}
    worker.drop(new)
    assert worker.held == {}


def test_a_frozen_worker_leaves_the_clip_of_the_next_claim(
    worker: Worker, store: SqliteStore, files: FolderFiles
) -> None:
    store.create(WHAT, 10)
    frozen = _claimed(store, lease=-1)
    second = _claimed(store, worker="v")
    worker.encode(_drawn(frozen))
    assert _bytes(files, frozen.id) == b"mine"  # the second claim draws, and puts its own in the place
    assert second.token is not None
    files.write(second.id, lambda path: write_whole(path, b"whole"))
    assert store.complete(second.id, second.token, {}, HOUR, "8")
    worker.encode(_drawn(frozen, b"whole"))
    assert _bytes(files, frozen.id) == b"whole"
    after = store.get(second.id)
    assert after is not None
    assert after.status == "completed"


@pytest.mark.parametrize("end", ["cancelled", "deleted", "failed"])
def test_a_clip_that_nobody_wants_is_deleted(end: str, worker: Worker, store: SqliteStore, files: FolderFiles) -> None:
    store.create(WHAT, 10)
    job = _claimed(store)
    assert job.token is not None
    if end == "cancelled":
        store.cancel(job.id)
    elif end == "deleted":
        store.delete(job.id)
    else:
        store.fail(job.id, job.token, Failure("engine_error", "it failed"), HOUR, final=True)
    worker.encode(_drawn(job))
    assert _bytes(files, job.id) is None
    assert list(files.ids()) == []


def test_a_completed_job_names_the_bits_of_its_last_steps(worker: Worker, store: SqliteStore) -> None:
    """Steps are faster than beats: no beat told the store of these."""
    store.create(WHAT, 10)
    drawn = _drawn(_claimed(store))
    drawn.running.bits = "8844"
    worker.encode(drawn)
    job = store.get(drawn.running.job.id)
    assert job is not None
    assert (job.status, job.bits) == ("completed", "8844")


def test_the_encoder_outlives_a_store_that_is_away(
    worker: Worker,
    store: SqliteStore,
    files: FolderFiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        store.create(WHAT, 10)
    first, second = _drawn(_claimed(store, lease=0.5)), _drawn(_claimed(store))
    worker.held = {each.running.job.id: each.running for each in (first, second)}
    with monkeypatch.context() as away:
        away.setattr(store, "complete", _raising(GONE))
        away.setattr(store, "fail", _raising(GONE))
        encoder = threading.Thread(target=worker.encode_all, daemon=True)
        encoder.start()
        worker.drawn.put(first)
        _until(lambda: first.running.job.id not in worker.held)
    assert "how a job ended could not be kept" in caplog.text
    keeper = threading.Thread(target=worker.keep_leases, daemon=True)
    keeper.start()
    worker.drawn.put(second)
    worker.drawn.put(None)
    encoder.join(60)
    assert not encoder.is_alive()
    done = store.get(second.running.job.id)
    assert done is not None
    assert done.status == "completed"
    # Nobody renews the lease of the first one, so another claim gets it.
    found: list[Job | None] = []
    _until(lambda: found.append(store.claim("v", ("wan",), 60)) or found[-1] is not None)
    again = found[-1]
    assert again is not None
    assert (again.id, again.attempts) == (first.running.job.id, 2)
    worker.gone.set()
    keeper.join(60)


@pytest.mark.parametrize("lasting", [False, True])
def test_drawing_outlives_a_store_that_is_away_and_a_broken_device_does_not(
    lasting: bool, worker: Worker, store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.create(WHAT, 10)
    job = _claimed(store)
    monkeypatch.setattr(store, "fail", _raising(GONE))
    text = "CUDA error: an illegal memory access was encountered" if lasting else "the clip is not finite"
    worker.generators["wan"] = _Failing(RuntimeError(text))  # type: ignore[assignment]
    worker.settings = dataclasses.replace(worker.settings, models=(ModelSource("wan", "out"),))
    with worker.hold(job) as running:
        worker.draw(running)
    assert "how a job ended could not be kept" in caplog.text
    assert worker.held == {}
    assert (worker.stopping.is_set(), worker.code) == (lasting, BROKEN if lasting else 0)


class _Failing:
    """A generator whose every clip fails."""

    artifact = SimpleNamespace(manifest=SimpleNamespace(graphs=[{"act_bits": 4}, {"act_bits": 8}]))

    def __init__(self, error: Exception) -> None:
        self.admit = _raising(error)


# ---------------------------------------------------------------------------------------------------------- the server


def test_a_store_that_is_away_does_not_end_the_watch_of_a_worker(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dvdquant.deploy.serve.metrics import ServerMetrics
    from dvdquant.deploy.serve.workers.supervisor import Pool

    monkeypatch.setattr(store, "abandon", _raising(GONE))
    command = (sys.executable, "-c", "raise SystemExit(3)")
    pool = Pool(
        ServerSettings(models=(), data=tmp_path, devices=("cpu",), spare=False),
        store,
        ServerMetrics(),
        command,
        lambda _: None,
    )
    with caplog.at_level(logging.INFO):
        pool.start()
        _until(lambda: caplog.text.count("worker_ended") >= 2)
    assert "could not be put back" in caplog.text
    pool.kill()
    assert pool.join(60)


def test_a_worker_is_seen_once_its_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever looks meanwhile takes it for a dead one, and deletes its files."""
    seen: list[list[Path]] = []
    lock, write = left_workers.fcntl.flock, os.write

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (seen.append(list(tmp_path.glob("*.lock"))), call(*given))[1]

    with monkeypatch.context() as watch:
        watch.setattr(left_workers.fcntl, "flock", watched(lock))
        watch.setattr(left_workers.os, "write", watched(write))
        berth = left_workers.Berth(tmp_path, "cpu-0-1")
    assert seen == [[], []]
    assert [(left.name, left.pid) for left in left_workers.find_left(tmp_path)] == [("cpu-0-1", os.getpid())]
    berth.close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_ends_while_the_next_server_looks_for_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    berth = left_workers.Berth(tmp_path, "cpu-0-1")
    held = left_workers.is_held

    def held_until_now(lock: Path) -> bool:
        found = held(lock)
        berth.close()
        return found

    with monkeypatch.context() as moment:
        moment.setattr(left_workers, "is_held", held_until_now)
        (left,) = left_workers.find_left(tmp_path)
    assert (left.pid, left.ask("let_go"), left.poll()) == (0, None, -1)
    assert left.wait(0) == -1


def test_expiry_goes_on_after_a_store_and_a_file_that_refuse(
    store: SqliteStore,
    files: FolderFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from dvdquant.deploy.serve import expiry
    from dvdquant.deploy.serve.metrics import ServerMetrics
    from dvdquant.deploy.serve.service import Service

    videos = []
    for _ in range(3):
        store.create(WHAT, 10)
        job = _claimed(store)
        assert job.token is not None
        files.write(job.id, lambda path: write_whole(path, b"clip"))
        store.complete(job.id, job.token, {}, -1, "8")
        videos.append(job.id)
    expire, delete = store.expire, files.delete
    rounds: list[float] = []

    def expire_later(now: float) -> list[str]:
        rounds.append(now)
        if len(rounds) == 1:
            raise GONE
        return expire(now)

    def delete_but_one(video: str) -> None:
        if video == videos[0]:
            raise OSError(errno.EIO, "Input/output error")
        delete(video)

    monkeypatch.setattr(store, "expire", expire_later)
    monkeypatch.setattr(files, "delete", delete_but_one)
    monkeypatch.setattr(expiry, "EXPIRE_SECONDS", 0.01)

    metrics = ServerMetrics()

    async def some_rounds() -> None:
        service = Service(ServerSettings(models=(), data=tmp_path), store, files, LocalWorkers(), metrics)
        task = asyncio.create_task(expiry.expire_for_ever(service))
        end = time.monotonic() + 60
        while len(rounds) < 4 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        service.close()

    asyncio.run(some_rounds())
    assert len(rounds) >= 4
    assert list(files.ids()) == videos[:1]
    assert "does not say what has expired" in caplog.text
    assert caplog.text.count(f"the clip of {videos[0]}") == 1  # it is tried again later
    kept = store.get(videos[0])
    assert kept is not None
    assert kept.expires_at is not None
    assert kept.expires_at > time.time() + 60
    assert "dvdq_undeleted_clips_total 1.0" in metrics.text({}).decode()


@pytest.mark.parametrize(("line", "said"), [(b"{nonsense\n", True), (b"\xff\n", True), (b'{"event": "st', False)])
def test_a_line_that_is_no_message_is_told(line: bytes, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(b'{"event": "ready"}\n' + line)
    assert [message["event"] for message in channel] == ["ready"]
    channel.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"] * said


def _raising(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
