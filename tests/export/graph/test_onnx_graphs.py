"""The exported graphs: every family, flavour, bit-width and dtype against float64, as a whole and layer by layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from dvdquant.errors import ExportError, ShapeError
from dvdquant.export.graph.trace import profile_shapes, trace_graph
from dvdquant.export.graph.writer import FLAVOURS
from dvdquant.export.passes.initializers_to_inputs import kept_to_inputs
from dvdquant.export.passes.plugin_inputs import plugin_inputs
from dvdquant.export.verify.graph import Verifier, verify_graph
from dvdquant.model import kept_inputs as module
from dvdquant.model.families import Axis, Sizes
from dvdquant.model.held_weights import held_weights
from dvdquant.model.kept_inputs import kept_inputs
from dvdquant.model.plan import plan_model
from dvdquant.recipe import ActivationSpec, Recipe, WeightSpec, get_recipe
from dvdquant.system.safetensors_reader import read_header
from tests.support import tiny_models as tiny
from tests.support.exporting import TINY_WAN, Export, check_layers, export_graphs, with_changes
from tests.support.image_pipelines import KINDS
from tests.support.tiny_pipelines import TOKENS
from tests.support.traces import traced

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROUPED = Recipe("grouped", (ActivationSpec(4, 64), ActivationSpec(8)), WeightSpec(group_size=64))
REAL = Recipe("float", (ActivationSpec(4, 64), ActivationSpec(8)), WeightSpec(32, "float"))
REAL_ROWS = Recipe("real-rows", (ActivationSpec(4), ActivationSpec(8)), WeightSpec(0, "float"))
PAPER_ALL = replace(get_recipe("paper"), name="paper-a8", modulation="a8")  # and the linears that modulate
OWN = {recipe.name: recipe for recipe in (GROUPED, REAL, REAL_ROWS, PAPER_ALL)}
ONE = {"num_layers": 1}  # where two blocks show no more
TI2V = with_changes(tiny.WAN, in_channels=48, out_channels=48)
FLF = KINDS["wan-flf2v"].config
LEARNED = with_changes(tiny.COGVIDEOX, **ONE, use_learned_positional_embeddings=True)
PIPELINE = Sizes(Axis.fixed(2), Axis.fixed(4), Axis.fixed(4), text_tokens=TOKENS)  # as in tests/deploy
TINY_SIZES = Sizes(Axis.fixed(2), Axis.fixed(12), Axis.fixed(16), text_tokens=5)


def case(name: str, config: Any, recipe: str, dtype: str, sizes: Sizes, when: str = "") -> Any:
    kind = "ranges" if sizes.dynamic else "fixed"
    marks = [getattr(pytest.mark, when)] if when else []
    return pytest.param((config, recipe, dtype, sizes), id=f"{name}-{recipe}-{dtype}-{kind}", marks=marks)


# In the normal run every family, dtype, kind of weights, and sizes fixed and in ranges stand at least once; not every pair.
# Those rounded to nearest, with a first and a last image, or with packed modulation are traced for other tests as well.
CASES = [
    case("tiny-wan", TINY_WAN, "w4a4", "bf16", TINY_SIZES, when="stress"),
    case("wan", tiny.WAN_ONE, "grouped", "fp16", tiny.FIXED),
    case("wan", tiny.WAN, "grouped", "fp16", tiny.FIXED, when="stress"),
    case("wan", tiny.WAN_ONE, "float", "fp16", tiny.FIXED, when="stress"),
    case("cogvideox", with_changes(tiny.COGVIDEOX, **ONE), "paper", "fp16", tiny.FIXED, when="stress"),
    case("hunyuan-video", tiny.HUNYUAN, "w4a4", "bf16", tiny.FIXED, when="stress"),
    case("ltx-video", with_changes(tiny.LTX, **ONE), "rtn", "bf16", tiny.RANGES),
    case("ltx-video", with_changes(tiny.LTX, **ONE), "w4a4", "bf16", tiny.RANGES, when="stress"),
    case("ltx-video", with_changes(tiny.LTX, **ONE), "w4a4", "fp16", tiny.FIXED, when="stress"),
    case("tiny-wan", TINY_WAN, "w4a4", "fp16", TINY_SIZES, when="stress"),
    case("wan", tiny.WAN, "w4a4", "bf16", tiny.FIXED, when="stress"),
    case("wan", tiny.WAN, "w4a4", "fp16", tiny.RANGES, when="stress"),
    case("wan", tiny.WAN, "w4a4", "bf16", tiny.RANGES, when="stress"),
    case("wan-ti2v", TI2V, "w4a4", "bf16", tiny.FIXED, when="stress"),
    case("wan-ti2v", TI2V, "w4a4", "fp16", tiny.RANGES, when="stress"),
    case("wan-flf", FLF, "w4a4", "bf16", PIPELINE, when="slow"),
    case("hunyuan-video", tiny.HUNYUAN, "grouped", "fp16", tiny.FIXED, when="stress"),
    case("hunyuan-video", tiny.HUNYUAN, "float", "bf16", tiny.FIXED, when="stress"),
    case("cogvideox", tiny.COGVIDEOX, "paper", "fp16", tiny.FIXED, when="stress"),
    case("cogvideox", tiny.COGVIDEOX, "real-rows", "fp16", tiny.FIXED, when="stress"),
    case("hunyuan-video", tiny.HUNYUAN, "rtn", "bf16", tiny.RANGES, when="slow"),
    case("hunyuan-video", tiny.HUNYUAN, "rtn", "bf16", tiny.FIXED, when="stress"),
    case("hunyuan-video", tiny.HUNYUAN, "w4a4", "bf16", tiny.RANGES, when="stress"),
    case("hunyuan-video", tiny.HUNYUAN, "w4a4", "fp16", tiny.RANGES, when="stress"),
    case("cogvideox", tiny.COGVIDEOX, "w4a4", "bf16", tiny.FIXED, when="stress"),
    case("cogvideox", tiny.COGVIDEOX, "w4a4", "fp16", tiny.RANGES, when="stress"),
    case("cogvideox-1.5", tiny.COGVIDEOX_15, "paper-a8", "fp16", tiny.EVEN, when="slow"),
    case("cogvideox-1.5", tiny.COGVIDEOX_15, "w4a4", "fp16", tiny.EVEN, when="stress"),
    case("cogvideox-i2v", LEARNED, "float", "fp16", tiny.FIXED, when="slow"),
    case("cogvideox-i2v", LEARNED, "w4a4", "fp16", tiny.FIXED, when="stress"),
    case("cogvideox-2b", tiny.COGVIDEOX_2B, "w4a4", "bf16", tiny.FIXED, when="stress"),
    case("cogvideox-2b", tiny.COGVIDEOX_2B, "w4a4", "fp16", tiny.FIXED, when="stress"),
    case("ltx-video", tiny.LTX, "grouped", "bf16", tiny.FIXED, when="stress"),
    case("ltx-video", tiny.LTX, "w4a4", "fp16", tiny.RANGES, when="stress"),
]
# The judgement of a whole graph holds every layer to its bound as well: of most cases it is enough.
LAYER_BY_LAYER = [
    each if each.id.startswith("wan-grouped") else pytest.param(*each.values, id=each.id, marks=pytest.mark.stress)
    for each in CASES
]


@pytest.fixture(scope="module", params=CASES)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    config, recipe, dtype, sizes = request.param
    folder = tmp_path_factory.mktemp("graphs")
    source = TINY_WAN / "transformer" if config is TINY_WAN else tiny.write_checkpoint(folder / "model", config)
    chosen = OWN[recipe] if recipe in OWN else get_recipe(recipe)
    return export_graphs(source, folder, chosen, sizes, DTYPES[dtype])


def graphs(export: Export) -> list[tuple[int, str]]:
    return [(entry["act_bits"], entry["target"]) for entry in export.graphs]


def points(export: Export) -> tuple[str, ...]:
    return ("min", "max") if export.sizes.dynamic else ("opt",)


def graphs_at_points(export: Export) -> list[tuple[int, str, str]]:
    """Every graph with a point of the ranges, so that each flavour and each width meets both ends."""
    ends = points(export)
    return [(bits, flavour, ends[index % len(ends)]) for index, (bits, flavour) in enumerate(graphs(export))]


# ------------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("export", LAYER_BY_LAYER, indirect=True)
def test_every_layer_is_right_on_the_input_it_had(export: Export) -> None:
    """Teacher-forced: the bound of each element follows from the number formats and the codes near a tie."""
    for bits, flavour in graphs(export):
        for which in points(export):
            inputs = export.plan.family.sample(export.sizes, export.plan.dtype, seed=3, which=which)
            checks = check_layers(export, export.path(bits, flavour), bits, inputs)
            assert len(checks) == len(export.plan.layers)
            wrong = [c for c in checks if not c.excess <= 1.0]
            assert not wrong, (bits, flavour, which, wrong[:3])


def test_whole_graph_is_as_close_to_float64_as_pytorch(export: Export) -> None:
    # As --verify does: the exact results of a bit-width serve both flavours.
    models = {bits: export.model(bits) for bits, _ in graphs(export)}
    verifiers: dict[tuple[int, str], Verifier] = {}
    for bits, flavour, which in graphs_at_points(export):
        path = export.path(bits, flavour)
        before = sorted(p.name for p in path.parent.iterdir())
        if (bits, which) not in verifiers:
            verifiers[bits, which] = Verifier(export.plan, export.sizes, models[bits], seed=3, which=which)
        check = verifiers[bits, which].check(path, bits)
        assert check.passed, check.faults()
        assert check.flipped_codes is not None
        # 16-bit inputs are no finer than an 8-bit grid: half of its codes may differ.
        assert 0 <= check.flipped_codes < 0.6
        assert len(check.layers.judged) == check.layers.total == len(export.plan.layers)
        assert check.between is not None
        assert check.between.places == len(export.plan.layers) + 1
        assert sorted(p.name for p in path.parent.iterdir()) == before


# ---------------------------------------------------------------------------------------------------- files and names


def test_graphs_share_one_copy_of_every_weight(export: Export) -> None:
    """Both bit-widths of a flavour reference the same bytes; what is in the .onnx files is not weights."""
    locations: dict[str, set[tuple[str, int, int]]] = {}
    for bits, flavour in graphs(export):
        proto = onnx.load(export.path(bits, flavour), load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                place = entry["location"], int(entry["offset"]), int(entry["length"])
                locations.setdefault(tensor.name, set()).add(place)
    # Hadamard constants have other names in the other flavour; a weight has one name and one place everywhere.
    assert all(len(places) == 1 for places in locations.values())
    for relative in {relative for relative, _ in export.packed.tensors.values()}:
        header = read_header(export.root / relative)
        for name, info in header.tensors.items():
            if name in locations:
                assert locations[name] == {(Path(relative).name, info.offset, info.nbytes)}
    weights = [n for n in locations if n.endswith(".weight")]
    assert len(weights) >= len(export.plan.layers)


def test_no_weight_bytes_inside_the_graph_files(export: Export) -> None:
    stored = sum(info.nbytes for _, info in export.packed.tensors.values())
    on_disk = {p.name: p.stat().st_size for p in (export.root / "onnx").iterdir()}
    files = {Path(relative).name for relative, _ in export.packed.tensors.values()}
    padding = 64 * (len(export.packed.tensors) + 1) + (1 << 18)
    assert sum(on_disk[name] for name in files) <= stored + padding
    for bits, flavour in graphs(export):
        proto = onnx.load(export.path(bits, flavour), load_external_data=False)
        inside = {
            t.name: len(t.raw_data) for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
        }
        packed = {n for spec in export.plan.layers for n in spec.tensors()}
        kept = set(export.plan.kept)
        assert not {name for name in inside if name in packed | kept}, (bits, flavour)
        # What is left are shapes, rotary tables, and the QDQ flavour's vectors and rotations (in the graph's dtype).
        rotations = {n for n in inside if n.startswith(("dvdquant.hadamard.", "dvdquant.outer."))}
        assert max((size for name, size in inside.items() if name not in rotations), default=0) <= 1 << 16
        assert flavour == "onnx" or not rotations


def test_what_is_not_quantized_is_an_input_or_a_constant_that_is_counted(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan says of every family which tensors become inputs of its engines, and what an engine holds in itself."""
    monkeypatch.setattr(module, "LARGE", 1024)  # as these models are small
    for plan in (export.plan, replace(export.plan, lora_rank=8)):
        wanted = kept_inputs(plan, plugin=True)
        for bits in (bits for bits, flavour in graphs(export) if flavour == "tensorrt"):
            graph = ir.load(export.path(bits, "tensorrt"))
            plugin_inputs(graph)
            before = len(graph.graph.inputs)
            assert kept_to_inputs(graph, wanted)
            assert {value.name for value in graph.graph.inputs[before:]} == wanted.keys()
            held = held_weights(plan, 80, [bits])
            assert held.shared == sum(wanted.values())
            assert held.constants == sum(
                value.const_value.nbytes
                for name, value in graph.graph.initializers.items()
                if value.const_value is not None
                and (name in plan.kept or ".pre_quant_" in name or name.startswith(("hadamard.", "outer.")))
            )


def test_inputs_outputs_and_checker(export: Export) -> None:
    expected = {s.name: s for s in export.plan.family.inputs(export.sizes)}
    for bits, flavour in graphs(export):
        path = export.path(bits, flavour)
        onnx.checker.check_model(str(path))
        proto = onnx.load(path, load_external_data=False)
        assert [i.name for i in proto.graph.input] == list(expected)
        assert [o.name for o in proto.graph.output] == ["sample"]
        for value in proto.graph.input:
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            spec = expected[value.name]
            axes = export.plan.family.axes(export.sizes)
            for axis, (dim, size) in enumerate(zip(dims, spec.sizes(axes), strict=True)):
                name = spec.shape[axis]
                ranges = name == "tokens" if isinstance(name, str) else False
                ranges = ranges or (isinstance(name, str) and name != "tokens" and getattr(export.sizes, name).dynamic)
                assert dim == (0 if ranges and export.sizes.dynamic else size), (value.name, axis)
        # Rotary embeddings are concatenations, in graphs for a range of sizes, too. CogVideoX puts those of the video behind
        # its text, in a slice of the tensor.
        if export.plan.family.name != "cogvideox":
            assert "ScatterND" not in {node.op_type for node in proto.graph.node}
        names = [node.op_type for node in proto.graph.node if node.domain == "dvdquant"]
        if flavour == "tensorrt":
            assert names == ["QuantLinear"] * len(export.plan.layers)
            bits_of = {
                a.i for n in proto.graph.node if n.op_type == "QuantLinear" for a in n.attribute if a.name == "act_bits"
            }
            asked = export.plan.recipe.activation(bits)
            assert bits_of == {spec.activation(asked).bits for spec in export.plan.layers}
        else:
            assert set(names) <= {"Rotate", "RotateOuter"}
        used = {(n.domain, n.op_type) for n in proto.graph.node if n.domain == "dvdquant"}
        assert {(f.domain, f.name) for f in proto.functions} >= used


def test_profile_covers_the_inputs(export: Export) -> None:
    shapes = profile_shapes(export.plan.family, export.sizes)
    if not export.sizes.dynamic:
        assert shapes is None
        return
    assert shapes is not None
    for spec in export.plan.family.inputs(export.sizes):
        low, best, high = shapes[spec.name]
        assert all(a <= b <= c for a, b, c in zip(low, best, high))
        sample = export.plan.family.sample(export.sizes, torch.float32, which="max")[spec.name]
        assert tuple(sample.shape) == high


# ------------------------------------------------------------------------------------------- checks that can fail


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("wan")
    source = tiny.write_checkpoint(folder / "model", tiny.WAN_ONE)
    return export_graphs(source, folder, get_recipe("w4a4"), tiny.FIXED, torch.float16)


VICTIM = "blocks.0.attn2.to_k+to_v"


def own_initializer(model: ir.Model, name: str) -> np.ndarray:
    """Make an initializer a private, writable copy."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    value.const_value = ir.tensor(array, name=name)
    return array


def scale_row(model: ir.Model) -> None:
    own_initializer(model, f"{VICTIM}.weight_scale")[100] *= 1.05


def flip_nibble(model: ir.Model) -> None:
    own_initializer(model, f"{VICTIM}.weight")[17, 5] ^= 0x40


def shift_bias(model: ir.Model) -> None:
    bias = own_initializer(model, f"{VICTIM}.bias")
    bias[:] = np.roll(bias, 1)


def change_bits(model: ir.Model) -> None:
    (node,) = [n for n in model.graph if n.op_type == "QuantLinear" and n.inputs[1].name == f"{VICTIM}.weight"]
    node.attributes["act_bits"] = ir.AttrInt64("act_bits", 6)


def transpose_hadamard(model: ir.Model) -> None:
    (node,) = [n for n in model.graph if n.op_type == "QuantLinear" and n.inputs[1].name == f"{VICTIM}.weight"]
    matrix = node.inputs[6].const_value.numpy().copy()
    other = ir.Value(name="wrong", const_value=ir.tensor(np.roll(matrix, 1, axis=1), name="wrong"))
    other.dtype, other.shape = ir.DataType.FLOAT, ir.Shape(matrix.shape)
    model.graph.initializers["wrong"] = other
    node.replace_input_with(6, other)


@pytest.mark.parametrize(
    ("bits", "fault"),
    [
        pytest.param(bits, fault, marks=[] if bits == 4 or fault is change_bits else [pytest.mark.stress])
        for bits in (4, 8)
        for fault in (scale_row, flip_nibble, shift_bias, change_bits, transpose_hadamard)
    ],
)
def test_a_planted_fault_is_found_in_its_layer_alone(wan: Export, bits: int, fault: Any) -> None:
    inputs = wan.plan.family.sample(wan.sizes, wan.plan.dtype, seed=3)
    checks = check_layers(wan, wan.path(bits, "tensorrt"), bits, inputs, edit=fault)
    assert [c.name for c in checks if not c.excess <= 1.0] == [VICTIM]


@pytest.mark.parametrize(
    ("bits", "fault"),
    [
        (4, "qdq_scale"),
        (8, "row_scale"),
        pytest.param(4, "row_scale", marks=pytest.mark.stress),
        pytest.param(8, "qdq_scale", marks=pytest.mark.stress),
    ],
)
def test_a_planted_fault_is_found_in_the_qdq_graph(wan: Export, bits: int, fault: str) -> None:
    def plant(model: ir.Model) -> None:
        array = own_initializer(model, f"{VICTIM}.{fault}")
        array.reshape(array.shape[0], -1)[100, 0] *= 1.25

    inputs = wan.plan.family.sample(wan.sizes, wan.plan.dtype, seed=3)
    checks = check_layers(wan, wan.path(bits, "onnx"), bits, inputs, edit=plant)
    assert [c.name for c in checks if not c.excess <= 1.0] == [VICTIM]


def test_verify_reports_a_graph_that_does_not_run(wan: Export) -> None:
    path = wan.path(8, "tensorrt")
    broken = path.with_name("broken.onnx")
    model = ir.load(path)
    model.functions.clear()
    ir.save(model, broken)
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        verify_graph(broken, wan.plan, wan.sizes, wan.model(8), 8)
    broken.unlink()


# --------------------------------------------------------------------------------------------------------------- trace


def test_trace_refuses_sizes_that_do_not_fit() -> None:
    made = plan_model(tiny.WAN, get_recipe("w4a4"), torch.float16)
    with pytest.raises(ShapeError):
        trace_graph(made, Sizes(Axis.fixed(2), Axis.fixed(7), Axis.fixed(8), text_tokens=4))
    with pytest.raises(ShapeError, match="positions for 32 patches"):  # the end of diffusers' rotary table
        trace_graph(made, Sizes(Axis.fixed(40), Axis.fixed(8), Axis.fixed(8), text_tokens=4))


def test_base_graph_is_the_same_every_time() -> None:
    """--resume and the engines' hashes rely on it; the second is a graph that went through the store of the tests."""
    made = plan_model(tiny.WAN_ONE, get_recipe("w4a4"), torch.float16)
    models = (trace_graph(made, tiny.FIXED), traced(made, tiny.FIXED))
    first, second = (ir.serde.serialize_model(_stripped(model)) for model in models)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_graphs_hold_no_place_of_this_machine(export: Export) -> None:
    for bits, flavour in graphs(export):
        raw = export.path(bits, flavour).read_bytes()
        assert b"site-packages" not in raw
        assert str(Path(torch.__file__).parents[1]).encode() not in raw


def _stripped(model: ir.Model) -> ir.Model:
    """Placeholders take the size of the model when written: leave their data out."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > 1 << 12:
            shape, dtype = value.const_value.shape, value.const_value.dtype
            value.const_value = ir.ExternalTensor("x", 0, 0, dtype, shape=shape, name=value.name)
    return model


def test_flavours_are_described() -> None:
    assert set(FLAVOURS) == {"tensorrt", "onnx"}
    assert json.dumps(FLAVOURS)
