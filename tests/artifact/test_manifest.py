"""The manifest: round trip, a refusal for every field out of form, and tampering with what it vouches for."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.manifest import FORMAT_VERSION, Manifest, check_relpath, load_manifest
from dvdquant.artifact.verify_files import read_verified, verify_files
from dvdquant.errors import OutputError, ResourceError
from dvdquant.system.files import hash_file
from tests.support import written_exports as made
from tests.support.written_exports import manifest

HASH = "a" * 64
ENGINE = {
    "path": "engines/rtx-8.9/a4.engine",
    "backend": "rtx",
    "sm": ["8.9"],
    "act_bits": 4,
    "precision": "int8",
    "executes": "INT8 tensor cores on codes stored in 8 bits",
    "onnx_sha256": HASH,
    "versions": {"tensorrt_rtx": "1.7.1"},
    "shapes": {"hidden_states": [[1, 3, 5, 8, 8]] * 3},
}
GRAPH = {"path": "onnx/transformer_a4.onnx", "target": "tensorrt", "act_bits": 4}


def full() -> Manifest:
    files = {name: {"sha256": HASH, "bytes": 7} for name in (ENGINE["path"], GRAPH["path"], "config.json")}
    return manifest(engines=[ENGINE], graphs=[GRAPH], files=files, export_key=HASH)


def test_round_trip() -> None:
    value = full()
    assert Manifest.from_json(value.to_json()) == value
    assert Manifest.from_json(value.to_json().encode()) == value
    assert json.loads(value.to_json())["created"].endswith("+00:00")
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.family = "other"  # type: ignore[misc]


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        data = data[part]  # type: ignore[index]
    if value is KeyError:
        del data[last]  # type: ignore[arg-type]
    else:
        data[last] = value  # type: ignore[index]


BAD_FIELDS: list[tuple[str, Any]] = [
    ("source", []),
    ("source/model", KeyError),
    ("source/fingerprint", 3),
    ("family", None),
    ("config_sha256", "c" * 63),
    ("config_sha256", "C" * 64),
    ("recipe", KeyError),
    ("recipe", {}),
    ("recipe/version", 99),
    ("recipe/weight/group_size", 7),
    ("recipe/activations", [3]),
    ("shapes", None),
    ("layers", {}),
    ("layers/0", "x"),
    ("layers/0/name", KeyError),
    ("layers/1/members", "blocks"),
    ("layers/0/features_in", 0),
    ("layers/0/features_in", True),
    ("layers/0/rotation_block", 2.0),
    ("layers/0/relative_mse", -1),
    ("layers/0/relative_mse", "small"),
    ("kept", "proj_out"),
    ("kept", [1]),
    ("graphs/0/path", "onnx/other.onnx"),
    ("graphs/0/act_bits", 5),
    ("engines/0/sm", "8.9"),
    ("engines/0/onnx_sha256", "zz"),
    ("engines/0/path", "engines/../../x"),
    ("engines/0/versions", {"trt": 10}),
    ("components", [None]),
    ("files/config.json", HASH),
    ("files/config.json/sha256", "x"),
    ("files/config.json/bytes", -1),
    ("files/config.json/mode", 0o644),
    ("tools", {"torch": 2}),
    ("created", "yesterday"),
    ("created", "2026-01-01T00:00:00"),
    ("dvdquant_version", 1),
    ("export_key", "x"),
    ("format_version", 0),
    ("surprise", 1),
]


@pytest.mark.parametrize(("path", "value"), BAD_FIELDS, ids=lambda item: str(item)[:30])
def test_names_the_field_that_is_out_of_form(path: str, value: Any) -> None:
    data = json.loads(full().to_json())
    _set(data, path, value)
    with pytest.raises(OutputError) as caught:
        Manifest.from_json(json.dumps(data))
    top = "files" if path.startswith("files") else path.split("/")[0]
    assert top in caught.value.what


@pytest.mark.parametrize("name", ["source", "recipe", "files", "layers", "created"])
def test_missing_fields_are_named(name: str) -> None:
    data = json.loads(full().to_json())
    del data[name]
    with pytest.raises(OutputError, match=f"field {name} is missing"):
        Manifest.from_json(json.dumps(data))


def test_newer_formats_name_the_version_to_install() -> None:
    data = {"format_version": FORMAT_VERSION + 1, "dvdquant_version": "9.9.0", "layers": "quite different"}
    with pytest.raises(
        OutputError, match=rf"format {FORMAT_VERSION + 1} is newer(.|\n)*install dvdquant 9\.9\.0 or newer"
    ):
        Manifest.from_json(json.dumps(data))


def test_the_older_format_says_how_to_export_again() -> None:
    for recipe in ({"name": "w4a8"}, {"name": "w4a8; rm -rf ~"}, None):
        data = {"format_version": 1, "recipe": recipe, "layers": "quite different"}
        with pytest.raises(OutputError, match="format 1") as caught:
            Manifest.from_json(json.dumps(data))
        fix = caught.value.fix or ""
        assert fix.endswith("--recipe w4a8" if recipe == {"name": "w4a8"} else "NEW_FOLDER")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a":1,"a":2}', '{"format_version":NaN}', "[" * 9999, '{"format_version":true}', "\ud800"],
)
def test_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(OutputError):
        Manifest.from_json(text.encode("utf-8", "surrogatepass"))


def test_values_json_cannot_carry_are_refused_on_writing() -> None:
    for shapes in ({"x": float("nan")}, {"x": {1, 2}}, {"x": float("inf")}):
        with pytest.raises(OutputError, match="JSON cannot carry"):
            manifest(shapes={**manifest().shapes, **shapes}).to_json()
    bad = copy.deepcopy(manifest().layers[0])
    bad["relative_mse"] = float("nan")
    with pytest.raises(OutputError, match="relative_mse"):
        manifest(layers=[bad]).to_json()


BAD_PATHS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/..",
    "./a",
    "a//b",
    "a/",
    "a\\b",
    "..\\x",
    "C:x",
    "a\0b",
    "a\nb",
    "\ud800",
    ".lock",
    ".commit",
    ".tmp-0123456789abcdef/x",
    "manifest.json",
    "x" * 2000,
    7,
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path)[:20])
def test_paths_that_leave_the_export(path: Any) -> None:
    with pytest.raises(OutputError, match="no path of a file in an export"):
        check_relpath(path)


@pytest.mark.parametrize(
    "path", ["config.json", "onnx/transformer_a4.onnx", "engines/rtx-8.9/a.engine", "a b/ü", "..a/b..", "x/.lock"]
)
def test_paths_inside(path: str) -> None:
    assert check_relpath(path) == path


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, Manifest]:
    out = tmp_path / "out"
    files = {}
    for index, name in enumerate((GRAPH["path"], ENGINE["path"], "config.json", "empty")):
        path = out / str(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(index).randbytes(3000 * index))
        files[name] = hash_file(path)
    value = manifest(files=files, graphs=[GRAPH], engines=[ENGINE])
    (out / "manifest.json").write_text(value.to_json())
    return out, value


def test_load_and_verify(export: tuple[Path, Manifest]) -> None:
    out, value = export
    assert load_manifest(out) == value
    read: list[int] = []
    verify_files(out, value, progress=read.append)
    assert sum(read) == sum(entry["bytes"] for entry in value.files.values())
    for name in value.files:
        assert read_verified(out, value, name) == (out / name).read_bytes()


def test_every_kind_of_tampering_is_named(export: tuple[Path, Manifest], tmp_path: Path) -> None:
    out, value = export
    name, rng = str(ENGINE["path"]), random.Random(5)
    path = out / name
    whole = path.read_bytes()

    def refused() -> None:
        with pytest.raises(OutputError, match=name):
            verify_files(out, value)
        with pytest.raises(OutputError, match=name):
            read_verified(out, value, name)
        verify_files(out, value, only=["config.json"])

    for _ in range(150):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        refused()
        path.write_bytes(whole[:place])
        refused()
    path.write_bytes(whole + b"\0")
    refused()
    path.write_bytes((out / "config.json").read_bytes()[: len(whole)])
    refused()
    path.unlink()
    refused()
    path.mkdir()
    refused()
    path.rmdir()
    os.mkfifo(path)
    refused()
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")  # the right bytes, but from outside the export
    refused()
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / path.name).write_bytes(whole)
    path.parent.symlink_to(tmp_path / "folder")
    refused()


def test_a_file_larger_than_memory_is_not_begun(export: tuple[Path, Manifest]) -> None:
    """A hole of a terabyte costs who wrote the export nothing."""
    out, value = export
    os.truncate(out / str(ENGINE["path"]), 1 << 40)
    files: Any = {**value.files, str(ENGINE["path"]): {"sha256": HASH, "bytes": 1 << 40}}
    with pytest.raises(ResourceError, match=r"1\.0 TiB(?s:.*)are free"):
        read_verified(out, dataclasses.replace(value, files=files), str(ENGINE["path"]))


def test_files_that_are_not_listed(export: tuple[Path, Manifest]) -> None:
    out, value = export
    for call in (lambda: verify_files(out, value, only=["x"]), lambda: read_verified(out, value, "../x")):
        with pytest.raises(OutputError, match="does not list"):
            call()


def test_many_problems_are_counted(export: tuple[Path, Manifest]) -> None:
    out, value = export
    extra = {f"f{i}": {"sha256": HASH, "bytes": 1} for i in range(9)}
    with pytest.raises(OutputError, match=r"f0 is missing.* and 4 more"):
        verify_files(out, dataclasses.replace(value, files={**value.files, **extra}))


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").mkdir()
    os.mkfifo(tmp_path / "link" / "manifest.json")
    for name, words in (
        ("absent", "does not exist"),
        ("empty", "an empty folder"),
        ("file", "file"),
        ("link", "regular"),
    ):
        with pytest.raises(OutputError) as caught:
            load_manifest(tmp_path / name)
        assert words in str(caught.value).lower()
        assert str(tmp_path / name) in caught.value.what


def test_hash_of_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="absent"):
        hash_file(tmp_path / "absent")


def test_an_export_in_a_cache_of_the_hub_says_how_to_have_its_files(tmp_path: Path) -> None:
    """There every file is a link to a blob. The command that is named makes an export of it."""
    made.export(tmp_path / "out", 1)
    blobs, snapshot = tmp_path / "models--org--x" / "blobs", tmp_path / "models--org--x" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(tmp_path / "out")
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number:064d}")
        link.symlink_to(blobs / f"{number:064d}")
    with pytest.raises(OutputError, match="cp -rL THIS FOLDER"):
        load_manifest(snapshot)
    known = Manifest.from_json((snapshot / "manifest.json").read_bytes())
    with pytest.raises(OutputError, match="cp -rL THIS FOLDER"):
        verify_files(snapshot, known)
    subprocess.run(["cp", "-rL", snapshot, tmp_path / "copy"], check=True)
    verify_files(tmp_path / "copy", load_manifest(tmp_path / "copy"))
