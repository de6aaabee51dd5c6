"""Exports on the hub: pushed to and read from a server on this machine that speaks the hub's HTTP API."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result

import dvdquant
from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.checkpoint.locate import locate_model
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.cli.plan import main as plan_main
from dvdquant.cli.push import main as push_main
from dvdquant.cli.run import main as run_main
from dvdquant.deploy import DvdqTransformer
from dvdquant.deploy.switching.schedule import default_place
from dvdquant.errors import CheckpointError, DvdquantError, OutputError, ResourceError
from dvdquant.hub import locate
from dvdquant.hub import push as room
from dvdquant.hub.locate import locate_export
from dvdquant.hub.names import is_hub_name, require_hub_name
from dvdquant.system import hub_client
from tests.support.children import in_child
from tests.support.commands import environment, refused
from tests.support.fake_hub import FAULTS, LARGE, TOKEN, FakeHub
from tests.support.session_exports import copy_of, family_export

NAME = "somebody/tiny-wan-w4a4"


@pytest.fixture(scope="module")
def export() -> Path:
    return family_export("wan", "fp16")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub that huggingface_hub in this process talks to, with an empty cache and a token."""
    constants = huggingface_hub.constants
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server


def push(*arguments: object) -> Result:
    return CliRunner().invoke(push_main, [str(a) for a in arguments])


def pushed(export: Path, *arguments: object) -> str:
    result = push(export, NAME, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


# ---------------------------------------------------------------------------------------------------------------- push


def test_what_is_pushed_is_read_back_and_runs(hub: FakeHub, export: Path, tmp_path: Path) -> None:
    """The same files, byte by byte, but for the card and what the manifest says of it; the same outputs."""
    output = pushed(export, "--license", "apache-2.0", "--tag", "toy model")
    assert f"{hub.url}/{NAME}/commit/" in output
    repository = hub.repositories[NAME]
    files = repository.at("main")[1]  # type: ignore[index]
    local = load_manifest(export)
    assert files.keys() - {".gitattributes"} == local.files.keys() | {"manifest.json", "README.md"}
    for name in local.files.keys() - {"README.md"}:
        assert files[name] == (export / name).read_bytes(), name
    assert any(len(content) >= LARGE for content in files.values())
    # Read back: plain files that match their manifest, so that every reader of exports takes them.
    folder = locate_export(NAME)
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (manifest.graphs, manifest.layers, manifest.recipe) == (local.graphs, local.layers, local.recipe)
    # No path of this machine goes along.
    assert str(tmp_path.parent.parent) not in files["manifest.json"].decode()
    assert manifest.source["model"] == Path(local.source["model"]).name
    card = files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "dvdquant"\n')
    assert '"toy model"' in card
    assert 'license: "apache-2.0"' in card
    assert f'from_pretrained("{NAME}")' in card
    assert card.count("\n---\n") == 1
    # The same numbers.
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 32), "return_dict": False,
    }  # fmt: skip
    outputs = []
    for place in (NAME, export):
        transformer = DvdqTransformer.from_pretrained(place, backend="pytorch", device="cpu", mode="a8")
        outputs.append(transformer(**inputs)[0])
        transformer.close()
    assert torch.equal(*outputs)


def test_a_dry_run_sends_nothing_and_needs_no_token(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = push(export, NAME, "--dry-run", "--private", "--json")
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert listed["files"].keys() == load_manifest(export).files.keys() | {"manifest.json", "README.md"}
    assert listed["files"]["README.md"] == len(listed["card"].encode())
    assert "private if it is new" in push(export, NAME, "--dry-run", "--private").output
    assert hub.requests == []
    refused(push(export, NAME), "no token", "HF_TOKEN")
    assert hub.requests == []


def test_private_repositories(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(export, "--private")
    assert hub.repositories[NAME].private
    assert (locate_export(NAME) / "manifest.json").is_file()
    monkeypatch.delenv("HF_TOKEN")
    other = "somebody/else"
    hub.add(other, {"manifest.json": b"{}"}, private=True)
    with pytest.raises(OutputError, match="neither a folder nor a repository") as caught:
        locate_export(other)
    assert "HF_TOKEN" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(push(export, "somebody/new"), "somebody/new", "HF_TOKEN")


def test_pushing_again_replaces_the_export_in_one_commit(hub: FakeHub, export: Path, tmp_path: Path) -> None:
    pushed(export)
    repository = hub.repositories[NAME]
    count = len(repository.commits)
    # The earlier export had an engine that the new one does not have.
    commit, files = repository.at("main")  # type: ignore[misc]
    old = json.loads(files["manifest.json"])
    old["files"]["engines/old.engine"] = {"sha256": "0" * 64, "bytes": 3}
    repository.commits[commit] = {
        **files, "engines/old.engine": b"old", "notes.md": b"by hand", "manifest.json": json.dumps(old).encode()
    }  # fmt: skip
    output = pushed(export, "--message", "once more")
    assert "1 files of the export that was there are removed" in output
    assert len(repository.commits) == count + 1
    now = repository.at("main")[1]  # type: ignore[index]
    assert "engines/old.engine" not in now
    assert now["notes.md"] == b"by hand"
    assert repository.messages[-1] == "once more"
    # Another model's export, and files that are none, stay where they are.
    other = copy_of(export, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["fingerprint"] = "f" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(push(other, NAME), "another model", "--force")
    hub.add("somebody/data", {"train.csv": b"1,2"})
    refused(push(export, "somebody/data"), "train.csv", "--force")
    assert push(export, "somebody/data", "--force").exit_code == 0
    assert hub.repositories["somebody/data"].at("main")[1]["train.csv"] == b"1,2"  # type: ignore[index]


def test_branches_are_revisions(hub: FakeHub, export: Path) -> None:
    pushed(export)
    main = locate_export(NAME)
    pushed(export, "--revision", "next", "--license", "other")
    following = locate_export(NAME, "next")
    assert following != main
    assert 'license: "other"' in (following / "README.md").read_text()
    assert locate_export(NAME, following.name) == following
    with pytest.raises(OutputError, match="no revision 'nowhere'"):
        locate_export(NAME, "nowhere")
    with pytest.raises(OutputError, match="is a folder"):
        locate_export(export, "main")


STAGES = {
    "create": r"POST /api/repos/create",
    "tree": r"GET /api/models/.*/tree",
    "preupload": r"POST /api/models/.*/preupload",
    "batch": r"POST .*/objects/batch",
    "upload": r"PUT /lfs/",
    "commit": r"POST /api/models/.*/commit",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A client that gives a silent server up soon, and does not pause; the pauses that it wanted, in seconds."""
    sleep, pauses = time.sleep, []

    def short(seconds: float) -> None:
        pauses.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(time, "sleep", short)
    monkeypatch.setattr(hub_client, "SILENCE", 0.15)
    monkeypatch.setattr(hub_client, "LONGEST_ANSWER", 0.1)
    return pauses


@pytest.mark.parametrize("stage", STAGES)
def test_a_hub_that_fails_in_any_stage_is_an_error_in_words_and_changes_nothing(
    hub: FakeHub, export: Path, impatient: list[float], stage: str
) -> None:
    """It answers 500 or nonsense, asks for a day's pause, hangs, drips, cuts the connection or its answer. Then all is well."""
    repository = hub.add(NAME, {".gitattributes": b""})
    plan = room.plan_push(export, NAME)
    before = {name: dict(files) for name, files in repository.commits.items()}
    for kind in FAULTS:
        if stage == "upload" and kind.startswith("answers"):
            continue  # nothing is read of this answer but its status
        hub.fault = STAGES[stage], kind
        with pytest.raises(OutputError) as caught:
            room.push(plan)
        assert caught.value.fix, kind
        assert "\x1b" not in str(caught.value)
        assert repository.commits == before, kind
    assert max(impatient, default=0) <= hub_client.LONGEST_PAUSE
    hub.go_on.set()
    hub.fault = None
    done = room.push(plan)
    assert repository.at("main")[0] == done.commit  # type: ignore[index]


@pytest.mark.parametrize(("kind", "said"), [("hangs", "does not answer"), ("drips", "does not come to an end")])
@pytest.mark.parametrize("asked", ["GET /api/models/.*/revision", "GET .*/tree"])
def test_a_silent_hub_is_given_up_by_readers(
    hub: FakeHub, export: Path, impatient: list[float], asked: str, kind: str, said: str
) -> None:
    """It says nothing, or a byte now and then. Of files the client has limits of its own."""
    pushed(export)
    hub.fault = asked, kind
    with pytest.raises(OutputError, match=said):
        locate_export(NAME)
    # Older clients do not list a model's files before they fetch them.
    with pytest.raises(CheckpointError, match=r"the hub gave nothing|does not come to an end"):
        locate_model(NAME, None, ["*.json"])
    hub.go_on.set()


def test_a_listing_without_end(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page names a next one: for what is pushed, and for an export and a model that are read."""
    monkeypatch.setattr(locate, "MAX_ENTRIES", 100)
    hub.add(NAME, {".gitattributes": b""})
    hub.endless = True
    with pytest.raises(OutputError, match="more than 100 files"):
        room.push(room.plan_push(export, NAME))
    monkeypatch.setattr(hub_client, "MOST_ANSWERS", 20)
    before = len(hub.requests)
    with pytest.raises(OutputError, match="no end after 20 pages"):
        locate_export(NAME)
    with pytest.raises(CheckpointError, match="no end after 20 pages"):
        locate_model(NAME, None, ["*.json"])
    assert len(hub.requests) - before <= 2 * 21
    monkeypatch.setattr(hub_client, "LARGEST_ANSWER", 10)
    with pytest.raises(CheckpointError, match=r"no end after .* bytes"):
        locate_model(NAME, None, ["*.json"])


def test_a_hub_that_has_something_else_than_was_sent_is_noticed(hub: FakeHub, export: Path) -> None:
    """It says another size, or loses a file."""
    plan = room.plan_push(export, NAME)
    hub.loses = "onnx/transformer.safetensors"
    with pytest.raises(
        OutputError, match=r"has other files .* than were sent: onnx/transformer\.safetensors has 0 bytes"
    ):
        room.push(plan)


def test_a_manifest_of_any_size_in_the_repository_is_not_fetched(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_MANIFEST", 1000)
    hub.add(NAME, {"manifest.json": b"[" * 2000})
    with pytest.raises(OutputError, match="no export of dvdquant"):
        room.push(room.plan_push(export, NAME))
    assert not any("resolve" in request for request in hub.requests)


def test_a_full_disk_under_the_cache_is_said(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, {"manifest.json": b"{}"})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(ResourceError, match="no room left"):
        room.push(room.plan_push(export, NAME))


def test_a_changed_file_is_not_pushed(hub: FakeHub, export: Path, tmp_path: Path) -> None:
    damaged = copy_of(export, tmp_path / "damaged")
    weights = damaged / "onnx" / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    refused(push(damaged, NAME), "transformer.safetensors", "SHA-256")
    assert hub.requests == []


def test_a_file_that_changes_while_it_is_sent_is_not_committed(
    hub: FakeHub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SMALL", 0)
    changing = copy_of(export, tmp_path / "changing")
    plan = room.plan_push(changing, NAME)
    weights = changing / "onnx" / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(OutputError, match=r"transformer\.safetensors changed while it was sent"):
        room.push(plan)
    assert len(hub.repositories[NAME].commits) == 1
    assert not any("/commit/" in request for request in hub.requests)


@pytest.mark.parametrize(
    "name", ["wan", "a/b/c", "user/name.git", "user/..", "../user", "user/a b", "user/a--b", "/user/a"]
)
def test_names_that_are_none(export: Path, name: str) -> None:
    with pytest.raises(OutputError, match="user/name"):
        require_hub_name(name)
    assert push(export, name, "--dry-run").exit_code == 2


@pytest.mark.parametrize("option", [["--license", "MIT license!"], ["--tag", "a\nb: c"], ["--base-model", "x"]])
def test_fields_of_the_card_are_checked(export: Path, option: list[str]) -> None:
    refused(push(export, NAME, "--dry-run", *option))


def test_the_model_that_was_exported_is_named(export: Path, tmp_path: Path) -> None:
    from dvdquant.hub.push import plan_push

    assert "base_model" not in plan_push(export, NAME).card
    of_hub = copy_of(export, tmp_path / "of-hub")
    data = json.loads((of_hub / "manifest.json").read_text())
    data["source"]["model"] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    (of_hub / "manifest.json").write_text(json.dumps(data))
    plan = plan_push(of_hub, NAME)
    assert 'base_model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"\nbase_model_relation: "quantized"' in plan.card
    assert plan.manifest.source["model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert 'base_model: "a/b"' in plan_push(of_hub, NAME, base_model="a/b").card


# ---------------------------------------------------------------------------------------------------------------- read


def test_commands_read_a_repository(
    hub: FakeHub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(export)
    runner = CliRunner()
    shown = runner.invoke(inspect_main, [NAME, "--check"])
    assert shown.exit_code == 0, shown.output
    assert "match the manifest" in shown.output
    refused(runner.invoke(inspect_main, [NAME, "--revision", "old"]), "no revision 'old'")
    refused(runner.invoke(plan_main, [NAME, "--revision", "old", "--prompt", "a"]), "no revision 'old'")
    # The schedule of an export of the hub goes beside the user, and that place is looked at before the work.
    monkeypatch.chdir(tmp_path)
    name = f"{NAME.partition('/')[2]}-schedule.json"
    (tmp_path / name).mkdir()
    refused(runner.invoke(plan_main, [NAME, "--prompt", "a"]), name)
    assert default_place(export, export) == export / "schedule.json"
    # Python's functions read it, too, and say the same.
    assert dvdquant.inspect_export(NAME, check=True).layers == load_manifest(export).layers
    for call in (dvdquant.inspect_export, lambda name, **more: dvdquant.plan_schedule(name, "a", **more)):
        with pytest.raises(OutputError, match="no revision 'old'"):
            call(NAME, revision="old")
        with pytest.raises(OutputError, match="a revision is for a repository"):
            call(export, revision="old")
    with pytest.raises(OutputError, match=name):
        dvdquant.plan_schedule(NAME, "a")
    # The export is found; its model has no pipeline to draw a clip with.
    result = runner.invoke(run_main, [NAME, "--prompt", "a", "-o", str(tmp_path / "a.mp4"), "--pipeline", str(export)])
    refused(result, way_out=False)
    assert "neither a folder nor" not in result.output


def test_what_was_downloaded_is_read_without_a_connection(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(export)
    first = locate_export(NAME)
    before = len(hub.requests)
    assert locate_export(NAME) == first
    assert not any("/resolve/" in request for request in hub.requests[before:])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert locate_export(NAME) == first
    assert len(hub.requests) == before
    shutil.rmtree(first)
    assert locate_export(NAME) == first
    verify_files(first, load_manifest(first))
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        locate_export("somebody/unseen")


def test_a_killed_download_leaves_nothing_for_ever(hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends while the files are compared with the manifest: the next download removes what it left."""
    pushed(export)

    def kill(folder: Path, manifest: Manifest) -> None:
        assert (folder / "manifest.json").is_file()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(locate, "verify_files", kill)
        assert in_child(lambda: print(locate_export(NAME))) == -signal.SIGKILL
    (place,) = (Path(huggingface_hub.constants.HF_HOME) / "dvdquant").iterdir()
    assert len(list(place.iterdir())) == 2, "the unfinished folder, and the file that has its lock"
    whole = locate_export(NAME)
    assert list(place.iterdir()) == [whole]
    verify_files(whole, load_manifest(whole))


def test_what_another_download_made_meanwhile_stays(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be read by then: it is the folder that both give, and no file of it goes for a moment."""
    pushed(export)
    verify, inodes = locate.verify_files, []

    def overtaken(folder: Path, manifest: Manifest) -> None:
        monkeypatch.setattr(locate, "verify_files", verify)
        inodes.append(locate_export(NAME).stat().st_ino)
        verify(folder, manifest)

    monkeypatch.setattr(locate, "verify_files", overtaken)
    whole = locate_export(NAME)
    assert [whole.stat().st_ino] == inodes
    assert list(whole.parent.iterdir()) == [whole]


def test_a_repository_that_is_no_export(hub: FakeHub) -> None:
    hub.add("somebody/model", {"config.json": b"{}", "model.safetensors": b"x" * LARGE})
    with pytest.raises(OutputError, match=r"no export of dvdquant: it has no manifest\.json"):
        locate_export("somebody/model")
    assert not any("model.safetensors" in request for request in hub.requests)
    hub.add("somebody/other", {"manifest.json": b'{"manifest_version": 3}'})
    with pytest.raises(OutputError):
        locate_export("somebody/other")
    with pytest.raises(OutputError, match="neither a folder nor a repository"):
        locate_export("nobody/nothing")


def damage(files: dict[str, bytes], how: str) -> dict[str, Any]:
    """Files of a repository that do not fit its manifest."""
    name = "onnx/transformer.safetensors"
    if how == "missing":
        return {path: content for path, content in files.items() if path != name}
    if how == "longer":
        return {**files, name: files[name] + b"\0"}
    return {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])}


@pytest.mark.parametrize("how", ["missing", "longer", "other bytes"])
def test_files_that_are_not_the_manifests_are_refused_before_they_are_fetched(
    hub: FakeHub, export: Path, how: str
) -> None:
    pushed(export)
    repository = hub.repositories[NAME]
    commit, files = repository.at("main")  # type: ignore[misc]
    repository.commits[commit] = damage(files, how)
    with pytest.raises(OutputError, match=r"does not match its manifest.*transformer\.safetensors") as caught:
        locate_export(NAME)
    assert "dvdq-push" in str(caught.value)
    assert not any("resolve" in request and "safetensors" in request for request in hub.requests)


def test_a_server_that_serves_other_bytes(hub: FakeHub, export: Path) -> None:
    """Of the right size, and under the right digest in the listing."""
    pushed(export)
    name = "onnx/transformer.safetensors"
    content = hub.repositories[NAME].at("main")[1][name]  # type: ignore[index]
    hub.corrupt[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(OutputError, match=r"what was downloaded of somebody/tiny-wan-w4a4 does not match.*SHA-256"):
        locate_export(NAME)
    assert list((Path(huggingface_hub.constants.HF_HOME) / "dvdquant").rglob("manifest.json")) == []


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "onnx/../../out"])
def test_a_manifest_that_names_files_elsewhere(hub: FakeHub, export: Path, path: str) -> None:
    pushed(export)
    repository = hub.repositories[NAME]
    commit, files = repository.at("main")  # type: ignore[misc]
    data = json.loads(files["manifest.json"])
    data["files"][path] = {"sha256": "0" * 64, "bytes": 3}
    repository.commits[commit] = {**files, "manifest.json": json.dumps(data).encode(), path: b"abc"}
    with pytest.raises(DvdquantError):
        locate_export(NAME)
    assert not any("resolve" in request and "safetensors" in request for request in hub.requests)


def test_a_folder_is_taken_before_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("out/wan")
    (tmp_path / "out").mkdir()
    assert not is_hub_name("out/wan")  # a mistyped folder is not looked for on the hub
    for path in (".", "/tmp/x", "./a/b", "a", "a/b/c", "../a"):
        assert not is_hub_name(path)
    assert locate_export("out/wan") == Path("out/wan")


def test_the_commands_as_processes(export: Path, tmp_path: Path) -> None:
    """By the variables that users set: HF_ENDPOINT, HF_HOME, HF_TOKEN."""
    with FakeHub() as server:
        variables = {**environment(), "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # this server speaks git LFS alone
        for command in (["push", str(export), NAME], ["inspect", NAME, "--check"]):
            line = [sys.executable, "-m", f"dvdquant.cli.{command[0]}", *command[1:]]
            done = subprocess.run(line, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=300)
            assert done.returncode == 0, done.stderr
        assert Manifest.from_json(server.repositories[NAME].at("main")[1]["manifest.json"])  # type: ignore[index]
        assert os.listdir(tmp_path / "hf" / "dvdquant") == ["somebody--tiny-wan-w4a4"]
