"""What precedes the activation grid: predicted means that are subtracted, and the signs of the powers of two."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.model.layers import QuantLinear, RotationTable
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.ops.prepared_cache import PreparedCache
from dvdquant.ops.quant_linear import smooth_quant_linear
from dvdquant.ops.smooth import apply_pre_quant, pack_pre_quant, smooth_input
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.quantize.hessian import random_signs_of
from dvdquant.quantize.layer import rotated_weight
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny


def plan(name: str, recipe: str = "w4a4") -> ModelPlan:
    return plan_model(tiny.CONFIGS[name], get_recipe(recipe), torch.bfloat16)


SHIFTED = {
    "wan": {"attn1.to_q+to_k+to_v", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2"},
    "hunyuan-video": {"attn.to_q+to_k+to_v", "ff.net.0.proj", "ff.net.2", "proj_mlp"},
    "cogvideox": set(),  # words and video pass as one sequence, each with a modulation of its own
    "ltx-video": {"attn1.to_q+to_k+to_v", "ff.net.0.proj", "ff.net.2"},
}


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_layers(name: str) -> None:
    """Those behind a modulated norm and inside the feed-forward of video tokens, if the recipe shifts at all."""
    made = plan(name)
    assert {spec.name.split(".", 2)[2] for spec in made.layers if spec.shifted} == SHIFTED[name]
    assert all(spec.random_signs == (spec.rotation.block > 1) for spec in made.layers)
    for other in (plan(name, "weights-only"), plan(name, "paper")):
        assert not any(spec.shifted or spec.random_signs for spec in other.layers)


def test_random_signs() -> None:
    """The same for one name, about as many of each, and unlike those of another name; a mean is spread by them."""
    random_signs = random_signs_of("blocks.3.ffn.net.2", 8960)
    assert torch.equal(random_signs, random_signs_of("blocks.3.ffn.net.2", 8960))
    assert torch.equal(random_signs[:100], random_signs_of("blocks.3.ffn.net.2", 100))
    assert random_signs.dtype == torch.float32
    assert torch.equal(random_signs.abs(), torch.ones(8960))
    assert abs(float(random_signs.mean())) < 0.04
    assert abs(float((random_signs * random_signs_of("blocks.4.ffn.net.2", 8960)).mean())) < 0.04
    # Known bits: another order of them would make another artifact of the same checkpoint.
    assert random_signs_of("a", 8).tolist() == [-1, 1, 1, 1, 1, -1, -1, 1]
    rotation = Rotation.for_features(8960, "auto")
    x = torch.nn.functional.gelu(torch.randn(16, 8960, generator=torch.Generator().manual_seed(0)))
    plain, spread = (rotate(v, rotation).abs().amax(-1).mean() for v in (x, x * random_signs))
    assert spread < 0.6 * plain


def test_what_precedes_the_grid_leaves_the_layer_as_it_is(tmp_path: Path) -> None:
    """Shift, signed powers of two and rotation, with the weight before rounding and the stored bias, are the linear layer."""
    made, model = plan("wan"), tiny.write_checkpoint(tmp_path / "wan", tiny.WAN)
    with ExportTransaction(tmp_path / "work", key={"model": "tiny"}) as transaction:
        quantize_checkpoint(open_checkpoint(model), made, transaction, Progress())
        stored = load_file(transaction.tree / "onnx/transformer.safetensors")
    source = load_file(model / "diffusion_pytorch_model.safetensors")
    assert {spec.shifted for spec in made.layers} == {True, False}
    for spec in made.layers:
        x = 2 + torch.randn(5, spec.features, generator=torch.Generator().manual_seed(1))
        scale = stored[f"{spec.name}.pre_quant_scale"].double()
        shift = stored[f"{spec.name}.pre_quant_shift"].double() if spec.shifted else torch.zeros(spec.features)
        assert not spec.shifted or shift.any()
        assert set(scale.sign().tolist()) == {1.0, -1.0}
        assert torch.equal(scale.abs().log2(), scale.abs().log2().round())
        weight = rotated_weight(open_checkpoint(model), spec, scale.float()).double()
        found = rotate((x.double() - shift) * scale, spec.rotation) @ weight.T + stored[f"{spec.name}.bias"].double()
        exact = torch.cat([source[f"{m}.weight"].double() @ x.double().T for m in spec.members]).T
        exact += torch.cat([source[f"{m}.bias"].double() for m in spec.members])
        assert (found - exact).norm() <= 1e-5 * exact.norm(), spec.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_balance_is_the_modules(dtype: torch.dtype) -> None:
    """One fused multiply-add per channel gives what the two pointwise operations give, bit by bit in bf16; in fp16, where small
    powers of two make subnormal numbers, up to one unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    k = 4096
    random_signs = 2 * torch.randint(0, 2, (k,), generator=generator) - 1
    scale = random_signs * torch.exp2(torch.randint(-12, 4, (k,), generator=generator).float())
    shift, x = (torch.randn(size, generator=generator) for size in ((k,), (9, k)))
    x = x.to(dtype)
    for parts in ((scale, shift), (scale, None), (None, shift)):
        rows = pack_pre_quant(*parts, dtype)
        assert rows.shape == (k // 8, 2, 8)
        at_once, apart = apply_pre_quant(x, rows), smooth_input(x, *parts)
        off = (at_once.double() - apart.double()).abs()
        unit = (2.0**-10 * apart.double().abs()).clamp(min=2.0**-24) * (dtype == torch.float16)
        assert bool((off <= unit).all())
        assert float((off == 0).double().mean()) > 0.9


def test_a_balanced_layer_is_the_op_on_a_balanced_input() -> None:
    made = plan("wan")
    spec = next(spec for spec in made.layers if spec.shifted and spec.smoothed)
    layer = QuantLinear(spec, made.recipe.activation(4), RotationTable([spec.rotation]))
    generator = torch.Generator().manual_seed(0)
    for name, (kind, shape) in spec.tensors().items():
        tensor = torch.randint(0, 200, shape, generator=generator) if not kind.is_floating_point else torch.randn(shape)
        setattr(layer, name.removeprefix(spec.name + "."), tensor.to(kind))
    layer.pre_quant_scale = torch.exp2(torch.randint(0, 4, (spec.features,), generator=generator).float())
    x = torch.randn(3, 5, spec.features, generator=generator).bfloat16()
    rest = (layer.weight, layer.weight_scale, layer.weight_group_scale, layer.weight_zero, layer.bias,
            *layer.rotation_matrices(), 4, 0)  # fmt: skip
    parts = (layer.pre_quant_scale, layer.pre_quant_shift)
    assert torch.equal(smooth_quant_linear(x, *parts, *rest), layer(x))
    torch.library.opcheck(torch.ops.dvdquant.smooth_quant_linear.default, (x, *parts, *rest))


def test_packed_balances_follow_their_tensors() -> None:
    """Made once for a dtype, anew when a tensor changed or was replaced, and gone with the layer."""
    cache = PreparedCache()
    scale, shift = torch.ones(16), torch.zeros(16)
    first = cache.pre_quant(scale, shift, torch.bfloat16)
    assert cache.pre_quant(scale, shift, torch.bfloat16) is first
    half = cache.pre_quant(scale, shift, torch.float16)
    assert half is not None
    assert half.dtype == torch.float16
    assert cache.pre_quant(scale, shift, torch.bfloat16) is first
    shift.add_(1)
    kept = [weakref.ref(first), weakref.ref(half)]
    for changed in ((scale, shift), (scale, shift.clone() + 1), (scale, None), (None, shift)):
        rows = cache.pre_quant(*changed, torch.bfloat16)
        assert rows is not None
        assert torch.equal(rows, pack_pre_quant(*changed, torch.bfloat16))
        kept.append(weakref.ref(rows))
    assert cache.pre_quant(None, None, torch.bfloat16) is None
    del first, half, rows
    gc.collect()
    # Of (scale, None) and (None, shift), which are not the same tensor's, and what was made in half before.
    assert [each() is not None for each in kept] == [False, True, False, False, True, True]
    del scale, shift, changed
    gc.collect()
    assert not any(each() is not None for each in kept)
