"""The graph that TensorRT gets: plugin nodes whose packed weights are inputs, and nothing of them inside."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dvdquant.errors import EngineError
from dvdquant.export.engines.network import check_custom_ops, read_model
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.stage import EngineStage
from dvdquant.export.graph.functions import attach_functions
from dvdquant.export.options import ExportOptions
from dvdquant.export.passes.plugin_inputs import PLUGIN_NAMESPACE, PLUGIN_VERSION, plugin_inputs
from dvdquant.model.families import Axis, Sizes
from dvdquant.recipe import RECIPES
from dvdquant.system.progress import Progress
from tests.support import quant_linear_graphs as qg
from tests.support.engine_building import as_tensorrt

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["midrise", "float"])
def spec(request: pytest.FixtureRequest) -> qg.Spec:
    groups = 64 if request.param == "float" else 0
    return qg.Spec("bf16", (256, 512, 256), 4, zero=request.param, weight_group=groups, block=64)


def exported(spec: qg.Spec, folder: Path) -> Path:
    """The QuantLinear graph as the exporter writes it, function body included."""
    model = qg.graph(spec, folder)
    attach_functions(model)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_packed_weights_become_inputs_and_the_body_goes(spec: qg.Spec, tmp_path: Path) -> None:
    path = exported(spec, tmp_path)
    model = ir.load(path)
    assert plugin_inputs(model)
    ir.save(model, tmp_path / "plugin.onnx")
    plugin = read_model(tmp_path / "plugin.onnx")
    assert not plugin.functions
    wanted = {}
    for layer in spec.layers:
        for field, array in (
            ("weight", layer.packed), ("weight_scale", layer.scale), ("weight_group_scale", layer.group_scale),
            ("weight_zero", layer.zero), ("bias", layer.bias),
        ):  # fmt: skip
            kind = onnx.TensorProto.FLOAT if array.dtype == np.float32 else onnx.TensorProto.INT8
            wanted[f"{layer.name}.{field}"] = (kind, list(array.shape))
    inputs = {
        value.name: (value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in plugin.graph.input
    }
    assert {name: inputs[name] for name in wanted} == wanted
    assert next(iter(inputs)) == "x"
    assert len(inputs) == 1 + len(wanted)
    # Only the rotation matrices are left, and TensorRT knows no UINT8 inside a network.
    assert {t.name for t in plugin.graph.initializer} == {"hadamard.64", "outer.1"}
    assert all(t.data_type == onnx.TensorProto.FLOAT for t in plugin.graph.initializer)
    assert (tmp_path / "plugin.onnx").stat().st_size < 64 * 64 * 4 + 20000


def test_nodes_name_the_plugin_and_the_layer(spec: qg.Spec, tmp_path: Path) -> None:
    model = ir.load(exported(spec, tmp_path))
    plugin_inputs(model)
    nodes = [node for node in model.graph if node.op_type == "QuantLinear"]
    assert [node.attributes["layer"].as_string() for node in nodes] == ["blocks.0.ffn", "blocks.1.ffn"]
    for node in nodes:
        assert node.attributes["plugin_version"].as_string() == PLUGIN_VERSION
        assert node.attributes["plugin_namespace"].as_string() == PLUGIN_NAMESPACE
        assert (node.attributes["act_bits"].as_int(), node.attributes["act_group"].as_int()) == (4, 0)


def test_the_plugin_registers_the_names_the_graph_asks_for() -> None:
    header = (ROOT / "plugins/csrc/quant_linear.h").read_text()
    assert f'kPluginNamespace[] = "{PLUGIN_NAMESPACE}"' in header
    assert f'kPluginVersion[] = "{PLUGIN_VERSION}"' in header
    assert 'kPluginName[] = "QuantLinear"' in header


def test_the_builder_takes_it_with_the_plugin_alone(spec: qg.Spec, tmp_path: Path) -> None:
    model = ir.load(exported(spec, tmp_path))
    plugin_inputs(model)
    proto = ir.to_proto(model)
    check_custom_ops(proto, as_tensorrt(), [Path("libdvdquant_plugins.so")])
    with pytest.raises(EngineError, match=r"2 dvdquant::QuantLinear nodes are left"):
        check_custom_ops(proto, as_tensorrt(), [])


def test_a_shared_weight_becomes_one_input_and_another_graph_is_left_alone(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (128, 128, 128), 8, block=64)
    model = qg.graph(spec, tmp_path)
    first, second = (node for node in model.graph if node.op_type == "QuantLinear")
    for position in range(1, 6):
        second.replace_input_with(position, first.inputs[position])
    assert plugin_inputs(model)
    names = [value.name for value in model.graph.inputs]
    assert len(names) == len(set(names)) == 6
    again = qg.graph(qg.Spec("fp16", (64, 64), 8, block=64), tmp_path)
    for node in list(again.graph):
        node.domain = "other"
    assert not plugin_inputs(again)
    assert len(again.graph.inputs) == 1


def test_the_engine_stage_builds_from_that_graph(spec: qg.Spec, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    exported(spec, tmp_path / "onnx").rename(tmp_path / "onnx/transformer_a4.onnx")
    library = tmp_path / "libx.so"
    library.write_bytes(b"not a library")
    fixed = Axis(1, 1, 1)
    stage = EngineStage(
        tmp_path,
        plan=SimpleNamespace(family=None, lora_rank=0, kept={}),  # fixed sizes need no profile
        sizes=Sizes(fixed, fixed, fixed, 1),
        component="transformer",
        options=ExportOptions(
            "model", tmp_path, RECIPES["w4a4"], targets=("tensorrt",), plugins=(library,), keep_graphs=True
        ),
        progress=Progress(),
        hashes={},
    )
    engine = EnginePlan("tensorrt", ("9.0",), 4, "plugin", "the plugin")
    # Neither TensorRT nor this library is there: what matters is what the builder process was given.
    with pytest.raises(EngineError, match=r"transformer a4 for tensorrt SM 9\.0"):
        stage.build(engine)
    given = read_model(tmp_path / "onnx/transformer_a4_plugin.onnx")
    assert {t.name for t in given.graph.initializer} == {"hadamard.64", "outer.1"}
    assert not list((tmp_path / "engines").rglob("*.engine"))


def test_make_plugin_says_what_is_missing(tmp_path: Path) -> None:
    if shutil.which("make") is None or list(Path("/usr/include").glob("*-linux-gnu/NvInfer.h")):
        pytest.skip("needs make, and a machine without TensorRT's headers in /usr/include")
    environment = {**os.environ, "TENSORRT_ROOT": str(tmp_path)}
    done = subprocess.run(["make", "plugin"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "plugin skipped: TensorRT's C++ headers were not found; set TENSORRT_ROOT" in done.stderr
