"""The journal of an export, and what --resume makes of interrupted work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dvdquant.artifact.transaction
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.journal import Journal
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.artifact.unfinished import differences
from dvdquant.artifact.verify_files import verify_files
from dvdquant.errors import OutputError
from tests.support.children import in_child
from tests.support.folders import memory_folder
from tests.support.interrupted_exports import CleanChildren, abandoned_work
from tests.support.written_exports import KEY, export, export_resumable, manifest, names_in, six_steps, state


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as folder:
        yield Path(folder)


def _interrupted(out: Path, steps: int, *, key: Any = KEY, killed: bool = True) -> None:
    assert in_child(lambda: abandoned_work(str(out), steps, key, killed)) != 0


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_resume_goes_on_and_gives_the_same_bytes(tmp_path: Path, steps: int, killed: bool) -> None:
    with ExportTransaction(tmp_path / "whole", key=KEY) as transaction:
        six_steps(transaction, 6)
        (transaction.tree / "half.onnx").unlink()
        transaction.commit(manifest(created="2026-01-01T00:00:00+00:00"))
    out = tmp_path / "out"
    _interrupted(out, steps, killed=killed)
    assert state(out) is None
    with ExportTransaction(out, key=KEY, resume=True) as transaction:
        assert transaction.resumed
        assert not (transaction.tree / "half.onnx").exists()
        assert six_steps(transaction, 6) == list(range(steps, 6))
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


@pytest.mark.parametrize("case", ["fresh", "replacing", "swept"])
def test_resume_after_a_kill_at_every_operation(memory: Path, case: str) -> None:
    """The kill hits the work itself, or a run without --resume that deletes such work: half deleted, it is no work."""
    children = CleanChildren()
    for kill_at in range(500):
        out = memory / str(kill_at) / "out"
        out.parent.mkdir()
        if case == "replacing":  # by the exchange
            export(out, 1)
        elif case == "swept":
            children.abandon(out, 3)
        status = children.run("abandoned" if case == "swept" else "resumable", out, kill_at, "kill")
        export_resumable(out, resume=True)
        assert (out / "weights.safetensors").read_bytes() == b"".join(bytes([step]) * 100 for step in range(3))
        assert names_in(out) == {"weights.safetensors", "half.onnx", "manifest.json"}
        verify_files(out, load_manifest(out))
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the operations never end")
    children.close()
    assert kill_at > 25


def test_resume_of_other_options_says_what_differs_and_keeps_thesix_steps(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupted(out, 2)
    other = {
        **KEY,
        "recipe": {"name": "w4a4", "weight": {"group_size": 64}},
        "sm": ["8.9", "12.0"],
        "layers": [[["blocks.0.attn1.to_q+to_k+to_v", 256, 1]] * 40],
    }
    with pytest.raises(OutputError) as caught, ExportTransaction(out, key=other, resume=True):
        pytest.fail("entered")
    assert "recipe.weight.group_size: 32 before, 64 now" in str(caught.value)
    assert "sm: [8.9] before, [8.9, 12.0] now; other layers\n" in str(caught.value)
    with ExportTransaction(out, key=KEY, resume=True) as transaction:
        assert list(transaction.steps) == ["layer0", "layer1"]


def test_many_differences_are_counted() -> None:
    then, now = ({"recipe": {f"field{i}": value for i in range(8)} | {"name": str(value)}} for value in (None, True))
    said = differences(then, now)
    assert said.startswith("recipe.name: None before, True now; recipe.field0: none before, True now; ")
    assert said.endswith("recipe.field4: none before, True now; and 3 more")


def test_a_reader_is_told_that_the_export_was_interrupted_or_still_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupted(out, 2)
    (out / ".lock").touch()  # a killed process leaves its file
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputError, match=r"was interrupted(?s:.*)available: .*\.tmp-(?s:.*)dvdq-export .* --resume"):
        load_manifest(out)
    assert sorted(out.rglob("*")) == before
    with ExportTransaction(out, key=KEY, resume=True), pytest.raises(OutputError, match="still running"):
        load_manifest(out)


def test_work_whose_deletion_failed_is_no_longer_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order a file system deletes in, half of it never passes for all of it."""
    _interrupted(tmp_path / "out", 2)

    def fail(folder: Folder, name: str) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder.path / name))

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", fail)
        with pytest.raises(OutputError, match="Input/output error"), ExportTransaction(tmp_path / "out", key=KEY):
            pytest.fail("entered")
    with ExportTransaction(tmp_path / "out", key=KEY, resume=True) as transaction:
        assert not transaction.steps


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
    folder = Folder.open(memory)
    journal = Journal(folder, "whole")
    for step in range(5):
        journal.add(f"step{step}", {"n": step}, [f"file{step}"])
    journal.close()
    raw = (memory / "whole").read_bytes()
    following = json.dumps({"step": "next", "data": None, "files": []})
    ghost = b"?" * len(following) + b"\n" + following.replace("next", "ghost").encode() + b"\n"
    for cut in range(len(raw) + 1):
        for tail in (b"", b"\x00\xff garbage", b'{"step":"evil","data":0,"files":["../../x"]}\n', ghost):
            (memory / "torn").write_bytes(raw[:cut] + tail)
            torn = Journal(folder, "torn")
            complete = raw[:cut].count(b"\n")
            assert list(torn.done) == [f"step{step}" for step in range(complete)]
            assert torn.files == {f"file{step}" for step in range(complete)}
            torn.add("next", None, [])
            torn.close()
            again = Journal(folder, "torn")
            assert list(again.done)[complete:] == ["next"]
            again.close()
    folder.close()


def _without(name: str) -> Callable[[Path], None]:
    return lambda stage: shutil.rmtree(stage / name) if (stage / name).is_dir() else (stage / name).unlink()


USELESS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no step": (lambda stage: (stage / "journal.jsonl").write_bytes(b""), "no step of it was finished"),
    "no journal": (_without("journal.jsonl"), "no step of it was finished"),
    "no tree": (_without("tree"), "files are missing"),
    "no owner": (_without("owner.json"), "half deleted"),
    "owner out of form": (lambda stage: (stage / "owner.json").write_text("{"), "is damaged ("),
    "journal of two names": (lambda stage: os.link(stage / "journal.jsonl", stage / "other"), "has several names"),
    "a file": (lambda stage: (shutil.rmtree(stage), stage.write_text("x")), "is no folder"),
}


@pytest.mark.parametrize("case", USELESS)
def test_resume_says_what_it_throws_away_before_it_does(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (damage, why) = tmp_path / "out", USELESS[case]
    _interrupted(out, 3)
    (stage,) = out.glob(".tmp-*")
    damage(stage)
    there: list[bool] = []
    real = dvdquant.artifact.transaction.sweep

    def swept(*arguments: Any, **options: Any) -> None:
        there.append(f"--resume: {stage} is deleted: " in caplog.text and os.path.lexists(stage))
        real(*arguments, **options)

    monkeypatch.setattr(dvdquant.artifact.transaction, "sweep", swept)
    export_resumable(out, resume=True)
    assert there == [True]
    assert why in caplog.text
    assert not os.path.lexists(stage)


def test_resume_says_that_older_and_other_work_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    for name, key in (("0" * 16, KEY), ("1" * 16, {**KEY, "sm": []}), ("2" * 16, KEY)):
        _interrupted(out / name, 2, key=key)
        (stage,) = (out / name).glob(".tmp-*")
        stage.rename(out / f".tmp-{name}")
        shutil.rmtree(out / name)
    for number, name in enumerate(("0" * 16, "1" * 16, "2" * 16)):
        os.utime(out / f".tmp-{name}", (number, number))
    with ExportTransaction(out, key=KEY, resume=True) as transaction:
        assert transaction.tree.parent.name == ".tmp-" + "2" * 16
    assert f".tmp-{'0' * 16} is deleted: newer work of the same model" in caplog.text
    assert f".tmp-{'1' * 16} is deleted: it is of another model or of other options" in caplog.text
    assert ".tmp-" + "2" * 16 + " is deleted" not in caplog.text
