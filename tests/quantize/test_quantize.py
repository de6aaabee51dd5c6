"""Checkpoint to packed weights: resume, shards, sharded sources, refusals, and the error table."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dvdquant.quantize.checkpoint as quantize_module
import dvdquant.quantize.layer as layer_module
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import CheckpointError, OutputError, ShapeError
from dvdquant.export.graph.writer import GraphWriter
from dvdquant.export.verify.graph import load_quantized, verify_graph
from dvdquant.model.loading import fill_quantized
from dvdquant.model.plan import ModelPlan, plan_model, quantized_skeleton
from dvdquant.numerics.hadamard import rotate
from dvdquant.numerics.packing import unpack_int4
from dvdquant.ops.reference import dequantize_weight
from dvdquant.quantize.bgr import quantize_weight
from dvdquant.quantize.checkpoint import PackedWeights, plan_shards, quantize_checkpoint
from dvdquant.quantize.gptq import gptq_round
from dvdquant.quantize.hessian import synthetic_hessians
from dvdquant.quantize.layer import rotate_rows
from dvdquant.quantize.layer_inputs import LayerInputs, layer_inputs, noise_levels
from dvdquant.recipe import RECIPES, get_recipe
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_tensor
from tests.support import tiny_models as tiny
from tests.support.traces import traced

SINGLE = "diffusion_pytorch_model.safetensors"
KEY = {"model": "tiny"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN)


def plan(recipe: str = "w4a4", dtype: torch.dtype = torch.bfloat16) -> ModelPlan:
    return plan_model(tiny.WAN, get_recipe(recipe), dtype)


def quantize(source: Path, out: Path, made: ModelPlan, *, resume: bool = False, **options: Any) -> PackedWeights:
    """Quantize into ``out/work`` and leave the files in ``out/tree``."""
    with ExportTransaction(out / "work", key=KEY, resume=resume, keep_for_resume=True) as transaction:
        packed = quantize_checkpoint(open_checkpoint(source), made, transaction, Progress(), **options)
        shutil.copytree(transaction.tree, out / "tree")
        transaction.keep_for_resume = False
    return packed


@dataclass(frozen=True)
class Made:
    """A model quantized by a recipe; nobody writes into its folder."""

    plan: ModelPlan
    folder: Path
    packed: PackedWeights
    known: dict[str, LayerInputs]


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Quantize the model by a recipe, each once."""

    @functools.cache
    def make(recipe: str) -> Made:
        folder, planned = tmp_path_factory.mktemp(recipe), plan(recipe)
        return Made(planned, folder / "tree", quantize(model, folder, planned), known_inputs(model, planned))

    return make


@pytest.fixture
def whole(made: Callable[[str], Made]) -> Made:
    """The model quantized by w4a4, in one go."""
    return made("w4a4")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


# ------------------------------------------------------------------------------------------------------------ content


def known_inputs(model: Path, made: ModelPlan) -> dict[str, LayerInputs]:
    """What quantizing may use of each layer's inputs, predicted once more; empty for recipes that ignore them."""
    if made.recipe.inputs == "ignored":
        return {}
    found = synthetic_hessians(open_checkpoint(model), made, Progress(), levels=noise_levels(made))
    return {spec.name: layer_inputs(found[spec.name], spec) for spec in made.layers}


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_hold_what_the_quantizer_makes_of_each_layer(
    recipe: str, model: Path, made: Callable[[str], Made]
) -> None:
    """Every stored tensor, recomputed member by member without chunks, merging or files."""
    ours = made(recipe)
    packed, known = ours.packed, ours.known
    stored = load_file(ours.folder / "onnx/transformer.safetensors")
    source = load_file(model / SINGLE)
    for spec in ours.plan.layers:
        row = 0
        for member, rows in zip(spec.members, spec.rows):
            weight = source[f"{member}.weight"]
            smooth_scale = known[spec.name].smooth_scale if known else torch.ones(spec.features)
            rotated = rotate_rows(weight.float() * smooth_scale, spec.rotation)
            exact = rotate(weight.double() * smooth_scale, spec.rotation)
            assert float((rotated - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
            want = quantize_weight(rotated, ours.plan.recipe.weight)
            if known:
                want = gptq_round(rotated, want, known[spec.name].hessian, known[spec.name].damping)
                assert torch.equal(stored[f"{spec.name}.pre_quant_scale"], 1 / smooth_scale)
            part = slice(row, row + rows)
            codes = want.codes.clamp(min=-7) if spec.regular else want.codes
            assert torch.equal(unpack_int4(stored[f"{spec.name}.weight"][part]), codes)
            assert torch.equal(stored[f"{spec.name}.weight_scale"][part], want.scale)
            assert torch.equal(stored[f"{spec.name}.weight_group_scale"][part], want.group_scale)
            assert torch.equal(stored[f"{spec.name}.weight_zero"][part], want.zero)
            bias = source[f"{member}.bias"].float()
            if spec.shifted:
                shift = known[spec.name].shift
                assert shift is not None
                assert torch.equal(stored[f"{spec.name}.pre_quant_shift"], shift.to(ours.plan.dtype).float())
                moved = bias.double() + weight.double() @ shift.to(ours.plan.dtype).double()
                torch.testing.assert_close(stored[f"{spec.name}.bias"][part].double(), moved, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(stored[f"{spec.name}.bias"][part], bias)
            row += rows
    for name, (dtype, _) in ours.plan.kept.items():
        assert torch.equal(stored[name], source[name].to(dtype))
    assert packed.nonfinite == ()
    assert set(packed.tensors) == {n for n in stored if not n.startswith("__pad")}
    for relative, entry in packed.files.items():
        path = ours.folder / relative
        assert entry == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_table(recipe: str, model: Path, made: Callable[[str], Made]) -> None:
    """Recomputed in float64 from the stored codes; never worse than min-max, and better where a search is asked for.

    Of the weights, or of the outputs where the recipe looks at inputs."""
    quantized = made(recipe)
    packed, known, root = quantized.packed, quantized.known, quantized.folder
    source = load_file(model / SINGLE)
    for spec, entry in zip(quantized.plan.layers, packed.layers, strict=True):
        smooth_scale = known[spec.name].smooth_scale if known else torch.ones(spec.features)
        weight = torch.cat([rotate(source[f"{m}.weight"].double() * smooth_scale, spec.rotation) for m in spec.members])
        parts = [read_tensor(root / packed.tensors[n][0], packed.tensors[n][1]) for n in list(spec.tensors())[:4]]
        wrong = dequantize_weight(*parts, dtype=torch.float64) - weight
        hessian = torch.block_diag(*known[spec.name].hessian.double()) if known else torch.eye(spec.features).double()
        error = ((wrong @ hessian) * wrong).sum() / ((weight @ hessian) * weight).sum()
        ours, theirs = entry["relative_mse"], entry["relative_mse_minmax"]
        assert ours is not None
        assert theirs is not None
        # The table is summed in fp32 over a row, which keeps four digits; with moments, over a product as well.
        assert ours == pytest.approx(float(error), rel=1e-3 if known else 1e-4)
        if quantized.plan.recipe.weight.solver == "minmax":
            assert ours == theirs
        else:
            assert ours < theirs
        assert (entry["name"], entry["members"]) == (spec.name, list(spec.members))
        assert (entry["features_in"], entry["features_out"]) == (spec.features, spec.out_features)
        assert entry["rotation_block"] == spec.rotation.block


def test_sampled_rows_stand_for_all_whatever_the_chunks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {}
    for name, chunk, rows in (("all", 1 << 23, 1 << 20), ("sampled", 1 << 23, 16), ("in chunks", 128 * 7, 16)):
        monkeypatch.setattr(layer_module, "CHUNK_WEIGHTS", chunk)
        monkeypatch.setattr(layer_module, "SAMPLED_ROWS", rows)
        packed = quantize(model, tmp_path / name, plan())
        tables[name] = torch.tensor([[e["relative_mse"], e["relative_mse_minmax"]] for e in packed.layers])
    torch.testing.assert_close(tables["in chunks"], tables["sampled"], rtol=1e-5, atol=0)
    assert not torch.equal(tables["sampled"], tables["all"])
    # Rows of 64 inputs differ in their error by about as much as they have: 16 of them by a quarter of it.
    ratios = tables["sampled"] / tables["all"]
    assert 0.3 < float(ratios.min()) <= float(ratios.max()) < 2
    assert abs(float(ratios.mean()) - 1) < 0.15


def test_chunks_do_not_change_a_bit(model: Path, whole: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "CHUNK_WEIGHTS", 128 * 7)
    monkeypatch.setattr(quantize_module, "BATCH_BYTES", 1000)
    quantize(model, tmp_path / "chunks", plan())
    assert digests(tmp_path / "chunks/tree") == digests(whole.folder)


def test_zero_layer_has_no_relative_error(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / SINGLE)
    tensors["blocks.0.attn1.to_out.0.weight"].zero_()
    save_file(tensors, source / SINGLE)
    packed = quantize(source, tmp_path, plan())
    (entry,) = [e for e in packed.layers if e["name"] == "blocks.0.attn1.to_out.0"]
    assert entry["relative_mse"] is None
    layer = load_quantized(plan(), packed.tensors, tmp_path / "tree", 4).get_submodule("blocks.0.attn1.to_out.0")
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), tensors["blocks.0.attn1.to_out.0.bias"].float().expand(3, -1))


# ------------------------------------------------------------------------------------------------------------- shards


def test_sharded_source_gives_the_same_bytes(model: Path, whole: Made, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    source.mkdir()
    shutil.copy(model / "config.json", source)
    tensors = load_file(model / SINGLE)
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    # Members of one merged layer end up in different shards.
    mapping = {name: names[i % 3] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if mapping[n] == shard}, source / shard)
    (source / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    quantize(source, tmp_path / "three", plan())
    assert digests(tmp_path / "three/tree") == digests(whole.folder)


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16], ids=str)
def test_source_dtypes(source_dtype: torch.dtype, model: Path, whole: Made, tmp_path: Path) -> None:
    """bf16 values stored wider are the same values (fp16 keeps these: they are in its range, with more digits)."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = {n: t.to(source_dtype) for n, t in load_file(source / SINGLE).items()}
    assert source_dtype == torch.float16 or all(torch.isfinite(t).all() for t in tensors.values())
    save_file(tensors, source / SINGLE)
    quantize(source, tmp_path / "other", plan())
    ours, theirs = (load_file(f / "onnx/transformer.safetensors") for f in (whole.folder, tmp_path / "other/tree"))
    if source_dtype == torch.float32:
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    else:
        close = [n for n in ours if n.endswith("weight_scale")]
        assert all(torch.allclose(ours[n], theirs[n], rtol=2e-2) for n in close)


def test_small_shards_reach_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight files of at most 60 kB: names, sizes, and a graph over all of them that verifies."""
    limit = 60_000
    monkeypatch.setattr(quantize_module, "SHARD_BYTES", limit)
    monkeypatch.setattr(plan_shards, "__defaults__", (limit,))
    model = tiny.write_checkpoint(tmp_path / "model", tiny.WAN_ONE)
    made = plan_model(tiny.WAN_ONE, get_recipe("w4a4"), torch.float16)
    shards = plan_shards(made, "transformer")
    assert len(shards) > 3
    assert list(shards) == [
        f"onnx/transformer-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for tensors in shards.values():
        size = sum(d.itemsize * torch.Size(s).numel() for _, d, s in tensors)
        assert size <= limit or len(tensors) == 1
    base = traced(made, tiny.FIXED)
    with ExportTransaction(tmp_path / "out") as transaction:
        packed = quantize_checkpoint(open_checkpoint(model), made, transaction, Progress())
        assert set(packed.files) == set(shards)
        writer = GraphWriter(transaction.tree, made, "transformer", base, packed.tensors)
        entry = writer.write(8, "tensorrt")
        path = transaction.tree / entry["path"]
        torch_model = load_quantized(made, packed.tensors, transaction.tree, 8)
        check = verify_graph(path, made, tiny.FIXED, torch_model, 8)
        assert check.passed
        whole = quantize(model, tmp_path, made)
        for name, (relative, info) in whole.tensors.items():
            again = read_tensor(transaction.tree / packed.tensors[name][0], packed.tensors[name][1])
            assert torch.equal(read_tensor(tmp_path / "tree" / relative, info), again)


# ------------------------------------------------------------------------------------------------------- interruption


class Interrupted(Exception):
    """Stands for whatever ends a run in the middle."""


def stop_after(monkeypatch: pytest.MonkeyPatch, target: str, calls: int) -> Callable[[], None]:
    """Make ``quantize.<target>`` raise after ``calls`` calls; returns what undoes it."""
    real = getattr(quantize_module, target)
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise Interrupted(f"{target} {count}")
        return real(*args, **kwargs)

    monkeypatch.setattr(quantize_module, target, wrapped)
    return lambda: monkeypatch.setattr(quantize_module, target, real)


@pytest.mark.parametrize("layers", [0, 1, 5, 13])
def test_resume_is_bit_identical(
    layers: int, model: Path, whole: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = stop_after(monkeypatch, "quantize_layer", layers)
    with pytest.raises(Interrupted):
        quantize(model, tmp_path / "cut", plan())
    undo()
    counted: list[str] = []
    real = quantize_module.quantize_layer

    def count(checkpoint: Any, made: Any, spec: Any, *rest: Any) -> Any:
        counted.append(spec.name)
        return real(checkpoint, made, spec, *rest)

    monkeypatch.setattr(quantize_module, "quantize_layer", count)
    packed = quantize(model, tmp_path / "cut", plan(), resume=True)
    assert counted == [spec.name for spec in plan().layers][layers:]
    assert digests(tmp_path / "cut/tree") == digests(whole.folder)
    assert packed == whole.packed


def test_resume_after_several_interruptions(
    model: Path, whole: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "BATCH_BYTES", 20_000)
    for target, calls in (("quantize_layer", 3), ("quantize_layer", 4), ("read_kept", 20)):
        undo = stop_after(monkeypatch, target, calls)
        with pytest.raises(Interrupted):
            quantize(model, tmp_path / "cut", plan(), resume=True)
        undo()
    quantize(model, tmp_path / "cut", plan(), resume=True)
    assert digests(tmp_path / "cut/tree") == digests(whole.folder)


@pytest.mark.parametrize(("target", "calls"), [("quantize_layer", 6), ("read_kept", 0)])
def test_a_tensor_that_did_not_reach_the_disk_is_written_again(
    target: str, calls: int, model: Path, whole: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the journal may know a layer whose bytes are gone: the checksum finds it, be it the only one left."""
    undo = stop_after(monkeypatch, target, calls)
    with pytest.raises(Interrupted):
        quantize(model, tmp_path / "cut", plan())
    undo()
    (path,) = (tmp_path / "cut/work").glob(".tmp-*/tree/onnx/transformer.safetensors")
    _, info = whole.packed.tensors["blocks.0.attn1.to_out.0.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.nbytes))
    quantize(model, tmp_path / "cut", plan(), resume=True)
    assert digests(tmp_path / "cut/tree") == digests(whole.folder)


# --------------------------------------------------------------------------------------------------------- non-finite

NAMES = ["blocks.0.attn1.to_k.weight", "blocks.1.ffn.net.2.bias", "proj_out.weight", "scale_shift_table"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, marks=[] if (i + j) % 3 == 0 else [pytest.mark.stress])
        for i, name in enumerate(NAMES)
        for j, value in enumerate((float("nan"), float("inf"), float("-inf")))
    ],
)
def test_nonfinite(name: str, value: float, model: Path, tmp_path: Path) -> None:
    """By the quickest recipe: those that look at inputs are in test_magnitudes.py."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / SINGLE)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError) as info:
        quantize(source, tmp_path / "refused", plan("rtn"))
    assert name in str(info.value)
    assert "--allow-nonfinite" in str(info.value)
    packed = quantize(source, tmp_path / "allowed", plan("rtn"), allow_nonfinite=True)
    assert packed.nonfinite == (name,)
    # What comes out is what a checkpoint with a zero in its place gives.
    tensors[name].view(-1)[-1] = 0.0
    save_file(tensors, source / SINGLE)
    quantize(source, tmp_path / "zero", plan("rtn"))
    assert digests(tmp_path / "allowed/tree") == digests(tmp_path / "zero/tree")


def test_nonfinite_names_survive_resume(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / SINGLE)
    for name in NAMES:
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, source / SINGLE)
    undo = stop_after(monkeypatch, "quantize_layer", 4)
    with pytest.raises(Interrupted):
        quantize(source, tmp_path, plan(), allow_nonfinite=True)
    undo()
    packed = quantize(source, tmp_path, plan(), resume=True, allow_nonfinite=True)
    assert sorted(packed.nonfinite) == sorted(NAMES)


def test_kept_value_that_fp16_cannot_hold(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / SINGLE)
    tensors["proj_out.weight"].view(-1)[0] = 1e5
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match=r"proj_out\.weight holds 9.98e\+04.*float16"):
        quantize(source, tmp_path / "fp16", plan(dtype=torch.float16))
    quantize(source, tmp_path / "bf16", plan())


def test_integer_tensors_are_refused(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / SINGLE)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match=r"proj_out\.weight.*I8"):
        quantize(source, tmp_path, plan())


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(4, 128, dtype=torch.int8)], ids=["shape", "dtype"])
def test_a_tensor_that_stays_of_another_form_is_refused(value: torch.Tensor, model: Path) -> None:
    """As it is loaded, not in the first step."""
    plan = plan_model(open_checkpoint(model).config, get_recipe("w4a4"), torch.bfloat16)
    tensors = {name: torch.zeros(s, dtype=d) for spec in plan.layers for name, (d, s) in spec.tensors().items()}
    tensors |= {name: torch.zeros(s, dtype=d) for name, (d, s) in plan.kept.items()}
    skeleton = quantized_skeleton(plan, 4)
    fill_quantized(skeleton, plan, tensors.__getitem__)
    name = "condition_embedder.text_embedder.linear_1.bias"
    with pytest.raises(ShapeError, match=name):
        fill_quantized(skeleton, plan, {**tensors, name: value}.__getitem__)


def test_no_file_stays_open_where_the_second_cannot_be_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(model)
    plan = plan_model(checkpoint.config, get_recipe("w4a8"), torch.bfloat16)
    shards = plan_shards(plan, "transformer", 100_000)
    assert len(shards) > 2
    monkeypatch.setattr(quantize_module, "plan_shards", lambda *_: shards)
    with ExportTransaction(tmp_path / "out", key=KEY) as transaction:
        (transaction.tree / list(shards)[1]).mkdir(parents=True)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OutputError):
            quantize_checkpoint(checkpoint, plan, transaction, Progress())
        assert len(os.listdir("/proc/self/fd")) == before
