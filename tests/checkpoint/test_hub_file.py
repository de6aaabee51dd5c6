"""Single files by their name on the hub: what is such a name, what is downloaded, and the export of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from dvdquant.checkpoint.formats.files import names_file
from dvdquant.checkpoint.locate import hub_file, is_remote
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.cli import export as export_command
from dvdquant.errors import CheckpointError
from dvdquant.export.options import ExportOptions
from dvdquant.recipe import get_recipe
from tests.support import other_formats as formats
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process

NAME = "split_files/diffusion_models/wan[1].safetensors"


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("org/name/file.safetensors", ("org/name", "file.safetensors")),
        ("org/name:file.gguf", ("org/name", "file.gguf")),
        ("Org/na.me-1/a/b c/File.GGUF", ("Org/na.me-1", "a/b c/File.GGUF")),
        ("org/file.safetensors", None),
        ("org/name", None),
        ("org/name/file.bin", None),
        ("org/name/../../etc/file.gguf", None),
        ("org/name//file.gguf", None),
        ("./org/name/file.gguf", None),
        ("/org/name/file.gguf", None),
        ("~/org/name/file.gguf", None),
        ("org/name/a\0.gguf", None),
        ("here/name/file.gguf", None),
    ],
)
def test_what_names_a_file_of_the_hub(model: str, meant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_file(model) == meant
    if meant is not None:
        assert names_file(model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one repository, which the client would put into its cache by links; the calls of the client."""
    tensors = formats.wan_original(formats.folder_tensors(tiny.write_checkpoint(tmp_path / "folder", tiny.WAN)))
    blob = formats.save_single(tmp_path / "hub/models--org--name/blobs/0123", tensors)
    place = tmp_path / "hub/models--org--name/snapshots/abc"
    link = place / NAME
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    calls: list[dict[str, Any]] = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append({"model": model, "revision": revision, "patterns": allow_patterns})
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("separator", ["/", ":"])
def test_one_file_is_downloaded_and_read(hub: list[dict[str, Any]], tmp_path: Path, separator: str) -> None:
    model = f"org/name{separator}{NAME}"
    assert Checkpoint.components(model) == ["transformer"]
    assert hub == []
    checkpoint = open_checkpoint(model, revision="abc")
    # A name with a bracket is no pattern.
    assert hub == [{"model": "org/name", "revision": "abc", "patterns": [NAME.replace("[", "[[]")]}]
    assert checkpoint.source.layout.startswith("single file")
    folder = open_checkpoint(tmp_path / "folder")
    for name in folder.tensors:
        assert torch.equal(checkpoint.read(name), folder.read(name)), name


def test_a_file_that_the_repository_lacks(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"has no file gone\.gguf") as caught:
        open_checkpoint("org/name/gone.gguf")
    assert caught.value.fix
    assert len(hub) == 1


REMOTE = [f"org/name/{NAME}", f"org/name:{NAME}", "org/name"]


@pytest.mark.parametrize("model", REMOTE)
def test_the_early_check_fetches_nothing(hub: list[dict[str, Any]], tmp_path: Path, model: str) -> None:
    assert is_remote(model)
    options = ExportOptions(model=model, out=tmp_path / "out", recipe=get_recipe("rtn"), revision="abc")
    export_command.check_early(options)
    assert hub == []


def test_what_is_there_locally_is_not_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for model in (str(tmp_path), "here", "here/gone", "here/gone/file.gguf", "./gone/away", "gone/a/b", "org/na\0me"):
        assert not is_remote(model), model


@pytest.mark.parametrize("separator", ["/", ":"])
def test_an_export_downloads_the_revision_alone(hub: list[dict[str, Any]], tmp_path: Path, separator: str) -> None:
    arguments = ["--revision", "abc", "--recipe", "rtn", "--target", "onnx", *SIZES, "--dry-run"]
    in_process(f"org/name{separator}{NAME}", "-o", tmp_path / "out", *arguments)
    assert hub
    assert {call["revision"] for call in hub} == {"abc"}
    assert not (tmp_path / "out").exists()
