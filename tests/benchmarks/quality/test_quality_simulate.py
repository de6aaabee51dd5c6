"""benchmarks/quality: simulated layers against the op they stand for, batches against single clips, and a whole small run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.deploy.switching.controller import StepController
from dvdquant.model.plan import plan_model
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.numerics.packing import pack_int4
from dvdquant.ops.reference import dequantize_weight
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.gptq import gptq_round
from dvdquant.quantize.hessian import synthetic_hessians
from dvdquant.quantize.layer_inputs import layer_inputs
from dvdquant.recipe import RECIPES
from dvdquant.system.progress import Progress
from tests.support.bounds import LAMBDA, UNIT, assert_layer
from tests.support.exporting import OpInputs, judge
from tests.support.quality_scripts import QUALITY, script

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "tiny-wan"


@pytest.fixture(scope="module")
def bench() -> Any:
    return replace(script("clips").Bench.open(MODEL), steps=3)


@pytest.fixture(scope="module")
def layers(bench: Any) -> list[Any]:
    """With what an export predicts of their inputs."""
    checkpoint = open_checkpoint(MODEL)
    hessian = synthetic_hessians(checkpoint, plan_model(checkpoint.config, RECIPES["w4a4"], torch.float32), Progress())
    return list(script("simulate").layers_of(bench.model, hessian=hessian))


@pytest.fixture
def exact_products() -> Any:
    simulate = script("simulate")
    simulate.set_product_dtype(torch.float32)
    yield
    simulate.set_product_dtype(torch.bfloat16)


def forward(model: Any, bench: Any, prompts: int = 2) -> Tensor:
    x, text = bench.noise(range(prompts)), bench.words(script("clips").bench_prompts(bench.table, prompts, 0))
    # A compiled model has no parameters: it takes float32, as the toy model does.
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    with torch.inference_mode():
        return model(x.to(dtype), torch.full((prompts,), 600.0, dtype=dtype), text.to(dtype), return_dict=False)[0]


@pytest.fixture(scope="module")
def exact(bench: Any) -> Tensor:
    """The model's output in float64."""
    return forward(copy.deepcopy(bench.model).double(), bench)


@pytest.fixture(scope="module")
def rounding(bench: Any, exact: Tensor) -> float:
    """How far fp32 is from that, as a share of its norm: two right computations in fp32 are a few times this apart."""
    found = float((forward(bench.model, bench) - exact).norm() / exact.norm())
    assert 2.0**-24 < found < 1e-4
    return found


@pytest.mark.usefixtures("exact_products")
def test_layers_that_change_nothing_change_nothing(bench: Any, exact: Tensor, rounding: float) -> None:
    """The surgery: merged members get their own rows and the bias."""
    simulate = script("simulate")
    layers = simulate.layers_of(bench.model)
    assert len(layers) == 42
    same = simulate.install(bench.model, layers, lambda layer: simulate.Simulated(layer.weight))
    assert float((forward(same, bench) - exact).norm() / exact.norm()) < 4 * rounding


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    ("recipe", "bits"),
    [(r, a.bits) for r in ("w4a4", "w4a4-g64", "w4a8", "paper", "rtn") for a in RECIPES[r].activations],
)
def test_a_recipe_is_what_the_op_computes(layers: list[Any], recipe: str, bits: int) -> None:
    """A simulated layer against QuantLinear's reference on the packed tensors."""
    simulate, methods = script("simulate"), script("methods")
    layer, bias = layers[0], layers[0].bias
    x = torch.randn(3, 20, layer.spec.features, generator=torch.Generator().manual_seed(1))
    group = simulate.SimulatedGroup(layer, methods.from_recipe(RECIPES[recipe])(layer, bits))
    y = group(x)
    chosen = methods.Rotation.for_features(layer.spec.features, RECIPES[recipe].rotation)
    if RECIPES[recipe].smooth:
        fitted = RECIPES[recipe].random_signs
        spec = replace(layer.spec, rotation=chosen, smoothed=True, random_signs=fitted, shifted=fitted)
        known = layer_inputs(layer.hessian, spec)
        w = rotate(layer.weight * known.smooth_scale, chosen)
        q = gptq_round(w, quantize_weight(w, RECIPES[recipe].weight), known.hessian, known.damping)
        if known.shift is not None:
            assert known.shift.abs().max() > 0.1
            x, bias = x - known.shift, bias + layer.weight @ known.shift
        assert bool((known.smooth_scale < 0).any()) == fitted
        x = x / known.smooth_scale
    else:
        q = quantize_weight(rotate(layer.weight, chosen), RECIPES[recipe].weight)
    hadamard, outer = chosen.matrices(torch.float32)
    tensors = {
        "weight": pack_int4(q.codes).view(torch.int8),
        "weight_scale": q.scale,
        "weight_group_scale": q.group_scale,
        "weight_zero": q.zero,
        "bias": bias,
        "hadamard": hadamard,
        "outer": outer,
    }
    op = OpInputs(tensors, bits, RECIPES[recipe].activation(bits).group_size)
    # A rotated value next to a rounding boundary may fall on its other side: one step of one input, whose share of a
    # result depends on the processor's order of sums. The judge counts those values.
    assert_layer(op, x, y)
    # The bound is worth something: the layer without its grid leaves it, and almost no code is near a boundary.
    ungridded = (
        rotate(x.double(), chosen)
        @ dequantize_weight(tensors["weight"], q.scale, q.group_scale, q.zero, torch.float64).T
        + bias
    )
    judged = judge(op, x)
    assert judged.excess(ungridded) > 1.0
    assert float(judged.near.double().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("features", "block", "group"), [(256, 256, 0), (1024, 256, 64), (1024, 1024, 0), (192, 64, 96), (64, 1, 0)]
)
def test_the_compiled_grid_is_the_grid(
    features: int, block: int, group: int, shifted: bool, divided: bool, dtype: torch.dtype
) -> None:
    """Rotation sums in another order: a value next to a rounding boundary may fall on its other side."""
    grid, rotation = script("grid"), Rotation.for_features(features, block if block > 1 else "none")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, features, generator=generator).mul(torch.rand(features, generator=generator) * 9).to(dtype)
    shift = torch.randn(features, generator=generator) if shifted else torch.zeros(features)
    shift = shift.to(dtype).float()  # so that nothing is left of the first token
    x[0, 0] = shift
    divide = torch.rand(features, generator=generator) + 0.5 if divided else None
    for bits in (4, 8):
        found = grid.rotated_to_grid(x, shift if shifted else None, divide, rotation, grid.Grid(bits, group))
        if found is None:
            pytest.skip("no g++: the grid runs in tensor operations")
        centred = x.float() - shift
        rotated = rotate(centred if divide is None else centred / divide, rotation)
        exact = grid.Grid(bits, group)(rotated)
        grouped = rotated.double().unflatten(-1, (-1, group or features))
        values = exact.double().unflatten(-1, (-1, group or features))
        amax = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
        step = amax / (2 ** (bits - 1) - 1)
        away = (found.float() - exact.to(torch.bfloat16).float()).double().reshape(grouped.shape).abs()
        # Sums of a block of the rotation in fp32, in two orders, and the roundings of the scale.
        size = (
            (centred if divide is None else centred / divide).double().unflatten(-1, (-1, rotation.block)).norm(dim=-1)
        )
        size = size.repeat_interleave(rotation.block, -1).reshape(grouped.shape)
        sums = 2 * LAMBDA * UNIT[torch.float32] * size * (rotation.block > 1)
        relative = sums.amax(-1, keepdim=True) / amax + 8 * UNIT[torch.float32]
        grid_position = grouped / step
        code_tie = (grid_position - grid_position.floor() - 0.5).abs() <= sums / step + grid_position.abs() * relative
        # A code's value that lies next to the middle of two bf16 numbers may be rounded to either.
        unit = torch.exp2(values.abs().clamp(min=2.0**-120).log2().floor() - 7)
        position = values / unit
        bf16_tie = (position - position.floor() - 0.5).abs() <= relative * position.abs()
        assert bool(((away == 0) | code_tie | bf16_tie).all())
        assert bool((away <= 1.5 * step).all())  # one code, and the rounding to bf16
        assert float((code_tie | bf16_tie).double().mean()) < 0.1
        assert not found[0, 0].any()


def test_what_has_no_compiled_grid_says_so() -> None:
    grid = script("grid")
    odd = Rotation.for_features(12, "full")
    assert odd.outer > 1
    assert grid.rotated_to_grid(torch.randn(2, 12), None, None, odd, grid.Grid(4)) is None
    assert grid.rotated_to_grid(torch.randn(2, 64, dtype=torch.float64), None, None, None, grid.Grid(4)) is None
    assert grid.rotated_to_grid(torch.randn(2, 64), None, None, None, grid.Grid(4, 8)) is None


@pytest.mark.stress
def test_the_compiled_model_is_the_model(
    bench: Any, layers: list[Any], exact: Tensor, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: the same numbers. bf16: as near to fp32 as the eager bf16 model, and a method exchanged without compiling again."""
    simulate, compiled, methods = script("simulate"), script("compiled"), script("methods")
    for module in (simulate, compiled):  # the compiler looks them up by name
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def away(y: Tensor, reference: Tensor = exact) -> float:
        return float((y.float() - reference).norm() / reference.norm())

    wide = compiled.CompiledModel(bench.model, layers, wide=True)
    assert away(forward(wide.install(layers, lambda layer: simulate.Simulated(layer.weight)), bench)) < 4 * rounding
    narrow = compiled.CompiledModel(bench.model, layers)
    with torch.autocast("cpu", torch.bfloat16):
        eager = away(forward(bench.model, bench))
    unquantized = narrow.install(layers, lambda layer: simulate.Simulated(layer.weight))
    assert away(forward(unquantized, bench)) < 1.5 * eager
    torch._dynamo.utils.counters.clear()
    for recipe, bits in (("w4a8", 8), ("rtn", 4)):
        method = methods.from_recipe(RECIPES[recipe])
        found = forward(narrow.install(layers, lambda layer, m=method, b=bits: m(layer, b)), bench)
        slow = simulate.install(bench.model, layers, lambda layer, m=method, b=bits: m(layer, b))
        with torch.autocast("cpu", torch.bfloat16):
            apart = away(forward(slow, bench), found.float())
        # Codes near ties differ in both, as they would between any two bf16 surroundings.
        assert apart < 0.8 * away(found)
        assert away(found) == pytest.approx(away(forward(slow, bench)), rel=0.1)
    assert not torch._dynamo.utils.counters["frames"]["total"]
    assert away(forward(unquantized, bench)) < 1.5 * eager  # its own layers again


@pytest.mark.parametrize("wide", [False, True])
def test_products_of_bf16_are_rounded_once(monkeypatch: pytest.MonkeyPatch, layers: list[Any], wide: bool) -> None:
    """In whichever dtype a machine multiplies: the sum of exact products, then one rounding to bf16."""
    simulate = script("simulate")
    monkeypatch.setattr(simulate, "WIDE_PRODUCTS", wide)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 256, generator=draw).to(torch.bfloat16)
    layer = next(each for each in layers if each.weight.shape[1] == 256 and each.bias is not None)
    down, up = torch.randn(4, 256, generator=draw), torch.randn(len(layer.weight), 4, generator=draw)
    plain = simulate.SimulatedGroup(layer, simulate.Simulated(layer.weight))
    branched = simulate.SimulatedGroup(layer, simulate.Simulated(layer.weight, low_rank=(down, up)))
    weight, bias, down, up = (each.to(torch.bfloat16).double() for each in (layer.weight, layer.bias, down, up))
    with torch.autocast("cpu", torch.bfloat16):
        branch = simulate.product(x, down.to(torch.bfloat16).T)
        found = {
            "branch": (branch, x.double(), down, 0.0),
            "plain": (plain(x), x.double(), weight, bias),
            "branched": (branched(x), torch.cat((x, branch), -1).double(), torch.cat((weight, up), 1), bias),
        }
    for name, (values, left, right, added) in found.items():
        exact, size = left @ right.T + added, left.abs() @ right.abs().T + abs(added)
        assert values.dtype == torch.bfloat16, name
        assert bool(((values.double() - exact).abs() <= 2**-8 * exact.abs() + 300 * 2**-24 * size).all()), name


def test_bf16_products_do_not_decide(bench: Any, layers: list[Any]) -> None:
    """The bench's products are rounded to bf16: far less than what W4A8 changes."""
    simulate, method = script("simulate"), script("methods").from_recipe(RECIPES["w4a8"])
    quantized = {layer.name: method(layer, 8) for layer in layers[::3]}  # of every kind and every block
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        simulate.set_product_dtype(dtype)
        changed = simulate.install(
            bench.model, layers, lambda layer: quantized.get(layer.name) or simulate.Simulated(layer.weight)
        )
        outputs[dtype] = forward(changed, bench)
    exact = forward(bench.model, bench)
    quantization = float((outputs[torch.float32] - exact).norm())
    assert float((outputs[torch.bfloat16] - outputs[torch.float32]).norm()) < 0.3 * quantization


def test_clips_do_not_depend_on_their_batch(bench: Any, rounding: float) -> None:
    """But for the order of sums: guidance adds the roundings of two outputs, (2g − 1)-fold, and every step adds its own."""
    clips = script("clips")
    prompts = clips.bench_prompts(bench.table, 3, seed=5)
    together = clips.generate(bench, {16: bench.model}, prompts, [7, 8, 9]).latents
    alone = clips.generate(bench, {16: bench.model}, prompts[1:2], [8]).latents
    assert float((together[1] - alone[0]).norm() / alone.norm()) < 4 * rounding * (2 * bench.guidance - 1) * bench.steps


@pytest.mark.parametrize("high", [0, pytest.param(3, marks=pytest.mark.stress)])
def test_a_planned_switch_is_its_one_model(bench: Any, layers: list[Any], high: int) -> None:
    """A few layers in other bits make another clip."""
    clips, simulate, methods = script("clips"), script("simulate"), script("methods")
    method = methods.from_recipe(RECIPES["w4a4"])
    few = {layer.name for layer in layers[:4]}

    def quantized(layer: Any, bits: int) -> Any:
        return method(layer, bits) if layer.name in few else simulate.Simulated(layer.weight)

    models = {b: simulate.install(bench.model, layers, lambda layer, b=b: quantized(layer, b)) for b in (4, 8)}
    bits = 8 if high else 4
    prompts = clips.bench_prompts(bench.table, 2, seed=5)
    alone = clips.generate(bench, {bits: models[bits]}, prompts, [1, 2])
    planned = clips.generate(
        bench, models, prompts, [1, 2], controllers=lambda _: StepController("planned", schedule=[bits] * 3)
    )
    assert planned.bits == [[bits] * 3] * 2
    assert torch.equal(alone.latents, planned.latents)


def test_outliers_change_the_inputs_and_not_the_output(bench: Any, exact: Tensor, rounding: float) -> None:
    outliers, simulate = script("outliers"), script("simulate")
    changed, factors = outliers.add_outliers(bench.model, count=5, largest=60.0)
    # The factors' own roundings in fp32 are as many as those of the model.
    assert float((forward(changed, bench) - exact).norm() / exact.norm()) < 8 * rounding
    assert max(factors.values()) == pytest.approx(60)
    assert min(factors.values()) == pytest.approx(15)
    largest: dict[bool, Tensor] = {}
    for which, model in ((False, bench.model), (True, changed)):
        hook = model.blocks[2].attn1.to_q.register_forward_pre_hook(
            lambda _m, args, which=which: largest.__setitem__(which, args[0].abs().amax((0, 1)))
        )
        forward(model, bench)
        hook.remove()
    ratio = largest[True] / largest[False]
    for channel in range(len(ratio)):
        assert float(ratio[channel]) == pytest.approx(factors.get(channel, 1.0), rel=1e-3)
    layer = simulate.layers_of(changed)[0]
    assert layer.weight[:, max(factors, key=factors.get)].norm() < layer.weight.norm(dim=0).median() / 10


def test_prompts_are_different_and_every_word_is_as_frequent(bench: Any) -> None:
    prompts = script("clips").bench_prompts(bench.table, 64, seed=0)
    assert len(set(prompts)) == 64
    counts = Counter(word for prompt in prompts for word in prompt)
    for words in bench.table.choices.values():
        assert all(abs(counts[word] - 64 / len(words)) <= 8 for word in words)


def test_predicted_inputs_resemble_the_real_ones(bench: Any, layers: list[Any]) -> None:
    """Feedback with predicted moments lowers the error on the inputs that layers have in clips, of most layers by far."""
    clips, methods = script("clips"), script("methods")
    layers = layers[::3]  # of every kind and every block
    real: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    hooks = [
        bench.model.get_submodule(layer.spec.members[0]).register_forward_pre_hook(
            lambda _m, args, name=layer.name: real[name].append(args[0].flatten(0, -2)[::8])
        )
        for layer in layers
    ]
    clips.generate(bench, {16: bench.model}, clips.bench_prompts(bench.table, 2, 3), [1, 2])
    for hook in hooks:
        hook.remove()
    ratios = []
    for layer in layers:
        x, errors = torch.cat(real[layer.name]), []
        for recipe in ("w4a4", "weights-only"):
            found = methods.from_recipe(RECIPES[recipe])(layer, 8)
            y = rotate(x if found.divide is None else x / found.divide, found.rotation) @ found.weight.T
            errors.append(float((y - x @ layer.weight.T).square().sum()))
        ratios.append(errors[0] / errors[1])
    assert sorted(ratios)[len(ratios) // 2] < 0.6
    assert sum(ratio < 1 for ratio in ratios) > 0.9 * len(ratios)


@pytest.mark.stress
def test_a_whole_small_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Real processes, real clips of ten steps: rows of every kind, a torn line, and a report that reads them."""
    command = [
        sys.executable, str(QUALITY / "run.py"), "--work", str(tmp_path), "--prompts", "2", "--seeds", "1", "--steps", "10",
        "--only", "RTN A4", "w4a4 A6", "--models", "plain", "--parts", "methods", "--no-report", "--eager",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    results = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    clips = Counter((row["method"], row["width"]) for row in rows if row["kind"] == "clip")
    assert clips == {("fp32", "A16"): 2, ("RTN", "A4"): 2, ("dvdquant w4a4", "A6"): 2}
    assert all(row["psnr"] < 60 for row in rows if row["kind"] == "clip" and row["method"] == "RTN")
    before = [line for line in results.read_text().splitlines() if '"RTN"' in line and '"clip"' in line]
    cut = [line for line in results.read_text().splitlines() if not ('"RTN"' in line and '"clip"' in line)]
    results.write_text("\n".join(cut[:-1]) + "\n" + before[0][:40])
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    again = [line for line in results.read_text().splitlines() if '"RTN"' in line and '"clip"' in line]

    def rows_of(lines: list[str]) -> list[dict[str, Any]]:
        """In one order, as parallel jobs finish in any, and without what a job took."""
        rows = [{k: v for k, v in json.loads(line).items() if k != "job_seconds"} for line in lines]
        return sorted(rows, key=str)

    assert rows_of(again) == rows_of(before)
    code = "import pathlib, report, sys; print(len(report.read_results(pathlib.Path(sys.argv[1])).clips))"
    reading = [sys.executable, "-c", code, str(results)]
    read = subprocess.run(reading, check=True, cwd=QUALITY, capture_output=True, text=True)
    assert read.stdout.strip() == "3"
