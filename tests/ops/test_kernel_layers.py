"""Layers held as the kernels multiply them: the outputs of the op, without the packed weights. On the library's double."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import pytorch
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.model.layers import TENSORS, LayerSpec, QuantLinear
from dvdquant.model.quantized_model import prepare_layers, quant_linears
from dvdquant.ops import cuda_linear
from dvdquant.ops.cuda_linear import CudaKernels, usable_kernels
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.ops.paths import choose_path
from dvdquant.ops.repack import LayerShape, prepared_bytes
from dvdquant.recipe import ActivationSpec
from tests.support import session_exports as made
from tests.support.bounds import assert_layer
from tests.support.kernel_layers import CPU, ROTATION, double, small_layer, tokens

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels" / folder) for folder in ("", "bench", "check")]

import check_kernels  # noqa: E402
import check_ops  # noqa: E402
from check_cases import make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402


@pytest.mark.parametrize(
    ("name", "sm", "forms"),
    [
        ("hunyuan-video", 90, 1),
        pytest.param("cogvideox", 120, 1, marks=pytest.mark.stress),
        pytest.param("ltx-video", 90, 1, marks=pytest.mark.stress),
        pytest.param("w4a4", 80, 2, marks=pytest.mark.stress),
        ("w4a4-g64", 90, 1),
    ],
)
def test_sessions_give_what_the_op_gives_without_packed_weights(
    name: str, sm: int, forms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families rounded to nearest, and recipes with balances, shifts and groups; ``forms`` are held of each weight."""
    recipe = name.startswith("w4a4")
    artifact = Artifact.open(made.weights_export(*("wan", name) if recipe else (name,)))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    kernels = double(sm)
    called: list[torch.dtype] = []
    run: Callable[..., torch.Tensor] = KernelLayer.__call__

    def call(self: KernelLayer, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        called.append(x.dtype)
        return run(self, x, *rest)

    monkeypatch.setattr(KernelLayer, "__call__", call)
    bench = check_kernels.Bench(kernels, CPU, (256,), ((3, 8),))
    with PyTorchSession(artifact) as session, check_ops.layers_run(check_ops.kernel_op(bench)):
        wanted = {bits: session.run(inputs, bits) for bits in (4, 8)}
        packed = session.resident_bytes()["weights"]
    assert called == []
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: kernels)
    with PyTorchSession(artifact) as session:
        layers = list(quant_linears(session.model).values())
        dropped = sum(tensor.nbytes for layer in layers for tensor in _packed(layer))
        assert session.resident_bytes()["weights"] == packed - dropped
        held = {}
        for bits in (8, 4, 8):
            assert torch.equal(session.run(inputs, bits), wanted[bits])
            held[bits] = session.resident_bytes()["weights"] - packed + dropped
        assert len(called) == 3 * len(layers)
        # Nothing between the layers widens what they get: it would be rounded back.
        assert set(called) == {artifact.dtype}
        pre_quants = sum(4 * layer.spec.features for layer in layers if layer.spec.smoothed or layer.spec.shifted)
        eight = {layer.spec.name: _prepared(layer, sm, artifact, 8) for layer in layers}
        assert held[8] - pre_quants >= sum(size for _, size in eight.values())
        every = [{eight[layer.spec.name], _prepared(layer, sm, artifact, 4)} for layer in layers]
        assert held[4] - pre_quants == sum(size for found in every for _, size in found)
        assert max(map(len, every)) == forms
        assert session.resident_bytes()["workspace"] > 0


def test_a_session_of_one_width_holds_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(made.weights_export("wan", "w4a4"))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: double(80))
    with PyTorchSession(artifact) as session:
        start = session.resident_bytes()["weights"]
        session.run(inputs, 4)
        four = session.resident_bytes()["weights"] - start
        session.run(inputs, 8)
        both = session.resident_bytes()["weights"] - start
        codes = sum(m.spec.features * m.spec.out_features for m in quant_linears(session.model).values())
        # Half a byte a weight, then one more; the rest are rows' scales, zero-points and biases.
        assert 0.5 * codes < four < 0.65 * codes
        assert 1.5 * codes < both < 1.8 * codes


def _packed(layer: QuantLinear) -> list[torch.Tensor]:
    """Tensors without content, of what the layer stored."""
    shapes = {name.rpartition(".")[2]: entry for name, entry in layer.spec.tensors().items()}
    return [torch.empty(shapes[name][1], dtype=shapes[name][0], device="meta") for name in TENSORS]


def _prepared(layer: QuantLinear, sm: int, artifact: Artifact, bits: int) -> tuple[str, int]:
    """Kind and bytes of the prepared weight that a width multiplies, by the table of paths."""
    spec = layer.spec
    grid = spec.activation(artifact.plan("transformer").recipe.activation(bits))
    shape = LayerShape(
        spec.out_features, spec.features, spec.groups, spec.float_zero_point, 1, 1, grid.bits, grid.group_size
    )
    path = choose_path(shape, sm)
    return path.partition("_")[0], prepared_bytes(shape, path)


def test_a_balanced_layer() -> None:
    x = tokens()
    bench = check_kernels.Bench(double(90), CPU, (256,), ((3, 8),))
    layer = small_layer(smoothed=True)
    with check_ops.layers_run(check_ops.kernel_op(bench)):
        wanted = layer(x)
    plain = small_layer()
    plain.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(plain(x), wanted)
    assert torch.equal(layer(x.reshape(1, 5, 256)), wanted[None])


def test_the_packed_weight_stays_where_it_was_and_comes_back_by_load() -> None:
    layer = small_layer()
    kept = {f"layer.{name}": layer.get_buffer(name) for name in TENSORS}
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    prepared = layer(tokens())
    assert dict(layer.named_buffers()) == {}
    # With other grids, from the same tensors.
    layer.prepare(double(80), [ActivationSpec(bits) for bits in (4, 8)], torch.bfloat16, CPU)
    assert torch.equal(layer(tokens()), prepared)
    assert layer.kernel is not None
    assert [t.data_ptr() for t in layer.kernel.packed.stored()] == [t.data_ptr() for t in kept.values()]
    layer.load(kept)
    assert layer.kernel is None
    assert_layer(layer, tokens(), layer(tokens()), prepared, rotated_in=torch.bfloat16)


@pytest.mark.parametrize(("sm", "group", "groups"), [(90, 64, 1), (90, 128, 2), (120, 64, 4)])
def test_weights_of_one_form_are_the_same_bytes(sm: int, group: int, groups: int) -> None:
    """What lets a4 in groups and a8 per token share a weight: their paths differ, what they multiply does not."""
    kernels = double(sm)
    eight = LayerShape(16, 256, groups)
    four = LayerShape(16, 256, groups, act_bits=4, act_group=group)
    packed = make_weight(eight, "midrise", CPU, seed=4)
    assert kernels.plan(four).path != kernels.plan(eight).path
    assert kernels.plan(four).form == kernels.plan(eight).form
    assert torch.equal(kernels.prepare(four, packed.stored()), kernels.prepare(eight, packed.stored()))


def test_what_a_prepared_layer_refuses() -> None:
    layer = small_layer()
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    with pytest.raises(ShapeError, match="layer of 256 channels"):
        layer(tokens()[:, :128])
    with pytest.raises(ShapeError, match="the layer is on cpu, x on meta"):
        layer(tokens().to("meta"))
    layer.use(ActivationSpec(4))
    with pytest.raises(UnsupportedError, match="not made for 4-bit") as caught:
        layer(tokens())
    assert caught.value.available == "8 bits, groups of 0"
    layer.use(ActivationSpec(8))
    assert layer(tokens().float()).dtype == torch.float32
    assert torch.equal(layer(tokens().float()), layer(tokens()).float())


def test_a_compiled_function_breaks_where_a_weight_is_made_and_nowhere_else() -> None:
    layer = small_layer()
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    call = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        call(tokens())
    wanted = layer(tokens())  # makes the weight
    torch.compiler.reset()
    assert torch.equal(call(tokens()), wanted)


def test_layers_that_no_kernel_runs_stay_packed() -> None:
    model = torch.nn.Sequential(small_layer(), small_layer())
    model[1].spec = LayerSpec("other", ("other",), (16,), 256, (True,), ROTATION, 1, floor=ActivationSpec(8))
    left = prepare_layers(model, double(90), [ActivationSpec(6), ActivationSpec(8)], torch.bfloat16, CPU)
    assert list(left) == ["layer"]
    assert "6-bit" in left["layer"]
    first, second = model
    assert first.kernel is None  # type: ignore[union-attr]
    assert first.weight is not None
    assert second.kernel is not None  # type: ignore[union-attr]
    both = prepare_layers(small_layer(), double(90), [ActivationSpec(8)], torch.float32, CPU)
    assert "float32" in both["layer"]
    odd = small_layer()
    odd.rotation_matrices()[0].neg_()
    assert "Sylvester" in prepare_layers(odd, double(90), [ActivationSpec(8)], torch.bfloat16, CPU)["layer"]


def test_kernels_are_usable_on_a_gpu_they_are_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library(HostLibrary):
        def serves(self, sm: int) -> bool:
            return sm == 90

    found: dict[str, Any] = {}
    monkeypatch.setattr(cuda_linear, "kernels_for", lambda device: found["kernels"])
    gpu = torch.device("cuda")
    for sm, usable in ((90, True), (89, False)):
        found["kernels"] = CudaKernels(Library(), sm)  # type: ignore[arg-type]
        assert (usable_kernels(gpu) is found["kernels"]) == usable
    assert usable_kernels(CPU) is None
    found["kernels"] = None
    assert usable_kernels(gpu) is None
