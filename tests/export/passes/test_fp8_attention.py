"""Attention in FP8: the pass, what TensorRT-RTX builds of it, and ONNX Runtime within bounds that follow from e4m3."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from dvdquant.artifact.manifest import load_manifest
from dvdquant.deploy.artifact import Artifact
from dvdquant.errors import EngineError
from dvdquant.export.engines import build_engine
from dvdquant.export.engines.attention import AttentionWish, attention_wish
from dvdquant.export.engines.precision import plan_engines
from dvdquant.export.engines.report import attention_summary, materialized_scores
from dvdquant.export.graph.trace import profile_shapes
from dvdquant.export.options import ExportOptions
from dvdquant.export.passes.fp8_attention import LONG_TOKENS, AttentionScales, fp8_attention
from dvdquant.export.passes.lowering.int8 import lower_int8
from dvdquant.export.passes.lowering.nvfp4 import lower_nvfp4
from dvdquant.export.pipeline import run_export
from dvdquant.export.plan import plan_export
from dvdquant.export.verify.attention import attention_intermediates, judge_attention, quantized_attention
from dvdquant.export.verify.graph import Verifier
from dvdquant.export.verify.intermediates import add_intermediates, load_graph, run_graph
from dvdquant.model.families import Axis, Sizes, get_family
from dvdquant.quantize.checkpoint import PackedWeights
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support.bounds import e4m3_attention_error
from tests.support.exporting import TINY_WAN, Export, export_graphs
from tests.support.session_exports import copy_of, family_export
from tests.support.tiny_models import CONFIGS, WAN, write_checkpoint

SIZES = Sizes(Axis(3, 4, 4), Axis(16, 16, 24), Axis(16, 16, 24), text_tokens=12)
FIXED = Sizes(Axis.fixed(2), Axis.fixed(24), Axis.fixed(24), text_tokens=12)
WAN_SIZES = Sizes(Axis(2, 8, 8), Axis(16, 24, 32), Axis(16, 24, 32), text_tokens=5)
# Fused attentions per family: the video's own, and all others (text).
FUSED = {
    "wan": {"FP8": 2, "BFloat16": 2},
    "hunyuan-video": {"FP8": 2, "BFloat16": 1},
    "cogvideox": {"FP8": 2},
    "ltx-video": {"FP8": 2, "BFloat16": 2},
}


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("fp8")
    return export_graphs(TINY_WAN / "transformer", folder, get_recipe("w4a8"), WAN_SIZES, torch.bfloat16, ("tensorrt",))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Two blocks of one size, which are traced and built sooner than six for a range."""
    folder = tmp_path_factory.mktemp("small")
    model = write_checkpoint(folder / "model", WAN)
    return export_graphs(model, folder / "out", get_recipe("w4a8"), FIXED, torch.bfloat16, ("tensorrt",))


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """One block of a range of sizes; by the count that the pass is given, it is taken for a long video."""
    artifact = Artifact.open(copy_of(family_export("wan"), tmp_path_factory.mktemp("ranged") / "out"))
    graphs = [entry for entry in artifact.manifest.graphs if entry["path"].startswith("onnx/transformer_a")]
    packed = PackedWeights({}, {}, (), ())
    return Export(artifact.root, artifact.plan("transformer"), artifact.sizes, packed, graphs)


def quantized(export: Export, path: Path | None = None) -> tuple[ir.Model, list[AttentionScales]]:
    model = ir.load(path or export.path(8, "tensorrt"))
    model.functions.clear()
    return model, fp8_attention(model, export.plan.family.tokens(*export.sizes.at("max")))


def build(export: Export, model: ir.Model, sms: tuple[str, ...], folder: Path, lower: Any = lower_int8) -> Any:
    lower(model)
    path = export.root / "onnx" / f"{folder.name}.onnx"
    ir.save(model, path)
    profile = profile_shapes(export.plan.family, export.sizes)
    try:
        return build_engine(path, folder / "x.engine", backend="rtx", sms=sms, profile=profile)
    finally:
        path.unlink()


@pytest.mark.stress
@pytest.mark.parametrize("sms", [("8.9", "12.0"), ("8.9",), ("12.0",)])
def test_tiny_wan_builds_one_fp8_kernel_for_each_attention(
    sms: tuple[str, ...], tiny_wan: Export, tmp_path: Path
) -> None:
    model, scales = quantized(tiny_wan)
    assert [each.name for each in scales] == [f"blocks.{i}.attn1" for i in range(6)]
    report = build(tiny_wan, model, sms, tmp_path)
    assert report.attention == {"FP8": 6, "BFloat16": 6}  # the text's attentions stay


def test_one_fp8_kernel_is_built_for_each_attention(small: Export, tmp_path: Path) -> None:
    model, scales = quantized(small)
    assert [each.name for each in scales] == [f"blocks.{i}.attn1" for i in range(2)]
    assert build(small, model, ("8.9", "12.0"), tmp_path).attention == FUSED["wan"]


def test_nvfp4_layers_leave_the_attention_in_fp8(small: Export) -> None:
    """The operands of the attention keep their Q/DQ and scales; every layer has the FP4 products of its own."""
    model, scales = quantized(small)
    layers = sum(node.op_type == "QuantLinear" for node in model.graph)

    def operands() -> dict[str, float]:
        nodes = [node for node in model.graph if node.op_type == "QuantizeLinear" and ".attn1." in (node.name or "")]
        return {node.name or "": float(node.inputs[1].const_value.numpy()) for node in nodes}  # type: ignore[union-attr]

    before = operands()
    assert before == {f"{each.name}.{side}_q": getattr(each, side) for each in scales for side in "qkvp"}
    lower_nvfp4(model)
    assert operands() == before
    assert not any(node.op_type == "QuantLinear" for node in model.graph)
    assert sum(node.op_type == "TRT_FP4DynamicQuantize" for node in model.graph) == layers


@pytest.mark.slow  # the graph is judged above
def test_nvfp4_layers_and_fp8_attention_are_built_into_one_engine(small: Export, tmp_path: Path) -> None:
    model, _ = quantized(small)
    report = build(small, model, ("12.0",), tmp_path, lower_nvfp4)
    assert report.attention == FUSED["wan"]
    assert any("FP4" in kind for kind in report.products)


def test_the_plain_graph_still_builds_16_bit_attention(small: Export, tmp_path: Path) -> None:
    model = ir.load(small.path(8, "tensorrt"))
    model.functions.clear()
    assert build(small, model, ("8.9",), tmp_path).attention == {"BFloat16": 4}


def test_scores_in_memory_are_refused(ranged: Export, tmp_path: Path) -> None:
    model = ir.load(ranged.path(8, "tensorrt"))
    model.functions.clear()
    assert len(fp8_attention(model, LONG_TOKENS + 1)) == 1
    for node in [node for node in model.graph if (node.name or "").endswith(".p_dq")]:
        codes = node.inputs[0].producer()  # type: ignore[union-attr]
        ir.convenience.replace_all_uses_with(node.outputs[0], codes.inputs[0])  # type: ignore
        model.graph.remove([node, codes], safe=True)  # type: ignore[list-item]
    with pytest.raises(EngineError, match=r"2 layers write the scores .* to memory(?s:.*)--attention 16"):
        build(ranged, model, ("8.9",), tmp_path)
    assert not (tmp_path / "x.engine").exists()


LINE = "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: q, Dimensions: [4,-1,64], Datatype: FP8 }}], Constants: [{c}], "
LINE += "Outputs: [ {{ Name: y, Dimensions: [{dims}], Datatype: BFloat16 }}], TacticName: t"
MATRIX = " { Name: w, Dimensions: [64,64], Datatype: Int8 }"


@pytest.mark.parametrize(
    ("name", "kind", "constants", "dims", "found"),
    [
        ("scores", "gemm", "", "4,-1,-1", True),
        ("scores", "gemm", "", "4,32760,32760", True),
        ("scores", "runtime_fusion", "", "1,4,-1,-1", True),
        ("__myl_SlicReshMaxrSubExpSumDiv_myl0_24", "kgen", "", "1,4,-1,-1", True),
        ("scores of text", "gemm", "", "4,-1,512", False),
        ("attended", "gemm", "", "4,-1,64", False),
        ("linear", "gemm", MATRIX, "1,-1,-1", False),
        ("__myl_ReshTran", "kgen", "", "1,3,-1,-1,-1", False),
        ("small", "gemm", "", "4,96,96", False),
    ],
)
def test_which_layers_hold_scores(name: str, kind: str, constants: str, dims: str, found: bool) -> None:
    line = LINE.format(name=name, kind=kind, c=constants, dims=dims)
    assert materialized_scores([line, "Layers:", ""]) == ([name] if found else [])


def test_attention_is_counted_by_the_type_of_its_queries() -> None:
    lines = [LINE.format(name=f"_gemm_mha_v2_myl0_{i}", kind="kgen", c="", dims="4,-1,64") for i in range(3)]
    assert attention_summary(lines) == {"FP8": 3}
    assert attention_summary([LINE.format(name="x", kind="gemm", c="", dims="4,-1,64")]) == {}


# ------------------------------------------------------------------------------------------------------ ONNX Runtime


def intermediates(
    export: Export, edit: Any = None, which: str = "min", tokens: int = 0
) -> tuple[dict[str, Tensor], list[AttentionScales]]:
    """Operands and results of every attention in ONNX Runtime; ``edit`` changes the graph behind the pass."""
    scales: list[AttentionScales] = []

    def change(model: ir.Model) -> None:
        scales.extend(fp8_attention(model, tokens or export.plan.family.tokens(*export.sizes.at("max"))))
        if edit is not None:
            edit(model)

    path = export.path(8, "tensorrt")
    model = load_graph(path, change)
    names = add_intermediates(model, attention_intermediates(model, scales))
    inputs = export.plan.family.sample(export.sizes, torch.bfloat16, which=which)
    got = run_graph(model, path.parent, inputs, path.name)
    return {key: got[name] for key, name in names.items()}, scales


def test_onnxruntime_is_within_the_bounds_of_the_formats(small: Export) -> None:
    seen, scales = intermediates(small)
    for each in scales:
        assert judge_attention(seen, each, torch.bfloat16).passed
        # And of attention without any quantization, no further than rounding to e4m3 can carry it.
        q, k, v, got = (seen[f"{each.name} {what}"].double() for what in ("q_rotated", "k_rotated", "v", "attended"))
        exact, bound = e4m3_attention_error(q, k, v, each, torch.bfloat16)
        assert bool(((got - exact).abs() <= bound).all())
        assert (
            float((got - exact).norm() / exact.norm()) > 2.0**-8
        )  # it is FP8 indeed: bf16 rounds by half of that at most


def test_a_graph_for_ranges_of_sizes(ranged: Export) -> None:
    """At two of its sizes."""
    for which in ("opt", "max"):
        seen, scales = intermediates(ranged, which=which, tokens=LONG_TOKENS + 1)
        (each,) = scales
        tokens = ranged.plan.family.tokens(*ranged.sizes.at(which))
        assert seen[f"{each.name} attended"].numel() == tokens * 128
        assert judge_attention(seen, each, torch.bfloat16).passed


def test_a_wrong_scale_is_out_of_bounds(small: Export) -> None:
    def double(model: ir.Model) -> None:
        for node in model.graph:
            if node.name == "blocks.1.attn1.p_dq":
                old = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
                tensor = ir.Tensor(np.array(old * 1.125, old.dtype), dtype=ir.DataType.BFLOAT16, name="wrong")
                value = ir.Value(name="wrong", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
                model.graph.initializers["wrong"] = value
                node.replace_input_with(1, value)

    seen, scales = intermediates(small, double)
    verdicts = [judge_attention(seen, each, torch.bfloat16) for each in scales]
    assert [check.name for check in verdicts if not check.passed] == ["blocks.1.attn1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.stress] if name == "wan" else []) for name in FUSED],  # Wan's stands above
)
def test_every_family_in_fp8(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS[family])
    export = export_graphs(model, tmp_path / "out", get_recipe("w4a8"), SIZES, torch.bfloat16, ("tensorrt",))
    verifier = Verifier(export.plan, SIZES, export.model(8), which="min")
    check = verifier.check(export.path(8, "tensorrt"), 8, fp8=True)
    assert check.passed, check.faults()
    assert len(check.attention) == FUSED[family]["FP8"]
    assert any("FP8 attention: 2 judged" in line for line in check.lines())
    graph, _ = quantized(export)
    assert build(export, graph, ("8.9", "12.0"), tmp_path).attention == FUSED[family]


# ------------------------------------------------------------------------------------------------------ the pass alone


def test_balancing_the_norms_changes_no_score(small: Export) -> None:
    """q·k is the same to the last bit where outlier channels of q and k are balanced by powers of two."""
    path = small.path(8, "tensorrt")
    model = ir.load(path)
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if name.endswith((".norm_q.weight", ".norm_k.weight")) and "attn1" in name:
            data = value.const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
            pairs = generator.choice([0.125, 1.0, 16.0], data.size // 2).repeat(2)
            data = data * pairs
            value.const_value = ir.Tensor(data.astype(value.dtype.numpy()), dtype=value.dtype, name=name)  # type: ignore
    before = {
        n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items() if "attn1.norm" in n
    }  # type: ignore
    scales = fp8_attention(model, LONG_TOKENS + 1)
    assert len(scales) == 2
    after = model.graph.initializers
    for each in scales:
        assert len(set(each.fold)) > 2
        for side, fold in (("q", each.fold), ("k", 1 / each.fold)):
            new = after[f"{each.name}.norm_{side}.weight.balanced"].const_value.numpy().astype(np.float64)  # type: ignore
            assert np.array_equal(new, before[f"{each.name}.norm_{side}.weight"] * fold)
        q, k = (after[f"{each.name}.norm_{s}.weight.balanced"].const_value.numpy().astype(np.float64) for s in "qk")  # type: ignore
        ratio = np.hypot(*q.reshape(-1, 2).T) / np.hypot(*k.reshape(-1, 2).T)
        assert ratio.min() >= 0.49
        assert ratio.max() <= 2.01
        assert not [name for name in after if name.endswith(f"{each.name}.norm_q.weight")]


def test_scales_bound_what_the_norms_give(small: Export) -> None:
    seen, scales = intermediates(small)
    for each in scales:
        for side in "qk":
            largest = float(seen[f"{each.name} {side}_rotated"].abs().max())
            assert largest <= 448 * getattr(each, side) * 1.01
        assert float(seen[f"{each.name} v"].abs().max()) <= 448 * each.v
        assert 1 / 448 <= each.p <= 1 / 448 * 1.01


def test_rotation_and_fold_leave_attention_as_it_is(small: Export) -> None:
    """The definition on float64 operands, with a fold far from 1, is no further from attention than e4m3 rounds."""
    _, scales = quantized(small)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 48, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    fold = torch.exp2(torch.arange(32) % 5).repeat_interleave(2).repeat(2)
    pairs = fold.reshape(2, 1, 64).double()
    each = dataclasses.replace(scales[0], fold=fold.numpy(), q=2.0**-6, k=2.0**-4, v=2.0**-6)
    rotation = torch.from_numpy(each.rotation).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(64, dtype=torch.float64), atol=1e-6)
    exact, bound = e4m3_attention_error(q @ rotation / 8, k @ rotation, v, each, torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert float((exact - expected).abs().max()) < 1e-5
    got = quantized_attention(q / pairs, k * pairs, v, each)
    assert bool(((got - exact).abs() <= bound).all())


def test_short_videos_and_other_attentions_stay(small: Export) -> None:
    model = ir.load(small.path(8, "tensorrt"))
    assert fp8_attention(model, LONG_TOKENS) == []
    assert sum(node.op_type == "Attention" for node in model.graph) == 4
    assert len(fp8_attention(model, LONG_TOKENS + 1)) == 2
    assert sum(node.op_type == "Attention" for node in model.graph) == 2


# ---------------------------------------------------------------------------------------------------- plans and words


@pytest.mark.parametrize(
    ("backend", "sms", "kinds"),
    [
        ("tensorrt_rtx", ["8.9", "12.0"], ["fp8"]),
        ("tensorrt_rtx", ["8.0", "8.9"], ["16"]),
        ("tensorrt_rtx", ["8.6"], ["16"]),
        ("tensorrt", ["8.0", "9.0"], ["16", "fp8"]),
    ],
)
def test_which_engines_have_fp8_attention(backend: str, sms: list[str], kinds: list[str]) -> None:
    (grid,) = get_recipe("w4a8").activations
    plans = plan_engines(backend, sms, [grid], attention=AttentionWish("fp8"))
    assert [plan.attention for plan in plans] == kinds
    for plan in plans:
        word = "self-attention in FP8" if plan.attention == "fp8" else "has no FP8 tensor cores"
        assert word in plan.executes
    assert all("attention" not in plan.executes for plan in plan_engines(backend, sms, [grid]))


def test_int8_attention_is_fp8_in_engines_and_says_why() -> None:
    wish = AttentionWish("int8")
    assert wish.on(["8.9"]) == "fp8"
    assert "INT8 attention would write its scores to memory" in wish.words(["8.9"])
    assert "SM 8.0 has no FP8" in wish.words(["8.0", "8.9"])


def test_models_that_cannot_say_so() -> None:
    recipe = dataclasses.replace(get_recipe("w4a8"), attention="fp8")
    assert get_recipe("w4a8").attention in ("16", "int8", "fp8")
    assert attention_wish(recipe, get_family(WAN), SIZES).on(["8.9"]) == "fp8"
    unnormed = attention_wish(recipe, get_family({**WAN, "qk_norm": None}), SIZES)
    assert unnormed.on(["8.9"]) == "16"
    assert "no norms of q and k" in unnormed.words(["8.9"])
    short = attention_wish(recipe, get_family(WAN), dataclasses.replace(SIZES, frames=Axis.fixed(1)))
    assert "a video of 144 tokens is short" in short.words(["8.9"])


def test_a_graph_without_norms_stays(small: Export) -> None:
    model = ir.load(small.path(8, "tensorrt"))
    for name in [n for n in model.graph.initializers if n.endswith("blocks.1.attn1.norm_k.weight")]:
        value = model.graph.initializers.pop(name)
        value.name = "something"
        model.graph.initializers["something"] = value
    assert [each.order for each in fp8_attention(model, LONG_TOKENS + 1)] == [0]
    assert fp8_attention(model, LONG_TOKENS + 1) == []


# ----------------------------------------------------------------------------------------------------- a whole export


def test_an_export_with_fp8_attention(tmp_path: Path) -> None:
    """From the options to the manifest, with ``--verify``: an engine in FP8, and one that an SM without FP8 shares."""
    model = write_checkpoint(tmp_path / "model", WAN)
    options = ExportOptions(
        str(model),
        tmp_path / "out",
        dataclasses.replace(get_recipe("w4a8"), attention="fp8"),
        sms=("8.9",),
        latent="2x24x24",
        text_tokens=12,
        verify=True,
    )
    plan = plan_export(options)
    assert [engine.attention for engine in plan.engines] == ["fp8"]
    result = run_export(plan, Progress("quiet"))
    assert [len(check.attention) for check in result.checks] == [0, 2]
    assert all(check.passed for check in result.checks)
    manifest = load_manifest(options.out)
    (engine,) = manifest.engines
    assert engine["attention"] == FUSED["wan"]
    assert "self-attention in FP8" in engine["executes"]
    assert result.builds[0]["attention"] == engine["attention"]
    older = dataclasses.replace(options, sms=("8.0", "8.9"), verify=False)
    again = run_export(plan_export(older), Progress("quiet")).manifest
    (both,) = [entry for entry in again.engines if entry["sm"] == ["8.0", "8.9"]]
    assert both["attention"] == {"BFloat16": 4}
    assert "SM 8.0 has no FP8 tensor cores" in both["executes"]
