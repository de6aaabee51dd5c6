"""Every call of an export into the system that can fail, failing: a clean error, and the previous export as it was."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dvdquant.artifact.commit
from dvdquant.artifact.commit import recover
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.errors import DvdquantError, OutputError, ResourceError
from tests.support.children import in_child
from tests.support.faults import ERRORS, FULL, WRITES, Faults
from tests.support.folders import memory_folder
from tests.support.interrupted_exports import no_exchange
from tests.support.written_exports import (
    KEY,
    content,
    export,
    export_resumable,
    hashes,
    manifest,
    names_in,
    six_steps,
    state,
)

WAYS = [("exchange", True), ("roll-forward", True), ("roll-forward", False)]
"""How the export is put in place, and whether there is one already."""


def seen(version: int) -> dict[str, str]:
    return hashes(content(version))


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


def first_export(memory: Path, out: Path) -> None:
    """Make ``out`` export number 1, which is made once in ``memory`` and copied: the faults come after it."""
    made = memory / "first"
    if not made.exists():
        export(made, 1)
    shutil.copytree(made, out)


def _one_fault(memory: Path, way: str, before: bool, faults: Faults) -> None:
    """One export over another, or into a new folder, with a fault, and the next one without."""
    out = memory / str(faults.at) / "out"
    if before:
        first_export(memory, out)
    raised: DvdquantError | None = None
    with pytest.MonkeyPatch.context() as patch:
        if way == "roll-forward":
            patch.setattr(dvdquant.artifact.commit, "exchange", no_exchange)
        faults.install(patch.setattr)
        try:
            export(out, 2, key=KEY)
        except DvdquantError as error:
            raised = error
    said = (faults.failed, faults.code, faults.at, raised)
    after, decided = state(out), (out / ".commit").exists()
    if raised is None:
        assert after == seen(2), said
    elif decided:
        assert after in (None, seen(1), seen(2)), said
        recover(out)
        assert state(out) == seen(2), said
    else:
        assert after == (seen(1) if before else None), said
    if raised is not None:
        assert raised.fix, said
        assert isinstance(raised, ResourceError) or faults.code not in FULL or decided, said
    export(out, 3)
    assert state(out) == seen(3), said
    assert names_in(out) == {*content(3), "manifest.json"}, said


@pytest.mark.parametrize(("way", "before"), WAYS)
def test_every_call_failing(memory: Path, way: str, before: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Every third one with one of the errors, by turns, each way other ones; the full set is under stress."""
    caplog.set_level(logging.CRITICAL)
    tried = 0
    for at in range(WAYS.index((way, before)), 2000, 3):
        code = ERRORS[at // 3 % len(ERRORS)]
        faults = Faults(code, at)
        _one_fault(memory, way, before, faults)
        if faults.failed is None:
            break
        tried += 1
    else:
        pytest.fail("the calls never end")
    assert tried > 50


@pytest.mark.stress
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize(("way", "before"), WAYS)
def test_every_call_failing_with_every_error(memory: Path, way: str, before: bool, code: int, lasting: bool) -> None:
    for at in range(2000):
        faults = Faults(code, at, lasting=lasting)
        _one_fault(memory, way, before, faults)
        if faults.failed is None:
            return
    pytest.fail("the calls never end")


@pytest.mark.parametrize("way", ["exchange", "roll-forward"])
def test_a_disk_that_fails_for_good(memory: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be cleaned up either: from some call on, all that write fail."""
    caplog.set_level(logging.CRITICAL)
    for at in range(500):
        faults = Faults(ERRORS[at % 2], at, WRITES, lasting=True)
        _one_fault(memory, way, True, faults)
        if faults.failed is None:
            return
    pytest.fail("the calls never end")


def test_every_call_of_a_resumed_export_failing(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The finished work is still there for the next --resume, or the export is made."""
    caplog.set_level(logging.CRITICAL)
    for at in range(0, 1000, 3):
        out = memory / str(at) / "out"
        with ExportTransaction(out, key=KEY, keep_for_resume=True) as transaction:
            six_steps(transaction, 2)
        faults = Faults(errno.EIO, at)
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch.setattr)
            try:
                export_resumable(out, resume=True)
            except DvdquantError as error:
                assert error.fix  # noqa: PT017
        export_resumable(out, resume=True)
        assert (out / "weights.safetensors").read_bytes() == b"".join(bytes([step]) * 100 for step in range(3))
        assert names_in(out) == {"weights.safetensors", "half.onnx", "manifest.json"}
        if faults.failed is None:
            return
    pytest.fail("the calls never end")


def _after_the_decision(patch: pytest.MonkeyPatch, way: str, start: Callable[[], None]) -> None:
    """Have ``start`` called at the moment from which the new export counts."""
    commit = dvdquant.artifact.commit
    real_roll, real_exchange = commit.roll_forward, commit.exchange

    def roll_forward(folder: Folder) -> None:
        start()
        real_roll(folder)

    def exchange(parent: Folder, one: str, other: str) -> None:
        real_exchange(parent, one, other)
        start()

    if way == "roll-forward":
        patch.setattr(commit, "exchange", no_exchange)
        patch.setattr(commit, "roll_forward", roll_forward)
    else:
        patch.setattr(commit, "exchange", exchange)


def _fault_after_the_decision(memory: Path, way: str, before: bool, faults: Faults, resume: bool) -> None:
    """What is read after it is the old or the new export, or says which command finishes it; and that finishes it."""
    out = memory / str(faults.at) / "out"
    if before:
        first_export(memory, out)
    said: list[Any] = [way, before, faults.code, faults.at, faults.lasting]
    with pytest.MonkeyPatch.context() as patch:
        _after_the_decision(patch, way, lambda: faults.install(patch.setattr))
        try:
            export(out, 2, key=KEY)
        except DvdquantError as error:
            said.append(error)
            assert error.fix, said  # noqa: PT017
            assert "--resume completes it" in error.fix, said  # noqa: PT017
    said.append(faults.failed)
    whole = state(out)
    if whole is None:
        with pytest.raises(OutputError, match=r"dvdq-export .* --resume"):
            load_manifest(out)
    else:
        assert whole in (seen(1), seen(2)), said
        assert load_manifest(out).family == ("v1" if whole == seen(1) else "v2"), said
    if resume:
        with ExportTransaction(out, key=KEY, resume=True) as transaction:
            assert transaction.complete, said
    else:
        export(out, 4, finish=False)  # any other export into the folder
    assert state(out) == seen(2), said
    assert names_in(out) == {*content(2), "manifest.json"}, said


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("way", "before"), WAYS)
def test_every_call_after_the_decision_failing(
    memory: Path, way: str, before: bool, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other one with one of two errors, by turns, and finished by one of two ways; all are under stress."""
    caplog.set_level(logging.CRITICAL)
    for at in range(lasting, 2000, 2):
        faults = Faults((errno.EMFILE, errno.EIO)[at // 2 % 2], at, lasting=lasting)
        _fault_after_the_decision(memory, way, before, faults, at // 4 % 2 == 0)
        if faults.failed is None:
            break
    else:
        pytest.fail("the calls never end")
    assert at > 20


@pytest.mark.stress
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize(("way", "before"), WAYS)
def test_every_call_after_the_decision_failing_with_every_error(
    memory: Path, way: str, before: bool, code: int, resume: bool, lasting: bool
) -> None:
    for at in range(2000):
        faults = Faults(code, at, lasting=lasting)
        _fault_after_the_decision(memory, way, before, faults, resume)
        if faults.failed is None:
            return
    pytest.fail("the calls never end")


@pytest.mark.parametrize(("way", "before"), WAYS)
def test_no_descriptor_left_after_the_decision(memory: Path, way: str, before: bool) -> None:
    """The kernel's own limit, from that moment on: every number of descriptors up to the one that is enough."""
    codes = []
    for spare in range(16):
        out = memory / str(spare) / "out"
        if before:
            first_export(memory, out)

        def work(out: Path = out, spare: int = spare) -> None:
            def limit() -> None:
                used = {int(name) for name in os.listdir("/proc/self/fd")}
                free = [number for number in range(256) if number not in used]
                resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], free[spare]))

            with pytest.MonkeyPatch.context() as patch:
                _after_the_decision(patch, way, limit)
                try:
                    export(out, 2, key=KEY)
                except DvdquantError as error:
                    assert "--resume completes it" in str(error)  # noqa: PT017
                    assert "ulimit" in str(error)  # noqa: PT017
                    os._exit(7)

        codes.append(in_child(work))
        assert codes[-1] in (0, 7), spare
        if state(out) is None:
            with pytest.raises(OutputError, match=r"dvdq-export .* --resume"):
                load_manifest(out)
        with ExportTransaction(out, key=KEY, resume=True) as transaction:
            assert transaction.complete
        assert state(out) == seen(2)
        assert names_in(out) == {*content(2), "manifest.json"}
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert way == "exchange" or codes[0] == 7


# ------------------------------------------------------------------------------------------------------- real failures


@pytest.mark.parametrize("way", ["exchange", "roll-forward"])
def test_a_lock_that_cannot_be_removed_after_the_commit(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The export is in place: a warning, no error."""
    out, real = tmp_path / "out", os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, **options)

    if way == "roll-forward":
        monkeypatch.setattr(dvdquant.artifact.commit, "exchange", no_exchange)
    export(out, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        export(out, 2)
    assert state(out) == seen(2)
    assert ".lock could not be removed (Read-only file system)" in caplog.text
    assert load_manifest(out).family == "v2"
    export(out, 3)
    assert names_in(out) == {*content(3), "manifest.json"}


def test_too_few_open_files(tmp_path: Path) -> None:
    """A real limit, at every number up to the one that is enough."""
    export(tmp_path / "out", 1)
    enough = None
    for spare in range(24):

        def work(spare: int = spare) -> None:
            used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))
            try:
                export(tmp_path / "out", 2)
            except DvdquantError as error:
                assert "Too many open files" in str(error)  # noqa: PT017
                assert "ulimit" in str(error)  # noqa: PT017
                os._exit(7)

        code = in_child(work)
        assert code in (0, 7), spare
        assert state(tmp_path / "out") == seen(1 if code else 2)
        if code == 0:
            enough = spare
            break
        # Removing its own folder takes a descriptor, too: what stays is swept by the run that comes through.
        kept = {name for name in names_in(tmp_path / "out") if not name.startswith(".tmp-")}
        assert kept == {*content(1), "manifest.json"}
    assert names_in(tmp_path / "out") == {*content(2), "manifest.json"}
    assert enough is not None


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE every 250 bytes: the kernel cuts every write there."""
    export(tmp_path / "out", 1)
    codes = []
    for size in range(0, 4000, 250):

        def work(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                export(tmp_path / "out", 2)
            except ResourceError:
                os._exit(7)

        codes.append(in_child(work))
        assert state(tmp_path / "out") == seen(1 if codes[-1] else 2)
        assert names_in(tmp_path / "out") == {*content(1 if codes[-1] else 2), "manifest.json"}
        if not codes[-1]:
            export(tmp_path / "out", 1)
    assert set(codes) == {0, 7}


def test_a_read_only_disk(tmp_path: Path) -> None:
    """Really mounted read-only: the export there can be read, and none written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    try:
        out = disk / "out"
        export(out, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OutputError, match="Read-only file system"):
            export(out, 2)
        assert load_manifest(out).family == "v1"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        export(out, 2)
        assert names_in(out) == {*content(2), "manifest.json"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


PERMISSIONS = ["out", "out/onnx", "out/engines", ".", "out/manifest.json", "out/.lock", "out/.tmp-0123456789abcdef"]


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o222, 0o444, 0o555])
@pytest.mark.parametrize("name", PERMISSIONS)
def test_folders_and_files_without_permission(name: str, mode: int) -> None:
    """As an ordinary user, whom the folder belongs to: the new export, or the old one and an error."""
    with memory_folder() as folder:
        os.chmod(folder, 0o777)

        def work() -> None:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            base = Path(folder) / "base"
            out = base / "out"
            export(out, 1)
            (out / ".lock").touch()
            (out / ".tmp-0123456789abcdef" / "tree").mkdir(parents=True)
            os.chmod(base / name, mode)
            try:
                export(out, 2, resume=True, key=KEY)
                expected = 2
            except OutputError as error:
                assert error.fix  # noqa: PT017
                expected = 1
            try:
                load_manifest(out)
            except OutputError as error:
                assert "Permission denied" in str(error)  # noqa: PT017
            if (base / name).exists() or mode != 0:
                os.chmod(base, 0o755)
                if os.path.lexists(base / name):
                    os.chmod(base / name, 0o755)
            os.chmod(base, 0o755)
            os.chmod(out, 0o755)
            assert state(out) == seen(expected)
            export(out, 3)
            assert state(out) == seen(3)

        assert in_child(work) == 0


# ---------------------------------------------------------------------------------------------------------- odd places


UNDECODABLE = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("below", ["", "/out", "/a/out"])
def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path: Path, below: str) -> None:
    with pytest.raises(OutputError, match=r"caf\\xe9.* not UTF-8"):
        export(Path(str(tmp_path / UNDECODABLE) + below), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [3600, 4090, 4096, 5000, 100_000])
def test_a_path_that_is_too_long_for_what_lies_below_it(tmp_path: Path, length: int) -> None:
    out = Path(str(tmp_path) + "/d" * ((length - len(str(tmp_path))) // 2))
    with pytest.raises(OutputError, match=f"{len(str(out))} bytes") as caught:
        export(out, 1)
    assert len(str(caught.value)) < 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [228, 229, 255])
def test_a_name_that_leaves_no_room_for_the_one_beside_it(tmp_path: Path, length: int) -> None:
    """The exchange needs a longer name; the other way does not."""
    out = tmp_path / ("n" * length)
    for version in (1, 2):
        export(out, version)
        assert state(out) == seen(version)
        assert names_in(out) == {*content(version), "manifest.json"}
    with pytest.raises(OutputError, match="File name too long"):
        export(tmp_path / ("n" * 256), 1)


def test_a_deleted_working_directory(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()

    def work() -> None:
        os.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        for out in ("out", ".", "a/b", ""):
            with pytest.raises(OutputError, match="working directory was deleted"):
                export(Path(out), 1)
        for version in (1, 2):
            export(tmp_path / "out", version)
            assert state(tmp_path / "out") == seen(version)

    assert in_child(work) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_output_folder_is_deleted_or_moved_while_the_export_runs(tmp_path: Path) -> None:
    for case in ("deleted", "moved", "replaced by a link"):
        out, other = tmp_path / case / "out", tmp_path / case / "other"
        export(out, 1)
        with pytest.raises(OutputError), ExportTransaction(out) as transaction:  # noqa: PT012
            transaction.path("x").write_text("x")
            out.rename(other)
            if case == "deleted":
                subprocess.run(["rm", "-r", str(other)], check=True)
            elif case == "replaced by a link":
                out.symlink_to(tmp_path / "elsewhere")
                (tmp_path / "elsewhere").mkdir()
            transaction.path("y").write_text("y")
            transaction.commit(manifest())
        if case != "deleted":
            assert state(other) == seen(1)
        if case == "replaced by a link":
            assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_lock_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OutputError, match="no file of dvdquant"):
        FolderLock(tmp_path)
    with Folder.open(tmp_path) as folder, pytest.raises(ValueError, match="a pipe"):
        folder.read(".lock", 10)
