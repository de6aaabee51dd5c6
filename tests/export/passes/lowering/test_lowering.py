"""Lowerings of QuantLinear to standard ops: numerics against fp64, zero copies, and what they refuse."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from dvdquant.errors import ExportError, OutputError
from dvdquant.export.passes.lowering.common import quant_linear_nodes, split_rotation
from dvdquant.export.passes.lowering.int8 import int8_weight, lower_int8
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4
from dvdquant.export.passes.lowering.qdq_int4 import int4_block, lower_qdq_int4
from dvdquant.export.passes.lowering.store import TensorStore
from dvdquant.export.verify.intermediates import add_intermediates, find_intermediates
from dvdquant.export.verify.tolerance import Judged, OpInputs, judge
from dvdquant.numerics.activation_grid import AMAX_FLOOR, QMAX
from dvdquant.onnx.emulate_bfloat16 import emulate_bfloat16
from dvdquant.ops.reference import rotate_by_matrices
from tests.support import quant_linear_graphs as qg

# The quotient is fp32, of at most 127 with four roundings.
HALF_A_STEP = 0.5 + 4 * 127 * 2.0**-24
LOWERINGS = {"int4": lower_qdq_int4, "int8": lower_int8}
# bits, activation group, weight group, zero, inner block, outer order
GRIDS = [
    (8, 0, 0, "midrise", 64, 1),
    (8, 0, 0, "symmetric", 16, 4),
    (8, 0, 0, "paper", 16, 12),
    (6, 0, 0, "midrise", 8, 1),
    (4, 0, 0, "midrise", 32, 1),
    (4, 0, 0, "paper", 1, 1),
    (8, 0, 32, "midrise", 64, 1),
    (4, 64, 0, "symmetric", 64, 1),
    (4, 128, 128, "midrise", 128, 1),
    (8, 32, 16, "symmetric", 4, 12),
    (8, 0, 0, "float", 64, 1),
    (8, 0, 32, "float", 64, 1),
    (4, 64, 128, "float", 16, 1),
    (8, 0, 16, "float", 16, 12),
]
ids = ["-".join(map(str, grid)) for grid in GRIDS]


def spec_of(grid: tuple, dtype: str, widths: tuple[int, ...] | None = None) -> qg.Spec:
    bits, act_group, weight_group, zero, block, outer = grid
    widths = widths or ((384, 768, 384, 768) if outer == 12 else (256, 512, 256, 1024))
    return qg.Spec(dtype, widths, bits, act_group, weight_group, zero, block, outer, seed=len(widths) + bits)


def run(model: ir.Model | Path, x: np.ndarray) -> np.ndarray:
    return session_of(model).run(None, {"x": x})[0]


# int8 refuses activation groups: test_int8_refuses_activation_groups.
CASES = [
    pytest.param(name, grid, id=f"{name}-{label}")
    for name in LOWERINGS
    for grid, label in zip(GRIDS, ids)
    if not (name == "int8" and grid[1])
]


def assert_layers(name: str, spec: qg.Spec, x: np.ndarray) -> None:
    """Assert of a lowered chain that every layer gives what its definition gives for the input that it had in the graph.

    The bound is the judge's: codes at ties may be one off, sums and results may be rounded (dvdquant.export.verify.tolerance).
    """
    model, dtype = qg.graph(spec), qg.TORCH[spec.dtype]
    added = {}
    if name == "int8":
        for layer, node in zip(spec.layers, quant_linear_nodes(model)):
            codes, scale = int8_weight(node)
            added[layer.name] = torch.from_numpy(codes * scale[:, None] - layer.weight())
    assert LOWERINGS[name](model)
    onnx.checker.check_model(ir.to_proto(model))
    if spec.dtype == "bf16":
        # ONNX Runtime's CPU provider has no bf16 kernels: fp32 ones, each result rounded to bf16.
        emulate_bfloat16(model)
        assert all(value.dtype is not None for node in model.graph for value in node.outputs)
        x = x.astype(np.float32)
    # 1. What went into each layer, and what came out.
    points = find_intermediates(model, [layer.name for layer in spec.layers])
    outputs = {f"{key} y": point.y for key, point in points.items()}
    outputs |= {f"{key} x": point.x for key, point in points.items() if point.x is not model.graph.inputs[0]}
    names = add_intermediates(model, outputs)
    found = dict(zip(names, session_of(model).run(list(names.values()), {"x": x})))
    # 2. Judge each layer alone.
    for layer in spec.layers:
        op = OpInputs(tensors_of(layer), layer.act_bits, layer.act_group)
        seen = torch.from_numpy(found.get(f"{layer.name} x", x)).to(dtype)
        judged = judge(op, seen, dtype)
        if layer.name in added:
            judged = with_added(judged, op, seen, added[layer.name])
        share, distance, bound = judged.worst(torch.from_numpy(found[f"{layer.name} y"]))
        assert share <= 1, f"{layer.name}: {distance:.3g} from float64, of at most {bound:.3g}"


def tensors_of(layer: qg.Layer) -> dict[str, torch.Tensor]:
    """The layer's constants by the names of the op's inputs, in its order."""
    arrays = {
        "weight": layer.packed.view(np.int8), "weight_scale": layer.scale, "weight_group_scale": layer.group_scale,
        "weight_zero": layer.zero, "bias": layer.bias, "hadamard": layer.hadamard, "outer": layer.outer,
    }  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def with_added(judged: Judged, op: OpInputs, x: torch.Tensor, added: torch.Tensor) -> Judged:
    """The judge's output and bound where the weight is another one by ``added`` [N, K], fp64."""
    rotated = rotate_by_matrices(x.double(), op.tensors["hadamard"].double(), op.tensors["outer"].double())
    step = rotated.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR) / QMAX[op.act_bits]
    # Codes at ties move that much more, and the sums have the norms of the other weight, which is at most 1 % larger:
    # half a step of 1/127 of a row's largest weight (test_int8_weight_of_groups_adds_little).
    flips = (judged.near * step) @ added.abs().T
    return replace(judged, y=judged.y + (judged.codes * step) @ added.T, bound=1.01 * judged.bound + flips)


def session_of(model: ir.Model | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", pytest.param("fp32", marks=pytest.mark.stress)])
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_matches_the_definition(name: str, grid: tuple, dtype: str) -> None:
    spec = spec_of(grid, dtype)
    assert_layers(name, spec, qg.outliers((1, 19, spec.widths[0]), 3, dtype))


@pytest.mark.parametrize("name", LOWERINGS)
def test_the_check_of_lowerings_sees_a_wrong_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of one row is a thousandth off."""
    spec = spec_of((8, 0, 0, "midrise", 64, 1), "fp32")
    lower = LOWERINGS[name]

    def lower_other(model: ir.Model) -> bool:
        changed = lower(model)
        spec.layers[1].scale[3] *= np.float32(1.001)
        return changed

    monkeypatch.setitem(LOWERINGS, name, lower_other)
    with pytest.raises(AssertionError, match=r"blocks\.1\.ffn: .* from float64"):
        assert_layers(name, spec, qg.outliers((1, 19, spec.widths[0]), 3, "fp32"))


@pytest.mark.parametrize("name", LOWERINGS)
def test_tiny_scales_do_not_underflow(name: str) -> None:
    spec = qg.Spec("fp16", (256, 128), 8, 0, 64 if name == "int4" else 0, "midrise", 64)
    for layer in spec.build_layers():
        layer.scale *= np.float32(1e-5)
        layer.bias[:] = 0
    assert spec.layers[0].scale.max() < np.finfo(np.float16).smallest_normal / 100
    x = (qg.outliers((1, 8, 256), 5, "fp32") * 1000).astype(np.float16)
    assert np.abs(qg.chain(spec, x, torch.float64)).max() > np.finfo(np.float16).smallest_normal
    assert_layers(name, spec, x)


@pytest.mark.parametrize("name", LOWERINGS)
def test_largest_codes_do_not_overflow_fp16(name: str) -> None:
    spec = qg.Spec("fp16", (4096, 32), 8, 0, 0, "symmetric", 1)
    (layer,) = spec.build_layers()
    layer.packed[:] = 0x77
    layer.scale[:], layer.bias[:] = 1e-4, 0
    model = qg.graph(spec)
    LOWERINGS[name](model)
    x = np.full((1, 3, 4096), 60000.0, np.float16)
    # Σ codes · codes = 4096 · 127 · 7 is far above 65504, y = 4096 · 60000 · 7e-4 too: the honest answer is inf, not
    # NaN.
    assert np.isposinf(run(model, x)).all()
    small = np.full((1, 3, 4096), 0.01, np.float16)
    assert_layers(name, spec, small)


@pytest.mark.parametrize("name", LOWERINGS)
@pytest.mark.parametrize("zero", ["midrise", "symmetric", "paper", "float"])
def test_zero_token_gives_the_bias(name: str, zero: str) -> None:
    spec = qg.Spec("fp16", (128, 64), 4, 0, 0, zero, 32)
    model = qg.graph(spec)
    LOWERINGS[name](model)
    y = run(model, np.zeros((1, 2, 128), np.float16))
    np.testing.assert_array_equal(y[0], np.broadcast_to(spec.layers[0].bias.astype(np.float16), (2, 64)))


@pytest.mark.parametrize("zero", ["midrise", "symmetric", "paper"])
def test_int8_weight_of_a_row_scale_is_exact(zero: str) -> None:
    spec = qg.Spec(widths=(256, 640), zero=zero)
    (layer,) = quant_linear_nodes(qg.graph(spec))
    codes, scale = int8_weight(layer)
    assert np.abs(codes).max() <= 30
    np.testing.assert_allclose(codes * scale[:, None], spec.layers[0].weight(), rtol=4 * 2.0**-53, atol=0)


@pytest.mark.parametrize("zero", ["midrise", "float"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_int8_weight_of_groups_adds_little(group: int, zero: str) -> None:
    spec = qg.Spec(widths=(1024, 600), weight_group=group, zero=zero)
    (layer,) = quant_linear_nodes(qg.graph(spec))
    codes, scale = int8_weight(layer)
    exact = spec.layers[0].weight()
    added = np.linalg.norm(codes * scale[:, None] - exact)
    steps = np.repeat(spec.layers[0].scale[:, None] * (spec.layers[0].group_scale / 255), group, axis=1)
    rounding_to_four_bits = np.linalg.norm(steps / np.sqrt(12))
    assert 0 < added < 0.1 * rounding_to_four_bits
    assert (np.abs(codes * scale[:, None] - exact) <= HALF_A_STEP * scale[:, None]).all()
    assert qg.relative(codes * scale[:, None], exact) < 0.01  # Gaussian rows: 127 steps to 4 deviations give 0.9 %


def test_int8_weight_of_a_float_zero_point_is_rounded_again() -> None:
    spec = qg.Spec(widths=(256, 64), zero="midrise")
    spec.build_layers()[0].zero[:] = 0.3
    (layer,) = quant_linear_nodes(qg.graph(spec))
    codes, scale = int8_weight(layer)
    assert np.abs(codes).max() == 127
    assert (np.abs(codes * scale[:, None] - spec.layers[0].weight()) <= HALF_A_STEP * scale[:, None]).all()


def test_int8_weight_of_zero_rows() -> None:
    spec = qg.Spec(widths=(64, 8), weight_group=16, zero="symmetric")
    spec.build_layers()[0].packed[3] = 0
    (layer,) = quant_linear_nodes(qg.graph(spec))
    codes, scale = int8_weight(layer)
    assert not codes[3].any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_int4_zero_points_of_groups_are_one_product(dtype: str) -> None:
    spec = qg.Spec(dtype, (256, 64), 8, 0, 32, "float")
    model = qg.graph(spec)
    lower_qdq_int4(model)
    (layer,) = spec.layers
    shares = model.graph.initializers[f"{layer.name}.qdq_zero"].const_value.numpy().astype(np.float64)
    exact = layer.group_scale * (layer.zero / 16 - 8) * 2.0**-11
    np.testing.assert_allclose(shares, exact, rtol=2.0**-8 if dtype == "bf16" else 2.0**-11, atol=0)
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2
    assert not any(name.endswith(".weight_zero") for name in model.graph.initializers)


@pytest.mark.parametrize(
    ("features", "group", "block"), [(1024, 0, 128), (192, 0, 64), (208, 0, 16), (40, 0, 40), (64, 32, 32)]
)
def test_int4_block(features: int, group: int, block: int) -> None:
    (layer,) = quant_linear_nodes(qg.graph(qg.Spec(widths=(features, 16), weight_group=group, block=1)))
    assert int4_block(layer) == block


def test_int4_weights_are_the_same_bytes_of_the_same_file(tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (256, 512, 256), 8, 0, 32)
    model = qg.graph(spec, tmp_path)
    before = {v.name: v.const_value for v in model.graph.initializers.values()}
    digest = hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).digest()
    lower_qdq_int4(model)
    for layer in spec.layers:
        name = f"{layer.name}.weight"
        tensor, was = model.graph.initializers[name].const_value, before[name]
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.location, tensor.offset, tensor.length) == (was.location, was.offset, was.length)
        assert tensor.dtype == ir.DataType.INT4
        np.testing.assert_array_equal(tensor.numpy().astype(np.int8), layer.codes)
    ir.save(model, tmp_path / "model.onnx")
    assert hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).digest() == digest
    assert (tmp_path / "model.onnx").stat().st_size < 200_000
    x = qg.outliers((1, 5, 256), 1, "fp16")
    exact = qg.chain(spec, x, torch.float64)
    assert qg.relative(run(tmp_path / "model.onnx", x), exact) < 2 * qg.relative(
        qg.chain(spec, x, torch.float16), exact
    )


@pytest.mark.parametrize("name", LOWERINGS)
def test_store_on_disk_gives_the_same_graph(name: str, tmp_path: Path) -> None:
    spec = qg.Spec("fp16", (1024, 1024, 512), 8, 0, 16)
    x = qg.outliers((1, 5, 1024), 1, "fp16")
    inline, stored = qg.graph(spec), qg.graph(spec, tmp_path)
    LOWERINGS[name](inline)
    store = TensorStore(tmp_path / "derived.bin")
    LOWERINGS[name](stored, store=store)
    ir.save(stored, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 200_000
    assert (tmp_path / "derived.bin").stat().st_size == store.bytes_written >= 512 * 1024 // 8
    external = [
        v.const_value for v in stored.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    assert all(t.offset % 64 == 0 for t in external if t.location == "derived.bin")
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", x), run(inline, x))


def test_store_shared_by_two_bit_widths_writes_once(tmp_path: Path) -> None:
    store, sizes = TensorStore(tmp_path / "derived.bin"), []
    for bits in (4, 8):
        model = qg.graph(qg.Spec("fp16", (512, 512), bits))
        lower_int8(model, store)
        sizes.append(store.bytes_written)
    assert sizes == [512 * 512] * 2
    other = qg.graph(qg.Spec("fp16", (512, 512), seed=1))
    lower_int8(other, store)
    assert store.bytes_written == 2 * 512 * 512


def test_store_in_an_impossible_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        TensorStore(tmp_path / "missing" / "derived.bin")


@pytest.mark.parametrize("lower", [lower_qdq_int4, lower_int8, lower_nvfp4], ids=["int4", "int8", "nvfp4"])
def test_leaves_nothing_behind_and_is_deterministic(lower) -> None:  # type: ignore[no-untyped-def]
    spec = qg.Spec("bf16", (96, 192, 96), 4, block=8, outer=12)
    protos = []
    for _ in range(2):
        model = qg.graph(spec)
        model.functions["dvdquant", "QuantLinear", ""] = ir.Function(
            "dvdquant", "QuantLinear", graph=ir.Graph([], [], nodes=[], opset_imports={"": 23}), attributes=[]
        )
        assert lower(model)
        assert not lower(model)
        protos.append(ir.to_proto(model))
    assert protos[0].SerializeToString() == protos[1].SerializeToString()
    graph = protos[0].graph
    used = {name for node in graph.node for name in node.input}
    assert {t.name for t in graph.initializer} <= used
    assert not any(n.op_type == "QuantLinear" for n in graph.node)
    assert [f.name for f in protos[0].functions] == ["RotateOuter"]
    names = [name for node in graph.node for name in (node.name, *node.output)]
    assert len({(name, i) for i, name in enumerate(names)}) == len(names)
    outputs = [name for node in graph.node for name in node.output]
    assert len(set(outputs)) == len(outputs)
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_no_rotation_emits_no_function() -> None:
    model = qg.graph(qg.Spec(block=1))
    lower_qdq_int4(model)
    assert not model.functions


@pytest.mark.parametrize("order", [2, 8, 12, 16, 128])
def test_split_rotation(order: int) -> None:
    matrix = qg.paley12() if order == 12 else qg.hadamard(order)
    exact, residual = split_rotation(matrix)
    assert 1 <= residual < 2
    np.testing.assert_array_equal(torch.from_numpy(exact).bfloat16().float().numpy(), exact)
    np.testing.assert_allclose(
        exact.astype(np.float64) * residual, matrix, rtol=2.0**-23
    )  # entries differ by a rounding


def test_split_rotation_leaves_other_matrices() -> None:
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0].astype(np.float32)
    exact, residual = split_rotation(matrix)
    assert residual == 1.0
    np.testing.assert_array_equal(exact, matrix)


def test_int8_refuses_activation_groups() -> None:
    with pytest.raises(ExportError, match=r"blocks\.0\.ffn.*groups of 64"):
        lower_int8(qg.graph(qg.Spec(act_group=64)))


def test_refuses_unbound_weights() -> None:
    model = qg.graph(qg.Spec())
    model.graph.initializers["blocks.1.ffn.weight"].const_value = None
    with pytest.raises(ExportError, match=r"blocks\.1\.ffn: input 'weight'"):
        lower_qdq_int4(model)


def test_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ExportError, match="256 channels cannot be split into groups of 96"):
        lower_qdq_int4(qg.graph(qg.Spec(act_group=96)))


def test_refuses_unknown_type_and_rank() -> None:
    model = qg.graph(qg.Spec(widths=(64, 64)))
    model.graph.inputs[0].type = None
    with pytest.raises(ExportError, match="element type None"):
        lower_int8(model)
    model = qg.graph(qg.Spec(widths=(64, 64), act_group=32))
    model.graph.inputs[0].shape = None
    with pytest.raises(ExportError, match="rank"):
        lower_qdq_int4(model)


def test_refuses_a_shared_weight() -> None:
    model = qg.graph(qg.Spec(widths=(64, 64, 64)))
    first, second = (n for n in model.graph if n.op_type == "QuantLinear")
    second.replace_input_with(1, first.inputs[1])
    with pytest.raises(ExportError, match="used by 2 nodes"):
        lower_int8(model)
