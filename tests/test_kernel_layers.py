"""Layers held as the kernels multiply them: the outputs of the op, without the packed weights. On the library's double."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import pytorch
from dvdquant.deploy.sessions.pytorch import PyTorchSession
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.hadamard import Rotation
from dvdquant.layers import TENSORS, LayerSpec, QuantLinear, RotationTable, prepare_layers
from dvdquant.ops import cuda_linear
from dvdquant.ops.cuda_linear import CudaKernels, usable_kernels
from dvdquant.ops.kernel_layer import KernelLayer
from dvdquant.recipe import ActivationSpec
from dvdquant.repack import LayerShape, prepared_bytes
from tests import session_exports as made

sys.path[:0] = [str(Path(__file__).parent.parent / "kernels" / folder) for folder in ("", "bench")]

import check_kernels  # noqa: E402
import check_ops  # noqa: E402
from check_cases import make_tokens, make_weight  # noqa: E402
from host_library import HostLibrary  # noqa: E402

CPU = torch.device("cpu")
ROTATION = Rotation.for_features(256, "auto")


def double(sm: int) -> CudaKernels:
    return CudaKernels(HostLibrary(), sm)  # type: ignore[arg-type]


def small_layer(bits: int = 8, balanced: bool = False) -> QuantLinear:
    spec = LayerSpec("layer", ("layer",), (16,), 256, (True,), ROTATION, 1, balanced=balanced, shifted=balanced)
    layer = QuantLinear(spec, ActivationSpec(bits), RotationTable([ROTATION]))
    shape = LayerShape(16, 256, 1, False, ROTATION.inner, ROTATION.outer)
    packed = make_weight(shape, "midrise", CPU, seed=3)
    tensors = {f"layer.{name}": tensor for name, tensor in zip(TENSORS, packed.stored())}
    if balanced:
        scale, shift = check_ops.make_balance(shape, CPU)
        tensors |= {"layer.pre_quant_scale": scale, "layer.pre_quant_shift": shift}
    layer.load(tensors)
    return layer


def tokens(count: int = 5) -> torch.Tensor:
    return make_tokens(LayerShape(16, 256), count, CPU, 1)


@pytest.mark.parametrize(
    ("name", "dtype", "sm"),
    [
        ("wan", "bf16", 90),
        ("wan", "bf16", 89),
        ("hunyuan-video", "bf16", 90),
        ("cogvideox", "bf16", 120),
        ("ltx-video", "fp16", 90),
    ],
)
def test_sessions_give_what_the_op_gives_without_packed_weights(
    name: str, dtype: str, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(made.family_export(name, dtype))
    inputs = artifact.family().sample(artifact.sizes, artifact.dtype)
    kernels = double(sm)
    called: list[torch.dtype] = []
    run: Callable[..., torch.Tensor] = KernelLayer.__call__

    def call(self: KernelLayer, x: torch.Tensor, *grid: int) -> torch.Tensor:
        called.append(x.dtype)
        return run(self, x, *grid)

    monkeypatch.setattr(KernelLayer, "__call__", call)
    bench = check_kernels.Bench(kernels, CPU, (256,), ((3, 8),))
    with PyTorchSession(artifact) as packed, check_ops.layers_run(check_ops.kernel_op(bench)):
        wanted = {bits: packed.run(inputs, bits) for bits in (4, 8)}
        before = packed.resident_bytes()["weights"]
    assert called == []
    monkeypatch.setattr(pytorch, "usable_kernels", lambda device: kernels)
    with PyTorchSession(artifact) as session:
        layers = [m for m in session._model.modules() if isinstance(m, QuantLinear)]  # type: ignore[union-attr]
        for bits in (8, 4, 8):
            assert torch.equal(session.run(inputs, bits), wanted[bits])
        assert len(called) == 3 * len(layers)
        # Nothing between the layers widens what they get: it would be rounded back.
        assert set(called) == {artifact.dtype}
        assert not any(buffer.dtype == torch.int8 for buffer in session._model.buffers())  # type: ignore[union-attr]
        dropped = sum(tensor.nbytes for layer in layers for tensor in _packed(layer))
        added = sum(_prepared(layer, sm, artifact) for layer in layers)
        assert session.resident_bytes()["weights"] == before - dropped + added
        assert session.resident_bytes()["workspace"] > 0


def _packed(layer: QuantLinear) -> list[torch.Tensor]:
    """Tensors without content, of what the layer stored."""
    shapes = {name.rpartition(".")[2]: entry for name, entry in layer.spec.tensors().items()}
    return [torch.empty(shapes[name][1], dtype=shapes[name][0], device="meta") for name in TENSORS]


def _prepared(layer: QuantLinear, sm: int, artifact: Artifact) -> int:
    """Bytes of prepared weights by their definition: once for both bit-widths where these share a path."""
    spec, sizes = layer.spec, {}
    for bits in (4, 8):
        grid = spec.activation(artifact.plan("transformer").recipe.activation(bits))
        shape = LayerShape(
            spec.out_features, spec.features, spec.groups, spec.real_zero, act_bits=grid.bits, act_group=grid.group_size
        )
        path = HostLibrary().plan_layer(shape, sm).path
        sizes[path] = prepared_bytes(shape, path)
    return sum(sizes.values())


def test_a_balanced_layer() -> None:
    x = tokens()
    bench = check_kernels.Bench(double(90), CPU, (256,), ((3, 8),))
    layer = small_layer(balanced=True)
    with check_ops.layers_run(check_ops.kernel_op(bench)):
        wanted = layer(x)
    plain = small_layer()
    plain.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(plain(x), wanted)
    assert torch.equal(layer(x.reshape(1, 5, 256)), wanted[None])


def test_the_packed_weight_is_let_go_and_comes_back_by_load() -> None:
    layer = small_layer()
    kept = {f"layer.{name}": layer.get_buffer(name).clone() for name in TENSORS}
    gone = weakref.ref(layer.weight)
    layer.prepare(double(90), [ActivationSpec(bits) for bits in (4, 8)], torch.bfloat16, CPU)
    prepared = layer(tokens())
    gc.collect()
    assert gone() is None
    assert dict(layer.named_buffers()) == {}
    layer.load(kept)
    assert layer.kernel is None
    assert torch.allclose(layer(tokens()), prepared, atol=0.05)


def test_what_a_prepared_layer_refuses() -> None:
    layer = small_layer()
    layer.prepare(double(90), [ActivationSpec(8)], torch.bfloat16, CPU)
    with pytest.raises(ShapeError, match="layer of 256 channels"):
        layer(tokens()[:, :128])
    with pytest.raises(ShapeError, match="the layer is on cpu, x on meta"):
        layer(tokens().to("meta"))
    layer.use(ActivationSpec(4))
    with pytest.raises(UnsupportedError, match="not prepared for 4-bit") as caught:
        layer(tokens())
    assert caught.value.available == "8 bits, groups of 0"
    layer.use(ActivationSpec(8))
    assert layer(tokens().float()).dtype == torch.float32
    assert torch.equal(layer(tokens().float()), layer(tokens()).float())


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
    odd._table[0].get_buffer("hadamard_256").neg_()
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
