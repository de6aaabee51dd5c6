"""dvdquant::quant_linear: the PyTorch op against its formula in float64, and its ONNX body in ONNX Runtime against both."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.export.graph.functions import QuantLinear, QuantLinearFloatZero
from dvdquant.numerics.packing import pack_int4
from dvdquant.onnx.schema import register_schemas
from dvdquant.ops.quant_linear import quant_linear
from dvdquant.ops.reference import quant_linear_reference
from tests.support.bounds import assert_layer
from tests.support.exporting import OpInputs, activations, judge, op_inputs

ONNX_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
# features, rows, bits, activation group, weight group, zero-point, rotation; 96, 160 and 1536 have Paley cores.
GRIDS: list[tuple[int, int, int, int, int, str, str | int]] = [
    (256, 24, 8, 0, 0, "midrise", "auto"),
    (256, 24, 4, 0, 0, "midrise", "auto"),
    (256, 7, 6, 0, 0, "symmetric", "none"),
    (256, 9, 4, 64, 0, "paper", "auto"),
    (256, 9, 4, 128, 128, "midrise", "full"),
    (128, 5, 8, 64, 16, "symmetric", "auto"),
    (96, 11, 4, 0, 0, "paper", "full"),
    (96, 11, 8, 0, 16, "midrise", "full"),
    (160, 6, 8, 0, 32, "symmetric", "full"),
    (160, 6, 6, 0, 0, "midrise", "auto"),
    (1536, 4, 4, 128, 128, "midrise", "full"),
    (1536, 4, 8, 0, 0, "paper", "full"),
    (1536, 4, 4, 64, 64, "symmetric", "auto"),
    (64, 3, 4, 0, 0, "symmetric", 2),
    (256, 9, 4, 0, 0, "float", "auto"),
    (256, 9, 4, 128, 64, "float", "full"),
    (96, 11, 8, 0, 16, "float", "full"),
    (1536, 4, 8, 0, 32, "float", "auto"),
]
IDS = [f"K{k}-a{b}g{ga}-w{gw}-{z}-{r}" for k, _, b, ga, gw, z, r in GRIDS]
DTYPES = [torch.float32, torch.float16]


def build(grid: tuple[int, int, int, int, int, str, str | int], seed: int = 0) -> OpInputs:
    k, n, bits, act_group, weight_group, zero, rotation = grid
    return op_inputs(
        k,
        n,
        act_bits=bits,
        act_group=act_group,
        weight_group=weight_group,
        zero_point=zero,
        rotation=rotation,
        seed=seed,
    )


def formula(op: OpInputs, x: Tensor) -> np.ndarray:
    """The definition, written out a second time: nested loops over blocks and groups, numpy float64."""
    t = {name: value.numpy().astype(np.float64) for name, value in op.tensors.items()}
    tokens = x.reshape(-1, x.shape[-1]).numpy().astype(np.float64)
    m, k = tokens.shape
    b, p = t["hadamard"].shape[0], t["outer"].shape[0]
    rotated = np.zeros_like(tokens)
    for start in range(0, k, b * p):
        block = tokens[:, start : start + b * p].reshape(m, p, b)
        rotated[:, start : start + b * p] = np.einsum("mib,bc,io->moc", block, t["hadamard"], t["outer"]).reshape(m, -1)
    packed = op.tensors["weight"].numpy().view(np.uint8)
    codes = np.empty((len(packed), k))
    for column in range(k):
        nibble = (packed[:, column // 2] >> (4 * (column % 2))) & 15
        codes[:, column] = np.where(nibble > 7, nibble.astype(int) - 16, nibble)
    groups = t["weight_group_scale"].shape[1]
    group_scales = np.repeat(t["weight_group_scale"], k // groups, axis=1) / 255
    zero = t["weight_zero"][:, None]
    if op.tensors["weight_zero"].dtype == torch.uint8:
        zero = np.repeat(t["weight_zero"] / 16 - 8, k // groups, axis=1)
    weight = t["weight_scale"][:, None] * group_scales * (codes - zero)
    qmax, width = 2 ** (op.act_bits - 1) - 1, op.act_group or k
    y = np.zeros((m, len(packed)))
    for start in range(0, k, width):
        part = rotated[:, start : start + width]
        amax = np.maximum(np.abs(part).max(axis=1, keepdims=True), 2.0**-100)
        rounded = np.clip(np.rint(part * (qmax / amax)), -qmax, qmax)
        y += (amax / qmax) * (rounded @ weight[:, start : start + width].T)
    return (y + t["bias"]).reshape(*x.shape[:-1], -1)


def run_body(op: OpInputs, x: Tensor) -> Tensor:
    """The ONNX function body in ONNX Runtime, everything but x a constant."""
    kind = ONNX_TYPES[x.dtype]
    constants = [numpy_helper.from_array(value.numpy(), name) for name, value in op.tensors.items()]
    node = helper.make_node(
        "QuantLinear",
        ["x", *op.tensors],
        ["y"],
        domain="dvdquant",
        act_bits=op.act_bits,
        act_group=op.act_group,
    )
    body = QuantLinearFloatZero if op.tensors["weight_zero"].dtype == torch.uint8 else QuantLinear
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", kind, [None] * x.ndim)],
        constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("dvdquant", 1)],
        functions=[body.to_function_proto()],
        ir_version=11,
    )
    register_schemas()
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# ----------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [GRIDS[1], GRIDS[4], GRIDS[7]], ids=[IDS[1], IDS[4], IDS[7]])
def test_op_passes_opcheck(grid: Any, dtype: torch.dtype) -> None:
    """Schema, fake tensor, autograd registration and dynamic shapes, by PyTorch's own checker."""
    op = build(grid)
    torch.library.opcheck(torch.ops.dvdquant.quant_linear.default, op.arguments(activations(3, grid[0], dtype)))


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_float64_is_the_formula(grid: Any) -> None:
    op = build(grid)
    x = activations(9, grid[0], torch.float64)
    want = formula(op, x)
    got = quant_linear(*op.arguments(x)).numpy()
    judged = judge(op, x)
    # Two float64 evaluations differ by rounding alone, of K terms at most K·2⁻⁵² of the largest; 1e-11 is that for 45 000
    # terms. A code within it of a tie would turn, and the step of one is far more: none of these inputs has one.
    assert np.abs(want - judged.y.numpy()).max() <= 1e-11 * np.abs(want).max()
    assert np.abs(got - want).max() <= 1e-11 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_low_precision_stays_within_the_bound(grid: Any, dtype: torch.dtype) -> None:
    op = build(grid)
    x = activations(33, grid[0], dtype)
    assert judge(op, x).excess(quant_linear(*op.arguments(x))) <= 1.0


def test_bound_notices_one_wrong_group_scale() -> None:
    """The bound is worth something: a factor that is off by 5 % in one group of one row leaves it."""
    op = build(GRIDS[4])
    x = activations(33, 256, torch.float32)
    wrong = dict(op.tensors)
    wrong["weight_group_scale"] = wrong["weight_group_scale"].clone()
    value = int(wrong["weight_group_scale"][3, 0])
    wrong["weight_group_scale"][3, 0] = round(value * 0.95)
    y = quant_linear(*OpInputs(wrong, op.act_bits, op.act_group).arguments(x))
    assert judge(op, x).excess(y) > 10.0


def test_shapes_of_x() -> None:
    op = build(GRIDS[0])
    x = activations(4, 256, torch.float32)
    whole = quant_linear(*op.arguments(x))
    assert whole.shape == (2, 4, 24)
    rows = [quant_linear(*op.arguments(x[i, j])) for i in range(2) for j in range(4)]
    # A token's result does not depend on its neighbours beyond the order of sums, which may turn a code at a tie.
    assert_layer(op, x, whole, torch.stack(rows).reshape(whole.shape))
    assert quant_linear(*op.arguments(x[:, :0])).shape == (2, 0, 24)


def test_wrong_arguments() -> None:
    op = build(GRIDS[0])
    x = activations(4, 256, torch.float32)
    with pytest.raises(UnsupportedError, match="5-bit"):
        quant_linear(*OpInputs(op.tensors, 5, 0).arguments(x))
    with pytest.raises(ShapeError, match="96 do not divide 256"):
        quant_linear(*OpInputs(op.tensors, 4, 96).arguments(x))
    with pytest.raises(RuntimeError):
        quant_linear(*op.arguments(x[..., :200]))


# ------------------------------------------------------------------------------------------------------ ONNX Runtime


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_onnx_body_equals_the_reference(grid: Any, dtype: torch.dtype) -> None:
    op = build(grid)
    x = activations(33, grid[0], dtype)
    judged = judge(op, x)
    got, reference = run_body(op, x), quant_linear_reference(*op.arguments(x))
    assert got.dtype == reference.dtype
    assert judged.excess(got) <= 1.0
    # Tokens without a code near a tie agree to the rounding of sums, which no wrong code could hide in.
    clear = ~judged.near.any(-1)
    if bool(clear.any()):
        step = (got.double() - reference.double()).abs()[clear]
        assert bool((step <= 2 * judged.bound[clear]).all())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("features", "rotation"), [(64, "none"), (96, "full"), (256, "auto"), (1536, "full")])
def test_onnx_codes_differ_at_ties_only(bits: int, features: int, rotation: str) -> None:
    """An identity as weight makes y the codes times s: every activation code of ONNX Runtime can be read off."""
    op = op_inputs(features, 4, act_bits=bits, rotation=rotation)
    rows = min(features, 256)
    codes = torch.zeros(rows, features, dtype=torch.int8)
    codes[torch.arange(rows), torch.arange(rows)] = 1
    identity = {
        "weight": pack_int4(codes).view(torch.int8),
        "weight_scale": torch.ones(rows),
        "weight_group_scale": torch.full((rows, 1), 255, dtype=torch.uint8),
        "weight_zero": torch.zeros(rows),
        "bias": torch.zeros(rows),
        "hadamard": op.tensors["hadamard"],
        "outer": op.tensors["outer"],
    }
    identity_op = OpInputs(identity, bits, 0)
    x = activations(400, features, torch.float32, seed=bits)
    judged = judge(identity_op, x)
    exact, near = judged.codes[..., :rows], judged.near[..., :rows]
    scale = (judged.y / torch.where(exact == 0, torch.inf, exact)).amax(-1, keepdim=True)
    flips = {}
    for name, y in (("ort", run_body(identity_op, x)), ("torch", quant_linear(*identity_op.arguments(x)))):
        got = (y.double() / scale).round()
        differ = got != exact
        assert bool((near | ~differ).all()), f"{name}: a code changed away from a tie"
        assert bool(((got - exact).abs() <= 1).all())
        flips[name] = int(differ.sum())
    # Near a tie is rare in fp32, so this is a statement about all but a few codes.
    assert float(near.double().mean()) < 5e-3
    assert max(flips.values()) <= int(near.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_group", [0, 64])
def test_extreme_inputs(dtype: torch.dtype, act_group: int) -> None:
    """A zero token, one huge outlier, the smallest and largest numbers of the dtype: finite, and within the bound."""
    op = op_inputs(128, 16, act_bits=4, act_group=act_group)
    x = activations(6, 128, dtype)
    x[0, 0] = 0
    x[0, 1, 5] = torch.finfo(dtype).max / 64
    x[0, 2] = torch.finfo(dtype).tiny
    x[0, 3] = 0
    x[0, 3, 7] = 1.0
    x[1, 0] = -torch.finfo(dtype).max / 2048
    judged = judge(op, x)
    fits = judged.y.abs() < torch.finfo(dtype).max
    for y in (run_body(op, x), quant_linear(*op.arguments(x))):
        assert torch.equal(y[0, 0].float(), op.tensors["bias"].to(dtype).float())
        assert bool(torch.isfinite(y[fits]).all())
        distance = ((y.double() - judged.y).abs() / judged.bound)[fits]
        assert float(distance.max()) <= 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_input_never_disappears(bad: float) -> None:
    """A NaN or an infinity reaches every output of its token and no output of another."""
    op = op_inputs(128, 16, act_bits=8)
    x = activations(4, 128, torch.float32)
    x[0, 2, 17] = bad
    clean = activations(4, 128, torch.float32)
    for executor in (lambda v: run_body(op, v), lambda v: quant_linear(*op.arguments(v))):
        y, want = executor(x), executor(clean)
        assert not bool(torch.isfinite(y[0, 2]).any())
        others = torch.ones(2, 4, dtype=torch.bool)
        others[0, 2] = False
        assert torch.equal(y[others], want[others])
