"""``dvdq-build BUNDLE`` into a folder that holds an export already: the same one, a damaged one, or another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact import unpack
from dvdquant.artifact.bundle import open_bundle
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.unpack import unpack_bundle
from dvdquant.artifact.verify_files import verify_files
from dvdquant.export import build_room
from dvdquant.system.files import hash_file
from tests.support.commands import digests
from tests.support.device_build import A4, A8, build_here, flip_last_bit, pack, plugin_library
from tests.support.device_build import made as made
from tests.support.device_build import plugin as plugin
from tests.support.device_build import quick_builder as quick_builder

WEIGHTS = "onnx/transformer.safetensors"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    pack(made, tmp_path / "orin.tar")
    return tmp_path / "orin.tar"


@pytest.fixture
def there(bundle: Path, tmp_path: Path) -> Path:
    """The folder of the bundle."""
    with open_bundle(bundle) as opened:
        unpack_bundle(opened, tmp_path / "orin")
    return tmp_path / "orin"


def change_manifest(folder: Path, **changes: Any) -> Manifest:
    changed = dataclasses.replace(load_manifest(folder), **changes)
    (folder / "manifest.json").write_text(changed.to_json())
    return changed


def become_another(folder: Path) -> Manifest:
    """Give an export other weights, of another model."""
    flip_last_bit(folder / WEIGHTS)
    before = load_manifest(folder)
    return change_manifest(
        folder,
        source={**before.source, "model": "someone/else", "fingerprint": "f" * 64},
        files={**before.files, WEIGHTS: hash_file(folder / WEIGHTS)},
    )


def test_another_export_is_replaced_only_where_that_is_asked_for(
    bundle: Path, there: Path, plugin: Path, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_another(there)
    assert build_here(monkeypatch, there, "--plugin", plugin, "--no-check").returncode == 0
    before = digests(there)
    assert {A4, A8} <= before.keys()
    for more in ((), ("--dry-run",)):
        done = build_here(monkeypatch, bundle, "-o", there, "--plugin", plugin, *more)
        assert done.returncode == 2
        assert f"{there} holds a finished export" in done.stderr
        assert "model: someone/else before" in done.stderr
        assert "give --replace to put the new export in its place" in done.stderr
        assert digests(there) == before
    done = build_here(monkeypatch, bundle, "-o", there, "--plugin", plugin, "--no-check", "--bits", 8, "--replace")
    assert done.returncode == 0, done.stderr
    assert "has engines of other graphs or weights, which are replaced with the rest: 2" in done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert [e["path"] for e in manifest.engines] == [A8]
    assert manifest.source["model"] != "someone/else"
    assert not (there / A4).exists()


def test_options_of_a_recipe_are_no_advice_for_a_bundle(
    made: Path, tmp_path: Path, there: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(made, tmp_path / "other"))
    recipe = load_manifest(other).recipe
    change_manifest(other, recipe={**recipe, "name": "w4a4"})
    pack(other, tmp_path / "other.tar")
    done = build_here(monkeypatch, tmp_path / "other.tar", "-o", there, "--plugin", plugin)
    assert done.returncode == 2
    assert "recipe: rtn before, w4a4 now" in done.stderr
    assert "--recipe" not in done.stderr


def test_an_export_that_comes_while_the_bundle_is_read_is_not_replaced(
    bundle: Path, there: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is empty when it is asked, and another export is put there before its lock."""
    away, require_disk = there.with_name("away"), unpack.require_disk
    become_another(there)
    before = digests(there)
    there.rename(away)

    def first(*arguments: Any) -> None:
        away.rename(there)
        require_disk(*arguments)

    monkeypatch.setattr(unpack, "require_disk", first)
    done = build_here(monkeypatch, bundle, "-o", there, "--plugin", plugin)
    assert done.returncode == 2
    assert "give --replace" in done.stderr
    assert {name: data for name, data in digests(there).items() if name != ".lock"} == before


@pytest.mark.parametrize("damage", ["a changed byte", "a missing file"])
def test_what_is_damaged_is_unpacked_again_and_engines_stay(
    damage: str, bundle: Path, there: Path, plugin: Path, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (bundle, "-o", there, "--plugin", plugin, "--no-check")
    assert build_here(monkeypatch, *line, "--bits", 8).returncode == 0
    card = (there / "README.md").read_bytes()
    flip_last_bit(there / WEIGHTS) if damage == "a changed byte" else (there / WEIGHTS).unlink()
    done = build_here(monkeypatch, *line, "--bits", 8)
    assert done.returncode == 0, done.stderr
    reason = "was changed (its SHA-256 differs)" if damage == "a changed byte" else "is missing"
    assert f"{there} does not match its manifest: {WEIGHTS} {reason}: unpacked again from {bundle}" in done.stderr
    assert f"{A8} is up to date" in done.stdout
    verify_files(there, load_manifest(there))
    assert (there / "README.md").read_bytes() == card
    # A damaged engine is built again, from a folder that is whole.
    flip_last_bit(there / A8)
    done = build_here(monkeypatch, *line)
    assert done.returncode == 0, done.stderr
    assert f"{there} holds what {bundle} holds" in done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert sorted(e["path"] for e in manifest.engines) == [A4, A8]


def test_engines_that_are_damaged_too_do_not_stay(
    bundle: Path, there: Path, plugin: Path, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (bundle, "-o", there, "--plugin", plugin, "--no-check")
    assert build_here(monkeypatch, *line).returncode == 0
    for name in (WEIGHTS, A4):
        flip_last_bit(there / name)
    done = build_here(monkeypatch, *line, "--bits", 8)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert [e["path"] for e in manifest.engines] == [A8]
    assert not (there / A4).exists()


def test_a_bundle_with_other_build_settings_is_built_with_them(
    made: Path, tmp_path: Path, there: Path, plugin: Path, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are those of the folder; its manifest says how they are built, and what a run takes by default."""
    line = ("-o", there, "--plugin", plugin, "--no-check")
    assert build_here(monkeypatch, tmp_path / "orin.tar", *line, "--bits", 4).returncode == 0
    other = Path(shutil.copytree(made, tmp_path / "other"))
    builds = [{**entry, "workspace_gib": 3.0} for entry in load_manifest(other).builds]
    change_manifest(other, builds=tuple(builds), sampling={"steps": 4})
    pack(other, tmp_path / "other.tar")
    done = build_here(monkeypatch, tmp_path / "other.tar", *line, "--bits", 8, "--log-format", "json")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert [entry["workspace_gib"] for entry in manifest.builds] == [3.0, 3.0]
    assert manifest.sampling == {"steps": 4}
    assert [e["path"] for e in manifest.engines] == [A4, A8]
    # The engine of a4 has the old settings, so it is built again.
    done = build_here(monkeypatch, tmp_path / "other.tar", *line, "--dry-run", "--log-format", "json")
    said = json.loads(done.stdout)
    assert [(entry["engine"], entry["workspace_gib"]) for entry in said["builds"]] == [(A4, 3.0)]
    assert said["up_to_date"] == [A8]
    done = build_here(monkeypatch, tmp_path / "other.tar", *line)
    assert f"{there} holds what {tmp_path / 'other.tar'} holds" in done.stderr
    assert A4 in done.stdout
    assert f"{A8} is up to date" not in done.stdout, "only what is built is told"


def test_the_dry_run_of_a_bundle_speaks_to_programs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = build_here(monkeypatch, bundle, "-o", tmp_path / "new", "--bits", 8, "--dry-run", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [entry["engine"] for entry in said["builds"]] == [A8]
    assert (said["bundle"]["path"], said["bundle"]["sm"], said["gpu"]["sm"]) == (str(bundle), ["8.7"], "8.7")
    with open_bundle(bundle) as opened:
        assert said["bundle"]["bytes"] == sum(member["bytes"] for member in opened.facts["files"])
    assert not (tmp_path / "new").exists()


def test_where_nothing_is_to_be_built_no_memory_is_asked_for(
    bundle: Path, there: Path, plugin: Path, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("--plugin", plugin, "--no-check")
    assert build_here(monkeypatch, there, *line, "--bits", 8).returncode == 0
    monkeypatch.setattr(build_room, "memory_limit", lambda: 1 << 20)  # other programs have the rest
    for source in ((there,), (bundle, "-o", there)):
        done = build_here(monkeypatch, *source, *line, "--bits", 8)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"{A8} is up to date", "nothing to do"]
        dry = build_here(monkeypatch, *source, *line[:2], "--bits", 8, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert f"{A8} is up to date" in dry.stdout
        for more in ((), ("--dry-run",)):
            refused = build_here(monkeypatch, *source, *line[:2], *more)
            assert refused.returncode == 2
            assert f"{A4}: the builder is estimated to take" in refused.stderr


def test_a_bundle_whose_engines_stay_asks_for_no_memory(
    made: Path, tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch, quick_builder: None
) -> None:
    """Its own plugin library; then another bundle of the same graphs and weights, which is unpacked over the first one."""
    library = plugin_library(tmp_path / "own.so", machine="aarch64")
    for place in ("dvdquant.system.plugin_file", "dvdquant.plugin_library"):  # the device, an Orin
        monkeypatch.setattr(f"{place}.machine_name", lambda: "aarch64")
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    pack(made, first, "--plugin", library)
    line = ("-o", there, "--plugin", "bundled", "--no-check")
    assert build_here(monkeypatch, first, *line).returncode == 0
    other = Path(shutil.copytree(made, tmp_path / "other"))
    change_manifest(other, sampling={"steps": 4})
    pack(other, second, "--plugin", library)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 1 << 20)
    for source in (first, second):
        for words in (line[:2], line[:4]):  # where nothing is named, it is the bundle's
            dry = build_here(monkeypatch, source, *words, "--dry-run")
            assert dry.returncode == 0, dry.stderr
            assert dry.stdout.splitlines()[-3:] == [
                f"{A4} is up to date",
                f"{A8} is up to date",
                "dry run: nothing was unpacked",
            ]
        done = build_here(monkeypatch, source, *line)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "nothing to do"
    assert load_manifest(there).sampling == {"steps": 4}
    flip_last_bit(there / A4)
    dry = build_here(monkeypatch, second, *line, "--dry-run")
    assert dry.returncode == 2
    assert f"{A4}: the builder is estimated to take" in dry.stderr


def test_replace_is_for_bundles(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = build_here(monkeypatch, there, "--replace")
    assert done.returncode == 2
    assert "--replace is for a bundle" in done.stderr
