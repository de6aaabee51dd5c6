"""A quantized layer and what comes before it in one plugin node: the pass, its definition in ONNX Runtime, TensorRT's graph."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from dvdquant.cli.inspect import main as inspect_main
from dvdquant.errors import EngineError, UnsupportedError
from dvdquant.export.engines.stage import BuildSettings, fuse_layers
from dvdquant.export.options import ExportOptions
from dvdquant.export.passes.fuse_prologues import FUSED, READS, expand_prologues, fuse_prologues
from dvdquant.export.passes.plugin_inputs import plugin_inputs
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.export.verify import graph as judged_graphs
from dvdquant.export.verify.graph import Verifier
from dvdquant.recipe import RECIPES, get_recipe
from dvdquant.system.progress import Progress
from tests.support.commands import SIZES, in_process
from tests.support.exporting import Export, export_graphs
from tests.support.tiny_models import CONFIGS, FIXED, RANGES, SMALL, WAN_ONE, write_checkpoint

LAYER = Path(__file__).parents[3] / "plugins/csrc/layer.cpp"
# (reads, norm, gelu) of the first block of Wan, which has none before it, and of two.
FIRST_BLOCK = {
    ("multiplier,addend,pre_quant", "layer", 0): 1,
    ("y,gate,multiplier,addend,pre_quant", "layer", 0): 1,
    ("y,multiplier,addend,pre_quant", "layer", 0): 1,
    ("pre_quant", "none", 1): 1,
}
TWO_BLOCKS = {
    ("multiplier,addend,pre_quant", "layer", 0): 1,
    ("y,gate,multiplier,addend,pre_quant", "layer", 0): 3,
    ("y,multiplier,addend,pre_quant", "layer", 0): 2,
    ("pre_quant", "none", 1): 2,
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("fused")
    model = write_checkpoint(folder / "model", WAN_ONE)
    return export_graphs(model, folder / "out", get_recipe("w4a8"), SMALL, torch.bfloat16, ("tensorrt",))


def forms(model: ir.Model) -> Counter[tuple[str, str, int]]:
    return Counter(
        (node.attributes["reads"].as_string(), node.attributes["norm"].as_string(), node.attributes["gelu"].as_int())
        for node in model.graph
        if node.op_type == FUSED
    )


def test_wans_layers_take_what_is_before_them(wan: Export) -> None:
    model = ir.load(wan.path(8, "tensorrt"))
    layers = sum(node.op_type == "QuantLinear" for node in model.graph)
    assert fuse_prologues(model) == 4
    assert forms(model) == FIRST_BLOCK
    # Attention's outputs and the text's layers have nothing that the kernel computes.
    left = [node.inputs[1].name for node in model.graph if node.op_type == "QuantLinear"]
    assert len(left) == layers - 4
    assert all(".to_out.0." in name or "attn2.to_k+to_v" in name for name in left)
    # Nothing is computed twice: norms of the video are left in the output alone.
    assert sum(node.op_type == "LayerNormalization" for node in model.graph) == 1
    assert not any(node.op_type == "Gelu" and "quant_linear" in node.inputs[0].name for node in model.graph)
    for node in model.graph:
        if node.op_type == FUSED:
            assert len(node.inputs) == 8 + len(node.attributes["reads"].as_string().split(","))
            assert len(node.outputs) == 1 + ("y," in node.attributes["reads"].as_string())
    assert fuse_prologues(model) == 0


def test_the_definition_of_the_nodes_is_judged_layer_by_layer(wan: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(wan.plan, wan.sizes, wan.model(8), which="min")
    check = verifier.check(wan.path(8, "tensorrt"), 8, fused=True)
    assert check.passed, check.faults()
    assert check.graph == "transformer_a8.onnx with fused layers"
    assert len(check.layers.judged) == check.layers.total
    assert check.between is not None

    def without_a_gate(model: ir.Model) -> int:
        done = fuse_prologues(model)
        node = next(n for n in model.graph if n.op_type == FUSED and "gate" in n.attributes["reads"].as_string())
        inputs = [value for i, value in enumerate(node.inputs) if i != 9]
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        node.attributes["reads"] = ir.AttrString("reads", node.attributes["reads"].as_string().replace("gate,", ""))
        return done

    monkeypatch.setattr(judged_graphs, "fuse_prologues", without_a_gate)
    wrong = verifier.check(wan.path(8, "tensorrt"), 8, fused=True)
    assert not wrong.passed
    assert any("blocks.0.attn2.to_q receives" in fault for fault in wrong.faults()), wrong.faults()


def test_what_something_else_reads_is_left_alone(wan: Export) -> None:
    model = ir.load(wan.path(8, "tensorrt"))
    layer = next(n for n in model.graph if n.op_type == "QuantLinear" and "ffn.net.2" in n.inputs[1].name)
    model.graph.outputs.append(layer.inputs[0])
    assert fuse_prologues(model) == 3
    assert layer.graph is model.graph


def test_tensorrt_gets_plugin_nodes_with_their_inputs(wan: Export) -> None:
    model = ir.load(wan.path(8, "tensorrt"))
    fuse_prologues(model)
    assert plugin_inputs(model)
    assert not model.functions
    names = {value.name for value in model.graph.inputs}
    for node in (node for node in model.graph if node.op_type == FUSED):
        assert node.attributes["plugin_version"].as_string() == "1"
        assert node.attributes["plugin_namespace"].as_string() == "dvdquant"
        layer = node.attributes["layer"].as_string()
        assert {f"{layer}.weight", f"{layer}.bias"} <= names
        packed = node.inputs[-1]
        assert packed.name == f"{layer}.pre_quant"
        assert packed.shape[1:] == (2, 8)
    # The plugin knows the inputs by the same names in the same order.
    listed = LAYER.read_text().split("kExtraNames[kExtras] = {")[1].split("}")[0]
    assert tuple(word.strip(' "') for word in listed.split(",")) == READS


def test_what_fuse_does_not_apply_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--fuse is for engines with the plugin") as error:
        ExportOptions("model", tmp_path, RECIPES["w4a4"], targets=("rtx",), fuse=True)
    assert "take --target tensorrt" in str(error.value)


def test_an_export_records_its_fused_layers_and_verifies_them(tmp_path: Path) -> None:
    """With attention in FP8 in the same graph, which other tests of such attention trace as well. It is for dvdq-build,
    which needs no builder here."""
    model = write_checkpoint(tmp_path / "model", CONFIGS["wan"])
    options = ExportOptions(
        str(model), tmp_path / "out", replace(get_recipe("w4a8"), attention="fp8"), targets=("tensorrt",), sms=("9.0",),
        latent="2x24x24", text_tokens=12, fuse=True, verify=True,
    )  # fmt: skip
    result = run_export(plan_export(options), Progress("quiet"))
    (entry,) = result.manifest.builds
    assert entry["fused_layers"] == sum(TWO_BLOCKS.values())
    assert entry["fp8_attentions"] == 2
    assert entry["graph"] == "onnx/transformer_a8_plugin_fp8_fused.onnx"
    assert "transformer_a8_plugin_fp8_fused.onnx" in entry["command"]
    graph = ir.load(options.out / entry["graph"])
    assert forms(graph) == TWO_BLOCKS
    # Each is in FP8 in the graph that was left for the device, and both are judged in one.
    assert {node.op_type for node in graph.graph} >= {"QuantizeLinear", "DequantizeLinear"}
    assert [(check.graph, len(check.attention)) for check in result.checks] == [
        ("transformer_a8.onnx", 0),
        ("transformer_a8.onnx with FP8 attention and fused layers", 2),
    ]
    assert all(check.passed for check in result.checks)
    done = CliRunner().invoke(inspect_main, [str(options.out)])
    assert done.exit_code == 0
    assert "8 layers with what comes before them" in done.output
    # An export of before, without the number, is one without fused layers.
    settings = BuildSettings("a", "plugin", "tensorrt", "10", None, None, (), fuse=True)
    made = {"onnx_sha256": "a", "precision": "plugin", "versions": {"tensorrt": "10"}, "fused_layers": 4}
    assert settings.made(made)
    assert not settings.made({**made, "fused_layers": 0})
    before = replace(settings, fuse=False)
    assert before.made({name: value for name, value in made.items() if name != "fused_layers"})
    assert before.digest != settings.digest


def test_the_dry_run_counts_the_layers_that_are_fused(wan: Export, tmp_path: Path) -> None:
    """As many as the graph of such an export has."""
    arguments = [
        write_checkpoint(tmp_path / "model", WAN_ONE), "-o", tmp_path / "out", "--recipe", "w4a8", "--target", "tensorrt",
        "--sm", "9.0", *SIZES, "--dry-run",
    ]  # fmt: skip
    text = in_process(*arguments, "--fuse")
    assert f"(--fuse): transformer 4 of {len(wan.plan.layers)} layers" in text
    assert json.loads(in_process(*arguments, "--fuse", "--log-format", "json"))["fused_layers"] == {"transformer": 4}
    assert "--onnx=onnx/transformer_a8_plugin_fused.onnx" in text
    without = in_process(*arguments)
    assert "--fuse" not in without
    assert "--onnx=onnx/transformer_a8_plugin.onnx" in without
    assert json.loads(in_process(*arguments, "--log-format", "json"))["fused_layers"] is None
    assert not (tmp_path / "out").exists()


def test_a_graph_with_nothing_to_fuse_is_refused(wan: Export) -> None:
    model = ir.load(wan.path(8, "tensorrt"))
    assert fuse_layers(model) == 4
    with pytest.raises(EngineError, match=r"no layer of the graph can be fused(?s:.*)without --fuse"):
        fuse_layers(model)


@pytest.mark.stress  # Wan's is above
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_with_fused_layers(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS[family])
    sizes = FIXED if family == "cogvideox-2b" else RANGES  # it has a table for one size
    export = export_graphs(model, tmp_path / "out", get_recipe("w4a8"), sizes, torch.bfloat16, ("tensorrt",))
    graph = ir.load(export.path(8, "tensorrt"))
    assert fuse_prologues(graph) > 0
    assert forms(graph) if family != "wan" else forms(graph) == TWO_BLOCKS
    expand_prologues(graph)
    assert not forms(graph)
    check = Verifier(export.plan, sizes, export.model(8), which="min").check(export.path(8, "tensorrt"), 8, fused=True)
    assert check.passed, check.faults()
