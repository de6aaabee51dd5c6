"""``dvdq-export`` as a user runs it: two transformers, options that matter, the dry run, nothing done twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dvdquant.artifact.manifest import Manifest, load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.cli.inspect import main as inspect
from dvdquant.recipe import RECIPES, Recipe
from dvdquant.text import amount
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, change, in_process, logged, refused, rehash, run
from tests.support.exporting import state_of
from tests.support.session_exports import family_export
from tests.support.traces import without_graphs

BOTH = ("--recipe", "w4a4", "--target", "rtx", "--target", "onnx", "--sm", "8.9", *SIZES)


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(out)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.2 pipeline: two transformers with different weights."""
    folder = tmp_path_factory.mktemp("pipeline") / "wan22"
    for seed, name in enumerate(("transformer", "transformer_2")):
        tiny.write_checkpoint(folder / name, tiny.WAN_ONE, seed=seed)
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind, "vae": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# --------------------------------------------------------------------------------------------- one pipeline, all of it


@pytest.fixture(scope="module")
def wan22(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out") / "wan22"
    return out, logged(pipeline_folder, "-o", out, *BOTH, "--verify")


def test_two_transformers(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = wan22
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert manifest.components == ("transformer", "transformer_2")
    names = {f"onnx/{c}_a{b}{s}.onnx" for c in manifest.components for b in (4, 8) for s in ("", "_qdq")}
    assert {g["path"] for g in manifest.graphs} == names
    assert {e["path"] for e in manifest.engines} == {
        f"engines/rtx-sm89/{c}_a{b}.engine" for c in manifest.components for b in (4, 8)
    }
    assert (out / "onnx/transformer.safetensors").read_bytes() != (out / "onnx/transformer_2.safetensors").read_bytes()
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "transformer_2.config.json", "engines", "manifest.json", "onnx",
    }  # fmt: skip
    # Graphs of one transformer never read the weights of the other.
    for graph in manifest.graphs:
        proto = onnx.load(out / graph["path"], load_external_data=False)
        files = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
        second = "transformer_2" in graph["path"]
        assert files
        assert all(f.startswith("transformer_2.") == second for f in files)
    # The same layers twice; the manifest keeps them apart by order.
    assert len(manifest.layers) == 2 * len({entry["name"] for entry in manifest.layers})


def test_engine_entries_say_what_executes(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = wan22
    manifest = load_manifest(out)
    card = (out / "README.md").read_text()
    made = {Path(entry["path"]).stem.rpartition("_")[0] for entry in manifest.engines}
    assert made == {"transformer", "transformer_2"}
    for entry in manifest.engines:
        assert entry["precision"] == "int8"
        assert "INT8 tensor cores" in entry["executes"]
        assert entry["executes"] in card
        assert entry["sm"] == ["8.9"]
        assert set(entry["versions"]) == {"tensorrt_rtx"}
        graph = f"onnx/{Path(entry['path']).stem}.onnx"
        assert entry["onnx_sha256"] == manifest.files[graph]["sha256"]
        assert (out / entry["path"]).stat().st_size > 10_000


def test_json_log(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    """Every line parsed already; stages begin, end, and carry rate, remaining time and memory."""
    _, lines = wan22
    assert all(isinstance(line["time"], float) for line in lines)
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "stage" in line:
            stages.setdefault(line["stage"], []).append(line)
    assert set(stages) == {"trace", "inputs", "quantize", "hash", "graphs", "compare", "engines", "verify"}
    for name, entries in stages.items():
        ends = [e for e in entries if e["event"] == "end"]
        assert len(ends) == len([e for e in entries if e["event"] == "start"]) >= 1, name
        for end in ends:
            assert end["done"] == end["total"] > 0
            assert end["rate"] > 0 or end["seconds"] > 1
            assert end["remaining_seconds"] == 0
            assert end["rss_bytes"] > 1 << 28
            assert end["unit"]
            assert end["label"]
    done = lines[-1]
    assert done["event"] == "done"
    assert done["up_to_date"] is False
    assert set(done["seconds"]) == {*stages, "total"}
    assert done["seconds"]["total"] >= sum(v for k, v in done["seconds"].items() if k != "total") - 0.5


def test_verify_holds_both_transformers_against_their_checkpoints(
    wan22: tuple[Path, list[dict[str, Any]]], pipeline_folder: Path, tmp_path: Path
) -> None:
    out, lines = wan22
    assert [check["component"] for check in lines[-1]["stored"]] == ["transformer", "transformer_2"]
    again = Path(shutil.copytree(out, tmp_path / "again"))
    layer, path = "blocks.0.ffn.net.2", again / "onnx/transformer_2.safetensors"
    change(path, f"{layer}.weight", lambda codes: codes ^ -1)
    rehash(again, "onnx/transformer_2.safetensors")
    refused(run(pipeline_folder, "-o", again, *BOTH, "--verify"), f"{layer} of transformer_2")


def test_verify_covers_every_graph(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    out, lines = wan22
    checks = lines[-1]["checks"]
    assert sorted(c["graph"] for c in checks) == sorted(Path(g["path"]).name for g in load_manifest(out).graphs)
    for check in checks:
        assert check["passed"] is True
        assert 0 < check["error"] <= check["bound"]
        assert check["bound"] == pytest.approx(3 * check["reference_error"] + 1e-6)
        layers = check["layers"]
        assert layers["passed"] is True
        assert layers["judged"] == layers["total"] > 0
        assert layers["failed"] == []
        assert 0 < layers["worst"]["excess"] <= 1
        assert layers["worst"]["error"] <= layers["worst"]["bound"]
        assert check["between"]["passed"] is True
        assert check["between"]["places"] == layers["total"] + 1


def test_second_run_changes_nothing(wan22: tuple[Path, list[dict[str, Any]]], pipeline_folder: Path) -> None:
    out, _ = wan22
    before, inodes = state_of(out), stamps(out)
    lines = logged(pipeline_folder, "-o", out, *BOTH)
    assert lines[-1]["up_to_date"] is True
    assert {line["stage"] for line in lines if "stage" in line} == {"check"}
    assert state_of(out) == before
    now = stamps(out)
    assert {n: s for n, s in now.items() if n != "."} == inodes
    text = in_process(pipeline_folder, "-o", out, *BOTH)
    assert "up to date" in text


# ------------------------------------------------------------------------------------------------- options that matter


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "w4a8" else [pytest.mark.stress]) for n in RECIPES],
)
def test_every_recipe_exports_and_verifies(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = in_process(model, "-o", out, "--target", "onnx", "--recipe", name, "--verify", *SIZES)
    manifest = load_manifest(out)
    assert Recipe.from_json(manifest.recipe) == RECIPES[name]
    bits = [a.bits for a in RECIPES[name].activations]
    assert len(manifest.graphs) == 2 * len(bits)
    assert text.count("verify transformer_a") == 2 * len(bits)
    for entry in manifest.layers:
        assert entry["relative_mse"] is not None
        assert entry["relative_mse_minmax"] is not None
        assert 0 < entry["relative_mse"] <= entry["relative_mse_minmax"] * (1 + 1e-6)


def test_globs_and_dtype_reach_the_manifest(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--target", "onnx", "--dtype", "fp16", "--keep", "blocks.0.ffn.*", "--force", "proj_out", *SIZES]
    with without_graphs():
        in_process(model, "-o", out, *options)
    manifest = load_manifest(out)
    names = {entry["name"] for entry in manifest.layers}
    assert "proj_out" in names
    assert not any(n.startswith("blocks.0.ffn.") for n in names)
    assert "blocks.0.attn1.to_out.0" in names
    assert "blocks.0.ffn.net.2" in manifest.kept
    assert manifest.shapes["dtype"] == "fp16"


def test_graphs_compute_in_the_dtype_that_was_asked_for() -> None:
    out = family_export("wan", "fp16")
    assert load_manifest(out).shapes["dtype"] == "fp16"
    graph = onnx.load(out / "onnx/transformer_a4.onnx", load_external_data=False)
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_one_component_of_a_pipeline(
    pipeline_folder: Path, wan22: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Its graphs are those that it has beside the other, whose trace they share there."""
    out = tmp_path / "out"
    in_process(pipeline_folder, "-o", out, "--target", "onnx", "--subfolder", "transformer_2", *SIZES)
    manifest = load_manifest(out)
    assert manifest.components == ("transformer_2",)
    names = {f"onnx/transformer_2_a{bits}{flavour}.onnx" for bits in (4, 8) for flavour in ("", "_qdq")}
    assert {g["path"] for g in manifest.graphs} == names
    assert all((out / name).read_bytes() == (wan22[0] / name).read_bytes() for name in names)


def test_nonfinite_weights_are_recorded_when_allowed(model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    path = broken / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    names = ["blocks.0.attn1.to_k.weight", "proj_out.bias", "blocks.0.ffn.net.0.proj.bias"]
    for name in names:
        tensors[name].view(-1)[1] = torch.nan
    save_file(tensors, path)
    in_process(broken, "-o", tmp_path / "out", "--target", "onnx", "--allow-nonfinite", *SIZES)
    manifest = load_manifest(tmp_path / "out")
    assert sorted(manifest.nonfinite) == sorted(names)
    assert Manifest.from_json(manifest.to_json()) == manifest
    stored = load_file(tmp_path / "out/onnx/transformer.safetensors")
    for name, tensor in stored.items():
        assert bool(torch.isfinite(tensor.float()).all()), name


# ------------------------------------------------------------------------------------------------------------ dry run


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    sms = ("--sm", "8.9", "--sm", "12.0", "--recipe", "w4a4")
    text = in_process(model, "-o", tmp_path / "out", "--dry-run", *sms, *SIZES)
    for part in (
        "recipe w4a4",
        "7 layers",
        "INT8 tensor cores",
        "FP4 tensor cores",
        "disk",
        "memory",
        "nothing was written",
    ):
        assert part in text
    assert state_of(tmp_path) == before
    # The words account for the total: the exporter alone, or what is left of it and the builder.
    (line,) = [line for line in text.splitlines() if line.startswith("memory")]
    units = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
    amounts = (float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) ([KMG]iB)", line))
    peak, alone, kept, later, builder = amounts  # NVFP4 reads the original weights again, so they are kept
    assert builder > 0
    assert kept > 0
    assert peak == pytest.approx(max(alone + kept, later + builder), rel=0.05)


def test_dry_run_as_json_and_its_estimates(wan22: tuple[Path, list[dict[str, Any]]], pipeline_folder: Path) -> None:
    """Loose factors only: the estimates are measured in benchmarks."""
    out, _ = wan22
    before = stamps(out)
    plan = json.loads(in_process(pipeline_folder, "-o", out, *BOTH, "--dry-run", "--log-format", "json"))
    assert stamps(out) == before
    assert plan["components"] == ["transformer", "transformer_2"]
    assert len(plan["layers"]) == len(load_manifest(out).layers)
    assert [e["act_bits"] for e in plan["engines"]] == [4, 8]
    assert "a copy of the weights of its own" in plan["answers"]["engines"]
    estimate = plan["estimate"]
    weights = sum(p.stat().st_size for p in (out / "onnx").glob("*.safetensors"))
    assert 0.8 * weights <= estimate["weight_file_bytes"] <= 1.2 * weights
    assert estimate["source_bytes"] == pytest.approx(
        sum(p.stat().st_size for p in pipeline_folder.rglob("*.safetensors")), rel=0.1
    )
    assert set(estimate["seconds"]) == {"inputs", "quantize", "trace", "engines"}


# Cards and options -> recipe, the SMs, bits and precision of each engine, and a part of the reason.
INT8, NVFP4 = "INT8 tensor cores", "FP4 tensor cores"
ENGINES: list[tuple[str, str, list[tuple[list[str], int, str]], str]] = [
    ("--gpu 4090", "w4a8", [(["8.9"], 8, INT8)], "takes the time and the memory of a8"),
    ("--gpu 5090", "w4a8", [(["12.0"], 8, INT8)], "both hold 1.56 bytes a weight"),
    ("--gpu 4090 --gpu 5090", "w4a8", [(["8.9", "12.0"], 8, INT8)], "one engine, of a8"),
    ("--gpu 4090 --target rtx --target graphs", "w4a8", [(["8.9"], 8, INT8)], "the other targets get the same width"),
    ("--gpu 4090 --target rtx --target onnx", "w4a8", [(["8.9"], 8, INT8)], "the other targets get the same width"),
    ("--gpu 4090 --also-write comfy", "convrot", [(["8.9"], 8, INT8)], "a8 alone"),
    ("--gpu 5090 --activations 4", "w4a4-g64", [(["12.0"], 4, NVFP4)], "a4 alone, as asked for"),
    ("--gpu 5090 --precision nvfp4", "w4a4-g64", [(["12.0"], 4, NVFP4)], "a4 alone, as asked for"),
    ("--gpu 4090 --recipe w4a4 --activations 8", "w4a4", [(["8.9"], 8, INT8)], ""),
    ("--gpu 4090 --recipe w4a4", "w4a4", [(["8.9"], 4, INT8), (["8.9"], 8, INT8)], ""),
    (
        "--gpu 4090 --gpu 5090 --recipe w4a4", "w4a4",
        [(["8.9"], 4, INT8), (["12.0"], 4, NVFP4), (["8.9", "12.0"], 8, INT8)], "",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "recipe", "engines", "reason"), ENGINES, ids=[each[0] for each in ENGINES])
def test_one_engine_unless_a_recipe_was_named(
    options: str, recipe: str, engines: list[tuple[list[str], int, str]], reason: str, model: Path, tmp_path: Path
) -> None:
    """Engines of TensorRT-RTX share no weights: two are larger than the original, and are made where they were asked for."""
    words = [model, "-o", tmp_path / "out", *options.split(), *SIZES, "--dry-run", "--log-format", "json"]
    plan = json.loads(in_process(*words))
    assert plan["recipe"]["name"] == recipe
    assert [(e["sm"], e["act_bits"], e["executes"].partition(";")[0]) for e in plan["engines"]] == engines
    assert [each["bits"] for each in plan["recipe"]["activations"]] == sorted({bits for _, bits, _ in engines})
    assert any(reason in note for note in plan["notes"])
    assert ("engines" in plan["answers"]) == (len(engines) > 1)


def test_an_export_of_two_engines_says_what_they_take(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = wan22
    result = CliRunner().invoke(inspect, [str(out)])
    total = sum(p.stat().st_size for p in out.rglob("*.engine"))
    (line,) = [line for line in result.stdout.splitlines() if "a copy of the weights of its own" in line]
    assert f"a4 and a8 on SM 8.9 take {amount(total)} together" in line
    assert "One alone: --activations 8" in line


def test_a_relative_model_is_recorded_for_use_from_anywhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent.parent)
    relative = model.relative_to(Path.cwd())
    out = tmp_path / "out"
    in_process(relative, "-o", out, "--target", "graphs", "--recipe", "w4a4", *SIZES)
    assert load_manifest(out).source["model"] == str(model)
    card = (out / "README.md").read_text()
    assert f"`{relative}` in 4 bits" in card
    # Where the model lies on this machine is nobody's business who gets the card.
    assert str(model) not in card
