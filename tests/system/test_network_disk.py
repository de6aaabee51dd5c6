"""Locks that other machines do not see: nothing of a run that may live there is taken or deleted."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import OutputError
from dvdquant.system import mounts, network_disk
from dvdquant.system.network_disk import LIVE_SECONDS, locks_stay_here
from dvdquant.system.whole_file import atomic_path, write_whole

NFS = "nfs4 server:/home rw,vers=4.2"


def mounted_as(folder: Path, monkeypatch: pytest.MonkeyPatch, kind_and_options: str) -> None:
    """Have the kernel's list of mounts say that ``folder`` lies on a disk of that kind."""
    device = folder.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / {folder} rw shared:1 - {kind_and_options}\n"
    listed = folder / "mountinfo"
    listed.write_text("1 0 250:9 / / rw - nfs a rw,nolock\nout of form\n" + line)
    monkeypatch.setattr(mounts, "MOUNTS", listed)


@pytest.mark.parametrize(
    ("disk", "stay"),
    [
        ("ext4 /dev/sda1 rw", False),
        ("overlay overlay rw,lowerdir=/a", False),
        (NFS, False),
        (NFS + ",local_lock=none", False),
        (NFS + ",local_lock=posix", False),
        (NFS + ",local_lock=flock", True),
        (NFS + ",local_lock=all,addr=1.2.3.4", True),
        ("nfs server:/home rw,nolock", True),
        ("fuse.sshfs server:/home rw", True),
        ("9p share rw", True),
    ],
)
def test_which_disks_keep_locks_to_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, stay: bool
) -> None:
    mounted_as(tmp_path, monkeypatch, disk)
    with (tmp_path / "file").open("w") as file:
        assert locks_stay_here(file.fileno()) == stay
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "missing")
    with (tmp_path / "file").open("w") as file:
        assert not locks_stay_here(file.fileno())


def _elsewhere(out: Path, age: float = 0.0) -> Path:
    """What an export on another machine leaves while it runs, as this machine sees it: no lock is held here."""
    stage = out / (".tmp-" + "0" * 16)
    (stage / "tree").mkdir(parents=True)
    (out / ".lock").write_text("pid 7 on another-machine\n")
    os.utime(out / ".lock", (time.time() - age,) * 2)
    return stage


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_may_live_on_another_machine_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    mounted_as(tmp_path, monkeypatch, "nfs server:/home rw,nolock")
    out = tmp_path / "out"
    stage = _elsewhere(out, LIVE_SECONDS - 100)
    with pytest.raises(OutputError, match=r"pid 7 on another-machine(?s:.*)delete .*\.lock"):
        ExportTransaction(out, key={"a": 1}, resume=resume).__enter__()
    assert stage.is_dir()
    assert (out / ".lock").read_text() == "pid 7 on another-machine\n"
    (out / ".lock").unlink()  # as the error says
    with ExportTransaction(out):
        assert not stage.exists()


@pytest.mark.parametrize(
    ("disk", "signed", "age"),
    [
        ("nfs server:/home rw,nolock", "pid 7 on another-machine\n", LIVE_SECONDS + 100),  # nothing for a day
        ("nfs server:/home rw,nolock", f"pid 7 on {socket.gethostname()}\n", 0),  # killed here
        ("nfs server:/home rw,nolock", "", 0),
        ("ext4 /dev/sda1 rw", "pid 7 on another-container\n", 0),  # where the lock is free, it is dead
        (NFS, "pid 7 on another-machine\n", 0),  # the server holds the lock
    ],
)
def test_a_dead_run_stands_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, signed: str, age: float
) -> None:
    mounted_as(tmp_path, monkeypatch, disk)
    stage = _elsewhere(tmp_path / "out", age)
    (tmp_path / "out" / ".lock").write_text(signed)
    os.utime(tmp_path / "out" / ".lock", (time.time() - age,) * 2)
    with ExportTransaction(tmp_path / "out"):
        assert not stage.exists()


def test_finished_steps_renew_the_lock(tmp_path: Path) -> None:
    with ExportTransaction(tmp_path / "out", key={"a": 1}) as transaction:
        os.utime(tmp_path / "out" / ".lock", (1, 1))
        transaction.done("step")
        assert (tmp_path / "out" / ".lock").stat().st_mtime > time.time() - 60
    FolderLock(tmp_path).release()


def _beats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dvdquant-heartbeat"]


def _renewed(path: Path) -> bool:
    """Make a file look dead, and return whether its holder renews its time without being asked."""
    os.utime(path, (1, 1))
    end = time.monotonic() + 60
    while path.stat().st_mtime < time.time() - LIVE_SECONDS and time.monotonic() < end:
        time.sleep(0.01)
    return path.stat().st_mtime > time.time() - LIVE_SECONDS


def test_a_step_of_days_renews_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step ends here, and the export lives all the same; then its thread is gone with the lock."""
    mounted_as(tmp_path, monkeypatch, "nfs server:/home rw,nolock")
    monkeypatch.setattr(network_disk, "RENEW_SECONDS", 0.01)
    out = tmp_path / "out"
    with ExportTransaction(out):
        assert _renewed(out / ".lock")
        missed = threading.Event()

        def away(*_: Any) -> None:
            missed.set()
            raise OSError(5, "the server is away")

        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", away)
            assert missed.wait(60)
        assert _renewed(out / ".lock")  # and goes on when the disk is back
    assert not _beats()


def test_a_file_that_takes_days_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is built into its unfinished file, which is written at the very end."""
    mounted_as(tmp_path, monkeypatch, "nfs server:/home rw,nolock")
    monkeypatch.setattr(network_disk, "RENEW_SECONDS", 0.01)
    with atomic_path(tmp_path / "engine") as unfinished:
        unfinished.write_bytes(b"whole")
        assert _renewed(unfinished)
    assert (tmp_path / "engine").read_bytes() == b"whole"
    assert not _beats()


def test_no_thread_where_locks_tell(tmp_path: Path) -> None:
    with ExportTransaction(tmp_path / "out"), atomic_path(tmp_path / "file") as unfinished:
        unfinished.touch()
        assert not _beats()


@pytest.mark.parametrize(
    ("disk", "age", "swept"),
    [
        ("nfs server:/home rw,nolock", 0, False),
        ("nfs server:/home rw,nolock", LIVE_SECONDS + 100, True),
        ("ext4 /dev/sda1 rw", 0, True),
    ],
)
def test_unfinished_files_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, age: float, swept: bool
) -> None:
    mounted_as(tmp_path, monkeypatch, disk)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another-machine")
        with atomic_path(tmp_path / "clip.mp4") as unfinished:
            name = unfinished.name
    other, own = tmp_path / name, None
    other.write_bytes(b"half")
    os.utime(other, (time.time() - age,) * 2)
    with atomic_path(tmp_path / "clip.mp4") as unfinished:
        own = tmp_path / unfinished.name
        unfinished.write_bytes(b"whole")
    own.write_bytes(b"half")  # killed here
    write_whole(tmp_path / "clip.mp4", b"whole")
    assert other.exists() != swept
    assert not own.exists()
