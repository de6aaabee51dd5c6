"""Each graph pass on small graphs, case by case, with results before and after compared by running them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dvdquant.errors import ExportError
from dvdquant.export.graph.functions import attach_functions
from dvdquant.export.passes.bind_weights import StoredTensor, bind_weights
from dvdquant.export.passes.boolean_where import boolean_where
from dvdquant.export.passes.name_weights import name_weights
from dvdquant.export.passes.set_activation import set_activation
from dvdquant.export.passes.simplify import simplify
from dvdquant.onnx.emulate_bfloat16 import emulate_bfloat16
from dvdquant.onnx.expand_attention_mask import expand_attention_mask
from dvdquant.recipe import ActivationSpec
from tests.support.bounds import attention_error, product_error
from tests.support.small_graphs import ops, parse, random, reference, run

# ------------------------------------------------------------------------------------------------------ boolean_where


def test_boolean_where_1_becomes_logic() -> None:
    graph = "g (bool[3,1] c, bool[1,4] a, bool[3,4] b) => (bool[3,4] y) { y = Where(c, a, b) }"
    model = parse(graph)
    assert boolean_where(model)
    assert "Where" not in ops(model)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    for bits in range(64):
        generator = np.random.default_rng(bits)
        feeds = {
            "c": generator.random((3, 1)) > 0.5,
            "a": generator.random((1, 4)) > 0.5,
            "b": generator.random((3, 4)) > 0.5,
        }
        assert np.array_equal(run(model, feeds)[0], np.where(feeds["c"], feeds["a"], feeds["b"]))


def test_boolean_where_leaves_numbers_alone() -> None:
    model = parse("g (bool[3] c, float[3] a, float[3] b) => (float[3] y) { y = Where(c, a, b) }")
    assert not boolean_where(model)
    assert ops(model) == ["Where"]


def test_boolean_where_chain_and_output_name() -> None:
    model = parse(
        "g (bool[3] c, bool[3] a, bool[3] b) => (bool[3] y) { t = Where(c, a, b) u = Where(t, b, a) y = Not(u) }"
    )
    assert boolean_where(model)
    assert not boolean_where(model)
    assert [o.name for o in model.graph.outputs] == ["y"]
    feeds = {n: np.random.default_rng(i).random(3) > 0.5 for i, n in enumerate("cab")}
    t = np.where(feeds["c"], feeds["a"], feeds["b"])
    assert np.array_equal(run(model, feeds)[0], ~np.where(t, feeds["b"], feeds["a"]))


# ---------------------------------------------------------------------------------------------- expand_attention_mask

ATTENTION = """g (float[1,2,L,4] q, float[1,2,5,4] k, float[1,2,5,4] v, {mask} mask) => (float[1,2,L,4] y)
{{ y = Attention(q, k, v, mask) }}"""


@pytest.mark.parametrize("mask", ["bool[1,1,1,5]", "float[1,1,1,5]", "bool[1,5]"])
def test_expand_attention_mask_1(mask: str) -> None:
    model = parse(ATTENTION.format(mask=mask))
    rank = mask.count(",") + 1
    assert expand_attention_mask(model)
    assert "Expand" in ops(model)
    feeds: dict[str, np.ndarray] = {
        "q": random(1, 2, 3, 4),
        "k": random(1, 2, 5, 4, seed=1),
        "v": random(1, 2, 5, 4, seed=2),
    }
    keep = np.array([True, True, False, True, False])
    value = keep if "bool" in mask else np.where(keep, 0.0, -1e30).astype(np.float32)
    feeds["mask"] = value.reshape((1,) * (rank - 1) + (5,))
    assert_attention(run(model, feeds)[0], feeds, keep)


def assert_attention(found: np.ndarray, feeds: dict[str, np.ndarray], keep: np.ndarray) -> None:
    want, bound = attention_error(*(torch.from_numpy(feeds[name]) for name in "qkv"), torch.from_numpy(keep))
    assert bool(((torch.from_numpy(found).double() - want).abs() <= bound).all())


@pytest.mark.parametrize("mask", ["bool[1,1,L,5]", "bool[1,2,3,5]"])
def test_expand_attention_mask_2_left_alone(mask: str) -> None:
    model = parse(ATTENTION.format(mask=mask))
    assert not expand_attention_mask(model)
    assert ops(model) == ["Attention"]
    bare = parse("g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention(q, q, q) }")
    assert not expand_attention_mask(bare)


# -------------------------------------------------------------------------------------------------------- bind_weights


def stored(array: np.ndarray, offset: int, dtype: ir.DataType = ir.DataType.FLOAT) -> StoredTensor:
    return StoredTensor("w.safetensors", offset, array.nbytes, dtype, array.shape)


def test_bind_weights_1_reads_the_file(tmp_path: Path) -> None:
    weight = random(4, 3)
    (tmp_path / "w.safetensors").write_bytes(b"x" * 17 + weight.tobytes() + b"y" * 5)
    model = parse("g (float[2,4] x) => (float[2,3] y) { y = MatMul(x, w) }", {"w": np.zeros((4, 3), np.float32)})
    assert bind_weights(model, {"w": stored(weight, 17), "other": stored(weight, 0)}, str(tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.location, tensor.offset, tensor.length) == ("w.safetensors", 17, 48)
    assert np.array_equal(tensor.numpy(), weight)
    ir.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 400
    x = random(2, 4, seed=3)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    bound = product_error(torch.from_numpy(x), torch.from_numpy(weight)).numpy()
    assert (np.abs(session.run(None, {"x": x})[0] - exact) <= bound).all()


def test_bind_weights_2_refuses_another_shape_or_dtype(tmp_path: Path) -> None:
    graph = "g (float[2,4] x) => (float[2,3] y) { y = MatMul(x, w) }"
    for wrong in (stored(random(3, 4), 0), stored(random(4, 3), 0, ir.DataType.BFLOAT16)):
        model = parse(graph, {"w": np.zeros((4, 3), np.float32)})
        with pytest.raises(ExportError) as info:
            bind_weights(model, {"w": wrong}, str(tmp_path))
        assert "w is FLOAT" in str(info.value)
    assert not bind_weights(parse(graph, {"w": random(4, 3)}), {}, str(tmp_path))


# -------------------------------------------------------------------------------------------------------- name_weights


def test_name_weights_cases() -> None:
    names = {
        "model.blocks.0.ffn.net.2.weight": "blocks.0.ffn.net.2.weight",
        "model.dvdq_rotation.hadamard_256": "hadamard.256",
        "model.dvdq_rotation.outer_12": "outer.12",
        "lifted_tensor_0": "lifted_tensor_0",
        "proj.weight": "constant.proj.weight",
    }
    one = np.ones(1, np.float32)
    value_of = {old: one * i for i, old in enumerate(names)}
    values = {old: ir.Value(name=old, const_value=ir.tensor(array, name=old)) for old, array in value_of.items()}
    total = ir.node("Sum", list(values.values()))
    total.outputs[0].name, total.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([], total.outputs, nodes=[total], initializers=list(values.values()), opset_imports={"": 23})
    model = ir.Model(graph, ir_version=10)
    assert name_weights(model, "model.", {"blocks.0.ffn.net.2.weight", "proj.weight"})
    assert set(model.graph.initializers) == set(names.values())
    for old, new in names.items():
        held = model.graph.initializers[new]
        assert held is values[old]
        assert held.name == new
        assert held.const_value is not None
        assert np.array_equal(held.const_value.numpy(), value_of[old])
    assert run(model, {})[0] == sum(range(5))
    assert not name_weights(model, "model.", set())


# ------------------------------------------------------------------------------------------------------ set_activation


def quant_linear_model() -> ir.Model:
    """Two QuantLinear nodes and something else; K = 8, N = 4."""
    generator = np.random.default_rng(0)
    tensors = {
        "w": generator.integers(-128, 128, (4, 4)).astype(np.int8),
        "s": np.full(4, 0.1, np.float32),
        "f": np.full((4, 1), 255, np.uint8),
        "z": np.full(4, -0.5, np.float32),
        "b": np.zeros(4, np.float32),
        "h": np.eye(1, dtype=np.float32),
        "o": np.eye(1, dtype=np.float32),
    }
    arguments = ", ".join(tensors)
    attributes = "<act_bits = 4, act_group = 0>"
    return parse(
        f"g (float[3,8] x) => (float[3,4] y) {{ a = dvdquant.QuantLinear{attributes}(x, {arguments}) "
        f"b2 = dvdquant.QuantLinear{attributes}(x, {arguments}) y = Add(a, b2) }}",
        tensors,
    )


def test_set_activation_cases() -> None:
    model = quant_linear_model()
    assert not set_activation(model, ActivationSpec(4))
    assert set_activation(model, ActivationSpec(8))
    assert not set_activation(model, ActivationSpec(8))
    assert set_activation(model, ActivationSpec(8, 4))
    read = [(n.attributes["act_bits"].as_int(), n.attributes["act_group"].as_int()) for n in model.graph if n.domain]
    assert read == [(8, 4), (8, 4)]
    assert "act_bits" not in next(n for n in model.graph if n.op_type == "Add").attributes


def test_set_activation_reaches_the_executor() -> None:
    """The same file at 4 and 8 bits: the result moves, towards the exact product at 8."""
    model = quant_linear_model()
    attach_functions(model)
    x = random(3, 8)
    results = {}
    for bits in (4, 8):
        set_activation(model, ActivationSpec(bits))
        results[bits] = run(model, {"x": x})[0]
    packed = model.graph.initializers["w"].const_value.numpy().view(np.uint8)  # type: ignore[union-attr]
    codes = np.stack([(packed << 4).view(np.int8) >> 4, packed.view(np.int8) >> 4], -1).reshape(4, 8)
    exact = 2 * x @ (0.1 * (codes + 0.5)).T
    assert np.abs(results[8] - exact).max() < np.abs(results[4] - exact).max() / 4


# ---------------------------------------------------------------------------------------------------- emulate_bfloat16


def bf16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


def test_emulate_bfloat16_rounds_after_every_operator() -> None:
    """Cases 1 to 4 in one graph, against bfloat16 arithmetic done by hand."""
    weight = bf16(random(4, 3, seed=1))
    model = parse(
        """g (bfloat16[2,4] x, float[2,3] r) => (bfloat16[2,3] y)
        { m = MatMul(x, w) t = Transpose <perm = [1, 0]> (m) u = Transpose <perm = [1, 0]> (t)
          c = Cast <to = 16> (r) s = Add(u, c) k = Constant <value = float {1.5}> () y = Mul(s, k) }""",
        {},
    )
    w = ir.Value(name="w", const_value=ir.Tensor(weight, dtype=ir.DataType.BFLOAT16, name="w"))
    w.dtype, w.shape = ir.DataType.BFLOAT16, ir.Shape([4, 3])
    model.graph.initializers["w"] = w
    for node in model.graph:
        if node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.Tensor(bf16(np.array(1.5)), dtype=ir.DataType.BFLOAT16)
            )
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == "w":
                node.replace_input_with(index, w)
        for value in node.outputs:
            value.dtype = ir.DataType.BFLOAT16
    assert emulate_bfloat16(model)
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert [o.name for o in model.graph.outputs] == ["y"]
    assert model.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
    # Case 3: no rounding pair behind the two transposes, three behind MatMul, Add, Mul, one for case 4.
    casts = [n for n in model.graph if n.op_type == "Cast" and n.attributes["to"].as_int() == ir.DataType.BFLOAT16]
    assert len(casts) == 4
    x, r = random(2, 4, seed=2), random(2, 3, seed=3)
    x = bf16(x).astype(np.float32)
    product = bf16(x @ weight.astype(np.float32)).astype(np.float32)
    total = bf16(product + bf16(r).astype(np.float32)).astype(np.float32)
    want = bf16(total * np.float32(1.5)).astype(np.float32)
    got = run(model, {"x": x, "r": r})[0]
    assert np.array_equal(got, want)
    # It matters: without rounding in between the result is another.
    assert not np.array_equal(got, (x @ weight.astype(np.float32) + r) * np.float32(1.5))


def test_emulate_bfloat16_rounds_values_whose_type_is_not_named() -> None:
    """A pass that adds nodes leaves the types of their outputs open."""
    model = parse("g (bfloat16[2] x) => (bfloat16[2] y) { e = Exp(x) y = Neg(e) }")
    for node in model.graph:
        if node.op_type == "Exp":
            node.outputs[0].type = None
    assert emulate_bfloat16(model)
    x = bf16(random(2)).astype(np.float32)
    want = -bf16(np.exp(x)).astype(np.float32)
    assert np.array_equal(run(model, {"x": x})[0], want)
    assert ops(model).count("Cast") == 4


def test_emulate_bfloat16_leaves_other_types_alone() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Exp(x) }")
    assert not emulate_bfloat16(model)
    assert ops(model) == ["Exp"]


def test_emulate_bfloat16_value_used_twice_and_as_output() -> None:
    model = parse(
        "g (bfloat16[2] x) => (bfloat16[2] e, bfloat16[2] y) { e = Exp(x) a = Neg(e) y = Add(a, e) }",
    )
    assert emulate_bfloat16(model)
    assert [o.name for o in model.graph.outputs] == ["e", "y"]
    x = bf16(random(2)).astype(np.float32)
    e, y = run(model, {"x": x})
    assert np.array_equal(e, bf16(np.exp(x)).astype(np.float32))
    assert np.array_equal(y, np.zeros(2, np.float32))


# ------------------------------------------------------------------------------------------------------------ simplify


def test_simplify_1_never_folds_a_parameter() -> None:
    model = parse(
        "g (float[2,4] x) => (float[2,4] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }",
        {"w": np.zeros((4, 4), np.float32)},
    )
    placeholder = model.graph.initializers["w"].const_value
    assert simplify(model, {"w"})
    assert "Transpose" in ops(model)
    assert model.graph.initializers["w"].const_value is placeholder
    assert [i.name for i in model.graph.inputs] == ["x"]
    other = parse(
        "g (float[2,4] x) => (float[2,4] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }", {"w": random(4, 4)}
    )
    simplify(other, set())
    assert ops(other) == ["MatMul"]


def test_simplify_1_drops_parameters_nobody_uses() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Exp(x) }", {"unused": random(3)})
    simplify(model, {"unused"})
    assert "unused" not in model.graph.initializers


def test_simplify_2_leaves_large_constants_as_computed() -> None:
    graph = "g (float[N,{n}] x) => (float[N,{n}] y) {{ s = Constant <value = int64[1] {{{n}}}> () "
    graph += "one = Constant <value = float {{1.0}}> () t = Expand(one, s) u = Sin(t) y = Mul(x, u) }}"
    small, large = (parse(graph.format(n=n)) for n in (16, 1 << 19))
    for model in (small, large):
        simplify(model, set())
    assert ops(small) == ["Mul"]
    assert "Expand" in ops(large)
    assert max((v.const_value.nbytes for v in large.graph.initializers.values() if v.const_value), default=0) < 1 << 20
    x = random(2, 16)
    # Two roundings: of the sine and of the product.
    np.testing.assert_allclose(run(small, {"x": x})[0], x.astype(np.float64) * np.sin(1.0), rtol=4 * 2.0**-24, atol=0)


def test_simplify_4_shares_what_is_computed_twice() -> None:
    model = parse(
        """g (float[3] x) => (float[3] y)
        { a = Constant <value = float {2.0}> () b = Constant <value = float {2.0}> ()
          p = Mul(x, a) q = Mul(x, b) s = Sin(p) c = Sin(q) y = Add(s, c) dead = Exp(x) }"""
    )
    simplify(model, set())
    assert sorted(ops(model)) == ["Add", "Mul", "Sin"]
    x = random(3)
    # 2x is exact; a sine is off by four units of 1 at most, and twice it by twice that.
    want = 2 * np.sin(2 * x.astype(np.float64))
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=0, atol=8 * 2.0**-24)


def test_reference_evaluator_agrees_on_the_mask() -> None:
    """The pass for ONNX Runtime is the identity in ONNX's own semantics."""
    model = parse(ATTENTION.format(mask="bool[1,1,1,5]").replace("L", "3"))
    feeds = {"q": random(1, 2, 3, 4), "k": random(1, 2, 5, 4, seed=1), "v": random(1, 2, 5, 4, seed=2)}
    feeds["mask"] = np.array([True, False, True, True, False]).reshape(1, 1, 1, 5)
    expanded = parse(ATTENTION.format(mask="bool[1,1,1,5]").replace("L", "3"))
    expand_attention_mask(expanded)
    for found in (reference(model, feeds)[0], run(expanded, feeds)[0]):
        assert_attention(found, feeds, feeds["mask"])
