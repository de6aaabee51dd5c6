"""The estimate before an export: exact where it can be, monotone where it cannot."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.export.engines.precision import plan_engines
from dvdquant.export.estimate import Estimate, engine_weight_bytes, estimate_export, packed_bytes
from dvdquant.export.options import ExportOptions
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.quantize.checkpoint import quantize_checkpoint
from dvdquant.quantize.hessian import hessian_bytes
from dvdquant.recipe import RECIPES, get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.exporting import with_changes

OPTIONS = ExportOptions(model="m", out=Path("out"), recipe=get_recipe("w4a4"))


def estimate(made: list[ModelPlan], sms: tuple[str, ...] = ("8.9",), **options: Any) -> Estimate:
    engines = plan_engines("tensorrt_rtx", sms, made[0].recipe.activations) if sms else []
    source = sum(2 * torch.Size(s).numel() for p in made for s in p.shapes.values())
    return estimate_export(made, engines, replace(OPTIONS, **options), source, source // 10)


def plan(recipe: str = "w4a4", **changes: Any) -> ModelPlan:
    return plan_model(with_changes(tiny.WAN, **changes), get_recipe(recipe), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("wan", recipe) for recipe in RECIPES),
        *(
            pytest.param("hunyuan-video", recipe, marks=[] if recipe == "w4a4" else pytest.mark.stress)
            for recipe in RECIPES
        ),
    ],
)
def test_weight_file_size_is_exact_up_to_alignment(name: str, recipe: str, tmp_path: Path) -> None:
    config = with_changes(tiny.CONFIGS[name], num_layers=1)
    source = tiny.write_checkpoint(tmp_path / "model", config)
    made = plan_model(config, get_recipe(recipe), torch.bfloat16)
    with ExportTransaction(tmp_path / "out") as transaction:
        packed = quantize_checkpoint(open_checkpoint(source), made, transaction, Progress())
        size = sum(entry["bytes"] for entry in packed.files.values())
    data = sum(info.nbytes for _, info in packed.tensors.values())
    assert packed_bytes(made) == data
    # Header and padding: some 150 bytes a tensor.
    assert 0 <= size - data <= 300 * len(packed.tensors) + 1000


def test_known_sizes_of_wan_1_3b() -> None:
    """Wan 2.1 1.3B from its published config: 1.42 billion parameters, 30 blocks."""
    config = {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 12,
        "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "eps": 1e-6,
    }  # fmt: skip
    made = plan_model(config, get_recipe("w4a4"), torch.bfloat16)
    parameters = sum(torch.Size(shape).numel() for shape in made.shapes.values())
    assert 1.41e9 < parameters < 1.43e9
    block = 8 * 1536 * 1536 + 2 * 1536 * 8960
    assert made.quantized_weights == 30 * block
    kept = 2 * (parameters - 30 * block)
    assert 30 * block / 2 < packed_bytes(made) < 30 * block / 2 + 2 * kept + 30 * 20 * 8960
    result = estimate([made])
    # An engine with 8-bit codes holds a byte a weight, and two of them are on disk.
    assert 2 * 30 * block < result.engine_bytes < 2 * (30 * block + 2 * kept)
    assert result.peak_bytes > 3 * 30 * block


def test_engines_decide_disk_and_memory() -> None:
    made = plan(num_layers=8, ffn_dim=4096)
    none, one, two = estimate([made], ()), estimate([made]), estimate([made], ("8.9", "12.0"))
    assert none.engine_bytes == none.builder_bytes == 0
    # What is predicted of the inputs is kept beside the work until the layers are quantized.
    assert none.scratch_bytes == hessian_bytes(made)
    assert none.disk_bytes == none.weight_file_bytes + none.scratch_bytes
    assert none.engine_bytes < one.engine_bytes < two.engine_bytes
    assert one.disk_bytes == one.weight_file_bytes + one.engine_bytes + one.scratch_bytes
    assert one.peak_bytes > none.peak_bytes
    by_kind = {
        e.precision: engine_weight_bytes(made, e)
        for e in plan_engines("tensorrt_rtx", ("12.0",), made.recipe.activations)
    }
    assert by_kind["nvfp4"] < by_kind["int8"]


def test_two_transformers_take_twice_the_disk_but_not_the_memory() -> None:
    made = plan(num_layers=4)
    one, two = estimate([made]), estimate([made, made])
    assert two.disk_bytes - two.scratch_bytes == 2 * (one.disk_bytes - one.scratch_bytes)
    assert two.scratch_bytes == one.scratch_bytes
    assert two.builder_bytes == one.builder_bytes
    assert set(one.seconds) == {"inputs", "quantize", "trace", "engines"}
    # They differ in their weights alone, so that their graph is traced once.
    assert all(two.seconds[k] == pytest.approx((1 if k == "trace" else 2) * v) for k, v in one.seconds.items())
    other = estimate([made, plan(num_layers=4, in_channels=8)])
    assert other.seconds["trace"] == pytest.approx(2 * one.seconds["trace"])


def test_larger_models_take_more() -> None:
    sizes = [estimate([plan(num_layers=n)]) for n in (1, 2, 4)]
    for a, b in itertools.pairwise(sizes):
        assert a.disk_bytes < b.disk_bytes
        assert sum(a.seconds.values()) < sum(b.seconds.values())
        assert a.resident_bytes <= b.resident_bytes


def test_json() -> None:
    result = estimate([plan()])
    data = result.to_json()
    assert data["disk_bytes"] == result.disk_bytes
    assert data["peak_bytes"] == result.peak_bytes
    assert set(data["seconds"]) == set(result.seconds)
