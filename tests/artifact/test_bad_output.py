"""Folders that cannot be written, previous exports, and exports that are damaged: refused in words, left as they were."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dvdquant.cli.inspect import main as inspect_main
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, edit_config, edit_weights, poke, refused, run, truncate
from tests.support.exporting import state_of

QKV = "blocks.0.attn1.to_q.weight"
MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "NaN": (poke(QKV, float("nan")), [QKV, "--allow-nonfinite"]),
    "truncated weights": (truncate, ["cut short"]),
    "missing tensor": (edit_weights(lambda t: t.pop(QKV)), [QKV, "missing"]),
    "unknown class": (edit_config(lambda c: c.update(_class_name="Other")), ["Other"]),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("pristine") / "model", tiny.WAN_ONE)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


# -------------------------------------------------------------------------------------------------------- bad outputs


def put_file(out: Path) -> Path:
    out.write_text("mine")
    return out


def below_file(out: Path) -> Path:
    out.write_text("mine")
    return out / "deeper" / "export"


def foreign(out: Path) -> Path:
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"\xff\xd8")
    return out


def other_manifest(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web app"}')
    return out


OUTPUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "a file": (put_file, ["not a folder"]),
    "below a file": (below_file, ["not a folder"]),
    "somebody's files": (foreign, ["holiday.jpg", "not empty"]),
    "somebody's manifest": (other_manifest, ["manifest.json"]),
    "not writable": (lambda out: Path("/proc/nothing/out"), ["cannot write /proc/nothing/out", "pick an -o"]),
    "name too long": (lambda out: out / ("x" * 300), ["x" * 100]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output(name: str, pristine: Path, tmp_path: Path) -> None:
    prepare, named = OUTPUTS[name]
    out = prepare(tmp_path / "out")
    before = state_of(tmp_path)
    refused(run(pristine, "-o", out, "--target", "onnx", *SIZES), *named)
    assert state_of(tmp_path) == before
    refused(run(pristine, "-o", out, "--target", "onnx", *SIZES, "--dry-run"), *named)
    assert state_of(tmp_path) == before


UNDECODABLE = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("option", ["-o", "MODEL", "--subfolder", "--keep", "--force", "--timing-cache", "hub id"])
def test_text_that_is_not_utf8_is_refused_before_the_work(option: str, pristine: Path, tmp_path: Path) -> None:
    """It would end in the manifest, or in a library that takes text alone, when all the rest is done."""
    out, model, more = tmp_path / "out", pristine, [option, UNDECODABLE]
    if option == "-o":
        out, more = tmp_path / UNDECODABLE / "out", []
    elif option == "MODEL":
        model, more = Path(shutil.copytree(pristine, tmp_path / UNDECODABLE)), []
    elif option == "hub id":
        model, more = Path(f"org/{UNDECODABLE}"), []
    before = state_of(tmp_path)
    target = "rtx" if option == "--timing-cache" else "onnx"  # a cache without engines is refused as such
    refused(run(model, "-o", out, "--target", target, *SIZES, *more), "caf\\xe9", "not UTF-8", "fix: ")
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("length", [300, 3600, 5000, 100_000])
@pytest.mark.parametrize("parts", ["/", "/d"])
def test_paths_that_are_too_long(parts: str, length: int, pristine: Path, tmp_path: Path) -> None:
    long = tmp_path / ("n" * length if parts == "/" else "d/" * (length // 2))
    if length > 300 or parts == "/":
        refused(run(pristine, "-o", long, "--target", "onnx", *SIZES), way_out=True)
        refused(run(pristine, "-o", long, "--target", "onnx", *SIZES, "--dry-run"), way_out=True)
    refused(run(long, "-o", tmp_path / "out", "--target", "onnx", *SIZES), way_out=False)
    said = inspect(long)
    wanted = "the path has" if length > 4000 else "does not exist" if parts != "/" else "File name too long"
    refused(said, wanted)
    assert len(said.output) < 2000
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_working_directory_and_a_name_with_everything(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a deleted folder nothing is begun; elsewhere any text may be in the name."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    rest = ["--target", "graphs", "--recipe", "rtn", *SIZES]
    for out in ("out", ".", "../out"):
        refused(run(pristine, "-o", out, *rest), "working directory", "fix: ")
    for model in ("model", "org/name"):
        refused(run(model, "-o", tmp_path / "out", *rest), "working directory")
    refused(inspect("out"), "working directory")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a 'b' \"c\" $d %s {e} #f\nü 漢 \u202e\x1b[31m"
    for _ in range(2):
        assert run(pristine, "-o", out, *rest).exit_code == 0
    assert inspect(out, "--check").exit_code == 0


def test_output_over_the_model_is_refused_by_the_dry_run_too(model: Path) -> None:
    before = state_of(model)
    for more in ([], ["--dry-run"]):
        refused(run(model, "-o", model, "--target", "onnx", *SIZES, *more), "not empty and not a dvdquant export")
    assert state_of(model) == before


def test_disk_too_small(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Need and free space in the message, before anything is made."""
    real = os.statvfs

    def tiny_disk(path: Any) -> Any:
        info = real(path)
        return SimpleNamespace(f_blocks=1000, f_bavail=100, f_bfree=100, f_frsize=info.f_frsize, f_bsize=info.f_bsize)

    monkeypatch.setattr(os, "statvfs", tiny_disk)
    refused(run(pristine, "-o", tmp_path / "out", *SIZES), "iB", "free", "the export needs")
    assert not (tmp_path / "out").exists()


def test_disk_fills_up_while_writing(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of free space passes and the disk is full all the same: another process was faster."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr("dvdquant.export.pipeline.require_disk", lambda *_: None)
        refused(run(pristine, "-o", small / "out", "--target", "onnx", *SIZES), "no room", str(small))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------ previous exports, inspect


@pytest.fixture(scope="module")
def exported(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    result = run(pristine, "-o", out, "--target", "onnx", *SIZES)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def previous(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "previous"))


@pytest.mark.parametrize("name", MODELS)
def test_previous_export_survives_a_bad_model(name: str, previous: Path, model: Path) -> None:
    MODELS[name][0](model)
    before = state_of(previous)
    refused(run(model, "-o", previous, "--target", "onnx", *SIZES, "--replace"), *MODELS[name][1])
    assert state_of(previous) == before


def test_resume_of_another_export(previous: Path, pristine: Path, tmp_path: Path) -> None:
    """Work begun with other options is not mixed in; the message says which option differs."""
    from dvdquant.artifact.transaction import ExportTransaction

    with ExportTransaction(tmp_path / "out", key={"recipe": {"name": "rtn"}}, keep_for_resume=True) as transaction:
        transaction.done("something")
    before = state_of(tmp_path / "out")
    refused(run(pristine, "-o", tmp_path / "out", "--target", "onnx", *SIZES, "--resume"), "--resume", "another one")
    assert state_of(tmp_path / "out") == before


def test_resume_with_nothing_to_resume_says_so(pristine: Path, tmp_path: Path) -> None:
    result = run(pristine, "-o", tmp_path / "out", "--target", "graphs", "--recipe", "rtn", *SIZES, "--resume")
    assert result.exit_code == 0, result.output
    assert f"nothing to resume in {tmp_path / 'out'}, starting from the beginning" in result.output


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(inspect_main, [str(a) for a in arguments])


def test_inspect_of_a_good_export(previous: Path) -> None:
    for arguments in ([], ["--check"], ["--layers"], ["--json"], ["--graph", "onnx/transformer_a4.onnx"]):
        result = inspect(previous, *arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        assert "blocks.0" in result.output or "--graph" in arguments


def test_inspect_does_all_that_is_asked(previous: Path, tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    result = inspect(previous, "--json", "--html", page, "--layers", "--check")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["family"] == "wan"
    assert page.is_file()
    assert f"{page} written" in result.stderr
    assert "files match the manifest" in result.stderr
    page.unlink()
    result = inspect(previous, "--html", page, "--layers")
    assert page.is_file()
    assert "all 7 layers" in result.stdout
    for more in ("--json", "--layers"):
        refused(inspect(previous, "--graph", "onnx/transformer_a4.onnx", more), "--graph", more)


def test_inspect_and_the_card_use_the_same_words_for_the_inputs(previous: Path) -> None:
    said = "channels balanced by powers of two with random signs, predicted means subtracted"
    assert f"inputs predicted, {said}" in inspect(previous).output
    assert said.replace(", ", "; ") in (previous / "README.md").read_text()


def test_a_page_that_cannot_be_written(previous: Path) -> None:
    result = inspect(previous, "--html", "/proc/x.html")
    refused(result, "cannot write /proc/x.html", "fix: pick a place you may write to")
    assert " -o " not in result.output


def damage_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        path = out / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


def interrupt(out: Path) -> None:
    shutil.rmtree(out)
    (out / ".tmp-0123456789abcdef" / "tree").mkdir(parents=True)


MANIFESTS: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "no export": (lambda out: (out / "manifest.json").unlink(), [], ["not a dvdquant export"]),
    "interrupted": (interrupt, [], ["was interrupted", "dvdq-export MODEL -o", "--resume"]),
    "no folder": (shutil.rmtree, [], ["does not exist"]),
    "cut manifest": (lambda out: os.truncate(out / "manifest.json", 500), [], ["not valid JSON"]),
    "field missing": (damage_manifest(lambda m: m.pop("family")), [], ["family", "missing"]),
    "field of another type": (damage_manifest(lambda m: m.update(layers="all")), [], ["layers"]),
    "path that leaves": (
        damage_manifest(lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}})),
        [],
        ["../x"],
    ),
    "newer format": (damage_manifest(lambda m: m.update(format_version=99)), [], ["99", "newer"]),
    "unknown graph": (lambda out: None, ["--graph", "onnx/other.onnx"], ["other.onnx", "transformer_a4.onnx"]),
    "graph outside": (lambda out: None, ["--graph", "../../etc/passwd"], ["passwd"]),
    "graph is garbage": (
        lambda out: (out / "onnx/transformer_a4.onnx").write_bytes(b"no protobuf"),
        ["--graph", "onnx/transformer_a4.onnx"],
        ["transformer_a4.onnx"],
    ),
    "file missing": (lambda out: (out / "onnx/transformer_a8.onnx").unlink(), ["--check"], ["transformer_a8.onnx"]),
    "file tampered": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text().replace("2", "3")),
        ["--check"],
        ["config.json", "SHA-256"],
    ),
    "file truncated": (
        lambda out: os.truncate(out / "onnx/transformer.safetensors", 1000),
        ["--check"],
        ["transformer.safetensors", "1000 bytes"],
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_inspect_refuses(name: str, previous: Path) -> None:
    damage, arguments, named = MANIFESTS[name]
    damage(previous)
    before = state_of(previous)
    result = inspect(previous, *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    for text in named:
        assert text in result.output, result.output
    assert state_of(previous) == before
