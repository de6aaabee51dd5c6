"""``dvdq-export`` again into the same folder: engines added, damaged or missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.verify_files import verify_files
from dvdquant.export.options import ExportOptions
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, digests, in_process, logged


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


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
    lines = logged(model, "-o", one_engine, "--target", "rtx", "--sm", "12.0", "--recipe", "w4a8", *SIZES)
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


@pytest.mark.parametrize("damage", [delete_engine, flip_engine, pytest.param(cut_engine, marks=pytest.mark.stress)])
def test_damaged_engine_is_rebuilt_alone(one_engine: Path, model: Path, damage: Callable[[Path], None]) -> None:
    weights = digests(one_engine, "onnx")
    damage(one_engine)
    lines = logged(model, "-o", one_engine, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES)
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
    lines = logged(model, "-o", one_engine, "--target", "rtx", "--sm", "8.9", "--recipe", "w4a8", *SIZES)
    assert any("damaged" in line.get("text", "") for line in lines)
    assert digests(one_engine, "onnx") == before
    verify_files(one_engine, load_manifest(one_engine))


@pytest.mark.slow
def test_ranges_build_one_engine_with_a_profile(model: Path, tmp_path: Path) -> None:
    """The profile of a graph that the tests of sessions have as well, so that it is traced once."""
    out = tmp_path / "out"
    recipe = get_recipe("rtn")
    options = ExportOptions(
        str(model), out, replace(recipe, name="eight-bit", activations=recipe.activations[1:]),
        sms=("8.9",), latent="2:3:4x4:8:12x6:8:10", text_tokens=12, verify=True,
    )  # fmt: skip
    result = run_export(plan_export(options), Progress("quiet"))
    (entry,) = load_manifest(out).engines
    assert entry["shapes"]["frames"] == [2, 3, 4]
    assert entry["shapes"]["height"] == [4, 8, 12]
    assert entry["shapes"]["width"] == [6, 8, 10]
    (check,) = result.checks
    assert check.passed
    graph = onnx.load(out / "onnx/transformer_a8.onnx", load_external_data=False)
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    assert [d.HasField("dim_param") for d in dims] == [False, False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "sm", "chosen", "stored"),
    [
        ("int4-weight-only", "8.9", "int4-weight-only", "INT4"),
        pytest.param("int8", "12.0", "int8", "INT8", marks=pytest.mark.stress),
        ("auto", "12.0", "nvfp4", "FLOAT4E2M1"),
    ],
)
def test_precision(precision: str, sm: str, chosen: str, stored: str, model: Path, tmp_path: Path) -> None:
    """The override, or the choice, reaches the manifest and the types of the weights in the graph that was built."""
    out = tmp_path / "out"
    recipe = ("--recipe", "w4a4", "--activations", "4")  # engines with 8 show nothing
    in_process(model, "-o", out, "--sm", sm, "--precision", precision, "--keep-graphs", *recipe, *SIZES)
    manifest = load_manifest(out)
    assert [(e["act_bits"], e["precision"]) for e in manifest.engines] == [(4, chosen)]
    kept = list((out / "onnx").glob(f"*_rtx_{chosen}.onnx"))
    assert kept
    types = {
        onnx.TensorProto.DataType.Name(t.data_type)
        for path in kept
        for t in onnx.load(path, load_external_data=False).graph.initializer
    }
    assert stored in types
