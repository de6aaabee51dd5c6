"""Weights that an export cannot hold are refused by name, whatever holds them; what can be held is exported as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import CheckpointError
from dvdquant.model.plan import plan_model
from dvdquant.quantize.checkpoint import PackedWeights, quantize_checkpoint
from dvdquant.quantize.layer import rotated_weight, stored_shift
from dvdquant.quantize.layer_inputs import LayerInputs
from dvdquant.quantize.magnitudes import largest
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support import tiny_models as tiny
from tests.support.commands import SINGLE, SIZES, edit_weights, in_process, poke, refused, run
from tests.support.exporting import with_changes
from tests.support.image_pipelines import KINDS
from tests.support.session_exports import FIXED, QUICK
from tests.support.tiny_pipelines import TOKENS

WEIGHTS_ONLY, LOOKS_AT_INPUTS = "w4a8", "w4a4"
QUANTIZED, KEPT = "blocks.0.ffn.net.0.proj.weight", "proj_out.weight"
FP32_KEPT = "blocks.0.scale_shift_table"
ONE_BLOCK = with_changes(tiny.WAN, num_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32, so that values are what they are set to."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", ONE_BLOCK, torch.float32)


def changed(source: Path, folder: Path, *changes: Callable[[Path], None]) -> Path:
    model = Path(shutil.copytree(source, folder / "changed"))
    for change in changes:
        change(model)
    return model


def quantize(
    model: Path, out: Path, dtype: torch.dtype, recipe: str = WEIGHTS_ONLY, allow: bool = False
) -> tuple[PackedWeights, dict[str, Tensor]]:
    checkpoint = open_checkpoint(model)
    plan = plan_model(checkpoint.config, get_recipe(recipe), dtype)
    with ExportTransaction(out) as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress(), allow_nonfinite=allow)
        tensors = {k: v for name in packed.files for k, v in load_file(transaction.tree / name).items()}
    return packed, tensors


@pytest.mark.parametrize("recipe", [WEIGHTS_ONLY, LOOKS_AT_INPUTS])
@pytest.mark.parametrize(
    ("name", "value", "dtype", "way_out"),
    [
        (QUANTIZED, 1e5, torch.float16, "--dtype bf16"),
        (KEPT, -1e5, torch.float16, "--dtype bf16"),
        ("blocks.0.attn1.to_k.bias", 1e5, torch.float16, "--dtype bf16"),
        (QUANTIZED, 1e30, torch.bfloat16, "--keep 'blocks.0.ffn.net.0.proj'"),
        (QUANTIZED, -3.4e38, torch.bfloat16, "no trained weight"),
        (KEPT, 3.4e38, torch.bfloat16, "no trained weight"),
        ("blocks.0.attn1.to_k.bias", 3.4e38, torch.bfloat16, "no trained weight"),
    ],
)
def test_a_value_that_cannot_be_held(
    name: str, value: float, dtype: torch.dtype, way_out: str, recipe: str, source: Path, tmp_path: Path
) -> None:
    model = changed(source, tmp_path, poke(name, value))
    with pytest.raises(CheckpointError) as info:
        quantize(model, tmp_path / "out", dtype, recipe)
    assert name in str(info.value)
    assert f"{abs(value):.3g}" in str(info.value)
    assert way_out in str(info.value)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        (KEPT, 65504.0, torch.float16),
        (KEPT, 1e30, torch.bfloat16),
        (FP32_KEPT, 3e38, torch.float16),
        (QUANTIZED, 1e5, torch.bfloat16),
        (QUANTIZED, 1e10, torch.bfloat16),
        (QUANTIZED, 1e-44, torch.float16),
    ],
)
def test_a_value_that_can(name: str, value: float, dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    model = changed(source, tmp_path, poke(name, value))
    packed, tensors = quantize(model, tmp_path / "out", dtype)
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
    assert all(layer["relative_mse"] is not None and layer["relative_mse"] < 1 for layer in packed.layers)
    if name == KEPT:
        assert float(tensors[name].abs().max()) == float(torch.tensor(value).to(dtype))


def test_rows_of_denormal_numbers(source: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[QUANTIZED][:3] *= 1e-42

    _, tensors = quantize(
        changed(source, tmp_path, edit_weights(shrink)), tmp_path / "out", torch.float16, LOOKS_AT_INPUTS
    )
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
    assert bool((tensors["blocks.0.ffn.net.0.proj.weight_scale"] > 0).all())


def test_a_row_that_fits_until_it_is_rotated(source: Path, tmp_path: Path) -> None:
    """64 times 3e4 in a row makes one of 2.4e5."""

    def level(tensors: dict[str, Tensor]) -> None:
        tensors[QUANTIZED][5] = 3e4

    model = changed(source, tmp_path, edit_weights(level))
    with pytest.raises(CheckpointError, match=rf"{QUANTIZED}.*rotation(?s:.*)--dtype bf16"):
        quantize(model, tmp_path / "out", torch.float16)
    quantize(model, tmp_path / "bf16", torch.bfloat16)


def test_float64_beyond_float32(source: Path, tmp_path: Path) -> None:
    """Finite where it is stored, infinite in the arithmetic: it does not pass for an infinity that may be a zero."""

    def widen(name: str) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[name] = tensors[name].double()
            tensors[name].view(-1)[7] = 1e300
            tensors[name].view(-1)[8] = float("nan")

        return change

    for index, name in enumerate((QUANTIZED, "blocks.0.attn2.to_v.bias")):
        model = changed(source, tmp_path / str(index), edit_weights(widen(name)))
        with pytest.raises(CheckpointError, match=rf"{name} holds 1e\+300"):
            quantize(model, tmp_path / "out", torch.bfloat16, allow=True)


def test_the_shift_of_an_input_beyond_the_dtype() -> None:
    mean = torch.tensor([1.0, -2.5, 6e4, -1e9, 3e38])
    assert stored_shift(mean, torch.float16).tolist() == [1.0, -2.5, 0.0, 0.0, 0.0]
    assert bool(stored_shift(mean, torch.bfloat16).isfinite().all())


def test_a_bias_that_the_shift_makes_too_large(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W·shift goes into the bias: rows of 3e4 times a mean of 30 do not fit into fp16."""
    from dvdquant.quantize import layer_inputs as predicted

    real = predicted.layer_inputs

    def far_from_zero(*arguments: object) -> LayerInputs:
        known = real(*arguments)  # type: ignore[arg-type]
        if known.shift is not None:
            known.shift.fill_(2e4)
        return known

    monkeypatch.setattr(predicted, "layer_inputs", far_from_zero)
    model = changed(source, tmp_path)
    with pytest.raises(CheckpointError, match=r"bias of blocks\.(?s:.*)--dtype bf16"):
        quantize(model, tmp_path / "out", torch.float16, LOOKS_AT_INPUTS)
    quantize(model, tmp_path / "bf16", torch.bfloat16, LOOKS_AT_INPUTS)


def test_the_command_refuses_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    model = changed(source, tmp_path, poke(QUANTIZED, 1e5))
    out = tmp_path / "out"
    result = run(model, "-o", out, "--dtype", "fp16", *QUICK, *FIXED)
    refused(result, QUANTIZED, "1e+05", "--dtype bf16")
    assert not out.exists()
    assert not list(tmp_path.glob(".tmp*"))


def test_largest() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert largest(torch.tensor([1.0, -16.0, float("nan"), 2.0]).to(dtype)) == 16
    assert largest(torch.tensor([float("inf"), float("nan")])) == 0
    assert largest(torch.empty(0)) == 0


# ------------------------------------------------------------------------------------------------------------------- fp8


@pytest.mark.parametrize("recipe", [WEIGHTS_ONLY, LOOKS_AT_INPUTS])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_with_nonfinite_values_is_its_bf16_conversion(dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    """Bit by bit, NaN (and the infinities of e5m2) accepted as zeros, in quantized and kept tensors alike."""
    model = tiny.write_checkpoint(tmp_path / "fp8", ONE_BLOCK, torch.float32)
    tensors = {name: (4 * value).to(dtype) for name, value in load_file(model / SINGLE).items()}
    bad = ["blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias", "proj_out.weight", "scale_shift_table"]
    for name in bad:
        tensors[name].view(torch.uint8).view(-1)[3] = 0x7F
        if dtype == torch.float8_e5m2:
            tensors[name].view(torch.uint8).view(-1)[4] = 0xFC  # -inf
    save_file(tensors, model / SINGLE)
    wide = Path(shutil.copytree(model, tmp_path / "bf16"))
    save_file({name: value.to(torch.bfloat16) for name, value in tensors.items()}, wide / SINGLE)

    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantize(model, tmp_path / "refused", torch.bfloat16, recipe)
    first, ours = quantize(model, tmp_path / "a", torch.bfloat16, recipe, allow=True)
    second, theirs = quantize(wide, tmp_path / "b", torch.bfloat16, recipe, allow=True)
    assert {n: e["sha256"] for n, e in first.files.items()} == {n: e["sha256"] for n, e in second.files.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(first.nonfinite) == sorted(second.nonfinite) == sorted(bad)
    assert first.layers == second.layers


def test_the_rotated_weight_of_accepted_nan(tmp_path: Path) -> None:
    """What other quantizers than ours get has zeros in their place, too."""
    model = tiny.write_checkpoint(tmp_path / "model", ONE_BLOCK)
    poke("blocks.0.attn1.to_out.0.weight", float("nan"))(model)
    checkpoint = open_checkpoint(model)
    plan = plan_model(ONE_BLOCK, get_recipe(WEIGHTS_ONLY), torch.bfloat16)
    (spec,) = [spec for spec in plan.layers if spec.name.endswith("attn1.to_out.0")]
    assert bool(rotated_weight(checkpoint, spec).isfinite().all())


# ---------------------------------------------------------------------------------------- tensors the class does not use


def test_tensors_that_the_class_does_not_use(tmp_path: Path) -> None:
    """As in the published Wan2.1-I2V-14B: ``norm_added_q`` in every block, all zero, and diffusers passes over them."""
    plain = tiny.write_checkpoint(tmp_path / "plain", KINDS["wan-i2v-21"].config)
    extra = Path(shutil.copytree(plain, tmp_path / "extra"))
    edit_weights(lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": torch.zeros(128)}))(extra)
    arguments = [
        "--target",
        "graphs",
        "--recipe",
        "w4a4",
        "--latent",
        KINDS["wan-i2v-21"].latent,
        "--text-tokens",
        TOKENS,
    ]
    hashes = []
    for model in (plain, extra):
        out = tmp_path / f"{model.name}-out"
        said = in_process(model, "-o", out, *arguments)
        assert ("norm_added_q" in said) == (model is extra)
        manifest = json.loads((out / "manifest.json").read_text())
        hashes.append({n: e["sha256"] for n, e in manifest["files"].items() if n.startswith("onnx/")})
        dry = in_process(model, "-o", tmp_path / "dry", "--dry-run", *arguments)
        assert ("norm_added_q" in dry) == (model is extra)
        plan = json.loads(in_process(model, "-o", tmp_path / "dry", "--dry-run", "--log-format", "json", *arguments))
        assert plan["left_out"] == (["blocks.0.attn2.norm_added_q.weight"] if model is extra else [])
    assert hashes[0] == hashes[1]
    assert hashes[0]


def test_only_what_diffusers_names_is_left_out(tmp_path: Path) -> None:
    """Another name is refused, also in a class that ignores some, and so are those names in a class that ignores none."""
    wan = tiny.write_checkpoint(tmp_path / "wan", ONE_BLOCK)
    edit_weights(lambda t: t.update({"blocks.0.attn2.norm_other_q.weight": torch.zeros(128)}))(wan)
    refused(run(wan, "-o", tmp_path / "out", "--dry-run", *SIZES), "norm_other_q")
    ltx = tiny.write_checkpoint(tmp_path / "ltx", tiny.LTX)
    edit_weights(lambda t: t.update({"norm_added_q.weight": torch.zeros(8)}))(ltx)
    refused(run(ltx, "-o", tmp_path / "out", "--dry-run", *SIZES), "norm_added_q")
