"""``dvdq-export`` as a user runs it: two transformers, engines, resume after a kill, nothing done twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from dvdquant.cli.export import main as export_main
from dvdquant.manifest import Manifest, load_manifest, verify_files
from dvdquant.recipe import RECIPES, Recipe
from tests import tiny_models as tiny
from tests.exporting import REPOSITORY, state_of

SIZES = ["--latent", "2x8x8", "--text-tokens", "4"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dvdquant.cli.export", *(str(a) for a in arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}


def export(*arguments: object, log: bool = True) -> list[dict[str, Any]]:
    """Run the command to its end; the JSON lines it wrote."""
    extra = ["--log-format", "json"] if log else []
    result = subprocess.run(command(*arguments, *extra), capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stderr.splitlines()] if log else [{"text": result.stdout}]


def in_process(*arguments: object) -> str:
    result = CliRunner().invoke(export_main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def digests(out: Path, *below: str) -> dict[str, str]:
    files = [p for top in below or ("",) for p in (out / top).rglob("*") if p.is_file()]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(out)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.2 pipeline: two transformers with different weights."""
    folder = tmp_path_factory.mktemp("pipeline") / "wan22"
    for seed, name in enumerate(("transformer", "transformer_2")):
        tiny.write_checkpoint(folder / name, tiny.WAN, seed=seed)
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind, "vae": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# --------------------------------------------------------------------------------------------- one pipeline, all of it


@pytest.fixture(scope="module")
def wan22(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out") / "wan22"
    lines = export(pipeline_folder, "-o", out, "--target", "rtx", "--target", "onnx", "--sm", "8.9", "--verify", *SIZES)
    return out, lines


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
    for entry in manifest.engines:
        assert entry["realization"] == "int8"
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
    assert set(stages) == {"trace", "quantize", "hash", "graphs", "engines", "verify"}
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


def test_verify_covers_every_graph(wan22: tuple[Path, list[dict[str, Any]]]) -> None:
    out, lines = wan22
    checks = lines[-1]["checks"]
    assert sorted(c["graph"] for c in checks) == sorted(Path(g["path"]).name for g in load_manifest(out).graphs)
    for check in checks:
        assert check["passed"] is True
        assert 0 < check["error"] <= check["bound"]
        assert check["bound"] == pytest.approx(2 * check["reference_error"] + 1e-6)


def test_second_run_changes_nothing(wan22: tuple[Path, list[dict[str, Any]]], pipeline_folder: Path) -> None:
    out, _ = wan22
    before, inodes = state_of(out), stamps(out)
    lines = export(pipeline_folder, "-o", out, "--target", "rtx", "--target", "onnx", "--sm", "8.9", *SIZES)
    assert lines[-1]["up_to_date"] is True
    assert {line["stage"] for line in lines if "stage" in line} == {"check"}
    assert state_of(out) == before
    now = stamps(out)
    assert {n: s for n, s in now.items() if n != "."} == inodes
    text = in_process(pipeline_folder, "-o", out, "--target", "rtx", "--target", "onnx", "--sm", "8.9", *SIZES)
    assert "up to date" in text


# --------------------------------------------------------------------------------------------------- engines, rebuilt


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "wan"
    in_process(model, "-o", out, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES)
    return out


@pytest.fixture
def one_engine(engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines, tmp_path / "wan"))


ENGINE = "engines/rtx-sm89/transformer_a8.engine"


def test_another_sm_builds_only_its_engine(one_engine: Path, model: Path) -> None:
    before = digests(one_engine, "onnx", "engines")
    lines = export(model, "-o", one_engine, "--target", "rtx", "--sm", "12.0", "--recipe", "w4a8", *SIZES)
    (engines,) = [line for line in lines if line.get("stage") == "engines" and line["event"] == "end"]
    assert engines["total"] == 1
    assert "quantize" not in {line.get("stage") for line in lines}
    after = digests(one_engine, "onnx", "engines")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"engines/rtx-sm120/transformer_a8.engine"}
    manifest = load_manifest(one_engine)
    verify_files(one_engine, manifest)
    assert {tuple(e["sm"]) for e in manifest.engines} == {("8.9",), ("12.0",)}


def delete_engine(out: Path) -> None:
    (out / ENGINE).unlink()


def flip_engine(out: Path) -> None:
    data = bytearray((out / ENGINE).read_bytes())
    data[len(data) // 2] ^= 1
    (out / ENGINE).write_bytes(data)


def cut_engine(out: Path) -> None:
    os.truncate(out / ENGINE, 100)


@pytest.mark.parametrize("damage", [delete_engine, flip_engine, cut_engine])
def test_damaged_engine_is_rebuilt_alone(one_engine: Path, model: Path, damage: Callable[[Path], None]) -> None:
    weights = digests(one_engine, "onnx")
    damage(one_engine)
    lines = export(model, "-o", one_engine, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES)
    assert "engines" in {line.get("stage") for line in lines}
    assert "quantize" not in {line.get("stage") for line in lines}, "an engine's damage cost the weights"
    assert any("engine" in line.get("text", "") for line in lines if line["event"] == "message")
    verify_files(one_engine, load_manifest(one_engine))
    assert digests(one_engine, "onnx") == weights


def test_damaged_weights_are_made_again(one_engine: Path, model: Path) -> None:
    before = digests(one_engine, "onnx")
    path = one_engine / "onnx/transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    path.write_bytes(data)
    lines = export(model, "-o", one_engine, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES)
    assert any("damaged" in line.get("text", "") for line in lines)
    assert digests(one_engine, "onnx") == before
    verify_files(one_engine, load_manifest(one_engine))


@pytest.mark.slow
def test_ranges_build_one_engine_with_a_profile(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = export(
        model, "-o", out, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", "--verify",
        "--latent", "2:3x6:8:10x8", "--text-tokens", "4",
    )  # fmt: skip
    (entry,) = load_manifest(out).engines
    assert entry["shapes"]["frames"] == [2, 3, 3]
    assert entry["shapes"]["height"] == [6, 8, 10]
    assert entry["shapes"]["width"] == [8, 8, 8]
    assert lines[-1]["checks"][0]["passed"]
    graph = onnx.load(out / "onnx/transformer_a8.onnx", load_external_data=False)
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    assert [d.HasField("dim_param") for d in dims] == [False, False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("realize", "sm", "products"),
    [("int4-weight-only", "8.9", {"Int4"}), ("int8", "12.0", {"Int8"}), ("nvfp4", "12.0", {"FP4E2M1"})],
)
def test_realize_overrides(realize: str, sm: str, products: set[str], model: Path, tmp_path: Path) -> None:
    """The builder's own listing says the products run in the types that were asked for."""
    out = tmp_path / "out"
    in_process(model, "-o", out, "--sm", sm, "--realize", realize, "--keep-graphs", *SIZES)
    manifest = load_manifest(out)
    assert {e["realization"] for e in manifest.engines if e["act_bits"] == 4} == {realize}
    kept = list((out / "onnx").glob(f"*_rtx_{realize}.onnx"))
    assert kept
    types = {
        onnx.TensorProto.DataType.Name(t.data_type)
        for path in kept
        for t in onnx.load(path, load_external_data=False).graph.initializer
    }
    assert {"Int4": "INT4", "Int8": "INT8", "FP4E2M1": "FLOAT4E2M1"}[products.pop()] in types


# --------------------------------------------------------------------------------------------------------- interrupted


def kill_when(arguments: list[object], ready: Callable[[], bool], limit: float = 120) -> bool:
    """Start the command, SIGKILL it (and what it started) as soon as ``ready``; False if it had ended before."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if ready():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def journal_lines(out: Path, marker: str) -> int:
    return sum(p.read_text(errors="replace").count(marker) for p in out.glob(".tmp-*/journal.jsonl"))


def engine_begun(out: Path) -> bool:
    return any(out.glob(".tmp-*/tree/engines/*/.dvdq-build-*"))


STAGES: dict[str, Callable[[Path], bool]] = {
    "quantize": lambda out: journal_lines(out, ":layer:") >= 5,
    "engines": engine_begun,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_a_kill(stage: str, model: Path, tmp_path: Path) -> None:
    """Bit-identical weights and graphs, and the finished layers are not quantized again."""
    arguments: list[object] = [model, "--target", "rtx", "--sm", "8.9", *SIZES]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    in_process(*arguments, "-o", whole)
    assert kill_when([*arguments, "-o", out], lambda: STAGES[stage](out)), "the export ended before it could be killed"
    assert not (out / "manifest.json").exists()
    finished = journal_lines(out, ":layer:")
    assert finished
    (weights,) = out.glob(".tmp-*/tree/onnx/transformer.safetensors")
    inode = weights.stat().st_ino
    export(*arguments, "-o", out, "--resume")
    assert digests(out, "onnx") == digests(whole, "onnx")
    assert (out / "onnx/transformer.safetensors").stat().st_ino == inode
    manifest = load_manifest(out)
    verify_files(out, manifest)
    assert manifest.layers == load_manifest(whole).layers
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_kill_without_resume_leaves_no_trace_in_the_next_run(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[object] = [model, "-o", out, "--target", "onnx", *SIZES]
    assert kill_when(arguments, lambda: journal_lines(out, ":layer:") >= 3)
    in_process(*arguments)
    verify_files(out, load_manifest(out))
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


# ------------------------------------------------------------------------------------------------- options that matter


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "w4a4-g64" else [pytest.mark.slow]) for n in RECIPES])
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
    in_process(
        model, "-o", out, "--target", "onnx", "--dtype", "fp16", "--keep", "blocks.1.*", "--force", "proj_out", *SIZES
    )
    manifest = load_manifest(out)
    names = {entry["name"] for entry in manifest.layers}
    assert "proj_out" in names
    assert not any(n.startswith("blocks.1.") for n in names)
    assert "blocks.1.ffn.net.2" in manifest.kept
    assert manifest.shapes["dtype"] == "fp16"
    graph = onnx.load(out / "onnx/transformer_a4.onnx", load_external_data=False)
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_one_component_of_a_pipeline(pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_process(pipeline_folder, "-o", out, "--target", "onnx", "--recipe", "w4a8", "--subfolder", "transformer_2", *SIZES)
    manifest = load_manifest(out)
    assert manifest.components == ("transformer_2",)
    assert {g["path"] for g in manifest.graphs} == {"onnx/transformer_2_a8.onnx", "onnx/transformer_2_a8_qdq.onnx"}


def test_nonfinite_weights_are_recorded_when_allowed(model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "model"))
    path = broken / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    names = ["blocks.0.attn1.to_k.weight", "proj_out.bias", "blocks.1.ffn.net.0.proj.bias"]
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
    text = in_process(model, "-o", tmp_path / "out", "--dry-run", "--sm", "8.9", "--sm", "12.0", *SIZES)
    for part in ("recipe w4a4", "14 layers", "INT8 tensor cores", "FP4 tensor cores", "disk", "memory", "nothing was written"):
        assert part in text
    assert state_of(tmp_path) == before


def test_dry_run_as_json_and_its_estimates(wan22: tuple[Path, list[dict[str, Any]]], pipeline_folder: Path) -> None:
    """Loose factors only: the estimates are measured in benchmarks."""
    out, lines = wan22
    before = stamps(out)
    text = in_process(
        pipeline_folder, "-o", out, "--target", "rtx", "--target", "onnx", "--sm", "8.9", *SIZES, "--dry-run",
        "--log-format", "json",
    )  # fmt: skip
    plan = json.loads(text)
    assert stamps(out) == before
    assert plan["components"] == ["transformer", "transformer_2"]
    assert len(plan["layers"]) == len(load_manifest(out).layers)
    assert [e["act_bits"] for e in plan["engines"]] == [4, 8]
    estimate = plan["estimate"]
    weights = sum(p.stat().st_size for p in (out / "onnx").glob("*.safetensors"))
    assert 0.8 * weights <= estimate["weight_file_bytes"] <= 1.2 * weights
    assert estimate["source_bytes"] == pytest.approx(
        sum(p.stat().st_size for p in pipeline_folder.rglob("*.safetensors")), rel=0.1
    )
    peak = max(line["rss_bytes"] for line in lines if "rss_bytes" in line)
    assert 0.5 * peak <= estimate["peak_bytes"] <= 3 * peak
    assert set(estimate["seconds"]) == {"quantize", "graphs", "engines"}
