"""Which engines of an earlier or an interrupted export are taken, and which are built again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.export import pipeline, plan
from dvdquant.export.engines import BuildReport, load_backend
from dvdquant.export.engines import stage as engines
from dvdquant.export.engines.stage import BuildSettings
from dvdquant.export.steps import is_step
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, run

ENGINE = "engines/rtx-sm89/transformer_a8.engine"
ARGUMENTS = ["--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


def quick_build(graph: Path, engine: Path, **options: Any) -> BuildReport:
    """In place of a build, which takes seconds, where only the choice of what is built counts."""
    engine.write_bytes(b"an engine")
    version = load_backend(options["backend"]).version
    return BuildReport(options["backend"], version, tuple(options["sms"]), 1.0, 9, 1, "0" * 64)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every build, which writes a file only."""
    calls: list[dict[str, Any]] = []

    def build(*arguments: Any, **options: Any) -> BuildReport:
        calls.append(options)
        return quick_build(*arguments, **options)

    monkeypatch.setattr(engines, "build_engine", build)
    return calls


def test_other_options_of_the_builder_build_the_engine_again(
    model: Path, tmp_path: Path, built: list[dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    in_process(model, "-o", out, *ARGUMENTS)
    (entry,) = load_manifest(out).engines
    assert entry.get("optimization_level", "missing") is None
    assert entry.get("workspace_gib", "missing") is None
    for number, options in enumerate((["--optimization-level", "1"], ["--workspace-gib", "0.5"])):
        in_process(model, "-o", out, *ARGUMENTS, *options)
        assert len(built) == 2 + number
    in_process(model, "-o", out, *ARGUMENTS, *options)
    assert len(built) == 3
    (entry,) = load_manifest(out).engines
    assert entry["workspace_gib"] == 0.5  # type: ignore[typeddict-item]
    assert entry["optimization_level"] is None  # type: ignore[typeddict-item]
    assert built[-1]["workspace_bytes"] == 1 << 29
    verify_files(out, load_manifest(out))
    # An export of before these fields counts as built with the defaults.
    data = json.loads((out / "manifest.json").read_text())
    for name in ("optimization_level", "workspace_gib", "plugins"):
        del data["engines"][0][name]
    (out / "manifest.json").write_text(json.dumps(data))
    before = len(built)
    assert "up to date" in in_process(model, "-o", out, *ARGUMENTS)
    assert len(built) == before


@pytest.fixture(scope="module")
def interrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both engines are built, by a release of before, and then the export fails."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    load = plan.load_backend

    def older(name: str) -> Any:
        return dataclasses.replace(load(name), version="1.0.0")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "load_backend", older)
        patch.setattr(pipeline, "model_card", fail)
        patch.setattr(engines, "build_engine", quick_build)
        result = run(model, "-o", out, *ARGUMENTS, "--sm", "12.0")
    assert result.exit_code == 2, result.output
    assert "Input/output error" in result.output
    assert list(out.glob(".tmp-*/tree/engines/*/*.engine"))
    return out


@pytest.fixture
def work(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def test_resume_builds_again_what_another_release_built(model: Path, work: Path) -> None:
    """By the real builder. An engine of the interrupted run that is not asked for any more does not get into the export."""
    in_process(model, "-o", work, *ARGUMENTS, "--resume")
    assert (work / ENGINE).stat().st_size > 1000
    manifest = load_manifest(work)
    (entry,) = manifest.engines
    assert entry["versions"] == {"tensorrt_rtx": plan.load_backend("tensorrt_rtx").version}
    assert [name for name in manifest.files if name.startswith("engines/")] == [ENGINE]
    assert sorted(p.name for p in (work / "engines").iterdir()) == ["rtx-sm89"]


def test_resume_takes_an_engine_of_the_same_settings_only(
    model: Path, work: Path, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = plan.load_backend
    with monkeypatch.context() as patch:
        patch.setattr(plan, "load_backend", lambda name: dataclasses.replace(load(name), version="1.0.0"))
        patch.setattr(pipeline, "model_card", lambda *_: 1 / 0)
        run(model, "-o", work, *ARGUMENTS, "--resume", "--optimization-level", "2")
        assert len(built) == 1
        run(model, "-o", work, *ARGUMENTS, "--resume", "--optimization-level", "2")
        assert len(built) == 1


SETTINGS = BuildSettings("0" * 64, "int8", "tensorrt", "11.0", 3, 1.5, ("1" * 64,))
ENTRY = {"onnx_sha256": "0" * 64, "precision": "int8", "versions": {"tensorrt": "11.0"}, **SETTINGS.recorded()}


def test_every_setting_counts() -> None:
    assert SETTINGS.made(ENTRY)
    others = {"onnx_sha256": "1" * 64, "precision": "int4", "backend": "tensorrt_rtx", "version": "10.9"}
    others |= {"optimization_level": None, "workspace_gib": 1.0, "plugins": (), "fuse": True}  # type: ignore[dict-item]
    others |= {"version_compatible": True, "kept_inputs": 1}  # type: ignore[dict-item]
    assert others.keys() == vars(SETTINGS).keys()
    for name, value in others.items():
        other = dataclasses.replace(SETTINGS, **{name: value})  # type: ignore[arg-type]
        assert not other.made(ENTRY), name
        assert other.digest != SETTINGS.digest, name
    for name in SETTINGS.recorded():
        for value in ("3", [], {}, None, True):
            assert not SETTINGS.made({**ENTRY, name: value})


def test_a_journal_that_is_not_ours_is_not_gone_on_from() -> None:
    layer = {
        "name": "blocks.0.ffn",
        "members": ["blocks.0.ffn"],
        "features_in": 64,
        "features_out": 64,
        "rotation_block": 64,
        "relative_mse": 0.5,
        "relative_mse_minmax": None,
    }
    good = {"entry": layer, "nonfinite": [], "crc": {"blocks.0.ffn.weight": 7}}
    assert is_step("transformer:layer:blocks.0.ffn", good)
    assert is_step("transformer:kept:0", {"nonfinite": ["x"], "crc": {}})
    assert is_step("transformer:hessian", None)
    bad: list[Any] = [None, [], 1, "x", {}, {**good, "crc": {"a": "7"}}, {**good, "crc": []}, {**good, "nonfinite": 1}]
    bad += [{**good, "entry": {**layer, name: value}} for name in layer for value in ([1], {}, True)]
    bad += [{**good, "entry": {k: v for k, v in layer.items() if k != name}} for name in layer]
    for data in bad:
        assert not is_step("transformer:layer:blocks.0.ffn", data), data
    for step in ("engine:x", "transformer:other:1", "transformer", "", ":", "engine:x:1"):
        assert not is_step(step, good), step
