"""Merged layers: whatever the order of calls, the result is that of the separate layers."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvdquant.errors import ShapeError
from dvdquant.model import merged_layer
from dvdquant.model.layers import LayerSpec, QuantLinear, empty_tensor
from dvdquant.model.quantized_model import install_quant_linears, quant_linears, set_activation
from dvdquant.numerics.hadamard import Rotation
from dvdquant.recipe import ActivationSpec
from tests.support.bounds import assert_layer
from tests.support.exporting import OpInputs, activations, judge, op_inputs

ROWS = (24, 16, 8)
FEATURES = 64
FIELDS = ("weight", "weight_scale", "weight_group_scale", "weight_zero", "bias")


class Attention(nn.Module):
    """Three linears with a shared input, and one inside a list as diffusers has it (``to_out.0``)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(FEATURES, n) for n in ROWS)
        self.to_out = nn.ModuleList([nn.Linear(FEATURES, FEATURES), nn.Identity()])


def spec(names: tuple[str, ...], rows: tuple[int, ...]) -> LayerSpec:
    parent = names[0].rpartition(".")[0]
    name = f"{parent}." * bool(parent) + "+".join(n.rpartition(".")[2] for n in names)
    rotation = Rotation.for_features(FEATURES, "auto")
    return LayerSpec(name, names, rows, FEATURES, (True,) * len(names), rotation, groups=2)


def members() -> list[dict[str, Tensor]]:
    """The packed tensors of to_q, to_k and to_v on their own."""
    made = [op_inputs(FEATURES, n, weight_group=32, seed=n) for n in ROWS]
    return [{name: op.tensors[name] for name in FIELDS} for op in made]


def merged(bits: int = 8) -> tuple[nn.Module, nn.Module]:
    """(a model with one merged layer, a model with three separate ones) with the same weights."""
    names = tuple(f"attn.to_{x}" for x in "qkv")
    one, three = nn.ModuleDict({"attn": Attention()}), nn.ModuleDict({"attn": Attention()})
    out = spec(("attn.to_out.0",), (FEATURES,))
    install_quant_linears(one, [spec(names, ROWS), out], ActivationSpec(bits))
    install_quant_linears(three, [*(spec((n,), (r,)) for n, r in zip(names, ROWS)), out], ActivationSpec(bits))
    parts = members()
    joined = one.get_submodule("attn.to_q+to_k+to_v")
    assert isinstance(joined, QuantLinear)
    joined.load({f"{joined.spec.name}.{f}": torch.cat([p[f] for p in parts]) for f in FIELDS})
    for name, part in zip(names, parts):
        layer = three.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layer.load({f"{name}.{f}": part[f] for f in FIELDS})
    return one, three


def call(model: nn.Module, member: str, x: Tensor) -> Tensor:
    result: Tensor = model.get_submodule(f"attn.to_{member}")(x)
    return result


def assert_separate(three: nn.Module, member: str, x: Tensor, got: Tensor) -> None:
    """``got`` is what the separate layer gives: both are products over the same K, in which only the order of sums differs."""
    layer = three.get_submodule(f"attn.to_{member}")
    assert isinstance(layer, QuantLinear)
    assert_layer(layer, x, got, layer(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", list(itertools.permutations("qkv")), ids="".join)
def test_merged_equals_separate_in_every_order(order: tuple[str, ...], bits: int) -> None:
    one, three = merged(bits)
    x = activations(5, FEATURES, torch.float32)
    for member in order:
        assert_separate(three, member, x, call(one, member, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_merged_in_other_dtypes(dtype: torch.dtype) -> None:
    one, three = merged(8)
    x = activations(5, FEATURES, dtype)
    for member in "qkv":
        got = call(one, member, x)
        assert got.dtype == dtype
        assert_separate(three, member, x, got)


def test_calls_with_other_tensors_in_between() -> None:
    """Every sequence of three calls on two tensors, members and tensors in any mix, twice the same included."""
    one, three = merged()
    inputs = [activations(3, FEATURES, torch.float32, seed=s) for s in (1, 2)]
    judged = {}
    for m, i in itertools.product("qkv", (0, 1)):
        layer = three.get_submodule(f"attn.to_{m}")
        assert isinstance(layer, QuantLinear)
        judged[m, i] = judge(OpInputs.of(layer), inputs[i])
    sequences = list(itertools.product(itertools.product("qk", (0, 1)), repeat=3))
    assert len(sequences) == 64
    for sequence in sequences:
        for member, index in (*sequence, ("v", 0)):
            got = call(one, member, inputs[index])
            assert judged[member, index].excess(got) <= 1.0


def test_tensor_changed_in_place_between_calls() -> None:
    """x of the next step may live at the same address: a full round must not leave the old result behind."""
    one, three = merged()
    x = activations(3, FEATURES, torch.float32)
    for member in "qkv":
        call(one, member, x)
    x.mul_(-3.0)
    for member in "qkv":
        assert_separate(three, member, x, call(one, member, x))


def test_partial_round_then_changed_tensor() -> None:
    """A model that stops half-way (an exception, a skipped branch) and goes on with the same tensor object, changed."""
    one, three = merged()
    x = activations(3, FEATURES, torch.float32)
    call(one, "q", x)
    x.add_(1.0)
    assert_separate(three, "k", x, call(one, "k", x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_merged_layer_runs_once_per_round(mode: Callable[[], AbstractContextManager[None]]) -> None:
    one, three = merged()
    calls = []
    one.get_submodule("attn.to_q+to_k+to_v").register_forward_pre_hook(lambda *_: calls.append(1))
    with mode():
        for seed in (1, 2, 3):
            x = activations(3, FEATURES, torch.float32, seed=seed)
            for member in "qkv":
                assert_separate(three, member, x, call(one, member, x))
    assert len(calls) == 3


def test_nothing_is_kept_after_a_round() -> None:
    """The shared input would keep the largest activations of the model alive."""
    one, _ = merged()
    x = activations(3, FEATURES, torch.float32)
    kept = [weakref.ref(x), *(weakref.ref(call(one, member, x)) for member in "qkv")]
    del x
    gc.collect()
    assert [each() for each in kept] == [None] * 4


def test_state_after_an_exception() -> None:
    one, three = merged()
    x = activations(3, FEATURES, torch.float32)
    call(one, "q", x)
    with pytest.raises(RuntimeError):
        call(one, "k", x[..., :10])
    for member in "qkv":
        assert_separate(three, member, x, call(one, member, x))


def test_set_activation_changes_every_layer() -> None:
    one, three = merged(8)
    x = activations(5, FEATURES, torch.float32)
    before = call(one, "q", x)
    layers = list(quant_linears(one).values())
    weights = [m.weight.clone() for m in layers]
    for model in (one, three):
        set_activation(model, ActivationSpec(4, 32))
    assert {(m.act_bits, m.act_group) for m in layers} == {(4, 32)}
    assert all(torch.equal(m.weight, w) for m, w in zip(layers, weights))
    after = call(one, "q", x)
    assert not torch.allclose(before, after, rtol=1e-3)
    assert_separate(three, "q", x, after)


def test_set_activation_in_the_middle_of_a_round() -> None:
    """Half of a pair in 8 bits and half in 4 would be neither."""
    one, three = merged(8)
    x = activations(5, FEATURES, torch.float32)
    call(one, "q", x)
    for model in (one, three):
        set_activation(model, ActivationSpec(4))
    assert_separate(three, "k", x, call(one, "k", x))


@pytest.mark.parametrize(
    ("field", "shape", "dtype"),
    [
        ("weight", (48, 31), torch.int8),
        ("weight", (48, 32), torch.uint8),
        ("weight_scale", (47,), torch.float32),
        ("weight_scale", (48,), torch.float16),
        ("weight_group_scale", (48, 1), torch.uint8),
        ("weight_zero", (48, 1), torch.float32),
        ("weight_zero", (48, 2), torch.uint8),
        ("bias", (1,), torch.float32),
    ],
)
def test_load_refuses_wrong_shapes_and_dtypes(field: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one, _ = merged()
    layer = one.get_submodule("attn.to_q+to_k+to_v")
    assert isinstance(layer, QuantLinear)
    tensors = {name: torch.zeros(s, dtype=d) for name, (d, s) in layer.spec.tensors().items()}
    tensors[f"{layer.spec.name}.{field}"] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ShapeError) as info:
        layer.load(tensors)
    assert f"{layer.spec.name}.{field}" in str(info.value)
    assert "expected" in str(info.value)


def test_float_zero_points_are_bytes_per_group() -> None:
    op = op_inputs(FEATURES, ROWS[0], weight_group=32, zero_point="float")
    plain = spec(("attn.to_q",), ROWS[:1])
    changed = replace(plain, float_zero_point=True)
    assert changed.tensors()["attn.to_q.weight_zero"] == (torch.uint8, (ROWS[0], 2))
    model = nn.ModuleDict({"attn": Attention()})
    install_quant_linears(model, [changed], ActivationSpec(8))
    layer = model.get_submodule("attn.to_q")
    assert isinstance(layer, QuantLinear)
    assert (layer.weight_zero.dtype, layer.weight_zero.shape) == (torch.uint8, (ROWS[0], 2))
    layer.load({f"attn.to_q.{f}": op.tensors[f] for f in FIELDS})
    x = activations(5, FEATURES, torch.float64)
    torch.testing.assert_close(layer(x), judge(op, x).y, rtol=1e-12, atol=1e-12)
    with pytest.raises(ShapeError, match=r"weight_zero is torch\.float32"):
        layer.load({f"attn.to_q.{f}": (op_inputs(FEATURES, ROWS[0], weight_group=32)).tensors[f] for f in FIELDS})


def test_placeholders_take_no_memory_and_tables_are_shared() -> None:
    one, _ = merged()
    assert empty_tensor((4096, 4096), torch.float32).untyped_storage().nbytes() == 4
    names = [name for name, _ in one.named_buffers() if "hadamard" in name]
    assert names == ["dvdq_rotation.hadamard_64"]
    assert "dvdq_rotation" not in "".join(one.state_dict())
    with_paley = replace(spec(("attn.to_q",), (24,)), rotation=Rotation.for_features(48, "full"), features=48, groups=1)
    model = nn.ModuleDict({"attn": Attention()})
    table = install_quant_linears(model, [with_paley], ActivationSpec(8))
    hadamard, outer = table.matrices(with_paley.rotation)
    assert (len(hadamard), len(outer)) == (with_paley.rotation.inner, with_paley.rotation.outer)


def test_modules_inside_lists_are_replaced_in_place() -> None:
    one, _ = merged()
    assert isinstance(one.get_submodule("attn.to_out.0"), QuantLinear)
    assert isinstance(one.get_submodule("attn.to_out.1"), nn.Identity)
    assert "24" not in one.get_submodule("attn.to_out.0").extra_repr()
    assert "to_q+to_k+to_v" in one.get_submodule("attn.to_k").extra_repr()


def test_threads_that_share_a_merged_layer_get_their_own_rows() -> None:
    """Each thread calls the members in another order with its own tensor, and stops between any two instructions."""
    one, _ = merged()
    inputs = [torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    layer = one.get_submodule("attn.to_q+to_k+to_v")
    members = [one.get_submodule(f"attn.to_{name}") for name in "qkv"]
    wanted = [layer(x).split(list(ROWS), dim=-1) for x in inputs]
    # The rows themselves stand for the kernel: the faults are in the bookkeeping, which should take most of the time.
    rows = {id(x): torch.cat(parts, dim=-1) for x, parts in zip(inputs, wanted)}
    layer.forward = lambda x: rows[id(x)]  # type: ignore[method-assign, assignment]
    problems: list[str] = []
    start = threading.Barrier(len(inputs))
    source = merged_layer.__file__

    def stop(frame: FrameType, event: str, argument: object) -> Any:
        """Let another thread run at every instruction of the module under test."""
        if frame.f_code.co_filename != source:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            time.sleep(0)
        return stop

    def run(thread: int) -> None:
        x = inputs[thread]
        start.wait()
        sys.settrace(stop)
        try:
            for _ in range(20):
                for i in range(3):
                    index = (i + thread) % 3
                    if not torch.equal(members[index](x), wanted[thread][index]):
                        problems.append(f"thread {thread} got other rows")
        except KeyError as error:
            problems.append(f"thread {thread}: {error!r}")
        finally:
            sys.settrace(None)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems[:3] == []


def test_threads_at_work_in_the_same_layer_keep_only_one_input() -> None:
    """Both are inside the layer at once; whoever ends last, both then find the rows of their own input."""
    one, three = merged()
    inputs = [torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    layer = one.get_submodule("attn.to_q+to_k+to_v")
    inside = threading.Barrier(2, timeout=20)
    first = set(map(id, inputs))
    forward = layer.forward

    def meet(x: Tensor) -> Tensor:
        if id(x) in first:
            first.discard(id(x))
            inside.wait()
        y: Tensor = forward(x)
        return y

    layer.forward = meet  # type: ignore[method-assign, assignment]
    found: dict[int, list[Tensor]] = {}

    def run(thread: int) -> None:
        found[thread] = [call(one, name, inputs[thread]) for name in "qkv"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        for name, got in zip("qkv", found[i]):
            assert_separate(three, name, x, got)


def test_rows_of_an_input_that_changes_while_the_layer_runs_are_not_kept() -> None:
    one, _ = merged()
    layer = one.get_submodule("attn.to_q+to_k+to_v")
    assert isinstance(layer, QuantLinear)
    forward = layer.forward
    x = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))

    def changed_meanwhile(value: Tensor) -> Tensor:
        y: Tensor = forward(value)
        value.mul_(2)
        return y

    layer.forward = changed_meanwhile  # type: ignore[method-assign, assignment]
    call(one, "q", x)
    layer.forward = forward  # type: ignore[method-assign]
    got = call(one, "k", x)
    assert torch.equal(got, layer(x).split(list(ROWS), dim=-1)[1])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_computes_the_same(way: Callable[[nn.Module], nn.Module]) -> None:
    """Half through the members, too: the copy does not wait for rows of the original's input."""
    one, _ = merged()
    x = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))
    wanted = [call(one, name, x) for name in "qkv"]
    call(one, "q", x)
    again = way(one)
    calls: list[int] = []
    again.get_submodule("attn.to_q+to_k+to_v").register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(torch.equal(call(again, name, x), want) for name, want in zip("qkv", wanted))
    assert len(calls) == 1  # the copied members share one state, whose layer is the copied one
