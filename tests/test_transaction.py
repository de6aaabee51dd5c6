"""The output folder: all of the new export or nothing of it, under failures, kills, full disks and rivals."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dvdquant.commit as commit_module
from dvdquant.commit import recover
from dvdquant.errors import OutputError, ResourceError
from dvdquant.manifest import load_manifest, verify_files
from dvdquant.transaction import ExportTransaction, Journal, require_disk
from tests.helpers_checkpoint import content, export, hashes, in_child, manifest, names_in, state

KEY = {"fingerprint": "f" * 64, "recipe": {"name": "w4a4", "weight": {"group_size": 32}}, "sm": ["8.9"]}


def seen(version: int) -> dict[str, str]:
    return hashes(content(version))


@pytest.fixture(params=["exchange", "roll-forward"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting an export in place; the second as on a file system without renameat2."""
    if request.param == "roll-forward":

        def refuse(a: Path, b: Path) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(commit_module, "exchange", refuse)
    return str(request.param)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of exports in a row spend their time in fsync."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


# ---------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.usefixtures("way")
def test_first_export_and_three_replacements(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    for version in range(1, 5):
        export(out, version, key=KEY)
        assert state(out) == seen(version)
        assert names_in(out) == {*content(version), "manifest.json"}  # nothing of the one before, no bookkeeping
        verify_files(out, load_manifest(out))
        assert load_manifest(out).family == f"v{version}"
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.rglob("*") if path.is_file())
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.usefixtures("way")
def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, 1)
    (out / "notes.txt").write_text("mine")
    (out / "engines" / "rtx-8.9" / "log").write_text("mine too")
    (out / "empty" / "folder").mkdir(parents=True)
    (out / "link").symlink_to("/nowhere")
    (out / "onnx" / "deep").symlink_to(tmp_path)
    export(out, 2)
    assert state(out) == seen(2)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "engines/rtx-8.9/log").read_text() == "mine too"
    assert (out / "empty" / "folder").is_dir()
    assert os.readlink(out / "link") == "/nowhere"
    assert os.readlink(out / "onnx" / "deep") == str(tmp_path)


def test_the_exchange_is_really_used_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(out, 1)
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    export(out, 2)
    assert out.stat().st_ino == inode  # whoever works inside OUT keeps the folder
    monkeypatch.chdir(tmp_path)
    export(out, 3)
    assert out.stat().st_ino != inode
    assert state(out) == seen(3)


def test_a_link_to_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    for version in (1, 2):
        export(tmp_path / "out", version)
        assert (tmp_path / "out").is_symlink()
        assert state(tmp_path / "real") == seen(version)


def test_hashes_already_at_hand_are_used_and_recomputed_when_the_size_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ExportTransaction(out) as transaction:
        for name in ("a", "b"):
            transaction.path(name).write_bytes(b"12345")
        known = {"a": {"sha256": "1" * 64, "bytes": 5}, "b": {"sha256": "1" * 64, "bytes": 4}}
        final = transaction.commit(manifest(), known)  # type: ignore[arg-type]
    assert final.files["a"]["sha256"] == "1" * 64
    assert final.files["b"] == {"sha256": hashes({"b": b"12345"})["b"], "bytes": 5}
    assert final == load_manifest(out)


# -------------------------------------------------------------------------------------------------------- refused OUTs


def _refusals(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "file").write_text("x")
    for name, entry in (("foreign", "photo.jpg"), ("hidden", ".git"), ("broken", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / entry).write_text("{}")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "manifest.json").write_text('{"format_version": 7, "dvdquant_version": "3.1"}')
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "manifest.json")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").symlink_to(tmp_path / "file")
    return {
        "file": (tmp_path / "file", "not a folder"),
        "below a file": (tmp_path / "file" / "out", "not a folder"),
        "foreign": (tmp_path / "foreign", "photo.jpg"),
        "hidden": (tmp_path / "hidden", ".git"),
        "broken": (tmp_path / "broken", "not a valid one of dvdquant"),
        "newer": (tmp_path / "newer", "format 7 is newer"),
        "piped": (tmp_path / "piped", "not a regular file"),
        "locked": (tmp_path / "locked", "cannot write"),
        "nul": (Path("a\0b"), "no usable path"),
        "too long": (tmp_path / ("n" * 300), "cannot write"),
        "no file system": (Path("/proc/none/out"), "cannot write"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "file",
        "below a file",
        "foreign",
        "hidden",
        "broken",
        "newer",
        "piped",
        "locked",
        "nul",
        "too long",
        "no file system",
    ],
)
def test_refuses_what_is_not_its_own_and_changes_nothing(tmp_path: Path, case: str) -> None:
    out, words = _refusals(tmp_path)[case]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        export(out, 1)
    assert words in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "x"


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def _as_ordinary_user(work: Callable[[], None]) -> int:
    """root may write everywhere, so give that up in the child."""

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        work()

    return in_child(unprivileged)


def test_an_unwritable_parent(public: Path) -> None:
    (public / "closed").mkdir(mode=0o555)

    def work() -> None:
        with pytest.raises(OutputError, match=r"cannot write .*/closed/a: Permission denied"):
            export(public / "closed" / "a" / "out", 1)

    assert _as_ordinary_user(work) == 0
    assert list((public / "closed").iterdir()) == []


def test_a_read_only_parent_still_allows_replacing(public: Path) -> None:
    out = public / "parent" / "out"
    export(out, 1)
    for path in (out, *out.rglob("*")):
        os.chmod(path, 0o777)
    os.chmod(out.parent, 0o555)
    inode = out.stat().st_ino
    assert _as_ordinary_user(lambda: export(out, 2)) == 0
    assert state(out) == seen(2)
    assert out.stat().st_ino == inode


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(2), OutputError("y")])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException, before: bool) -> None:
    out = tmp_path / "new" / "out"
    if before:
        export(out, 1)

    def fail() -> None:
        with ExportTransaction(out) as transaction:
            transaction.path("onnx/half.onnx").write_bytes(b"half")
            transaction.done("layer")
            raise error

    with pytest.raises(type(error)):
        fail()
    if before:
        assert state(out) == seen(1)
        assert names_in(out) == {*content(1), "manifest.json"}
    else:
        assert list(tmp_path.iterdir()) == []  # the parents that were made are gone as well


def test_leaving_without_a_commit_is_no_export(tmp_path: Path) -> None:
    export(tmp_path / "out", 1, finish=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", 1, finish=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_manifest_or_tree_keeps_the_old_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, 1)

    def commit(prepare: Callable[[ExportTransaction], None], **changes: Any) -> None:
        with ExportTransaction(out) as transaction:
            prepare(transaction)
            transaction.commit(manifest(**changes))

    with pytest.raises(OutputError, match="config_sha256"):
        commit(lambda t: None, config_sha256="no")
    with pytest.raises(OutputError, match="not a regular file"):
        commit(lambda t: t.path("x").symlink_to("/etc/passwd"))
    with pytest.raises(OutputError, match="no path of a file"):
        commit(lambda t: t.path("../x").write_bytes(b""))  # type: ignore[arg-type, return-value]
    (out / "report.html").mkdir()
    with pytest.raises(OutputError, match="in its way"):
        commit(lambda t: t.path("report.html").write_bytes(b""))  # type: ignore[arg-type, return-value]
    (out / "report.html").rmdir()
    assert state(out) == seen(1)
    assert names_in(out) == {*content(1), "manifest.json"}


def test_a_full_disk_in_the_work_is_a_resource_error(tmp_path: Path) -> None:
    export(tmp_path / "out", 1)
    transaction = ExportTransaction(tmp_path / "out")
    with pytest.raises(ResourceError, match="no room left"), transaction:
        raise OSError(errno.ENOSPC, "No space left on device", str(transaction.path("onnx/transformer_a4.onnx")))
    assert state(tmp_path / "out") == seen(1)


@pytest.mark.usefixtures("way")
def test_every_file_operation_of_a_replacement_failing(memory: Path) -> None:
    """An audit hook makes the n-th file operation fail for want of space, for every n until one run gets through."""

    def attempt(out: Path, fail_at: int) -> Callable[[], None]:
        def work() -> None:
            _at_operation(fail_at, _no_space, out)
            export(out, 2)

        return work

    clean = 0
    for fail_at in range(500):
        out = memory / str(fail_at) / "out"
        export(out, 1)
        status = in_child(attempt(out, fail_at))
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
        for left in range(0, 200_000, 20_000):
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
        with pytest.raises(ResourceError, match=r"weights needs 0\.00 GB, 0\.00 GB are free"):
            require_disk(disk / "not" / "yet", 2 << 20, "weights")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_require_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "out", 1000, "the weights")
    with pytest.raises(ResourceError) as caught:
        require_disk(tmp_path / "out" / "deep", 10**18, "the weights")
    assert "the weights needs 1000000000.00 GB" in caught.value.what
    assert str(tmp_path) in caught.value.what


# --------------------------------------------------------------------------------------------------------------- kills


def _at_operation(count: int, action: Callable[[], None], out: Path) -> None:
    """From now on, run ``action`` before the ``count``-th operation on a file below or beside ``out`` (in a child)."""
    names = {
        "open",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.truncate",
        "os.chmod",
        "fcntl.flock",
    }
    left = count

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "ctypes.dlsym" or (event in names and str(out.parent) in str(args[0])):
            left -= 1
            if left == -1:
                action()

    sys.addaudithook(hook)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("first", [True, False])
def test_killed_before_every_single_operation(memory: Path, way: str, first: bool) -> None:
    """SIGKILL before the n-th file operation of an export, for every n: the old export or the new one, no third.

    With the exchange, by the bytes on disk alone; rolling forward, no manifest ever stands beside files of another
    export, and the first reader completes what was decided.
    """

    def attempt(out: Path, kill_at: int) -> Callable[[], None]:
        def work() -> None:
            _at_operation(kill_at, _kill, out)
            export(out, 2)

        return work

    outcomes = set()
    for kill_at in range(500):
        out = memory / str(kill_at) / "out"
        out.parent.mkdir()
        if not first:
            export(out, 1)
        status = in_child(attempt(out, kill_at))
        raw = state(out)
        if raw is None and (out / ".commit").exists():
            assert first or way == "roll-forward"
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


LOOP = """
import sys
from pathlib import Path
from tests.helpers_checkpoint import export
out, version = Path(sys.argv[1]), 1
while True:
    print(version, flush=True)
    export(out, version)
    version += 1
"""


def _random_kills(tmp_path: Path, kills: int) -> None:
    """A process that exports version after version, killed at a random time, again and again in the same folder."""
    root, out, rng = Path(__file__).parents[1], tmp_path / "out", random.Random(2)
    versions = {json.dumps(seen(version), sort_keys=True): version for version in range(1, 5000)}
    before: dict[str, str] | None = None
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", LOOP, out], cwd=root, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        begun = 1 + len(process.stdout.read().split())
        process.wait()
        raw = state(out)
        if raw is None and (out / ".commit").exists():
            raw = hashes({}) if not out.exists() else {n: e["sha256"] for n, e in load_manifest(out).files.items()}
            assert state(out) == raw
        assert raw == before or (raw is not None and versions[json.dumps(raw, sort_keys=True)] <= begun)
        before = raw
    export(out, 1)
    assert state(out) == seen(1)
    assert names_in(out) == {*content(1), "manifest.json"}


@pytest.mark.slow
def test_300_random_kills(memory: Path) -> None:
    _random_kills(memory, 300)


def test_20_random_kills(memory: Path) -> None:
    _random_kills(memory, 20)


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
        with pytest.raises(OutputError, match="cannot be completed"):
            load_manifest(out)
        assert (victim / "file").read_text() == "keep"


def test_a_stage_that_is_a_link_is_unlinked_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("keep")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".tmp-{'0' * 16}").symlink_to(tmp_path / "victim")
    export(tmp_path / "out", 1)
    assert (tmp_path / "victim" / "file").read_text() == "keep"
    assert names_in(tmp_path / "out") == {*content(1), "manifest.json"}


# -------------------------------------------------------------------------------------------------------------- rivals


def test_the_second_export_says_who_is_first(tmp_path: Path) -> None:
    with ExportTransaction(tmp_path / "out"):
        with pytest.raises(OutputError, match=f"being written by another export .*pid {os.getpid()}"):
            export(tmp_path / "out", 1)
        with pytest.raises(OutputError, match="being written"):
            recover(tmp_path / "out")


def test_races_of_8_processes(memory: Path) -> None:
    """Every process either exports or says that another one does; what is left is one whole export."""
    wins = losses = 0
    for race in range(12):
        out, gate = memory / f"race{race}" / "out", os.pipe()
        out.parent.mkdir()
        if race % 2:
            export(out, 1)
        children = {}
        for rival in range(8):
            pid = os.fork()
            if pid == 0:
                code = 9
                try:
                    os.close(gate[1])
                    os.read(gate[0], 1)  # all start together, when the parent closes the gate
                    export(out, 2 + rival)
                    code = 0
                except OutputError as error:
                    code = 5 if "is being written by another export" in error.what else 8
                finally:
                    os._exit(code)
            children[pid] = rival
        os.close(gate[0])
        os.close(gate[1])
        codes = {children[pid]: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
        assert set(codes.values()) <= {0, 5}, codes
        winners = [2 + rival for rival, code in codes.items() if code == 0]
        assert winners
        assert state(out) in [seen(version) for version in winners]
        assert "manifest.json" in names_in(out)
        assert not any(name.startswith(".") for name in names_in(out))
        wins, losses = wins + len(winners), losses + 8 - len(winners)
    assert losses > 0
    assert wins >= 12


# -------------------------------------------------------------------------------------------------------------- resume


def _interrupted(out: Path, steps: int, *, key: Any = KEY, killed: bool = True) -> None:
    def work() -> None:
        with ExportTransaction(out, key=key, keep_for_resume=True) as transaction:
            _work(transaction, steps)
            if killed:
                _kill()
            raise ValueError("broken")

    assert in_child(work) != 0


def _work(transaction: ExportTransaction, steps: int) -> list[int]:
    """Six steps of 100 bytes of one growing file, each noted in the journal; returns those that ran now."""
    ran, path = [], transaction.path("weights.safetensors", resumable=True)
    path.touch()
    for step in range(steps):
        if transaction.is_done(f"layer{step}"):
            assert transaction.data(f"layer{step}") == {"error": step / 7}
            continue
        with path.open("r+b") as file:
            file.seek(100 * step)
            file.write(bytes([step]) * 100)
        transaction.done(f"layer{step}", {"error": step / 7}, files=["weights.safetensors"])
        ran.append(step)
    transaction.path("half.onnx").write_bytes(b"half")  # neither resumable nor part of a finished step
    return ran


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_resume_goes_on_and_gives_the_same_bytes(tmp_path: Path, steps: int, killed: bool) -> None:
    with ExportTransaction(tmp_path / "whole", key=KEY) as transaction:
        _work(transaction, 6)
        (transaction.tree / "half.onnx").unlink()
        transaction.commit(manifest(created="2026-01-01T00:00:00+00:00"))
    out = tmp_path / "out"
    _interrupted(out, steps, killed=killed)
    assert state(out) is None
    with ExportTransaction(out, key=KEY, resume=True) as transaction:
        assert transaction.resumed
        assert not (transaction.tree / "half.onnx").exists()
        assert _work(transaction, 6) == list(range(steps, 6))
        (transaction.tree / "half.onnx").unlink()
        transaction.commit(manifest(created="2026-01-01T00:00:00+00:00"))
    assert names_in(out) == {"weights.safetensors", "manifest.json"}
    for name in names_in(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resumed_work_is_kept_when_the_resuming_run_fails_early(tmp_path: Path) -> None:
    _interrupted(tmp_path / "out", 3)
    with pytest.raises(ValueError, match="early"), ExportTransaction(tmp_path / "out", key=KEY, resume=True) as first:
        raise ValueError("early")
    assert first.kept is not None
    with ExportTransaction(tmp_path / "out", key=KEY, resume=True) as second:
        assert list(second.steps) == ["layer0", "layer1", "layer2"]


def test_resume_after_a_kill_at_every_operation(memory: Path) -> None:
    def attempt(out: Path, kill_at: int) -> Callable[[], None]:
        def work() -> None:
            _at_operation(kill_at, _kill, out)
            with ExportTransaction(out, key=KEY) as transaction:
                _work(transaction, 3)
                transaction.commit(manifest())

        return work

    for kill_at in range(500):
        out = memory / str(kill_at) / "out"
        out.parent.mkdir()
        status = in_child(attempt(out, kill_at))
        with ExportTransaction(out, key=KEY, resume=True) as transaction:
            if not transaction.complete:
                _work(transaction, 3)
                transaction.commit(manifest())
        assert (out / "weights.safetensors").read_bytes() == b"".join(bytes([step]) * 100 for step in range(3))
        assert names_in(out) == {"weights.safetensors", "half.onnx", "manifest.json"}
        verify_files(out, load_manifest(out))
        if status == 0:
            assert kill_at > 25
            return
    pytest.fail("the operations never end")


def test_resume_of_other_options_says_what_differs_and_keeps_the_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupted(out, 2)
    other = {**KEY, "recipe": {"name": "w4a4", "weight": {"group_size": 64}}, "sm": ["8.9", "12.0"]}
    with pytest.raises(OutputError) as caught, ExportTransaction(out, key=other, resume=True):
        pytest.fail("entered")
    assert "recipe.weight.group_size: 32 before, 64 now" in str(caught.value)
    assert "sm: ['8.9'] before, ['8.9', '12.0'] now" in str(caught.value)
    with ExportTransaction(out, key=KEY, resume=True) as transaction:
        assert list(transaction.steps) == ["layer0", "layer1"]


def test_without_resume_the_orphans_are_swept(tmp_path: Path) -> None:
    _interrupted(tmp_path / "out", 2)
    with ExportTransaction(tmp_path / "out", key=KEY) as transaction:
        assert not transaction.steps
        assert len(list((tmp_path / "out").glob(".tmp-*"))) == 1


def test_resume_with_nothing_to_resume_and_of_a_complete_export(tmp_path: Path) -> None:
    with ExportTransaction(tmp_path / "out", key=KEY, resume=True) as transaction:
        assert not transaction.resumed
        assert not transaction.complete
        transaction.path("x").write_bytes(b"1")
        transaction.commit(manifest())
    with ExportTransaction(tmp_path / "out", key=KEY, resume=True) as transaction:
        assert transaction.complete
        assert transaction.previous == load_manifest(tmp_path / "out")
    with ExportTransaction(tmp_path / "out", key={**KEY, "sm": []}, resume=True) as transaction:
        assert not transaction.complete
    assert (tmp_path / "out" / "x").read_bytes() == b"1"


def test_a_journal_torn_at_every_byte(memory: Path) -> None:
    whole = memory / "whole"
    journal = Journal(whole)
    for step in range(5):
        journal.add(f"step{step}", {"n": step}, [f"file{step}"])
    journal.close()
    raw = whole.read_bytes()
    for cut in range(len(raw) + 1):
        for tail in (b"", b"\x00\xff garbage", b'{"step":"evil","data":0,"files":["../../x"]}\n'):
            (memory / "torn").write_bytes(raw[:cut] + tail)
            torn = Journal(memory / "torn")
            complete = raw[:cut].count(b"\n")
            assert list(torn.done) == [f"step{step}" for step in range(complete)]
            assert torn.files == {f"file{step}" for step in range(complete)}
            torn.add("next", None, [])
            torn.close()
            again = Journal(memory / "torn")
            assert list(again.done)[complete:] == ["next"]
            again.close()
