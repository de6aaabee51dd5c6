"""An output folder from a stranger: readers change nothing, and an export into it touches nothing outside."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dvdquant.artifact.commit
from dvdquant.artifact.commit import recover
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.lock import FolderLock
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.errors import DvdquantError, OutputError
from tests.support.children import in_child
from tests.support.costs import Costs
from tests.support.folders import memory_folder
from tests.support.interrupted_exports import no_exchange
from tests.support.written_exports import KEY, content, export, hashes, manifest, names_in, state, state_of

STAGE = ".tmp-" + "0" * 16
SIBLING = ".out.dvdquant-" + "0" * 16


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What must not change: a folder with a private one in it, and a program."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("secret")
    (home / "program").write_text("run me")
    os.chmod(home / "program", 0o751)
    return home


def listing(*names: str) -> Manifest:
    return manifest(files={name: {"sha256": "0" * 64, "bytes": 6} for name in names})


def prepared(out: Path, *names: str, record: Any = None) -> Path:
    """``out`` as a stranger prepares it: decided, and nothing but the manifest in its tree yet; returns the tree."""
    tree = out / STAGE / "tree"
    tree.mkdir(parents=True)
    (tree / "manifest.json").write_text(listing(*names).to_json())
    record = {"stage": STAGE, "install": list(names), "remove": []} if record is None else record
    (out / ".commit").write_text(json.dumps(record))
    return tree


def inspected(out: Path) -> str:
    result = CliRunner().invoke(inspect_main, [str(out)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    return result.output


# ------------------------------------------------------------------------------------------------------------- readers


def test_a_reader_moves_nothing_into_an_unfinished_export(tmp_path: Path, home: Path) -> None:
    """A link inside the prepared tree, and a record that installs what lies behind it."""
    out = tmp_path / "out"
    (prepared(out, "onnx/.ssh") / "onnx").symlink_to(home)
    before = state_of(tmp_path)
    for read in (load_manifest, _open_artifact, inspected):
        try:
            said = str(read(out))
        except OutputError as error:
            said = str(error)
        assert "interrupted while it was put in place" in said
        assert f"dvdq-export MODEL -o {out} ... --resume" in said
        assert state_of(tmp_path) == before


def _open_artifact(out: Path) -> Any:
    from dvdquant.deploy.artifact import Artifact

    return Artifact.open(out)


def test_a_reader_completes_no_export_of_its_own_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a sound one: it may have no right to write, and the exporter may be at it."""
    out = _half_installed(tmp_path / "out", monkeypatch)
    before = state_of(tmp_path)
    with pytest.raises(OutputError, match="interrupted while it was put in place"):
        load_manifest(out)
    assert state_of(tmp_path) == before
    lock = FolderLock(out)
    before = state_of(tmp_path)
    with pytest.raises(OutputError, match="still running"):
        load_manifest(out)
    assert state_of(tmp_path) == before
    lock.release()
    export(out, 3, finish=False)  # any other export completes it first
    assert state(out) == hashes(content(2))


def _half_installed(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Killed after the first file of the new export was put in place of the old one's."""
    export(out, 1)

    def work() -> None:
        real, left = Folder.rename, [3]

        def rename(folder: Folder, name: str, target: Folder, new: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                os._exit(0)
            real(folder, name, target, new)

        dvdquant.artifact.commit.exchange = no_exchange
        Folder.rename = rename  # type: ignore[method-assign]
        export(out, 2)

    assert in_child(work) == 0
    assert (out / ".commit").exists()
    assert not (out / "manifest.json").exists()
    return out


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "link to a pipe"])
@pytest.mark.parametrize("name", ["manifest.json", ".commit", ".lock", STAGE])
def test_a_reader_neither_follows_nor_waits(tmp_path: Path, home: Path, name: str, kind: str) -> None:
    out = tmp_path / "out"
    (out / STAGE).mkdir(parents=True)
    if name == STAGE:
        (out / STAGE).rmdir()
    _put(out / name, kind, home)
    before = state_of(tmp_path)
    with pytest.raises(OutputError):
        load_manifest(out)
    inspected(out)
    assert state_of(tmp_path) == before


def _put(place: Path, kind: str, home: Path) -> None:
    if kind == "link":
        place.symlink_to(home / "program")
    elif kind == "link to a folder":
        place.symlink_to(home)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "link to a pipe":
        os.mkfifo(home.parent / f"pipe-{place.name}")
        place.symlink_to(home.parent / f"pipe-{place.name}")
    elif kind == "folder":
        (place / "inside").mkdir(parents=True)
    elif kind == "hard link":
        os.link(home / "program", place)
    else:
        place.write_bytes(b"\0 garbage" if kind == "garbage" else b"")


def test_a_reader_in_the_way_of_an_export_that_begins(tmp_path: Path) -> None:
    """The lock a reader takes for an instant, to see whether anybody holds it, makes no export fail."""
    (tmp_path / "out" / STAGE).mkdir(parents=True)
    (tmp_path / "out" / ".lock").touch()
    stop, reading = os.pipe(), 0
    reading = os.fork()
    if reading == 0:
        os.close(stop[1])
        os.set_blocking(stop[0], False)
        while True:
            try:
                os.read(stop[0], 1)
                os._exit(0)
            except BlockingIOError:
                for _ in range(20):
                    try:
                        load_manifest(tmp_path / "out")
                    except OutputError:
                        continue
    try:
        for _ in range(300):
            FolderLock(tmp_path / "out").release()
    finally:
        os.close(stop[1])
        os.waitpid(reading, 0)


# ------------------------------------------------------------------------------------------------------------ exporter


ATTACKS: dict[str, Callable[[Path, Path], Any]] = {
    "link in the tree": lambda out, home: (prepared(out, "onnx/.ssh") / "onnx").symlink_to(home),
    "link in the tree to a file": lambda out, home: (prepared(out, "x") / "x").symlink_to(home / "program"),
    "link deeper in the tree": lambda out, home: (
        (prepared(out, "a/b/.ssh") / "a").mkdir(),
        (out / STAGE / "tree" / "a" / "b").symlink_to(home),
    ),
    "link in the folder": lambda out, home: (
        (prepared(out, "onnx/program") / "onnx").mkdir(),
        (out / STAGE / "tree" / "onnx" / "program").write_text("evil"),
        (out / "onnx").symlink_to(home),
    ),
    "link in the folder, to delete": lambda out, home: (
        prepared(out, record={"stage": STAGE, "install": [], "remove": ["onnx/program"]}),
        (out / "onnx").symlink_to(home),
    ),
    "link for the tree": lambda out, home: (
        shutil.rmtree(prepared(out, "program")),
        (home / "manifest.json").write_text(listing("program").to_json()),
        (out / STAGE / "tree").symlink_to(home),
    ),
    "link for the stage": lambda out, home: (
        shutil.rmtree(prepared(out, "program").parent),
        (home / "tree").mkdir(),
        (home / "tree" / "program").write_text("mine"),
        (home / "tree" / "manifest.json").write_text(listing("program").to_json()),
        (out / STAGE).symlink_to(home),
    ),
    "link for the manifest of the tree": lambda out, home: (
        (prepared(out) / "manifest.json").unlink(),
        (home / "m.json").write_text(listing().to_json()),
        (out / STAGE / "tree" / "manifest.json").symlink_to(home / "m.json"),
    ),
    "link for the record": lambda out, home: (
        prepared(out),
        (home / "record").write_bytes((out / ".commit").read_bytes()),
        (out / ".commit").unlink(),
        (out / ".commit").symlink_to(home / "record"),
    ),
    "parent of a path": lambda out, home: prepared(
        out, record={"stage": STAGE, "install": ["../home/program"], "remove": []}
    ),
    "absolute path": lambda out, home: prepared(
        out, record={"stage": STAGE, "install": [], "remove": [str(home / "program")]}
    ),
    "stage elsewhere": lambda out, home: prepared(out, record={"stage": "../home", "install": [], "remove": []}),
    "stage is a link, to be swept": lambda out, home: (out.mkdir(), (out / STAGE).symlink_to(home)),
    "tree is a link, to be swept": lambda out, home: (
        (out / STAGE).mkdir(parents=True),
        (out / STAGE / "tree").symlink_to(home),
        (out / STAGE / "owner.json").symlink_to(home / "program"),
        os.link(home / "program", out / STAGE / "journal.jsonl"),
    ),
    "sibling to be put back, through a link": lambda out, home: (
        (out.parent / SIBLING).mkdir(parents=True),
        (out.parent / SIBLING / "program").write_text("evil"),
        out.mkdir(),
        (out / STAGE).symlink_to(home),
    ),
    "sibling is a link": lambda out, home: (
        out.mkdir(parents=True),
        (home / "manifest.json").write_text(listing("program").to_json()),
        (out.parent / SIBLING).symlink_to(home),
    ),
    "sibling whose manifest is a link": lambda out, home: (
        out.mkdir(parents=True),
        (out.parent / SIBLING).mkdir(),
        (home / "m.json").write_text(listing("program").to_json()),
        (out.parent / SIBLING / "manifest.json").symlink_to(home / "m.json"),
    ),
    "sibling with links to carry": lambda out, home: (
        export(out, 1),
        (out.parent / SIBLING).mkdir(),
        (out.parent / SIBLING / "manifest.json").write_text(listing().to_json()),
        (out.parent / SIBLING / "mine").symlink_to(home),
        (out / "onnx" / "links").symlink_to(home),
        (out.parent / SIBLING / "onnx").mkdir(),
        (out.parent / SIBLING / "onnx" / "links").mkdir(),
        (out.parent / SIBLING / "onnx" / "links" / "program2").write_text("evil"),
    ),
    "the export's folders are links": lambda out, home: (
        export(out, 1),
        shutil.move(out / "onnx", home / "onnx"),
        (out / "onnx").symlink_to(home / "onnx"),
    ),
    "lock is a link": lambda out, home: (out.mkdir(), (out / ".lock").symlink_to(home / "program")),
    "lock is a link to nothing": lambda out, home: (out.mkdir(), (out / ".lock").symlink_to(home / "new")),
    "lock is a second name": lambda out, home: (out.mkdir(), os.link(home / "program", out / ".lock")),
    "lock is a pipe": lambda out, home: (out.mkdir(), os.mkfifo(out / ".lock")),
    "lock is a folder": lambda out, home: (out / ".lock").mkdir(parents=True),
    "manifest is a link": lambda out, home: (
        out.mkdir(),
        (home / "m.json").write_text(listing().to_json()),
        (out / "manifest.json").symlink_to(home / "m.json"),
    ),
    "manifest is a pipe": lambda out, home: (out.mkdir(), os.mkfifo(out / "manifest.json")),
    "record is a pipe": lambda out, home: (prepared(out), (out / ".commit").unlink(), os.mkfifo(out / ".commit")),
    "record is a folder": lambda out, home: (prepared(out), (out / ".commit").unlink(), (out / ".commit").mkdir()),
    "record is large": lambda out, home: (prepared(out), os.truncate(out / ".commit", 1 << 40)),
    "a folder in the way": lambda out, home: (
        (prepared(out, "x") / "x").write_text("new"),
        (out / "x").mkdir(),
    ),
}


def outside(tmp_path: Path) -> dict[str, tuple[Any, ...]]:
    """All but the output folder and what is beside it by the exporter's own names; the count of a file's names too."""
    found = state_of(tmp_path / "home")
    links = {name: (tmp_path / "home" / name).lstat().st_nlink for name in found if name != "."}
    return found | {"names": tuple(sorted(p.name for p in tmp_path.iterdir() if "out" not in p.name))} | {
        # Another name of a file may go; none may come, and the folders have none.
        f"{name} links": (count,) for name, count in links.items() if stat.S_ISDIR(found[name][1])
    }  # fmt: skip


def _error_of(work: Callable[[], Any]) -> DvdquantError | None:
    try:
        work()
    except DvdquantError as error:
        return error
    return None


@pytest.mark.parametrize("way", ["exchange", "roll-forward"])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_export_touches_nothing_outside(
    tmp_path: Path, home: Path, attack: str, resume: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made, or refused in words; either way all files elsewhere keep their places, bytes, modes and times."""
    if way == "roll-forward":
        monkeypatch.setattr(dvdquant.artifact.commit, "exchange", no_exchange)
    out = tmp_path / "out"
    ATTACKS[attack](out, home)
    before = outside(tmp_path)
    for _ in range(2):
        refusal = _error_of(lambda: export(out, 1, key=KEY, resume=resume))
        assert refusal is None or refusal.fix
        assert outside(tmp_path) == before


def test_a_lock_that_is_a_second_name_is_taken_out_of_the_way(tmp_path: Path, home: Path) -> None:
    (tmp_path / "out").mkdir()
    os.link(home / "program", tmp_path / "out" / ".lock")
    export(tmp_path / "out", 1)
    assert (home / "program").read_text() == "run me"
    assert names_in(tmp_path / "out") == {*content(1), "manifest.json"}


def test_a_link_that_comes_while_files_are_installed(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the record was compared with the trees, their folder becomes a link, before each of the steps that follow."""
    refused = 0
    for which in ("tree", "out"):
        for at in range(8):
            out = tmp_path / f"{which}{at}" / "out"
            tree = prepared(out, "onnx/a", "onnx/deep/.ssh", "onnx/deep/b")
            (tree / "onnx" / "deep").mkdir(parents=True)
            for name in ("a", "deep/.ssh", "deep/b"):
                (tree / "onnx" / name).write_text("evil")
            place = (tree if which == "tree" else out) / "onnx"
            before = state_of(home)
            with monkeypatch.context() as patch:
                _swap_folder(patch, Folder.reach, COMPARISONS + at, place, home)
                refusal = _error_of(lambda out=out: recover(out))  # type: ignore[misc]
            assert state_of(home) == before
            assert place.is_symlink() or not place.parent.exists()
            if refusal is not None:
                assert "cannot write" in refusal.what
                refused += 1
    assert refused > 8


COMPARISONS = 6  # folders opened before anything is changed: two for every file


def _swap_folder(patch: pytest.MonkeyPatch, real: Any, after: int, place: Path, home: Path) -> None:
    left = [after]

    def reach(folder: Folder, parts: list[str], *, make: bool = False) -> Folder:
        left[0] -= 1
        if left[0] < 0 and not place.is_symlink():
            if place.exists():
                place.rename(place.with_name("away"))
            place.symlink_to(home)
        result: Folder = real(folder, parts, make=make)
        return result

    patch.setattr(Folder, "reach", reach)


def test_resumed_work_has_files_of_its_own_only(tmp_path: Path, home: Path) -> None:
    """What a journal claims is written to: not where it is a link, a second name, a pipe or in a folder that is a link."""
    out = tmp_path / "out"
    with ExportTransaction(out, key=KEY, keep_for_resume=True) as transaction:
        for name in ("good", "link", "second", "pipe", "onnx/.ssh/id", "onnx/x"):
            transaction.path(name).write_text("work")
        transaction.done("step", {}, ["good", "link", "second", "pipe", "onnx/.ssh/id", "onnx/x"])
    assert transaction.kept is not None
    tree = transaction.kept / "tree"
    for name in ("link", "second", "pipe"):
        (tree / name).unlink()
    (tree / "link").symlink_to(home / "program")
    os.link(home / "program", tree / "second")
    os.mkfifo(tree / "pipe")
    shutil.rmtree(tree / "onnx")
    (tree / "onnx").symlink_to(home)
    (transaction.kept / "transformer.hessian.safetensors").symlink_to(home / "program")
    before = state_of(home)
    with ExportTransaction(out, key=KEY, resume=True) as resumed:
        assert resumed.resumed
        assert names_in(resumed.tree) == {"good"}
        assert not (resumed.tree.parent / "transformer.hessian.safetensors").is_symlink()
        resumed.path("onnx/x").write_text("new")
        resumed.commit(manifest())
    assert state_of(home) == before
    assert names_in(out) == {"good", "onnx/x", "manifest.json"}


def test_work_that_is_no_work_is_not_resumed(tmp_path: Path, home: Path) -> None:
    for index, kind in enumerate(("link", "link to a folder", "pipe", "folder", "hard link", "garbage", "empty")):
        for name in ("journal.jsonl", "owner.json", "tree"):
            out = tmp_path / f"out{index}-{name}"
            with ExportTransaction(out, key=KEY, keep_for_resume=True) as transaction:
                transaction.done("step")
            assert transaction.kept is not None
            place = transaction.kept / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            _put(place, kind, home)
            before = state_of(home)
            with ExportTransaction(out, key=KEY, resume=True) as resumed:
                resumed.path("x").write_text("new")
                resumed.done("other", {}, ["x"])
                resumed.keep_for_resume = False
            assert state_of(home) == before
            assert not out.exists() or not list(out.iterdir())


def test_another_users_work_and_folders_are_left_alone(tmp_path: Path, home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files to another user needs root")
    out = tmp_path / "out"
    with ExportTransaction(out, key=KEY, keep_for_resume=True) as transaction:
        transaction.done("step")
    (tmp_path / SIBLING).mkdir()
    (tmp_path / SIBLING / "manifest.json").write_text(listing().to_json())
    for path in (transaction.kept, tmp_path / SIBLING):
        assert path is not None
        os.chown(path, 65534, 65534)
    with ExportTransaction(out, key=KEY, resume=True) as resumed:
        assert not resumed.resumed
        assert (tmp_path / SIBLING).is_dir()


def test_deleting_goes_as_deep_as_it_must(tmp_path: Path, home: Path) -> None:
    """Deeper than Python's calls and the open files of a process, with links at the bottom."""
    out = tmp_path / "out"
    (out / STAGE).mkdir(parents=True)
    fd = os.open(out / STAGE, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.symlink(home, "link", dir_fd=fd)
    os.close(fd)
    before = state_of(home)
    export(out, 1)
    assert names_in(out) == {*content(1), "manifest.json"}
    assert state_of(home) == before


# -------------------------------------------------------------------------------------------------------------- fuzzer


NAMES = ["onnx", "engines", "x", "a", "manifest.json", ".ssh", "program", "id", "weights.safetensors", "config.json"]
TOPS = [".lock", ".commit", STAGE, ".tmp-" + "1" * 16, "lost+found", *NAMES]


def _tree(rng: random.Random, place: Path, home: Path, depth: int, names: list[str]) -> None:
    for name in rng.sample(names, rng.randint(0, min(4, len(names)))):
        _thing(rng, place / name, home, depth)


def _thing(rng: random.Random, place: Path, home: Path, depth: int) -> None:
    if os.path.lexists(place):
        return
    kind = rng.choices(
        ["folder", "link", "link to a folder", "pipe", "hard link", "garbage", "empty", "text"],
        [6, 2, 3, 1, 1, 1, 1, 4],
    )[0]
    if kind == "folder" and depth > 0:
        place.mkdir()
        if STAGE[:5] == place.name[:5]:
            _stage(rng, place, home, depth)
        else:
            _tree(rng, place, home, depth - 1, NAMES)
    elif kind == "text":
        place.write_text(_text(rng, place.name, home))
    elif kind != "folder":
        _put(place, kind, home)


def _stage(rng: random.Random, place: Path, home: Path, depth: int) -> None:
    for name in ("tree", "owner.json", "journal.jsonl", "commit.json", "transformer.hessian.safetensors"):
        if rng.random() < 0.8:
            if rng.random() < 0.7:
                if name == "tree":
                    (place / name).mkdir()
                    _tree(rng, place / name, home, depth - 1, NAMES)
                else:
                    (place / name).write_text(_text(rng, name, home))
            else:
                _thing(rng, place / name, home, depth - 1)


def _path(rng: random.Random) -> str:
    parts = [
        rng.choice([*NAMES, "..", "home"]) if rng.random() < 0.1 else rng.choice(NAMES)
        for _ in range(rng.randint(1, 3))
    ]
    return ("/" if rng.random() < 0.02 else "") + "/".join(parts)


def _text(rng: random.Random, name: str, home: Path) -> str:
    """A record of its kind, often in form, often not."""
    names = [_path(rng) for _ in range(rng.randint(0, 4))]
    record: Any = {
        "stage": rng.choice([STAGE, STAGE, STAGE, "../home", ".tmp-" + "1" * 16]),
        "install": names,
        "remove": [_path(rng)],
    }
    if name in ("manifest.json", "owner.json"):
        if name == "owner.json":
            record = {"pid": 1, "host": "h", "started": "then", "key": KEY}
        else:
            try:
                text = listing(*(n for n in names if rng.random() < 0.9 and n != "manifest.json")).to_json()
                record = json.loads(text)
            except OutputError:
                record = {}
    elif name == "journal.jsonl":
        lines = [
            {"step": rng.choice([None, "step", "layer0"]), "data": {"error": 0.0}, "files": names} for _ in range(3)
        ]
        return "".join(json.dumps(line) + "\n" for line in lines)
    elif name not in (".commit", "commit.json"):
        return "text"
    if rng.random() < 0.15:
        key = rng.choice(list(record) or ["x"])
        record[key] = rng.choice([None, 1, "text", [1], {}, ["../home/program"], -1e300, [[]]])
    text = json.dumps(record)
    if rng.random() < 0.1:
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + rng.choice(["", "}", "\0", "é", text])
    return text


def hostile_folder(rng: random.Random, base: Path) -> None:
    """``base/out`` and perhaps its siblings, with links to ``base/home``."""
    home, out = base / "home", base / "out"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("secret")
    (home / "onnx").mkdir()
    (home / "tree").mkdir()
    (home / "program").write_text("run me")
    (home / "x").write_text("mine")
    (home / "manifest.json").write_text(listing("program", "x").to_json())
    (home / "tree" / "manifest.json").write_text(listing("program").to_json())
    (home / "tree" / "program").write_text("mine, too")
    style = rng.random()
    if style < 0.2:
        export(out, 1, key=KEY)
    else:
        out.mkdir()
    if style < 0.7:  # a decided commit whose parts fit, but for what _tree makes of them
        names = sorted({_path(rng) for _ in range(rng.randint(0, 3))})
        try:
            text = listing(*names).to_json()
        except OutputError:
            text = listing().to_json()
        (out / STAGE / "tree").mkdir(parents=True)
        (out / STAGE / "tree" / "manifest.json").write_text(text)
        (out / ".commit").write_text(
            json.dumps({"stage": STAGE, "install": names, "remove": [_path(rng) for _ in range(rng.randint(0, 2))]})
        )
        if style > 0.25:
            (out / "manifest.json").unlink(missing_ok=True)
        _tree(rng, out / STAGE / "tree", home, 3, NAMES)
        for name in names:
            place = out / STAGE / "tree" / name
            if not os.path.lexists(place) and ".." not in name and not name.startswith("/"):
                try:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    inside = os.path.realpath(place.parent).startswith(str(out))
                    if inside:
                        place.write_text("new")
                except OSError:
                    continue
    _tree(rng, out, home, 3, TOPS)
    for sibling in (SIBLING, SIBLING[:-1] + "1"):
        if rng.random() < 0.3:
            _thing(rng, base / sibling, home, 3)


def _fuzz(folder: Path, cases: int, seed: int) -> dict[str, int]:
    counts = {"made": 0, "refused": 0, "read": 0, "unread": 0}
    with Costs("output folders with links, pipes and records") as costs:
        for case in range(cases):
            rng, base = random.Random(seed * 1_000_003 + case), folder / str(case)
            hostile_folder(rng, base)
            out, home = base / "out", state_of(base / "home")
            before, started = state_of(base), time.monotonic()
            try:
                load_manifest(out)
                counts["read"] += 1
            except DvdquantError:
                counts["unread"] += 1
            assert state_of(base) == before, case
            real = dvdquant.artifact.commit.exchange
            if rng.random() < 0.5:
                dvdquant.artifact.commit.exchange = no_exchange
            try:
                refusal = _error_of(lambda: export(out, 2, key=KEY, resume=rng.random() < 0.5))  # noqa: B023
            finally:
                dvdquant.artifact.commit.exchange = real
            assert refusal is None or refusal.fix or refusal.available, case
            counts["made" if refusal is None else "refused"] += 1
            assert state_of(base / "home") == home, case
            assert sorted(p.name for p in base.iterdir() if not p.name.startswith((".out", "pipe-"))) == [
                "home",
                "out",
            ], case
            costs.add(time.monotonic() - started, refused=refusal is not None)
            shutil.rmtree(base)
    return counts


@pytest.mark.parametrize("cases", [250, pytest.param(20_000, marks=pytest.mark.stress)])
def test_random_hostile_folders(cases: int) -> None:
    """Trees of folders, links, pipes, second names and records, half of them nearly in form."""
    with memory_folder() as folder:
        counts = _fuzz(Path(folder), cases, seed=1)
    print(counts)
    assert min(counts.values()) > cases // 50
