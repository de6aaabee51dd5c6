"""What happens to an export between the plan of ``dvdq-build`` and its work, and while its engines are judged.

Here it is another run of dvdq-build or dvdq-export, or a hand; the builder is a double in this process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.errors import OutputError
from dvdquant.export import on_device
from dvdquant.export.on_device import DeviceResult, build_on_device, plan_on_device
from dvdquant.system.files import hash_file
from dvdquant.system.progress import Progress
from tests.support.commands import in_process
from tests.support.device_build import A4, A8, ORIN, build_here, flip_last_bit
from tests.support.device_build import made as made
from tests.support.device_build import model as model
from tests.support.device_build import out as out
from tests.support.device_build import plugin as plugin
from tests.support.device_build import quick_builder as quick_builder
from tests.support.device_build import tensorrt as tensorrt
from tests.support.session_exports import RANGES


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Something to be done once, after the plan and before the lock of the export."""

    def arrange(something: Callable[[], object]) -> None:
        require_disk = on_device.require_disk

        def first(*arguments: Any) -> None:
            monkeypatch.setattr(on_device, "require_disk", require_disk)
            something()
            require_disk(*arguments)

        monkeypatch.setattr(on_device, "require_disk", first)

    return arrange


def build_of(out: Path, plugin: Path, *bits: int) -> DeviceResult:
    plan = plan_on_device(out, load_manifest(out), ORIN, plugins=[plugin], bits=bits)
    return build_on_device(plan, Progress("quiet"))


def test_the_engine_of_another_run_stays(
    out: Path, plugin: Path, tensorrt: None, quick_builder: None, meanwhile: Any
) -> None:
    meanwhile(lambda: build_of(out, plugin, 4))
    result = build_of(out, plugin, 8)
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert [e["path"] for e in manifest.engines] == [A4, A8]
    assert list(result.reports) == [A8]
    assert result.manifest == manifest


def test_what_another_run_has_built_is_not_built_again(
    out: Path, plugin: Path, quick_builder: None, meanwhile: Any, tensorrt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two engines, or both of them."""
    meanwhile(lambda: build_of(out, plugin, 4))
    result = build_of(out, plugin)
    assert list(result.reports) == [A8]
    assert [entry["engine"] for entry in result.plan.current] == [A4]
    plugin.write_bytes(plugin.read_bytes() + b"another build of it")
    meanwhile(lambda: build_of(out, plugin))
    done = build_here(monkeypatch, out, "--plugin", plugin, "--no-check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{A4} is up to date", f"{A8} is up to date", "nothing to do"]
    verify_files(out, load_manifest(out))


def test_what_another_run_left_to_be_built_stays(
    model: Path, out: Path, plugin: Path, tensorrt: None, quick_builder: None, meanwhile: Any
) -> None:
    """dvdq-export adds another SM; then the export goes on as one that was built in that order."""
    more = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "11.0", *RANGES]
    meanwhile(lambda: in_process(model, "-o", out, *more))
    build_of(out, plugin)
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert [b["sm"] for b in manifest.builds] == [["8.7"], ["8.7"], ["11.0"], ["11.0"]]
    assert [e["path"] for e in manifest.engines] == [A4, A8]


@pytest.mark.parametrize("change", ["other weights", "other settings", "gone"])
def test_another_export_is_not_built_as_the_planned_one(
    change: str, out: Path, plugin: Path, tensorrt: None, quick_builder: None, meanwhile: Any
) -> None:
    left: list[Any] = []

    def replace() -> None:
        manifest, weights = load_manifest(out), "onnx/transformer.safetensors"
        if change == "gone":
            out.rename(out.with_name("elsewhere"))
        elif change == "other weights":
            flip_last_bit(out / weights)
            files = {**manifest.files, weights: hash_file(out / weights)}
            (out / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
        else:
            builds = tuple({**entry, "workspace_gib": 3.0} for entry in manifest.builds)
            (out / "manifest.json").write_text(dataclasses.replace(manifest, builds=builds).to_json())  # type: ignore[arg-type]
        left.append(load_manifest(out) if out.exists() else None)

    meanwhile(replace)
    with pytest.raises(OutputError, match="was changed meanwhile by another run: nothing was built") as caught:
        build_of(out, plugin)
    assert caught.value.fix == "run the same line again"
    assert (load_manifest(out) if out.exists() else None) == left[0]


def test_a_file_that_was_changed_before_the_lock_is_found(
    out: Path, plugin: Path, tensorrt: None, quick_builder: None, meanwhile: Any
) -> None:
    before = (out / "manifest.json").read_bytes()
    meanwhile(lambda: flip_last_bit(out / "onnx" / "transformer.safetensors"))
    with pytest.raises(OutputError, match=r"transformer\.safetensors was changed"):
        build_of(out, plugin)
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["a changed byte", "a missing file"])
def test_a_damaged_engine_of_another_width_is_left_out(
    damage: str, out: Path, plugin: Path, tensorrt: None, quick_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be entered again with the hash that it had; missing, it would end the work after the build."""
    build_of(out, plugin, 4)
    flip_last_bit(out / A4) if damage == "a changed byte" else (out / A4).unlink()
    done = build_here(monkeypatch, out, "--plugin", plugin, "--no-check", "--bits", 8)
    assert done.returncode == 0, done.stderr
    assert f"the engine is left out: {out} does not match its manifest: {A4} " in done.stderr
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert [e["path"] for e in manifest.engines] == [A8]
    assert not (out / A4).exists()


def test_others_read_the_graphs_while_engines_are_judged(
    out: Path, plugin: Path, tensorrt: None, quick_builder: None
) -> None:
    """Readers of external data refuse files with several names: of the export, and of what the judge gets."""
    graph = load_manifest(out).builds[0]["graph"]
    judged = []

    def judge(tree: Path, *_: object) -> None:
        for folder in (out, tree):
            onnx.load(folder / graph)  # with its weights
        judged.append(tree)

    plan = plan_on_device(out, load_manifest(out), ORIN, plugins=[plugin])
    build_on_device(plan, Progress("quiet"), check=judge)
    assert len(judged) == 2
