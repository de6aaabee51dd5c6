"""Engines for a device that is elsewhere: what the export leaves, what the device builds of it, and what it refuses first.

TensorRT is a double (tests/support/tensorrt_double), in the real process that builds; TensorRT-RTX is the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner

from dvdquant.artifact.bundle import open_bundle, unpack_bundle, write_bundle
from dvdquant.artifact.layout import PLUGIN_PLACE
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.backends import Backend
from dvdquant.cli.build import main as build_main
from dvdquant.cli.bundle import main as bundle_main
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions.engines import TensorRTSession
from dvdquant.errors import EngineError, OutputError, ResourceError, UnsupportedError
from dvdquant.export import build_room, on_device
from dvdquant.export.build_room import check_builds
from dvdquant.export.elsewhere import COMPATIBLE, SCRIPT
from dvdquant.export.engines import BuildReport, stage
from dvdquant.export.engines.report import memory_advice
from dvdquant.export.on_device import as_compatible, build_on_device, plan_on_device
from dvdquant.export.options import ExportOptions
from dvdquant.hardware.make_lines import make_plugin
from dvdquant.model.families import Sizes, get_family
from dvdquant.model.working_memory import step_bytes_at
from dvdquant.recipe import get_recipe
from dvdquant.system.gpu import Gpu
from dvdquant.system.progress import Progress
from dvdquant.text import amount
from tests.deploy.test_lean_runtime import Machine
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, run
from tests.support.device_build import ORIN, build, build_here, plugin_library
from tests.support.session_exports import RANGES

A4, A8 = (f"engines/tensorrt-sm87/transformer_a{bits}.engine" for bits in (4, 8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """An export for an Orin, made where there is neither TensorRT nor a GPU."""
    out = model.parent / "orin"
    in_process(model, "-o", out, "--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def refused(done: object, *texts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr  # type: ignore[attr-defined]
    for text in texts:
        assert text in done.stderr, done.stderr  # type: ignore[attr-defined]
    assert "Traceback" not in done.stderr  # type: ignore[attr-defined]


def engine_of(out: Path, path: str) -> dict[str, object]:
    """What the double wrote."""
    return dict(json.loads((out / path).read_text()))


# ------------------------------------------------------------------------------------------------------------ the export


def test_the_dry_run_needs_no_tensorrt(model: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", "--sm", "11.0", *SIZES, "--dry-run"]
    text = in_process(model, "-o", tmp_path / "out", *arguments)
    assert "left to dvdq-build on the device" in text
    assert "a4 on SM 8.7 (tensorrt)" in text
    assert "a8 on SM 11.0 (tensorrt)" in text
    plan = json.loads(in_process(model, "-o", tmp_path / "out", *arguments, "--log-format", "json"))
    assert [(e["sm"], e["act_bits"]) for e in plan["later"]] == [
        (["8.7"], 4),
        (["11.0"], 4),
        (["8.7"], 8),
        (["11.0"], 8),
    ]
    assert plan["engines"] == []
    held = {name.partition(" (")[0]: size for name, size in plan["held_bytes"].items()}
    # The weights stay packed, so that it is the same for all.
    assert held["a4 on SM 8.7"] == held["a8 on SM 8.7"] == held["a4 on SM 11.0"] == held["a8 on SM 11.0"]
    assert "on the device, an engine of one transformer with its weights: a4 on SM 8.7" in text
    assert "too small" not in text
    assert not (tmp_path / "out").exists()


def test_engines_here_still_need_the_plugin(model: Path, tmp_path: Path) -> None:
    result = run(model, "-o", tmp_path / "out", "--target", "tensorrt", "--sm", "8.7", "--build", "here", *SIZES)
    assert result.exit_code == 2
    assert "tensorrt" in result.output


def test_what_is_left_for_the_device(made: Path) -> None:
    manifest = load_manifest(made)
    verify_files(made, manifest)
    assert manifest.engines == ()
    assert [b["engine"] for b in manifest.builds] == [A4, A8]
    sizes = Sizes.from_json(manifest.shapes)
    for entry in manifest.builds:
        assert entry["graph"] in manifest.files
        assert entry["working_bytes"] == step_bytes_at(get_family(tiny.WAN_ONE), sizes, sizes.at("opt")) > 0
        graph = onnx.load(made / entry["graph"], load_external_data=False).graph
        assert all(node.domain != "dvdquant" or node.op_type == "QuantLinear" for node in graph.node)
        inputs = {value.name for value in graph.input}
        assert set(entry["profile"] or {}) <= inputs
        assert any(name.endswith(".weight_group_scale") for name in inputs), "packed weights are inputs"
        assert not any(
            "QuantLinear" in f.name for f in onnx.load(made / entry["graph"], load_external_data=False).functions
        )
        # The line of TensorRT's own builder says the same as the entry.
        words = shlex.split(entry["command"])
        assert words[0] == "trtexec"
        options = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
        assert options["onnx"] == entry["graph"]
        assert options["saveEngine"] == entry["engine"]
        for which, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = {part.split(":")[0]: part.split(":")[1] for part in options[name].split(",")}
            assert shapes == {n: "x".join(map(str, three[which])) for n, three in (entry["profile"] or {}).items()}
        assert entry["command"] in (made / SCRIPT).read_text()


def test_the_script_runs_its_lines_beside_the_plugin_and_says_where_that_is_missing(out: Path, tmp_path: Path) -> None:
    (tmp_path / "trtexec").write_text(
        '#!/bin/sh\nfor word; do case $word in --saveEngine=*) echo > "${word#*=}";; esac; done\n'
    )
    (tmp_path / "trtexec").chmod(0o755)

    def script() -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
        return subprocess.run(
            ["sh", str(out / SCRIPT)], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60
        )

    refused(script(), f"{out}/{PLUGIN_PLACE} is missing: make plugin builds it")
    assert not (out / "engines").exists()
    plugin_library(out / PLUGIN_PLACE)
    assert script().returncode == 0
    assert (out / A4).is_file()
    assert (out / A8).is_file()


def test_the_same_export_again_is_up_to_date(model: Path, made: Path) -> None:
    arguments = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES]
    assert "is up to date" in in_process(model, "-o", made, *arguments)


def test_another_sm_is_added_to_what_is_there(model: Path, out: Path) -> None:
    in_process(model, "-o", out, "--recipe", "rtn", "--target", "tensorrt", "--sm", "11.0", *RANGES)
    manifest = load_manifest(out)
    assert [b["sm"] for b in manifest.builds] == [["8.7"], ["8.7"], ["11.0"], ["11.0"]]
    verify_files(out, manifest)


# ------------------------------------------------------------------------------------------------------------ the device


def test_the_device_builds_enters_and_repeats_nothing(out: Path, tmp_path: Path, tensorrt: None) -> None:
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    before = load_manifest(out)
    done = build(out, "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert [e["path"] for e in manifest.engines] == [A4, A8]
    assert {name: manifest.files[name] for name in before.files if name != "README.md"} == {
        name: entry for name, entry in before.files.items() if name != "README.md"
    }
    assert manifest.export_key == before.export_key, "dvdq-export knows its own weights again"
    for entry, bits in zip(manifest.engines, (4, 8)):
        told = engine_of(out, entry["path"])
        assert told["act_bits"] == [bits]
        assert told["libraries"] == [str(plugin)]
        assert told["profiles"] == [before.builds[0]["profile"]]
        assert entry["versions"] == {"tensorrt": "11.4.0.1"}
        assert entry["sm"] == ["8.7"]
        assert "measured" not in entry
        assert (told["flags"], entry["version_compatible"]) == ([], False), (
            "slower engines are for those who ask for them"
        )
    assert "was not run" in done.stdout
    assert manifest.files[A4]["sha256"][:12] in done.stdout
    assert all((out / name).stat().st_nlink == 1 for name in manifest.files), "readers refuse files with two names"
    again = plan_on_device(out, manifest, ORIN, plugins=[plugin])
    assert (again.builds, len(again.current)) == ((), 2)
    # Another release of TensorRT, another plugin, or a damaged engine is built again.
    plugin.write_bytes(plugin.read_bytes() + b"x")
    assert len(plan_on_device(out, manifest, ORIN, plugins=[plugin]).builds) == 2


def test_an_interrupted_build_goes_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    before = (out / "manifest.json").read_bytes()
    failed = build_here(monkeypatch, out, "--plugin", plugin, DOUBLE_FAIL="[8]")
    refused(failed, "could not build the engine for SM 8.7", "--resume")
    assert (out / "manifest.json").read_bytes() == before
    done = build_here(monkeypatch, out, "--plugin", plugin, "--resume", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert len(manifest.engines) == 2
    assert not [name for name in os.listdir(out) if name.startswith(".tmp-")]


def test_version_compatible_engines(
    model: Path, out: Path, tmp_path: Path, tensorrt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for where they are built, or in the export; without a runtime inside; and the lean runtime runs what comes out."""
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    asked = (out, "--plugin", plugin, "--version-compatible")
    planned = build_here(monkeypatch, *asked, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    lines = [line for line in planned.stdout.splitlines() if line.startswith("by hand: ")]
    assert [line.split()[-2:] for line in lines] == [[*COMPATIBLE]] * 2
    assert f"{A8}: TensorRT's lean runtime of the same release runs it, too" in planned.stdout
    # 1. The export asks for them: dvdq-build needs no word.
    arguments = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES]
    in_process(model, "-o", out, *arguments, "--version-compatible")
    for entry in load_manifest(out).builds:
        assert entry["version_compatible"] is True
        assert set(COMPATIBLE) <= set(shlex.split(entry["command"]))
        assert entry["command"] in (out / SCRIPT).read_text()
    done = build_here(monkeypatch, out, "--plugin", plugin, "--bits", "8")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    (engine,) = manifest.engines
    assert engine_of(out, A8)["flags"] == ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    assert engine["version_compatible"] is True
    assert "tensorrt 11.4.0.1, or its lean runtime" in CliRunner().invoke(inspect_main, [str(out)]).output
    assert "--version-compatible" in Artifact.open(out).rebuild_command()
    # 2. It is up to date for who asks for such an engine, and no other.
    for builds, count in (
        (manifest.builds, 0),
        (tuple({**e, "version_compatible": False} for e in manifest.builds), 1),
    ):
        other = dataclasses.replace(manifest, builds=builds)
        assert len(plan_on_device(out, other, ORIN, plugins=[plugin], bits=[8]).builds) == count
        assert plan_on_device(out, other, ORIN, plugins=[plugin], bits=[8], version_compatible=True).builds == ()
    # 3. On a machine with the lean runtime of that release alone.
    machine = Machine(monkeypatch, None, "11.4.0.1")
    with TensorRTSession(Artifact.open(out), bits=[8], device=torch.device("cpu"), backend="tensorrt") as session:
        assert session.library == "tensorrt_lean 11.4.0.1"
    assert machine.deserialized == {"tensorrt_lean": 1}


def test_tensorrt_rtx_builds_no_version_compatible_engines(made: Path, tmp_path: Path) -> None:
    """An option that asks for them alone is refused; beside engines of TensorRT, those of TensorRT-RTX stay as they are."""
    with pytest.raises(
        UnsupportedError, match=r"is for TensorRT engines, and --target is rtx(?s:.*)take --target tensorrt"
    ):
        ExportOptions("model", tmp_path, get_recipe("rtn"), targets=("rtx",), version_compatible=True)
    ours, other = load_manifest(made).builds
    rtx = {**other, "backend": "tensorrt_rtx", "command": ""}
    with pytest.raises(UnsupportedError, match="OUT has TensorRT-RTX engines to build"):
        as_compatible([rtx], "OUT")  # type: ignore[list-item]
    asked, same = as_compatible([ours, rtx], "OUT")  # type: ignore[list-item]
    assert (asked["version_compatible"], same) == (True, rtx)
    assert as_compatible([asked], "OUT") == [asked], "the line has each option once"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT by its version alone, for what is decided before it is used."""
    monkeypatch.setattr(on_device, "load_backend", lambda name: Backend(name, None, "11.4.0.1"))


def test_what_does_not_fit_is_refused_before_work(out: Path, tmp_path: Path, tensorrt: None) -> None:
    good = plugin_library(tmp_path / "libdvdquant_plugins.so")
    manifest = load_manifest(out)
    assert len(plan_on_device(out, manifest, ORIN, plugins=[good]).builds) == 2
    arm, pc = (plugin_library(tmp_path / m / "libx.so", machine=m) for m in ("aarch64", "x86_64"))
    (tmp_path / "text.so").write_text("no library")
    other = [plugin_library(tmp_path / f"{m}.so", major=m) for m in (10,)]
    kernels = plugin_library(tmp_path / "kernels.so", major=None)
    desktop = plugin_library(tmp_path / "desktop.so", kernels="80;90a;100;120")
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            r"is for SM 8\.7, and this GPU \(RTX\) has SM 8\.9(?s:.*)--sm 8\.9",
            {"gpu": Gpu("RTX", "8.9", 8 << 30, False)},
        ),
        (r"driver of this machine names none(?s:.*)on the device", {"gpu": None}),
        (r"--plugin was not given", {"plugins": []}),
        (r"is built for TensorRT 10, and this machine has 11\.4\.0\.1", {"plugins": other}),
        (r"is for \w+, and this machine is", {"plugins": [arm, pc]}),
        (r"are for 80, 90a, 100, 120, and this GPU has SM 8\.7", {"plugins": [desktop]}),
        (r"is no plugin library", {"plugins": [tmp_path / "text.so"]}),
        (r"holds dvdquant's kernels without the plugin", {"plugins": [good, kernels]}),
        (r"to take .* of device memory(?s:.*) on Orin", {"gpu": dataclasses.replace(ORIN, memory_bytes=10**6)}),
        (r"no engine of 6 bits to build(?s:.*)4 bits, 8 bits", {"bits": [6]}),
    ]
    for text, changes in cases:
        gpu = changes.pop("gpu", ORIN)
        with pytest.raises((UnsupportedError, ResourceError), match=text):
            plan_on_device(out, manifest, gpu, **{"plugins": [good], **changes})


GIB = 1 << 30
SMALL_ORIN = dataclasses.replace(ORIN, memory_bytes=int(7.4 * GIB))
CARD = Gpu("RTX", "8.7", int(7.4 * GIB), False)


def sized(manifest: Any, a4: dict[str, float], a8: dict[str, float], **changes: Any) -> Any:
    """The manifest with other sizes of its two engines, in GiB: ``build``, ``held`` and ``work``."""
    names = {"build": "builder_bytes", "held": "held_bytes", "work": "working_bytes"}
    builds = tuple(
        {**entry, "working_bytes": 0, **{names[key]: int(GIB * size) for key, size in sizes.items()}, **changes}
        for entry, sizes in zip(manifest.builds, (a4, a8))
    )
    return dataclasses.replace(manifest, builds=builds)


def memory_error(manifest: Any, gpu: Gpu | None) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        check_builds(manifest.builds, manifest, gpu)
    return caught.value


def test_too_little_memory_to_build_says_what_fits(out: Path, tmp_path: Path, tensorrt: None, monkeypatch: Any) -> None:
    good = plugin_library(tmp_path / "libdvdquant_plugins.so")
    uneven = sized(load_manifest(out), {"build": 0.5}, {"build": 8})
    monkeypatch.setattr(build_room, "memory_limit", lambda: 4 * GIB)
    with pytest.raises(ResourceError, match=r"estimated to take 9\.0 GiB of memory, 1\.0 GiB of it for CUDA") as caught:
        plan_on_device(out, uneven, ORIN, plugins=[good])
    assert re.fullmatch(r"4\.0 GiB; fits: a4 \(1\.5 GiB to build, [\d.]+ MiB to use\)", str(caught.value.available))
    assert caught.value.fix == "build what fits: dvdq-build … --bits 4"
    assert len(plan_on_device(out, uneven, ORIN, plugins=[good], bits=[4]).builds) == 1


def test_what_fits_the_builder_alone_does_not_fit(out: Path, monkeypatch: Any) -> None:
    """Two engines that an 8 GB Orin could build and never hold: neither is offered."""
    manifest = load_manifest(out)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    error = memory_error(sized(manifest, {"build": 2, "held": 8}, {"build": 2, "held": 8}), SMALL_ORIN)
    assert "estimated to take 8.0 GiB of device memory, 8.0 GiB for weights" in error.what
    assert error.available == (
        "5.4 GiB on Orin, where 2.0 GiB of 7.4 GiB are kept back for CUDA and the system; nothing of this export fits"
    )
    # One can be held and not built, the other built and not held.
    error = memory_error(sized(manifest, {"build": 5.5, "held": 1}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert str(error.available).endswith("nothing of this export fits")
    # One fits both.
    error = memory_error(sized(manifest, {"build": 1, "held": 1, "work": 2}, {"build": 1, "held": 8}), SMALL_ORIN)
    assert str(error.available).endswith("fits: a4 (2.0 GiB to build, 3.0 GiB to use)")
    assert error.fix == "build what fits: dvdq-build … --bits 4"


@pytest.mark.parametrize(
    ("gpu", "a4", "fits"),
    [
        (SMALL_ORIN, {"held": 7.3}, False),
        (SMALL_ORIN, {"held": 5.3}, True),
        (SMALL_ORIN, {"held": 5.3, "work": 0.2}, False),
        (CARD, {"held": 6.3}, True),
        (CARD, {"held": 6.3, "work": 0.2}, False),
        # The builder and CUDA share the memory of an Orin; a card has its own.
        (SMALL_ORIN, {"build": 5.5}, False),
        (CARD, {"build": 5.5}, True),
        (CARD, {"build": 6.5}, False),
        (None, {"build": 5.5, "held": 99}, True),
    ],
)
def test_what_a_device_has_room_for(
    gpu: Gpu | None, a4: dict[str, float], fits: bool, made: Path, monkeypatch: Any
) -> None:
    """Weights, what a call works in and what CUDA and the system keep are counted together."""
    manifest = sized(load_manifest(made), a4, {})
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    if fits:
        check_builds(manifest.builds, manifest, gpu)
    else:
        assert "fits: a8 (" in str(memory_error(manifest, gpu).available)


def test_what_to_do_where_nothing_fits(made: Path, monkeypatch: Any) -> None:
    """Every way out is computed from the export, and would fit."""
    manifest = load_manifest(made)
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)

    def fix(each: dict[str, float], gpu: Gpu = SMALL_ORIN, **changes: Any) -> str:
        return str(memory_error(sized(manifest, each, each, **changes), gpu).fix)

    packed = sum(file["bytes"] for name, file in manifest.files.items() if name == "onnx/transformer.safetensors")
    # 1. The same weights, packed, in a session that needs no engine.
    assert fix({"held": 8}) == (
        f"draw without engines: dvdq-run … --backend pytorch holds the weights packed, {amount(packed)}"
    )
    # 2. Smaller clips: 5.4 GiB less the weights are 40.4 % of what a call works in.
    few = {**manifest.files, "onnx/transformer.safetensors": {"bytes": 8 * GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=few)
    latents = " × ".join(str(manifest.shapes[axis][1]) for axis in ("frames", "height", "width"))
    said = fix({"held": 1.4, "work": 9.9})
    assert f"at most 40 % of the {latents} latents" in said
    assert "--target tensorrt --sm 8.7 --dry-run" in said
    # 3. A smaller model: 5.4 of 8 GiB.
    layer = {**manifest.layers[0], "features_in": 4096}
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 4096}, {**layer, "features_out": 8192}))
    said = fix({"held": 8, "work": 0.01})
    assert "at most 34 million weights (this one has 50 million); dvdq-export" in said, "no clip is small enough"
    assert "or for much smaller clips; dvdq-export" in fix({"held": 5.4, "work": 9})
    manifest = dataclasses.replace(manifest, layers=({**layer, "features_out": 2**20},) * 3)
    assert "at most 8.7 billion weights (this one has 12.9 billion)" in fix({"held": 8})
    # 4. The builder alone is too large.
    small = {**few, "onnx/transformer.safetensors": {"bytes": GIB, "sha256": "0" * 64}}
    manifest = dataclasses.replace(manifest, files=small)
    assert fix({"build": 9}) == (
        "end other programs, or draw without engines: dvdq-run … --backend pytorch holds 1.0 GiB of weights"
    )
    assert "needs no GPU to build" in fix({"build": 9}, backend="tensorrt_rtx")
    # An engine of TensorRT-RTX for another card is no matter of this GPU's memory.
    elsewhere = sized(manifest, {"held": 99}, {"held": 99}, backend="tensorrt_rtx", sm=["12.0"])
    check_builds(elsewhere.builds, elsewhere, SMALL_ORIN)


def test_two_transformers_are_held_together(made: Path, monkeypatch: Any) -> None:
    manifest = sized(load_manifest(made), {"held": 3, "work": 1}, {"held": 1})
    second = tuple(
        {**entry, "component": "transformer_2", "engine": f"{entry['engine']}2"} for entry in manifest.builds
    )
    monkeypatch.setattr(build_room, "memory_limit", lambda: 6 * GIB)
    check_builds(manifest.builds, manifest, SMALL_ORIN)
    error = memory_error(dataclasses.replace(manifest, builds=(*manifest.builds, *second)), SMALL_ORIN)
    assert "estimated to take 7.0 GiB of device memory, 6.0 GiB for weights and 1.0 GiB to work in" in error.what
    assert "fits: a8 (" in str(error.available)


def test_the_need_of_tensorrts_builder_is_called_an_estimate() -> None:
    """The factor was measured with TensorRT-RTX."""
    assert "estimate" in memory_advice("tensorrt")
    assert "estimate" not in memory_advice("tensorrt_rtx")


def test_a_damaged_export_is_not_built(out: Path, tmp_path: Path, tensorrt: None) -> None:
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    (out / "onnx" / "transformer.safetensors").write_bytes(b"x")
    plan = plan_on_device(out, load_manifest(out), ORIN, plugins=[plugin])
    with pytest.raises(OutputError, match="does not match its manifest"):
        build_on_device(plan, Progress("quiet"))
    assert load_manifest(out).engines == ()


@pytest.mark.parametrize(
    ("own", "advice"), [(None, "report it with the log"), ("update the driver", "update the driver")]
)
def test_an_engine_that_fails_its_check(
    own: str | None, advice: str, out: Path, tmp_path: Path, tensorrt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder writes a file only; the judge's own advice is passed on, and a general one is not."""
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    hashed, limits = [], []
    hash_file, memory_limit = on_device.hash_file, build_room.memory_limit

    def quick_build(graph: Path, engine: Path, **options: Any) -> BuildReport:
        engine.write_bytes(b"an engine")
        return BuildReport(options["backend"], "11.4.0.1", tuple(options["sms"]), 1.0, 9, 1, "0" * 64)

    def judge(*_: object) -> None:
        raise EngineError("it computes something else", fix=own)

    monkeypatch.setattr(stage, "build_engine", quick_build)
    monkeypatch.setattr(on_device, "hash_file", lambda path: (hashed.append(path), hash_file(path))[1])
    monkeypatch.setattr(build_room, "memory_limit", lambda: (limits.append(1), memory_limit())[1])
    before = (out / "manifest.json").read_bytes()
    plan = plan_on_device(out, load_manifest(out), ORIN, plugins=[plugin])
    with pytest.raises(EngineError, match="something else") as caught:
        build_on_device(plan, Progress("quiet"), check=judge)
    assert caught.value.fix == advice
    assert (out / "manifest.json").read_bytes() == before
    assert (hashed.count(plugin), len(limits)) == (1, 1)


# ----------------------------------------------------------------------------------------------------------- the bundle


def pack(out: Path, target: Path, *arguments: object) -> str:
    result = CliRunner().invoke(bundle_main, [str(a) for a in (out, "-o", target, *arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def not_packed(*arguments: object) -> str:
    """What ``dvdq-bundle`` says where it refuses."""
    result = CliRunner().invoke(bundle_main, [str(a) for a in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def page_of(bundle: Path) -> str:
    """The page that a bundle holds."""
    with tarfile.open(bundle) as tar:
        return tar.extractfile("README.md").read().decode()  # type: ignore[union-attr]


def export_for(sm: str, made: Path, out: Path, backend: str = "tensorrt") -> Path:
    """A copy of the export whose engines are for another GPU."""
    shutil.copytree(made, out)
    manifest = load_manifest(out)
    builds = tuple({**entry, "sm": [sm], "backend": backend} for entry in manifest.builds)
    (out / "manifest.json").write_text(dataclasses.replace(manifest, builds=builds).to_json())  # type: ignore[arg-type]
    return out


def test_a_bundle_is_all_that_a_device_needs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so", machine="aarch64")
    for place in ("dvdquant.system.plugin_file", "dvdquant.export.on_device"):  # the device, an Orin
        monkeypatch.setattr(f"{place}.machine_name", lambda: "aarch64")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some-1.0-py3-none-any.whl").write_bytes(b"a wheel")
    said = pack(made, tmp_path / "orin.tar", "--plugin", plugin, "--wheels", tmp_path / "wheels")
    assert "dvdq-build orin.tar -o orin --plugin bundled" in said
    assert "has no wheel of dvdquant" in said
    assert "python3-libnvinfer-lean" in page_of(tmp_path / "orin.tar")
    assert "wheels has no wheel of accelerate==" in said
    # Refused before anything is unpacked.
    there = tmp_path / "device"
    thor = dataclasses.replace(ORIN, name="Thor", sm="11.0")
    for gpu, version, text in (
        (thor, "11.4.0.1", "is for SM 8.7, and this GPU (Thor) has SM 11.0"),
        (None, "11.4.0.1", "the driver of this machine names none"),
        (ORIN, "10.3.0", "is for TensorRT 11, and this machine has 10.3.0"),
        (dataclasses.replace(ORIN, memory_bytes=10**6), "11.4.0.1", "of device memory"),
    ):
        monkeypatch.setattr("dvdquant.system.gpu.read_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr("dvdquant.backends.load_backend", lambda name, v=version: Backend(name, None, v))
        result = CliRunner().invoke(build_main, [str(tmp_path / "orin.tar"), "-o", str(there), "--plugin", "bundled"])
        assert result.exit_code == 2
        assert text in result.output
    # A bundle without a plugin library is for that SM just as well, and says what it lacks; one whose library has other kernels
    # is no use on this GPU.
    pack(made, tmp_path / "bare.tar")
    others = plugin_library(tmp_path / "others.so", machine="aarch64", kernels="90;110")
    write_bundle(tmp_path / "others.tar", made, load_manifest(made), {PLUGIN_PLACE: others})
    library = ("--plugin", "bundled")
    for gpu, bundle, options, text in (
        (thor, "bare.tar", (), "is for SM 8.7, and this GPU (Thor) has SM 11.0"),
        (thor, "bare.tar", ("--dry-run",), "--plugin FILE, for it holds no plugin library"),
        (ORIN, "bare.tar", (), "holds none"),
        (ORIN, "bare.tar", library, "holds none"),
        (ORIN, "orin.tar", (), "--plugin bundled takes that of the bundle"),
        (
            ORIN,
            "others.tar",
            library,
            "others.tar/plugins/libdvdquant_plugins.so are for 90, 110, and this GPU has SM 8.7",
        ),
        (ORIN, "others.tar", ("--dry-run",), "are for 90, 110, and this GPU has SM 8.7"),
        (ORIN, "orin.tar", ("--plugin", str(others)), "others.so are for 90, 110"),
        (ORIN, "orin.tar", (*library, "--bits", "6"), "has no engine of 6 bits to build"),
    ):
        monkeypatch.setattr("dvdquant.system.gpu.read_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr("dvdquant.backends.load_backend", lambda name: Backend(name, None, "11.4.0.1"))
        result = CliRunner().invoke(build_main, [str(tmp_path / bundle), "-o", str(there), *options])
        assert result.exit_code == 2
        assert text in result.output
    assert not there.exists()
    whole = (tmp_path / "orin.tar").read_bytes()
    (tmp_path / "changed.tar").write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    with (
        open_bundle(tmp_path / "changed.tar") as changed,
        pytest.raises(OutputError, match="is not as dvdq-bundle wrote"),
    ):
        unpack_bundle(changed, there)
    assert not there.exists()
    # Unpacked, built, and the second time neither.
    done = build_here(monkeypatch, tmp_path / "orin.tar", "-o", there, "--plugin", "bundled")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(there)
    verify_files(there, manifest)
    assert [e["path"] for e in manifest.engines] == [A4, A8]
    assert {
        "requirements.txt",
        "plugins/libdvdquant_plugins.so",
        "wheels/some-1.0-py3-none-any.whl",
    } <= manifest.files.keys()
    assert engine_of(there, A4)["libraries"] == [str(there / "plugins" / "libdvdquant_plugins.so")]


def test_wheels_that_are_there_are_not_named_as_lacking(made: Path, tmp_path: Path) -> None:
    pack(made, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        required = tar.extractfile("requirements.txt").read().decode().split()  # type: ignore[union-attr]
    (tmp_path / "wheels").mkdir()
    for line in required:
        name, _, version = line.partition("==")
        platform = "any" if name == "click" else "manylinux2014_aarch64.manylinux_2_17_aarch64"
        if name != "numba":
            (tmp_path / "wheels" / f"{name.replace('-', '_')}-{version}-py3-none-{platform}.whl").touch()
    (tmp_path / "wheels" / "numba-0.1-py3-none-any.whl").touch()
    said = pack(made, tmp_path / "a.tar", "--wheels", tmp_path / "wheels")
    (numba,) = (line for line in required if line.startswith("numba=="))
    assert f"wheels has no wheel of {numba}: without internet" in said


def test_a_library_that_is_no_use_on_the_device_is_not_packed(made: Path, tmp_path: Path) -> None:
    """Each refusal names what it is and what was wanted, and has the line that makes the right one."""
    good = plugin_library(tmp_path / "good.so", machine="aarch64")
    (tmp_path / "other.so").write_bytes(good.read_bytes().replace(b"@dvdquant", b"@anything"))
    pc = plugin_library(tmp_path / "pc.so", machine="x86_64")
    kernels = plugin_library(tmp_path / "kernels.so", None, "aarch64")
    bare = plugin_library(tmp_path / "bare.so", machine="aarch64", kernels="")
    thor = plugin_library(tmp_path / "thor.so", machine="aarch64", kernels="90a;110")
    wanted = "wanted is one for SM 8.7 on aarch64"
    for library, words in (
        (tmp_path / "other.so", ("is another library or program, for aarch64", wanted)),
        (kernels, ("holds dvdquant's kernels without the plugin, for aarch64", wanted)),
        (tmp_path / "none.so", ("cannot be read: No such file", wanted)),
        (pc, ("is for x86_64, and GPUs of SM 8.7 (Orin Nano, Orin NX, AGX Orin) sit in machines with aarch64",)),
        (bare, ("has no kernels for SM 8.7", "loads them from another file, which a bundle does not hold")),
        (thor, ("has no kernels for SM 8.7", "kernels for 90a, 110")),
    ):
        said = not_packed(made, "-o", tmp_path / "x.tar", "--plugin", library)
        for text in (str(library), *words, make_plugin("aarch64", ["8.7"])):
            assert text in said
    assert "leave --machine out" in not_packed(made, "-o", tmp_path / "x.tar", "--plugin", good, "--machine", "x86_64")
    rtx = export_for("12.1", made, tmp_path / "rtx", "tensorrt_rtx")
    assert "has TensorRT-RTX engines alone, which load none" in not_packed(
        rtx, "-o", tmp_path / "x.tar", "--plugin", good
    )
    assert not (tmp_path / "x.tar").exists()


def test_the_processor_is_that_of_the_gpu_or_the_one_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    spark = export_for("12.1", made, tmp_path / "spark", "tensorrt_rtx")
    hopper = export_for("9.0", made, tmp_path / "hopper")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64.whl").touch()
    wheels, target = ("--wheels", tmp_path / "wheels"), tmp_path / "a.tar"
    said = pack(spark, target, *wheels)
    assert "for SM 12.1 on aarch64" in said
    assert "manylinux2014_aarch64" in said
    assert "x86_64" not in said
    assert "--machine is x86_64, and GPUs of SM 12.1 (GB10) sit in machines with aarch64" in not_packed(
        spark, "-o", target, "--machine", "x86_64"
    )
    # An H100 sits beside x86-64, a GH200 of the same SM beside ARM.
    assert "aarch64, and the device is Linux on x86_64" in not_packed(hopper, "-o", target, *wheels)
    said = pack(hopper, target)
    assert "for SM 9.0 on x86_64" in said
    assert "GH200 sit in machines with aarch64: --machine aarch64" in said
    said = pack(hopper, target, *wheels, "--machine", "aarch64")
    assert "for SM 9.0 on aarch64" in said
    assert "sit in machines" not in said
    library = plugin_library(tmp_path / "arm.so", machine="aarch64", kernels="80;90a;compute_80")
    assert "on aarch64" in pack(hopper, target, "--plugin", library)
    assert f"{library} is for aarch64, and --machine is x86_64" in not_packed(
        hopper, "-o", target, "--plugin", library, "--machine", "x86_64"
    )


def test_the_page_asks_for_what_the_engines_need(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    # 1. TensorRT without a plugin library: what is missing, what makes it, and lines that name it.
    said, line = pack(made, target), "dvdq-build a.tar -o a --plugin libdvdquant_plugins.so"
    assert line in said
    assert "dvdq-build there refuses them without --plugin" in said
    assert make_plugin("aarch64", ["8.7"]) in said
    page = page_of(target)
    for text in (
        f"4. `{line}`",
        "3. The plugin library, which TensorRT engines need and this bundle does not hold",
        'make kernels SM="87" && make plugin`',
        'make kernels HOST=aarch64 SM="87" && make plugin HOST=aarch64 TENSORRT_ROOT=FOLDER',
        f"`{PLUGIN_PLACE}`, which is missing",
        "JetPack brings the last two",
        "By estimate, a build takes up to",
        "TensorRT's own builder has not been measured",
    ):
        assert text in page, page
    # 2. With one.
    pack(made, target, "--plugin", plugin_library(tmp_path / "arm.so", machine="aarch64"))
    page = page_of(target)
    assert "3. `dvdq-build a.tar -o a --plugin bundled`" in page
    assert "and TensorRT 11 with its Python module" in page
    assert "missing" not in page
    # 3. Of a server: no JetPack there.
    pack(export_for("9.0", made, tmp_path / "hopper"), target)
    page = page_of(target)
    assert "JetPack" not in page
    assert "build/plugins-aarch64" not in page
    # 4. TensorRT-RTX, which pip installs, and which loads no plugin.
    pack(export_for("12.1", made, tmp_path / "spark", "tensorrt_rtx"), target)
    page = page_of(target).partition("# `")[0]
    assert "1. Python 3.11 or newer and the GPU's driver." in page
    assert "3. `dvdq-build a.tar -o a`" in page
    for text in ("JetPack", "plugin", "system-site-packages", "the system's TensorRT", SCRIPT, "own builder"):
        assert text not in page, page


def test_what_cannot_be_packed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no wheel" in not_packed(made, "-o", tmp_path / "x.tar", "--wheels", tmp_path / "empty")
    for wheel, words in (
        (
            "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            "is for manylinux_2_28_x86_64, and the device is Linux on aarch64",
        ),
        ("torch-2.13.0-cp312-cp312-win_arm64.whl", "is for win_arm64"),
        ("torch.whl", "has not the name of a wheel"),
    ):
        (tmp_path / "empty" / wheel).touch()
        assert words in not_packed(made, "-o", tmp_path / "x.tar", "--wheels", tmp_path / "empty")
        (tmp_path / "empty" / wheel).unlink()
    assert "is a folder" in not_packed(made, "-o", tmp_path)
    bare = Path(shutil.copytree(made, tmp_path / "bare"))
    manifest = dataclasses.replace(load_manifest(bare), builds=())
    (bare / "manifest.json").write_text(manifest.to_json())
    assert "no engine that is left to be built" in not_packed(bare, "-o", tmp_path / "x.tar")
    with pytest.raises(UnsupportedError, match="has no engine that was left to be built"):
        plan_on_device(bare, manifest, ORIN)
    assert not (tmp_path / "x.tar").exists()


# ------------------------------------------------------------------------------------------- TensorRT-RTX, the real one


def test_the_real_builder_builds_what_was_left_to_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    in_process(model, "-o", out, "--recipe", "rtn", "--target", "rtx", "--build", "device", *SIZES)
    entries = load_manifest(out).builds
    assert [e["precision"] for e in entries] == ["int8", "int8"]
    assert not (out / SCRIPT).exists()
    pack(out, tmp_path / "a.tar")
    for source in ((tmp_path / "a.tar", "-o", tmp_path / "there"), (out,)):
        done = build_here(monkeypatch, *source, "--version-compatible", gpu=None)
        refused(done, "--version-compatible is for TensorRT engines", "export with --target tensorrt")
    assert not (tmp_path / "there").exists()
    done = build_here(monkeypatch, tmp_path / "a.tar", "-o", tmp_path / "there", "--bits", "8", gpu=None)
    assert done.returncode == 0, done.stderr
    there = load_manifest(tmp_path / "there")
    (engine,) = there.engines
    assert engine["path"] == "engines/rtx-sm89/transformer_a8.engine"
    assert there.files[engine["path"]]["bytes"] > 1 << 20
    verify_files(tmp_path / "there", there)
    # The same engine as an export that builds here: same graph, same settings.
    in_process(model, "-o", out, "--recipe", "rtn", "--target", "rtx", *SIZES)
    here = load_manifest(out)
    assert here.builds == ()
    assert [e["onnx_sha256"] for e in here.engines if e["act_bits"] == 8] == [engine["onnx_sha256"]]


def test_both_lines_on_memory_count_engines_that_are_left_to_the_device(model: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "w4a8", "--target", "rtx", "--sm", "8.9", *SIZES, "--dry-run", "--log-format", "json"]
    here, there = (
        json.loads(in_process(model, "-o", tmp_path / "out", *arguments, "--build", where))
        for where in ("here", "device")
    )
    (held,) = there["held_bytes"].values()
    assert f"weights of the a8 engine {amount(held)} " in there["answers"]["GPU memory"]
    assert there["answers"]["GPU memory"] == here["answers"]["GPU memory"]
