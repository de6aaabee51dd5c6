"""benchmarks/quality/peers: every peer against the exact product, its own package, and the same grid without its trick."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvdquant.model.layers import LayerSpec
from dvdquant.numerics.activation_grid import fake_quantize_activation
from dvdquant.numerics.hadamard import Rotation
from tests.support.quality_scripts import script

# Every name and width; which of them run depends on what is installed.
WIDTHS = {
    "SmoothQuant (modelopt)": (8, 6, 4),
    "SmoothQuant α ½ (modelopt)": (8, 6, 4),
    "SVDQuant (modelopt)": (8, 6, 4),
    "SVDQuant rank K/96 (modelopt)": (8, 6, 4),
    "HQQ": (8, 6, 4),
    "ConvRot W4A4 (comfy-kitchen)": (4,),
    "codebook W4A8 (comfy-kitchen)": (8,),
}
HQQ, CONVROT, CODEBOOK = "HQQ", "ConvRot W4A4 (comfy-kitchen)", "codebook W4A8 (comfy-kitchen)"
HALF, SVD = "SmoothQuant α ½ (modelopt)", "SVDQuant (modelopt)"
# Half an ulp of bf16, relative.
BF16 = 2.0**-9


@pytest.fixture(scope="module")
def modules() -> SimpleNamespace:
    """The scripts' modules, which import each other by name."""
    return SimpleNamespace(simulate=script("simulate"), peers=script("peers"))


def peer(modules: SimpleNamespace, name: str) -> Any:
    """The function, or a skip that names the missing package."""
    if name in modules.peers.missing_peers():
        pytest.skip(f"needs the package of {name}: {modules.peers.missing_peers()[name]}")
    return modules.peers.PEERS[name][0]


def layer_of(
    modules: SimpleNamespace, rows: tuple[int, ...], features: int, outliers: float = 1.0, tokens: int = 256
) -> Any:
    """Gaussian weights and inputs, one input channel in 64 times ``outliers``."""
    generator = torch.Generator().manual_seed(len(rows) + features)
    members = tuple(f"to_{letter}" for letter in "qkv"[: len(rows)])
    rotation = Rotation.for_features(features, "none")
    spec = LayerSpec("+".join(members), members, rows, features, (True,) * len(rows), rotation, 1)
    weight = torch.randn(sum(rows), features, generator=generator) / features**0.5
    inputs = torch.randn(tokens, features, generator=generator)
    inputs[:, ::64] *= outliers
    return modules.simulate.Layer(spec.name, spec, weight, torch.randn(sum(rows), generator=generator), inputs)


def other_inputs(layer: Any) -> Tensor:
    """Inputs of the calibration's distribution that it has not seen."""
    sizes = layer.inputs.square().mean(0).sqrt()
    x = torch.randn(layer.inputs.shape, generator=torch.Generator().manual_seed(99))
    return x * sizes.where(sizes > 2, torch.ones(()))


def output(sim: Any, x: Tensor) -> Tensor:
    """What the bench computes, in fp64 from fp32 operands; ``whole`` as the package gives it."""
    if sim.whole is not None:
        return sim.whole(x).double()
    divided = x if sim.divide is None else x / sim.divide
    y = F.linear((divided if sim.activation is None else sim.activation(divided)).double(), sim.weight.double())
    if sim.low_rank is not None:
        down, up = (t.double() for t in sim.low_rank)
        y = y + F.linear(F.linear(divided.double(), down), up)
    return y


def relative(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


def error(sim: Any, layer: Any, x: Tensor) -> float:
    return relative(output(sim, x), x.double() @ layer.weight.double().T)


def plain(layer: Any, x: Tensor, act_bits: int, group: int = 0) -> float:
    """Error of the grid of the peers without smoothing, rotation or branch: symmetric, by maximum."""
    weight = fake_quantize_activation(layer.weight, 4, group)
    return relative(fake_quantize_activation(x, act_bits, group) @ weight.T, x.double() @ layer.weight.double().T)


def test_table_lists_every_peer_and_its_widths(modules: SimpleNamespace) -> None:
    peers = modules.peers
    assert {name: widths for name, (_, widths) in peers.PEERS.items()} == WIDTHS
    here, missing = peers.available_peers(), peers.missing_peers()
    assert set(here) | set(missing) == set(WIDTHS)
    assert not set(here) & set(missing)
    assert "nvidia-modelopt" in peers.versions(), "a dependency of this project"


def test_a_package_that_is_not_installed_is_left_out_and_named(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("hqq", "comfy_kitchen"):
        monkeypatch.setitem(sys.modules, module, None)
    peers = modules.peers
    assert set(peers.available_peers()) == {name for name in WIDTHS if "modelopt" in name}
    comfy = "pip install comfy-kitchen"
    assert peers.missing_peers() == {HQQ: "pip install hqq", CONVROT: comfy, CODEBOOK: comfy}
    assert list(peers.versions()) == ["nvidia-modelopt"]
    with pytest.raises(ValueError, match="pip install hqq"):
        peers.hqq(layer_of(modules, (64,), 64), 4)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_width_it_does_not_have_is_refused_with_those_it_has(modules: SimpleNamespace, name: str) -> None:
    layer = layer_of(modules, (64,), 256)
    for bits in {3, 4, 5, 6, 7, 8, 16} - set(WIDTHS[name]):
        with pytest.raises(modules.peers.PeerError, match=f"available: {WIDTHS[name][0]}") as caught:
            modules.peers.PEERS[name][0](layer, bits)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "features"), [(SVD, 96), (HQQ, 96), (CONVROT, 96), (CODEBOOK, 24)])
def test_channels_it_cannot_group_are_refused(modules: SimpleNamespace, name: str, features: int) -> None:
    with pytest.raises(modules.peers.PeerError, match=rf"multiples of \d+: to_q has {features}"):
        modules.peers.PEERS[name][0](layer_of(modules, (64,), features), WIDTHS[name][-1])


@pytest.mark.parametrize("name", [n for n in WIDTHS if "modelopt" in n])
def test_calibration_without_inputs_is_refused(modules: SimpleNamespace, name: str) -> None:
    layer = layer_of(modules, (64,), 256)
    with pytest.raises(modules.peers.PeerError, match="has no inputs"):
        modules.peers.PEERS[name][0](replace(layer, inputs=layer.inputs[:0]), 8)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(("rows", "features"), [((64, 32, 96), 256), ((256,), 1024), ((96,), 192)])
def test_error_is_that_of_rounding_and_falls_with_the_width(
    modules: SimpleNamespace, name: str, rows: tuple[int, ...], features: int
) -> None:
    """No peer may do worse than plain symmetric rounding on Gaussian data, where there is nothing to smooth.

    SmoothQuant divides by maxima, which scatter even there: channel scales of ±20 % widen the range of a row by at
    most as much. HQQ's activations are per token, its weights in groups; the others' grids are at least as fine.
    """
    layer = layer_of(modules, rows, features)
    x = other_inputs(layer)
    errors = [error(peer(modules, name)(layer, bits), layer, x) for bits in WIDTHS[name]]
    for bits, got in zip(WIDTHS[name], errors):
        slack = 1.2 if "SmoothQuant" in name else 1.03
        assert 1e-2 < got < slack * plain(layer, x, bits), f"A{bits}"
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", WIDTHS)
def test_members_of_a_merged_layer_get_their_rows(modules: SimpleNamespace, name: str) -> None:
    """In the bench's model, in place of three linears that share their input; the layer itself stays as it was."""
    layer = layer_of(modules, (64, 32, 96), 256, outliers=15)
    function, bits = peer(modules, name), WIDTHS[name][-1]
    before = layer.weight.clone(), layer.inputs.clone()
    model = nn.ModuleDict({m: nn.Linear(256, rows) for m, rows in zip(layer.spec.members, layer.spec.rows)})
    changed = modules.simulate.install(model, [layer], lambda one: function(one, bits))
    x = other_inputs(layer).reshape(2, -1, 256)
    parts = [changed[member](x) for member in layer.spec.members]
    assert [tuple(p.shape) for p in parts] == [(2, 128, rows) for rows in layer.spec.rows]
    expected = output(function(layer, bits), x) + layer.bias
    # Operands and result of the bench are bf16 where the package brings no product of its own; roundings are random, so
    # the norm of the difference stays below one rounding of each of the four: two operands, branch, result.
    assert relative(torch.cat(parts, -1), expected) < 4 * BF16
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.inputs, before[1])


@pytest.mark.parametrize("name", WIDTHS)
def test_calls_are_silent_and_repeatable(
    modules: SimpleNamespace, name: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    function, layer = peer(modules, name), layer_of(modules, (128,), 256, outliers=15)
    first, second = (output(function(layer, WIDTHS[name][-1]), layer.inputs) for _ in range(2))
    assert torch.equal(first, second)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("features", [256, 1024])
def test_smoothing_helps_where_there_are_outlier_channels(modules: SimpleNamespace, features: int) -> None:
    """At A4, where the outliers' scale swallows the other channels; at A8 the weight, which now has them, loses more."""
    layer = layer_of(modules, (192,), features, outliers=30)
    x = other_inputs(layer)
    assert error(peer(modules, HALF)(layer, 4), layer, x) < plain(layer, x, 4)


def test_smoothquant_is_modelopts_formula_at_four_bits(modules: SimpleNamespace) -> None:
    """divide = max|x|^α / max|W|^(1−α); weights on 16 steps of their row's maximum / 7."""
    layer = layer_of(modules, (96,), 256, outliers=15)
    for name, alpha in (("SmoothQuant (modelopt)", 1.0), (HALF, 0.5)):
        sim = peer(modules, name)(layer, 8)
        formula = layer.inputs.abs().amax(0) ** alpha / layer.weight.abs().amax(0) ** (1 - alpha)
        torch.testing.assert_close(sim.divide, formula, rtol=1e-5, atol=0)
        smooth = layer.weight * sim.divide
        step = smooth.abs().amax(1, keepdim=True) / 7
        codes = sim.weight / step
        assert float((codes - codes.round()).abs().max()) < 1e-4
        assert codes.round().min() >= -8
        assert codes.round().max() <= 7
        assert float(((sim.weight - smooth).abs() / step).max()) < 0.5 + 1e-4


def test_low_rank_branch_takes_what_the_grid_cannot(modules: SimpleNamespace) -> None:
    """With a strong component of rank 8 in the weight the residual is small; on noise alone the branch still helps."""
    noise = layer_of(modules, (192,), 256, outliers=15)
    generator = torch.Generator().manual_seed(5)
    strong = torch.randn(192, 8, generator=generator) @ torch.randn(8, 256, generator=generator) / 16
    for layer, share in ((noise, 1.0), (replace(noise, weight=noise.weight + strong), 0.5)):
        sim = peer(modules, SVD)(layer, 8)
        down, up = sim.low_rank
        assert down.shape == (32, 256)
        assert up.shape == (192, 32)
        smooth = layer.weight * sim.divide
        alone = relative(fake_quantize_activation(smooth, 4, 64), smooth)
        assert relative(sim.weight + up @ down, smooth) < share * alone


def test_svdquant_is_modelopts_own_layer(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts taken out of modelopt's layer compute what that layer computes, before activations are quantized.

    And its smoothing and its SVD are those it finds with a quantizer for activations in the configuration.
    """
    peers = modules.peers
    own, configs, calibrate = [], [], peers.modelopt_linear

    def keep(layer: Any, config: dict[str, Any]) -> Any:
        configs.append(config)
        own.append(calibrate(layer, config))
        return own[-1]

    monkeypatch.setattr(peers, "modelopt_linear", keep)
    layer = layer_of(modules, (192,), 256, outliers=15)
    sim = peer(modules, SVD)(layer, 4)
    with torch.no_grad():
        theirs = own[0](other_inputs(layer))
    sim.activation = None
    # fp32 sums of 256 terms against fp64.
    assert relative(output(sim, other_inputs(layer)), theirs) < 1e-5

    activations = {"num_bits": 4, "block_sizes": {-1: 64, "type": "dynamic"}}
    quantizers = [*configs[0]["quant_cfg"], {"quantizer_name": "*input_quantizer", "cfg": activations}]
    quantized = calibrate(layer, {**configs[0], "quant_cfg": quantizers})
    assert quantized.input_quantizer.is_enabled
    assert torch.equal(quantized.input_quantizer.pre_quant_scale, own[0].input_quantizer.pre_quant_scale)
    assert torch.equal(quantized.weight, own[0].weight)


def test_svdquant_beats_its_grid_without_smoothing_and_branch(modules: SimpleNamespace) -> None:
    layer = layer_of(modules, (192,), 256, outliers=15)
    x = other_inputs(layer)
    for bits in (8, 4):
        assert error(peer(modules, SVD)(layer, bits), layer, x) < plain(layer, x, bits, group=64), f"A{bits}"


@pytest.mark.parametrize("name", ["SmoothQuant (modelopt)", HALF, SVD, HQQ])
def test_activations_have_a_scale_per_token_or_per_64_channels(modules: SimpleNamespace, name: str) -> None:
    """Channels a thousandth of the others survive 8 bits in a group of their own, and vanish beside the others."""
    sim = peer(modules, name)(layer_of(modules, (64,), 256), 8)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(3))
    x[:, 64:128] *= 1e-3
    small, got = x[:, 64:128], sim.activation(x)[:, 64:128]
    if name == SVD:
        # Half a step of at most 1/127 of the group's maximum, in every element.
        assert float(((got - small).abs() / small.abs().amax(1, keepdim=True)).max()) < 0.5 / 127 + 1e-6
    else:
        assert not got.any()


@pytest.mark.parametrize("heavy", [False, True])
def test_hqq_improves_on_its_own_min_max(modules: SimpleNamespace, heavy: bool) -> None:
    """Its solver starts from min-max and stops when the mean absolute error no longer falls."""
    function = peer(modules, HQQ)
    layer = layer_of(modules, (128,), 256)
    weight = layer.weight * torch.exp(layer.weight * 16) if heavy else layer.weight
    sim = function(replace(layer, weight=weight), 8)
    groups = weight.reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    minmax = (((groups - low) / step).round() * step + low).reshape(weight.shape)
    assert float((sim.weight - weight).abs().mean()) <= float((minmax - weight).abs().mean())
    assert relative(sim.weight, weight) <= relative(minmax, weight)
    assert max(len(group.unique()) for group in sim.weight.reshape(-1, 64)) <= 16


def regular_hadamard(block: int) -> Tensor:
    """ConvRot's matrix from its definition: Kronecker powers of the regular Hadamard matrix of order 4, fp64."""
    order_4 = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(1)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(matrix, order_4)
    return matrix / block**0.5


def exact_int8_products() -> bool:
    """Return whether this processor's int8 products are exact: without VNNI, pairs of them are added in 16 bits."""
    a, b = torch.full((32, 256), 127, dtype=torch.int8), torch.full((256, 32), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, b) == 256 * 127 * 127).all())


@pytest.mark.parametrize("name", [CONVROT, CODEBOOK])
@pytest.mark.parametrize(("features", "block"), [(256, 256), (1024, 256), (192, 64)])
def test_comfy_kitchens_product_is_its_weight_times_rotated_activations(
    modules: SimpleNamespace, name: str, features: int, block: int
) -> None:
    """Its own forward, against rotation, one scale per token, and its dequantized weight, on input with outliers.

    Both round x̃ from fp32; where a value lies on the edge of two codes the two may take different ones, which is rare.
    """
    layer = layer_of(modules, (192,), features, outliers=15)
    (bits,) = WIDTHS[name]
    if not exact_int8_products():
        pytest.skip("needs exact int8 products: torch._int_mm saturates here, as oneDNN's do without VNNI")
    sim, x = peer(modules, name)(layer, bits), other_inputs(layer)
    matrix = regular_hadamard(block)
    rotated = (x.double().reshape(-1, block) @ matrix).reshape(x.shape)
    weight = (sim.weight.double().reshape(-1, block) @ matrix).reshape(sim.weight.shape)
    expected = fake_quantize_activation(rotated.float(), bits).double() @ weight.T
    assert relative(sim.whole(x), expected) < BF16
    assert sim.whole(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [CONVROT, CODEBOOK])
def test_comfy_kitchens_rotation_spreads_the_outliers(modules: SimpleNamespace, name: str) -> None:
    """The same widths without rotation do worse on 15-fold channels."""
    layer = layer_of(modules, (192,), 256, outliers=15)
    x, (bits,) = other_inputs(layer), WIDTHS[name]
    assert error(peer(modules, name)(layer, bits), layer, x) < plain(layer, x, bits)
