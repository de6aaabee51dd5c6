"""The output folder: all of the new export or nothing of it, and what it refuses."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dvdquant.artifact.commit
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction, require_disk
from dvdquant.artifact.verify_files import verify_files
from dvdquant.errors import OutputError, ResourceError
from tests.support.children import in_child
from tests.support.interrupted_exports import no_exchange
from tests.support.written_exports import KEY, content, export, hashes, manifest, names_in, state


def seen(version: int) -> dict[str, str]:
    return hashes(content(version))


@pytest.fixture(params=["exchange", "roll-forward"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of putting an export in place; the second as on a file system without renameat2."""
    if request.param == "roll-forward":
        monkeypatch.setattr(dvdquant.artifact.commit, "exchange", no_exchange)
    return str(request.param)


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
    (tmp_path / "float").mkdir()
    (tmp_path / "out").symlink_to("float")
    for version in (1, 2):
        export(tmp_path / "out", version)
        assert (tmp_path / "out").is_symlink()
        assert state(tmp_path / "float") == seen(version)


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


def test_require_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "out", 1000, "the weights")
    with pytest.raises(ResourceError) as caught:
        require_disk(tmp_path / "out" / "deep", 10**18, "the weights")
    assert "the weights needs 909494.7 TiB" in caught.value.what
    assert str(tmp_path) in caught.value.what


# --------------------------------------------------------------------------------------------------------------- kills


# -------------------------------------------------------------------------------------------------------------- rivals


# -------------------------------------------------------------------------------------------------------------- resume
