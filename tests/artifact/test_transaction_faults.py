"""The output folder under full disks, kills at every instant, hostile records and rivals."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dvdquant.artifact.commit
from dvdquant.artifact.commit import recover
from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction, require_disk
from dvdquant.errors import OutputError, ResourceError
from tests.support.folders import memory_folder
from tests.support.interrupted_exports import CleanChildren
from tests.support.written_exports import content, export, hashes, manifest, names_in, state, state_of


def seen(version: int) -> dict[str, str]:
    return hashes(content(version))


@pytest.fixture(params=["exchange", "roll-forward"])
def way(request: pytest.FixtureRequest) -> str:
    """The two ways of putting an export in place."""
    return str(request.param)


@pytest.fixture(scope="module")
def children() -> Iterator[CleanChildren]:
    server = CleanChildren()
    yield server
    server.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


def read_unfinished(out: Path) -> None:
    """A reader of a decided commit says how it is finished, and leaves every byte as it is."""
    before = state_of(out)
    with pytest.raises(OutputError, match=r"interrupted while it was put in place(?s:.*)dvdq-export .* --resume"):
        load_manifest(out)
    assert state_of(out) == before


def test_every_file_operation_of_a_replacement_failing(memory: Path, children: CleanChildren, way: str) -> None:
    """An audit hook makes the n-th file operation fail for want of space, for every n until one run gets through."""

    clean = 0
    for fail_at in range(500):
        out = memory / str(fail_at) / "out"
        export(out, 1)
        status = children.run("export_2", out, fail_at, "no space", way)
        assert status in (0, 1)
        after, decided = state(out), (out / ".commit").exists()
        assert after in ((seen(1), seen(2), None) if decided else (seen(1), seen(2)))
        export(out, 4, finish=False)  # the next run sweeps, or completes what was decided
        assert state(out) == (seen(2) if decided else after)
        assert names_in(out) == {*(content(1) if state(out) == seen(1) else content(2)), "manifest.json"}
        clean = clean + 1 if status == 0 else 0
        if clean == 12:
            return
    pytest.fail("the operations never end")


def test_disk_full_on_a_real_small_disk(tmp_path: Path) -> None:
    """A tmpfs of 1 MB, where it can be mounted: a mount point besides, so the exchange is impossible there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    try:
        export(disk, 1)
        with pytest.raises(ResourceError, match="no room left"), ExportTransaction(disk) as transaction:
            transaction.path("big").write_bytes(bytes(4 << 20))
        assert state(disk) == seen(1)
        filler = disk / "onnx" / "filler"
        for left in range(0, 200_000, 4096):  # every page of the new export, until it fits
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - left)))
            try:
                export(disk, 2)
            except ResourceError:
                assert state(disk) == seen(1)
            filler.unlink()
        assert state(disk) == seen(2)  # the last rounds had room
        export(disk, 3)
        assert state(disk) == seen(3)
        with pytest.raises(ResourceError, match=r"weights needs 2\.0 MiB, [\d.]+ K?i?B are free"):
            require_disk(disk / "not" / "yet", 2 << 20, "weights")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("first", [True, False])
def test_killed_before_every_single_operation(memory: Path, children: CleanChildren, way: str, first: bool) -> None:
    """SIGKILL before the n-th file operation of an export, for every n: the old export or the new one, no third.

    With the exchange, by the bytes on disk alone; rolling forward, no manifest ever stands beside files of another
    export; a reader says so and changes nothing, and the next export completes what was decided.
    """

    outcomes = set()
    for kill_at in range(500):
        out = memory / str(kill_at) / "out"
        out.parent.mkdir()
        if not first:
            export(out, 1)
        status = children.run("export_2", out, kill_at, "kill", way)
        raw = state(out)
        if raw is None and (out / ".commit").exists():
            assert first or way == "roll-forward"
            read_unfinished(out)
            recover(out)
            assert load_manifest(out).family == "v2"
            raw = state(out)
        assert raw in ((None, seen(2)) if first else (seen(1), seen(2)))
        outcomes.add(None if raw is None else (1 if raw == seen(1) else 2))
        export(out, 3)
        assert state(out) == seen(3)
        assert names_in(out) == {*content(3), "manifest.json"}  # orphans are swept
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the operations never end")
    assert kill_at > 25
    assert outcomes == ({None, 2} if first else {1, 2})


def _random_kills(tmp_path: Path, children: CleanChildren, kills: int) -> None:
    """A process that exports version after version, killed at a random time, again and again in the same folder."""
    out, rng = tmp_path / "out", random.Random(2)
    before: dict[str, str] | None = None
    for _ in range(kills):
        begun = children.kill_at_random(out, rng.uniform(0, 0.08))
        raw = state(out)
        if raw is None and (out / ".commit").exists():
            read_unfinished(out)
            recover(out)
            raw = state(out)
        assert raw == before or raw in [seen(version) for version in range(1, begun + 1)]
        before = raw
    export(out, 1)
    assert state(out) == seen(1)
    assert names_in(out) == {*content(1), "manifest.json"}


@pytest.mark.stress
def test_500_random_kills(memory: Path, children: CleanChildren) -> None:
    _random_kills(memory, children, 500)


def test_20_random_kills(memory: Path, children: CleanChildren) -> None:
    _random_kills(memory, children, 20)


def test_a_commit_record_cannot_reach_outside(tmp_path: Path) -> None:
    """``.commit`` lies in a folder somebody may have sent: its paths are checked like any other."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("keep")
    stage = ".tmp-" + "0" * 16
    records: list[Any] = [
        {"stage": stage, "install": [], "remove": ["../victim/file"]},
        {"stage": stage, "install": ["../victim/file"], "remove": []},
        {"stage": stage, "install": [], "remove": [str(victim / "file")]},
        {"stage": stage, "install": [], "remove": ["link/file"]},
        {"stage": stage, "install": ["link/file"], "remove": []},
        {"stage": "../victim", "install": [], "remove": []},
        {"stage": stage, "install": ["lost"], "remove": []},
        {"stage": stage},
        {"stage": 1, "install": [], "remove": []},
        [],
    ]
    for index, record in enumerate(records):
        out = tmp_path / str(index)
        tree = out / stage / "tree"
        (tree / "link").mkdir(parents=True)
        (tree / "link" / "file").write_text("evil")
        (tree / "manifest.json").write_text(manifest().to_json())
        (out / "link").symlink_to(victim)
        (out / ".commit").write_text(json.dumps(record))
        with pytest.raises(OutputError, match="cannot be completed"):
            recover(out)
        read_unfinished(out)
        assert (victim / "file").read_text() == "keep"


def test_a_stage_that_is_a_link_is_unlinked_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("keep")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".tmp-{'0' * 16}").symlink_to(tmp_path / "victim")
    export(tmp_path / "out", 1)
    assert (tmp_path / "victim" / "file").read_text() == "keep"
    assert names_in(tmp_path / "out") == {*content(1), "manifest.json"}


def test_the_second_export_says_who_is_first(tmp_path: Path) -> None:
    with ExportTransaction(tmp_path / "out"):
        with pytest.raises(OutputError, match=f"being written by another export .*pid {os.getpid()}"):
            export(tmp_path / "out", 1)
        with pytest.raises(OutputError, match="being written"):
            recover(tmp_path / "out")


def test_a_lock_file_removed_between_opening_and_locking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder leaves and a third export comes, just then: a lock on the removed file is worth nothing."""
    real, holders = fcntl.flock, [FolderLock(tmp_path)]

    def flock(fd: int, operation: int) -> None:
        if len(holders) == 1:
            holders[0].release()
            holders.append(holders[0])  # the next call is the real one
            holders[1] = FolderLock(tmp_path)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="being written by another export"):
        FolderLock(tmp_path)
    holders[1].release()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_the_new_folder_is_locked_from_the_moment_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, refused = tmp_path / "out", dvdquant.artifact.commit.exchange, []

    def exchange(*names: Any) -> None:
        real(*names)
        with pytest.raises(OutputError, match="being written") as caught:
            FolderLock(out)
        refused.append(caught.value)

    monkeypatch.setattr(dvdquant.artifact.commit, "exchange", exchange)
    export(out, 1)
    export(out, 2)
    assert len(refused) == 1
    assert state(out) == seen(2)


@pytest.mark.parametrize("races", [2, pytest.param(200, marks=pytest.mark.stress)])
def test_races_of_8_processes(memory: Path, children: CleanChildren, races: int) -> None:
    """Every process either exports or says that another one does; what is left is one whole export."""
    wins = losses = 0
    for race in range(races):
        out = memory / f"race{race}" / "out"
        out.parent.mkdir()
        if race % 2:
            export(out, 1)
        codes = children.race(out, 2, 8)
        assert set(codes) <= {0, 5}, codes
        winners = [2 + rival for rival, code in enumerate(codes) if code == 0]
        assert winners
        assert state(out) in [seen(version) for version in winners]
        assert "manifest.json" in names_in(out)
        assert not any(name.startswith(".") for name in names_in(out))
        wins, losses = wins + len(winners), losses + 8 - len(winners)
    assert losses > 0
    assert wins >= races
