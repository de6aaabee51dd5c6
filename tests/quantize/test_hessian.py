"""Moments of the inputs from the checkpoint alone: the streamed model against the loaded one, sums against brute force."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import CheckpointError, ResourceError
from dvdquant.model.families import get_family
from dvdquant.model.layers import LayerSpec
from dvdquant.model.plan import ModelPlan, build_skeleton, plan_model
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.quantize import hessian as hessian
from dvdquant.quantize import synthetic_inputs as synthetic
from dvdquant.quantize.hessian import (
    InputHessian,
    hessian_block,
    rotated_hessian,
    smooth_scale_of,
    streamed,
    synthetic_hessians,
)
from dvdquant.quantize.layer_inputs import layer_inputs
from dvdquant.quantize.synthetic_inputs import synthetic_inputs
from dvdquant.recipe import Recipe, get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.bounds import LAMBDA, UNIT
from tests.support.exporting import with_changes

I2V = with_changes(tiny.WAN, image_dim=32, added_kv_proj_dim=128, in_channels=36, out_channels=16)
CONFIGS = {
    **tiny.CONFIGS,
    "wan-i2v": I2V,
    "wan-flf": with_changes(I2V, pos_embed_seq_len=514),
    "wan-ti2v": with_changes(tiny.WAN, in_channels=48, out_channels=48),
    "cogvideox-1.5": with_changes(tiny.COGVIDEOX, patch_size_t=2, ofs_embed_dim=32, sample_frames=9),
    "cogvideox-i2v": with_changes(tiny.COGVIDEOX, use_learned_positional_embeddings=True, in_channels=8),
}
LEVELS = 3


def opened(folder: Path, config: dict[str, Any], recipe: Recipe | str = "w4a4") -> tuple[Checkpoint, ModelPlan]:
    """A random checkpoint and its plan."""
    tiny.write_checkpoint(folder, config)
    chosen = get_recipe(recipe) if isinstance(recipe, str) else recipe
    return open_checkpoint(folder), plan_model(config, chosen, torch.bfloat16)


def spec_of(features: int, rotation: str | int, rows: int = 8) -> LayerSpec:
    return LayerSpec("x", ("x",), (rows,), features, (False,), Rotation.for_features(features, rotation), 1)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the checkpoint in ``folder``."""
    path = folder / "diffusion_pytorch_model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


def loaded_model(folder: Path, config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder, torch_dtype=torch.float32).eval()


def seen_inputs(model: nn.Module, plan: ModelPlan, levels: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of the loaded model, and [T, K] of every member of every layer."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda _module, args: seen.update({name: args[0].reshape(-1, args[0].shape[-1]).clone()})

    for spec in plan.layers:
        for member in spec.members:
            model.get_submodule(member).register_forward_pre_hook(watch(member))
    dtype = next(model.parameters()).dtype
    inputs = plan.family.forward_kwargs(synthetic_inputs(plan.family, levels))
    with torch.inference_mode():
        wide = {name: _as(value, dtype) for name, value in inputs.items()}
        output = model(**wide, return_dict=False)[0]
    return output, seen


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def growing_sums(size: Tensor, count: int) -> Tensor:
    """Return how far sums of ``count`` products in fp32 may be off that are, by magnitudes, ``size`` in the end.

    Terms of one sign add up, so that every rounding is of a sum of up to that size, and not of a term's.
    """
    return (LAMBDA * count**0.5 + 4) * UNIT[torch.float32] * size


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_model_is_the_loaded_one(tmp_path: Path, name: str) -> None:
    """In every family: the same output, the moments that hooks on the loaded model give, and no weight left behind."""
    config = CONFIGS[name]
    checkpoint, plan = opened(tmp_path, config, dataclasses.replace(get_recipe("w4a4"), modulation="a8"))
    model = loaded_model(tmp_path, config)
    weights = {
        spec.name: torch.cat([model.get_submodule(m).weight.detach() for m in spec.members]) for spec in plan.layers
    }
    expected, seen = seen_inputs(model, plan, LEVELS)
    # What fp32 makes of this model: two right computations of it differ by no more than a few times that.
    exact, exact_seen = seen_inputs(loaded_model(tmp_path, config).double(), plan, LEVELS)
    away = float((expected - exact).norm())
    assert away < 1e-3 * float(exact.norm())
    skeleton = build_skeleton(config, torch.float32)
    with torch.inference_mode(), streamed(skeleton, checkpoint):
        inputs = synthetic_inputs(plan.family, LEVELS)
        output = skeleton(**plan.family.forward_kwargs(inputs), return_dict=False)[0]
    assert (output - exact).norm() <= 4 * away
    assert len(expected) == LEVELS
    assert expected.std() > 1e-3
    assert all(p.untyped_storage().nbytes() <= p.element_size() for p in skeleton.parameters())

    found = synthetic_hessians(checkpoint, plan, Progress(), levels=LEVELS)
    assert list(found) == [spec.name for spec in plan.layers]
    for spec in plan.layers:
        rows = seen[spec.members[0]].double()
        for member in spec.members:
            assert torch.equal(seen[member], seen[spec.members[0]])
        parts = rows.view(len(rows), -1, hessian_block(spec)).transpose(0, 1)
        reference = parts.transpose(1, 2) @ parts / len(rows)
        blocks = found[spec.name].blocks
        assert blocks.dtype == torch.float32
        assert found[spec.name].tokens == len(rows)
        # Inputs of another order of sums are off as these are from float64; so are products of two of them, twice.
        moved = rows - exact_seen[spec.members[0]]
        bound = growing_sums(parts.abs().mT @ parts.abs() / len(rows), len(rows)).norm()
        bound += 4 * 2 * moved.norm() * rows.norm() / len(rows)
        assert (blocks - reference).norm() <= bound
        assert torch.equal(blocks, blocks.mT)
        bound = growing_sums(rows.abs().mean(0), len(rows)) + 4 * LAMBDA * moved.norm(dim=0) / len(rows) ** 0.5
        assert bool(((found[spec.name].mean.double() - rows.mean(0)).abs() <= bound).all())
        squares = weights[spec.name].double().square()
        bound = growing_sums(squares.mean(0), len(squares))
        assert bool(((found[spec.name].weight_energy.double() - squares.mean(0)).abs() <= bound).all())
        torch.testing.assert_close(found[spec.name].input_energy, blocks.diagonal(dim1=1, dim2=2).flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs(name: str) -> None:
    """Shapes as the family has them, 64 to 512 tokens an item, noise as its timestep says."""
    family = get_family(CONFIGS[name])
    inputs = synthetic_inputs(family, 16)
    latents, steps = inputs["hidden_states"], inputs["timestep"].view(len(inputs["timestep"]), -1)[:, 0]
    assert latents.dtype == torch.float32
    assert len(steps) == 16
    assert steps.diff().min() > 0
    assert steps[-1] == (999 if "cogvideox" in name else 1000)
    axes = [i for i in range(1, latents.ndim) if not isinstance(family.inputs(sizes_of(family))[0].shape[i], str)]
    channels = latents.movedim(axes[0], 1)[:, : CONFIGS[name]["out_channels"]]
    smooth = channels.flatten(0, 1)
    assert (channels.flatten(1).std(dim=1) - 1).abs().max() < (0.35 if "cogvideox" in name else 0.9)
    # Neighbours in the last axis differ by noise alone, and the more of it there is, the more.
    steps_apart = smooth.diff(dim=-1).view(16, -1).square().mean(1)
    assert steps_apart[-1] == pytest.approx(2.0, rel=0.2)
    assert steps_apart[0] < steps_apart[7] < steps_apart[-1]
    again = synthetic_inputs(family, 16)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert not torch.equal(latents, synthetic_inputs(family, 16, seed=1)["hidden_states"])


def sizes_of(family: Any) -> Any:
    return synthetic.synthetic_sizes(family, 16)[0]


def test_condition_channels_stay_as_drawn() -> None:
    family = get_family(I2V)
    latents = synthetic_inputs(family, 4)["hidden_states"]
    sizes = dataclasses.replace(sizes_of(family), batch=4)
    drawn = family.sample(sizes, torch.float32)["hidden_states"]
    assert torch.equal(latents[:, 16:], drawn[:, 16:])
    assert not torch.equal(latents[:, :16], drawn[:, :16])
    assert torch.equal(latents[-1], drawn[-1])  # pure noise


def test_large_fixed_sizes_mean_fewer_items() -> None:
    config = with_changes(CONFIGS["cogvideox-i2v"], sample_height=60, sample_width=90)
    family = get_family(config)
    inputs = synthetic_inputs(family)
    assert tuple(inputs["hidden_states"].shape[-2:]) == (60, 90)
    assert len(inputs["timestep"]) == 6  # of 1350 tokens each
    assert inputs["timestep"][-1] == 999


@pytest.mark.parametrize(("text", "items"), [(226, 16), (512, 16), (4096, 2), (65536, 1)])
def test_long_texts_mean_fewer_items(text: int, items: int) -> None:
    """One number of a config, without a weight that belongs to it, makes a text of any length."""
    inputs = synthetic_inputs(get_family(with_changes(tiny.COGVIDEOX_2B, max_text_seq_length=text)))
    assert inputs["encoder_hidden_states"].shape[:2] == (items, text)


@pytest.mark.parametrize(
    ("features", "rotation", "block"),
    [
        (256, "auto", 256),
        (1024, "auto", 256),
        (1920, "auto", 192),
        (5120, "auto", 256),
        (12288, "auto", 256),
        (15360, "auto", 256),
        (256, "full", 256),
        (1024, "full", 1024),
        (1920, "full", 1920),
        (5120, "full", 5120),
        (12288, "full", 12288),
        (15360, "full", 15360),
        (256, "none", 256),
        (1920, "none", 240),
        (5120, "none", 256),
        (514, "none", 2),
        (257, "none", 1),
    ],
)
def test_hessian_block(features: int, rotation: str, block: int) -> None:
    assert hessian_block(spec_of(features, rotation)) == block


def test_smooth_scale() -> None:
    """Root mean squares 1 apart from one outlier of 100, one of 3 (left alone), a quiet one, and channels without energy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator)
    x[:, 3] *= 100
    x[:, 5] *= 3
    x[:, 7] /= 5000
    x[:, 9] = 0
    w = torch.ones(64)
    w[11] = 0
    parts = x.view(4096, 4, 16).transpose(0, 1)
    smooth_scale = smooth_scale_of(InputHessian.from_blocks(parts.mT @ parts / 4096, w))
    expected = torch.ones(64)
    # Half of log2(100) is 3.3, of log2(1/5000) −6.1, which is more than a quiet channel is trusted; the mean is near 0.
    expected[3], expected[7] = 8, 2.0**-3
    assert torch.equal(smooth_scale, expected)
    quiet = InputHessian.from_blocks(torch.zeros(4, 16, 16), w)
    assert torch.equal(smooth_scale_of(quiet), torch.ones(64))
    extreme = torch.diag_embed(torch.logspace(-30, 30, 64).view(4, 16))
    found = smooth_scale_of(InputHessian.from_blocks(extreme, torch.ones(64)))
    assert found.min() == 2.0**-3
    assert found.max() == 2.0**12
    assert torch.equal(found.log2(), found.log2().round())


@pytest.mark.parametrize(
    ("features", "rotation"), [(512, "auto"), (1920, "auto"), (192, "full"), (240, "none"), (24, 12)]
)
@pytest.mark.parametrize("divide", [True, False])
def test_rotated_hessian(features: int, rotation: str | int, divide: bool) -> None:
    """Against the moments of divided and rotated samples; a multiple of the rotation's block keeps blocks apart."""
    generator = torch.Generator().manual_seed(features)
    spec = spec_of(features, rotation)
    order = hessian_block(spec)
    x = torch.randn(300, features, generator=generator).exp()
    found = InputHessian.from_blocks(_hessian(x, order), torch.ones(features))
    smooth_scale = torch.exp2(torch.randint(-3, 4, (features,), generator=generator).float()) if divide else None
    rotated = rotate((x if smooth_scale is None else x / smooth_scale).double(), spec.rotation)
    # The moments' own sums; a rotation leaves their norm as it is, and adds the roundings of its two products of that order.
    divided = x.double() if smooth_scale is None else x.double() / smooth_scale
    parts = divided.view(len(x), -1, order).transpose(0, 1)
    size = _hessian(divided, order).norm(dim=(1, 2))
    bound = growing_sums(parts.abs().mT @ parts.abs() / len(x), len(x)).norm(dim=(1, 2))
    bound += 2 * LAMBDA * order**0.5 * UNIT[x.dtype] * size
    off = (rotated_hessian(found, spec, smooth_scale).double() - _hessian(rotated, order)).norm(dim=(1, 2))
    assert bool((off <= bound).all())
    assert bool((bound < 1e-3 * size).all())  # it means something


def _hessian(x: Tensor, order: int) -> Tensor:
    parts = x.view(len(x), -1, order).transpose(0, 1)
    return parts.mT @ parts / len(x)


def test_deterministic_and_ordinary_tensors(tmp_path: Path) -> None:
    checkpoint, plan = opened(tmp_path, tiny.WAN)
    first, again = (synthetic_hessians(checkpoint, plan, Progress(), levels=2) for _ in range(2))
    other = synthetic_hessians(checkpoint, plan, Progress(), levels=2, seed=1)
    for name, value in first.items():
        assert torch.equal(value.triangles, again[name].triangles)
        assert not torch.equal(value.triangles, other[name].triangles)
        assert torch.equal(value.weight_energy, other[name].weight_energy)
        assert not value.triangles.is_inference()
        assert not value.weight_energy.is_inference()


def test_nonfinite_weights_count_as_zero(tmp_path: Path) -> None:
    def spoil(content: dict[str, Tensor]) -> None:
        weight = content["blocks.0.attn1.to_k.weight"]
        weight[3, 5], weight[4, 6], weight[0, 0] = float("nan"), float("inf"), -float("inf")

    def clean(content: dict[str, Tensor]) -> None:
        weight = content["blocks.0.attn1.to_k.weight"]
        weight[3, 5] = weight[4, 6] = weight[0, 0] = 0

    _, plan = opened(tmp_path, tiny.WAN)
    changed(tmp_path, spoil)
    spoiled = synthetic_hessians(open_checkpoint(tmp_path), plan, Progress(), levels=2)
    changed(tmp_path, clean)
    cleaned = synthetic_hessians(open_checkpoint(tmp_path), plan, Progress(), levels=2)
    for name, value in spoiled.items():
        assert torch.equal(value.triangles, cleaned[name].triangles)
        assert torch.equal(value.weight_energy, cleaned[name].weight_energy)


def test_values_beyond_fp32_mean_no_prediction(tmp_path: Path) -> None:
    def enlarge(content: dict[str, Tensor]) -> None:
        content["blocks.1.ffn.net.0.proj.weight"].fill_(1e38)

    opened(tmp_path, tiny.WAN)
    changed(tmp_path, enlarge)
    _, plan = open_checkpoint(tmp_path), plan_model(tiny.WAN, get_recipe("w4a4"), torch.bfloat16)
    found = synthetic_hessians(open_checkpoint(tmp_path), plan, Progress(), levels=2)
    identity = torch.eye(256)[None]
    assert torch.equal(found["blocks.1.ffn.net.2"].blocks, identity)
    assert found["blocks.1.ffn.net.2"].tokens == 0
    assert not torch.equal(found["blocks.0.ffn.net.2"].blocks, identity)
    assert all(value.triangles.isfinite().all() for value in found.values())


@pytest.mark.parametrize("size", [1e17, 1e18, 1e19])
def test_a_hessian_that_fits_until_it_is_rotated(size: float) -> None:
    """The Hessian of few inputs is finite, and its rotation beyond fp32: there is no prediction, and no failure later."""
    plan = plan_model(tiny.WAN, get_recipe("w4a4"), torch.bfloat16)
    spec = next(spec for spec in plan.layers if spec.features == 256)
    collected = hessian.LayerSums(plan)
    collected.add_weight(f"{spec.members[0]}.weight", torch.ones(spec.out_features, spec.features))
    collected.watch(spec)(nn.Identity(), (torch.full((2, spec.features), size),))
    found = collected.take(spec)
    assert found.tokens == 0
    known = layer_inputs(found, spec)
    assert bool(known.hessian.isfinite().all())
    assert bool(known.gptq.factors.isfinite().all())


def test_layer_never_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity Hessian, the energy from the weights."""
    checkpoint, plan = opened(tmp_path, tiny.WAN)

    def without_second_block(config: Any, dtype: torch.dtype) -> nn.Module:
        model = build_skeleton(config, dtype)
        model.get_submodule("blocks.1.ffn").forward = lambda x: x  # type: ignore[assignment]
        return model

    monkeypatch.setattr(hessian, "build_skeleton", without_second_block)
    stream = io.StringIO()
    found = synthetic_hessians(checkpoint, plan, Progress("json", stream), levels=2)
    weight = checkpoint.read("blocks.1.ffn.net.2.weight").float()
    assert torch.equal(found["blocks.1.ffn.net.2"].blocks, torch.eye(256)[None])
    assert found["blocks.1.ffn.net.2"].tokens == 0
    torch.testing.assert_close(found["blocks.1.ffn.net.2"].weight_energy, weight.square().mean(0))
    end = json.loads(stream.getvalue().splitlines()[-1])
    assert (end["event"], end["stage"], end["done"]) == ("end", "inputs", end["total"])
    assert end["total"] == sum(info.nbytes // 2 for info in checkpoint.tensors.values())


def test_failures_are_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plan = opened(tmp_path, tiny.WAN)
    models: list[nn.Module] = []

    def broken(config: Any, dtype: torch.dtype) -> nn.Module:
        models.append(build_skeleton(config, dtype))
        models[0].get_submodule("blocks.1.attn1").to_out[0].forward = lambda x: x @ x.new_zeros(3, 3)  # type: ignore
        return models[0]

    monkeypatch.setattr(hessian, "build_skeleton", broken)
    with pytest.raises(CheckpointError, match=r"does not run: RuntimeError"):
        synthetic_hessians(checkpoint, plan, Progress(), levels=2)
    assert all(p.untyped_storage().nbytes() <= p.element_size() for p in models[0].parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models[0].modules())
    monkeypatch.undo()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        synthetic_hessians(checkpoint, plan, Progress(), levels=2)
    changed_plan = dataclasses.replace(plan, shapes={**plan.shapes, "proj_out.bias": (5,)})
    with pytest.raises(CheckpointError, match=r"proj_out\.bias"):
        synthetic_hessians(checkpoint, changed_plan, Progress(), levels=2)


def test_a_hessian_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint, plan = opened(tmp_path, tiny.WAN)
    huge = dataclasses.replace(spec_of(1 << 20, 1024), rotation=Rotation(1 << 20, 1024, 1024))
    with pytest.raises(ResourceError, match="GiB"):
        synthetic_hessians(checkpoint, dataclasses.replace(plan, layers=(huge,)), Progress())
