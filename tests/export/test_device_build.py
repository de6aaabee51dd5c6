"""Engines for a device that is elsewhere: what the export leaves, what the device builds of it, and what it refuses first.

TensorRT is a double (tests/support/tensorrt_double), in the real process that builds; TensorRT-RTX is the real one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner

from dvdquant.artifact.layout import PLUGIN_PLACE
from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.backends import Backend
from dvdquant.cli.inspect import main as inspect_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import needs
from dvdquant.deploy.generation.memory_plan import Loaded
from dvdquant.deploy.sessions.engines import TensorRTSession
from dvdquant.errors import EngineError, OutputError, ResourceError, UnsupportedError
from dvdquant.export import build_room, on_device
from dvdquant.export import plan as plan_module
from dvdquant.export.elsewhere import COMPATIBLE, SCRIPT, build_script
from dvdquant.export.on_device import as_compatible, build_on_device, plan_on_device
from dvdquant.export.options import ExportOptions
from dvdquant.model.families import Sizes, get_family
from dvdquant.model.held_weights import held_weights
from dvdquant.model.kept_inputs import LARGE
from dvdquant.model.working_memory import step_bytes_at
from dvdquant.recipe import get_recipe
from dvdquant.system.files import hash_file
from dvdquant.system.gpu import Gpu
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header
from dvdquant.text import amount
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, run
from tests.support.device_build import A4, A8, ORIN, build, build_here, engine_of, pack, plugin_library
from tests.support.device_build import made as made
from tests.support.device_build import model as model
from tests.support.device_build import out as out
from tests.support.device_build import quick_builder as quick_builder
from tests.support.device_build import tensorrt as tensorrt
from tests.support.installed_libraries import Machine
from tests.support.session_exports import RANGES


def refused(done: object, *texts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr  # type: ignore[attr-defined]
    for text in texts:
        assert text in done.stderr, done.stderr  # type: ignore[attr-defined]
    assert "Traceback" not in done.stderr  # type: ignore[attr-defined]


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


def test_the_dry_run_has_the_lines_of_trtexec_and_the_largest_inputs(made: Path, model: Path, tmp_path: Path) -> None:
    """The lines are those that the export records, and the tensors those that it stores without quantizing them."""
    arguments = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES, "--dry-run"]
    text = in_process(model, "-o", tmp_path / "out", *arguments)
    builds = load_manifest(made).builds
    assert [line.removeprefix("by hand: ") for line in text.splitlines() if line.startswith("by hand: ")] == [
        entry["command"] for entry in builds
    ]
    plan = json.loads(in_process(model, "-o", tmp_path / "out", *arguments, "--log-format", "json"))
    assert plan["trtexec"] == {entry["engine"]: entry["command"] for entry in builds}
    stored = read_header(made / "onnx" / "transformer.safetensors").tensors
    sizes = sorted((stored[name].nbytes for name in Artifact.open(made).plan().kept), reverse=True)
    assert [tensor["bytes"] for tensor in plan["largest_kept"]["transformer"]] == sizes[:6]
    largest = plan["largest_kept"]["transformer"][0]
    assert stored[largest["name"]].shape == tuple(largest["shape"])
    assert f"transformer, not quantized: {amount(sum(sizes))}" in text
    assert any(line.startswith(largest["name"]) for line in text.splitlines())
    # Engines of TensorRT-RTX hold their weights themselves, and no trtexec builds them.
    rtx = in_process(model, "-o", tmp_path / "out", "--recipe", "rtn", "--target", "rtx", *SIZES, "--dry-run")
    assert "trtexec" not in rtx
    assert "not quantized:" not in rtx


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


def run_script(out: Path, tools: Path, nvidia_smi: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script of an export where trtexec writes a file only and the driver's tool prints this."""
    tools.mkdir(exist_ok=True)
    lines = {
        "trtexec": 'for word; do case $word in --saveEngine=*) echo > "${word#*=}";; esac; done',
        "nvidia-smi": f"printf '{nvidia_smi}'" if nvidia_smi else "exit 1",
    }
    for name, line in lines.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join((str(tools), os.environ["PATH"]))}
    command = ["sh", str(out / SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def engines_in(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.glob("engines/*/*"))


def test_the_script_runs_its_lines_beside_the_plugin_and_says_where_that_is_missing(out: Path, tmp_path: Path) -> None:
    refused(run_script(out, tmp_path / "tools", ""), f"{out}/{PLUGIN_PLACE} is missing: make plugin builds it")
    assert not (out / "engines").exists()
    plugin_library(out / PLUGIN_PLACE)
    done = run_script(out, tmp_path / "tools", "[N/A]\\n")  # as on a Jetson Orin
    assert done.returncode == 0, done.stderr
    assert engines_in(out) == [A4, A8]


def test_the_script_builds_engines_of_the_device_alone(out: Path, tmp_path: Path) -> None:
    """The SM is that of the argument, or of the driver; trtexec would build anything for the GPU it finds."""
    manifest, tools = load_manifest(out), tmp_path / "tools"
    thor = [
        {name: value.replace("sm87", "sm110") if isinstance(value, str) else value for name, value in entry.items()}
        | {"sm": ["11.0"]}
        for entry in manifest.builds
    ]
    of_thor = [entry["engine"] for entry in thor]
    (out / SCRIPT).write_text(build_script([*manifest.builds, *thor]) or "")  # type: ignore[list-item]
    plugin_library(out / PLUGIN_PLACE)
    for said, arguments, text in (
        ("", (), "has engines for SM 8.7, 11.0, and nvidia-smi does not say which this GPU has: sh trtexec.sh SM"),
        ("8.7\\n11.0\\n", (), "nvidia-smi does not say which"),
        ("[N/A]\\n", (), "nvidia-smi does not say which"),
        ("8.9\\n", (), "has engines for SM 8.7, 11.0, not for SM 8.9"),
        ("8.7\\n", ("8.9",), "not for SM 8.9"),
    ):
        refused(run_script(out, tools, said, *arguments), text)
        assert engines_in(out) == []
    for said, arguments, built in (
        ("11.0\\n11.0\\n", (), of_thor),
        ("", ("8.7",), [A4, A8]),
        ("8.7\\n", ("11.0",), of_thor),
    ):
        assert run_script(out, tools, said, *arguments).returncode == 0
        assert engines_in(out) == built
        shutil.rmtree(out / "engines")
    # An export for one SM alone, on another GPU.
    (out / SCRIPT).write_text(build_script(manifest.builds) or "")
    refused(run_script(out, tools, "11.0\\n"), "has engines for SM 8.7, not for SM 11.0")
    assert engines_in(out) == []


# ---------------------------------------------------------------------------------------------------- what engines share

_KINDS = {
    onnx.TensorProto.BFLOAT16: ("BF16", 2), onnx.TensorProto.FLOAT: ("FLOAT", 4), onnx.TensorProto.INT8: ("INT8", 1),
    onnx.TensorProto.INT64: ("INT64", 8),
}  # fmt: skip


def _initializers(path: Path) -> dict[str, int]:
    """The bytes of a graph's initializers, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name: _KINDS[tensor.data_type][1] * math.prod(tensor.dims) for tensor in graph.initializer}


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """The inputs and outputs of an engine that is built from a graph, as the double of a session's library takes them."""
    graph, found = onnx.load(path, load_external_data=False).graph, {}
    for values, output in ((graph.input, False), (graph.output, True)):
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
            found[value.name] = (_KINDS[tensor.elem_type][0], shape, output)
    return found


def _with_engines(out: Path, sizes: dict[int, int], kept: int | None) -> Artifact:
    """The export with an engine of so many bytes for each width; the entries of older exports lack ``kept_inputs``."""
    manifest, engines, files = load_manifest(out), [], {}
    for planned, (width, size) in zip(manifest.builds, sizes.items()):
        there = out / planned["engine"]
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(json.dumps({"version": "11.4.0.1", "flags": [], "bits": width}).ljust(size))
        files[planned["engine"]] = hash_file(there)
        names = ("backend", "sm", "act_bits", "precision", "executes", "onnx_sha256")
        shapes = {name: value for name, value in manifest.shapes.items() if name != "dtype"}
        entry: Any = {name: planned[name] for name in names} | {"path": planned["engine"], "shapes": shapes}  # type: ignore[literal-required]
        engines.append(entry | {"versions": {"tensorrt": "11.4.0.1"}} | ({} if kept is None else {"kept_inputs": kept}))
    builds: Any = [{k: v for k, v in b.items() if k != "kept_inputs" or kept is not None} for b in manifest.builds]
    changed = dataclasses.replace(
        manifest, engines=tuple(engines), builds=tuple(builds), files={**manifest.files, **files}
    )
    (out / "manifest.json").write_text(changed.to_json())
    return Artifact.open(out)


def test_the_engines_of_both_widths_share_what_is_not_quantized(
    out: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of the weights is in a graph or is an input, and the counts are the sum; so it is for an older export."""
    graphs = {entry["act_bits"]: out / entry["graph"] for entry in load_manifest(out).builds}
    weights = read_header(out / "onnx" / "transformer.safetensors").tensors
    inputs = {name for name in _tensors(graphs[4]) if name in weights}
    assert _tensors(graphs[8]).keys() == _tensors(graphs[4]).keys()
    plan = Artifact.open(out).plan()
    shared = {name for name in inputs if name in plan.kept}
    assert "condition_embedder.time_proj.weight" in shared
    kept = sum(weights[name].nbytes for name in shared)
    assert [entry["kept_inputs"] for entry in load_manifest(out).builds] == [kept, kept]
    constants = {}
    for width, path in graphs.items():
        found = _initializers(path)
        assert not inputs & found.keys()
        assert inputs | found.keys() >= weights.keys(), "each stored tensor is one of the two"
        assert all(found[name] < LARGE for name in found if name in weights)
        ours = [name for name in found if name in weights or name.startswith(("hadamard.", "outer."))]
        constants[width] = sum(found[name] for name in ours)
        # The others are the positions of the rotary embedding and the arguments of operators.
        assert sum(found[name] for name in found if name not in ours) < LARGE
    read = sum(weights[name].nbytes for name in inputs)
    held = held_weights(plan, 87, (4, 8))
    rows = sum(layer.rows for layer in held.layers)
    assert held.nbytes("packed", plugin=True) == read + rows + sum(constants.values())
    assert (held.shared, held.constants) == (kept, sum(constants.values()))
    # 1. What a session holds, and what is said of it before; 2. the same of engines that hold all of it in themselves.
    machine, request = Machine(monkeypatch, "11.4.0.1", None), SimpleNamespace(mode="a8")
    for entry, again in ((kept, 0), (None, kept)):
        artifact = _with_engines(out, {width: size + again for width, size in constants.items()}, entry)
        machine.libraries["tensorrt"].tensors = {
            name: tensor for name, tensor in _tensors(graphs[4]).items() if not again or name not in shared
        }
        assert artifact.kept_inputs("transformer", "tensorrt", (4, 8)) == [entry or 0] * 2
        host, options = torch.device("cpu"), {"backend": "tensorrt", "weights": "packed"}
        with TensorRTSession(artifact, device=host, **options) as session:  # type: ignore[arg-type]
            there = session.resident_bytes()
        assert there == {
            "weights": read - again + rows,
            "engines": sum(constants.values()) + 2 * again,
            "workspace": 0,
        }
        total = there["weights"] + there["engines"]
        counted = held_weights(plan, 87, (4, 8), shared=artifact.kept_inputs("transformer", "tensorrt", (4, 8)))
        assert counted.nbytes("packed", plugin=True) == total
        said = needs.transformer_bytes(artifact, [request], "tensorrt", False, "8.7", "packed", {})  # type: ignore[list-item]
        assert said == {Loaded("packed"): total}
    # 3. The graphs of such an export are made again for their builder, its weights are not.
    text = in_process(model, "-o", out, "--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES)
    assert "weights and graphs in" in text
    assert "is up to date" not in text
    assert [entry["kept_inputs"] for entry in load_manifest(out).builds] == [kept, kept]


def test_the_same_export_again_is_up_to_date(model: Path, out: Path) -> None:
    arguments = ["--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES]
    assert "is up to date" in in_process(model, "-o", out, *arguments)


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
        (r"is built for TensorRT 10, and this machine has tensorrt 11\.4\.0\.1", {"plugins": other}),
        (r"is for \w+, and this machine is", {"plugins": [arm, pc]}),
        (r"are for 80, 90a, 100, 120, and this GPU has SM 8\.7", {"plugins": [desktop]}),
        (r"is no plugin library", {"plugins": [tmp_path / "text.so"]}),
        (r"holds dvdquant's kernels without the plugin", {"plugins": [good, kernels]}),
        (r"to take .* of device memory(?s:.*) on Orin", {"gpu": dataclasses.replace(ORIN, memory_bytes=10**6)}),
        (r"no engine of 6 bits to build(?s:.*)4 bits, 8 bits", {"bits": [6]}),
    ]
    for text, changes in cases:
        gpu = changes.pop("gpu", ORIN)
        with pytest.raises((UnsupportedError, ResourceError, EngineError), match=text):
            plan_on_device(out, manifest, gpu, **{"plugins": [good], **changes})


def test_an_export_asks_for_the_plugin_before_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dvdq-build would refuse, dvdq-export refuses: nothing is written, and the line that builds the plugin is named."""
    monkeypatch.setattr(plan_module, "load_backend", lambda name: Backend(name, None, "11.4.0.1"))
    good = plugin_library(tmp_path / "libdvdquant_plugins.so")
    other = plugin_library(tmp_path / "other.so", major=10)
    (tmp_path / "text.so").write_text("no library")
    arguments = [model, "-o", tmp_path / "out", "--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *SIZES]
    for plugin, text in (
        (other, "is built for TensorRT 10, and this machine has tensorrt 11.4.0.1"),
        (tmp_path / "text.so", "is no plugin library"),
    ):
        result = run(*arguments, "--plugin", plugin)
        assert result.exit_code == 2
        assert text in result.output
        assert "make plugin" in result.output
        assert not (tmp_path / "out").exists()
    done = run(*arguments, "--plugin", good, "--dry-run")
    assert done.exit_code == 0, done.output


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
    own: str | None,
    advice: str,
    out: Path,
    tmp_path: Path,
    tensorrt: None,
    quick_builder: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The builder writes a file only; the judge's own advice is passed on, and a general one is not."""
    plugin = plugin_library(tmp_path / "libdvdquant_plugins.so")
    hashed, limits = [], []
    hash_file, memory_limit = on_device.hash_file, build_room.memory_limit

    def judge(*_: object) -> None:
        raise EngineError("it computes something else", fix=own)

    monkeypatch.setattr(on_device, "hash_file", lambda path: (hashed.append(path), hash_file(path))[1])
    monkeypatch.setattr(build_room, "memory_limit", lambda: (limits.append(1), memory_limit())[1])
    before = (out / "manifest.json").read_bytes()
    plan = plan_on_device(out, load_manifest(out), ORIN, plugins=[plugin])
    with pytest.raises(EngineError, match="something else") as caught:
        build_on_device(plan, Progress("quiet"), check=judge)
    assert caught.value.fix == advice
    assert (out / "manifest.json").read_bytes() == before
    assert (hashed.count(plugin), len(limits)) == (1, 1)


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
        done = build_here(monkeypatch, *source, "--plugin", __file__, gpu=None)
        refused(done, "has TensorRT-RTX engines to build here, and --plugin is for TensorRT", "leave --plugin out")
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
