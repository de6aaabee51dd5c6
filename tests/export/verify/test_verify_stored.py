"""``--verify`` holds what is stored against the checkpoint: every wrong tensor is found and named, every right export passes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.artifact.verify_files import verify_files
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.errors import ExportError
from dvdquant.export.model_card import model_card
from dvdquant.export.verify.stored import StoredCheck, verify_stored
from dvdquant.model.plan import ModelPlan, plan_model
from dvdquant.numerics.packing import pack_int4, unpack_int4
from dvdquant.quantize.checkpoint import PackedWeights, quantize_checkpoint
from dvdquant.recipe import RECIPES, get_recipe
from dvdquant.system.progress import Progress
from dvdquant.system.safetensors_reader import read_header, read_tensor
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, change, digests, in_process, refused, rehash, run

VICTIM = "blocks.0.attn2.to_k+to_v"
SHIFTED = "blocks.0.attn1.to_q+to_k+to_v"
KEPT = "blocks.0.scale_shift_table"

Change = Callable[[Tensor], Any]


# ------------------------------------------------------------------------------------------------ one transformer, bare


@dataclass
class Stored:
    """The packed weights of one transformer and what they were made of."""

    tree: Path
    checkpoint: Checkpoint
    plan: ModelPlan
    packed: PackedWeights

    def verify(self, tree: Path | None = None, *, recorded: bool = True) -> StoredCheck:
        entries = [dict(entry) for entry in self.packed.layers]
        if not recorded:
            for entry in entries:
                entry.pop("weight_mse", None)
        return verify_stored(
            "transformer", tree or self.tree, self.checkpoint, self.plan, self.packed.tensors, entries  # type: ignore[arg-type]
        )  # fmt: skip


def stored(
    config: dict[str, Any], recipe: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Stored:
    source = tiny.write_checkpoint(folder / "model", config)
    checkpoint = open_checkpoint(source)
    plan = plan_model(checkpoint.config, dataclasses.replace(get_recipe(recipe), **changes), dtype)
    with ExportTransaction(folder / "work") as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress())
        transaction.tree.rename(folder / "tree")
    return Stored(folder / "tree", checkpoint, plan, packed)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    made: dict[str, Stored] = {}

    def get(recipe: str) -> Stored:
        if recipe not in made:
            made[recipe] = stored(tiny.WAN_ONE, recipe, tmp_path_factory.mktemp(recipe))
        return made[recipe]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_with_and_without_recorded_weight_errors(recipe: str, wan: Callable[[str], Stored]) -> None:
    export = wan(recipe)
    check = export.verify()
    assert check.layers == len(export.plan.layers)
    assert check.kept == len(export.plan.kept)
    assert check.rows == sum(spec.out_features for spec in export.plan.layers)
    assert abs(check.gain) < 1e-6, "the search that is repeated is not the one that was made"
    export.verify(recorded=False)
    synthetic = export.plan.recipe.inputs == "synthetic"
    assert all(("weight_mse" in entry) == synthetic for entry in export.packed.layers)


@pytest.mark.parametrize("family", [name for name in tiny.CONFIGS if name != "wan"])
def test_every_family_passes(family: str, tmp_path: Path) -> None:
    """Modulation layers with a floor of their own, layers without bias, fp32 modules, position tables."""
    export = stored({**tiny.CONFIGS[family], "num_layers": 1}, "w4a4", tmp_path, torch.float16, modulation="a8")
    assert export.verify().layers == len(export.plan.layers)


def row(index: int, group_scale: float) -> Change:
    def edit(value: Tensor) -> None:
        value[index] *= group_scale

    return edit


def one_code(value: Tensor) -> Tensor:
    codes = unpack_int4(value)
    codes[3, 5] += 1 if codes[3, 5] < 7 else -1
    return pack_int4(codes).view(torch.int8)


def swapped_columns(value: Tensor) -> Tensor:
    codes = unpack_int4(value)
    codes[:, [0, 1]] = codes[:, [1, 0]]
    return pack_int4(codes).view(torch.int8)


# What a gross fault does to the function of a layer is seen whatever the manifest says.
GROSS: dict[str, tuple[str, Change]] = {
    "every byte inverted": ("weight", lambda t: t ^ -1),
    "every byte xor 0x55": ("weight", lambda t: t ^ 0x55),
    "nibbles swapped": ("weight", lambda t: ((t.view(torch.uint8) << 4) | (t.view(torch.uint8) >> 4)).view(torch.int8)),
    "rows rolled": ("weight", lambda t: t.roll(1, 0)),
    "rows reversed": ("weight", lambda t: t.flip(0)),
    "all codes 0": ("weight", lambda t: t * 0),
    "scale doubled": ("weight_scale", lambda t: t * 2),
    "scale halved": ("weight_scale", lambda t: t / 2),
    "scale 5 % up": ("weight_scale", lambda t: t * 1.05),
    "scale 5 % down": ("weight_scale", lambda t: t * 0.95),
    "scale negative": ("weight_scale", lambda t: -t),
    "scale nan": ("weight_scale", lambda t: t * float("nan")),
    "pre_quant_scale doubled": ("pre_quant_scale", lambda t: t * 2),
    "pre_quant_scale 5 % up": ("pre_quant_scale", lambda t: t * 1.05),
    "pre_quant_scale without its signs": ("pre_quant_scale", lambda t: t.abs()),
    "one sign": ("pre_quant_scale", row(7, -1)),
    "bias doubled": ("bias", lambda t: t * 2),
    "bias 0": ("bias", lambda t: t * 0),
    "one bias 1e-5 up": ("bias", row(4, 1.00001)),
    "zero one up": ("weight_zero", lambda t: t + 1),
    "zero 0": ("weight_zero", lambda t: t * 0),
    "factor 254": ("weight_group_scale", lambda t: t * 0 + 254),
}  # fmt: skip
# Small ones change the recorded error.
FINE: dict[str, tuple[str, Change]] = {
    "one code": ("weight", one_code),
    "two columns swapped": ("weight", swapped_columns),
    "one row's scale 5 % up": ("weight_scale", row(11, 1.05)),
    "one channel doubled": ("pre_quant_scale", row(9, 2.0)),
}


def damaged(export: Stored, tmp_path: Path, name: str, edit: Change) -> Path:
    tree = Path(shutil.copytree(export.tree, tmp_path / "tree"))
    change(tree / "onnx/transformer.safetensors", name, edit)
    return tree


@pytest.mark.parametrize("fault", GROSS)
def test_a_gross_fault_is_found_without_a_record(fault: str, wan: Callable[[str], Stored], tmp_path: Path) -> None:
    kind, edit = GROSS[fault]
    export = wan("w4a4")
    tree = damaged(export, tmp_path, f"{VICTIM}.{kind}", edit)
    for recorded in (True, False):
        with pytest.raises(ExportError, match=VICTIM.replace("+", r"\+")):
            export.verify(tree, recorded=recorded)


@pytest.mark.parametrize("fault", FINE)
def test_a_fine_fault_is_found_by_the_record(fault: str, wan: Callable[[str], Stored], tmp_path: Path) -> None:
    kind, edit = FINE[fault]
    export = wan("w4a4")
    tree = damaged(export, tmp_path, f"{VICTIM}.{kind}", edit)
    with pytest.raises(ExportError, match=VICTIM.replace("+", r"\+")):
        export.verify(tree)


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("weight_group_scale", lambda t: t // 2 + 1),
        ("weight_group_scale", lambda t: t * 0),
        ("weight_group_scale", lambda t: t.roll(1, 1)),
        ("weight_zero", lambda t: t + 8),
        ("weight_zero", lambda t: t.roll(1, 0)),
    ],
    ids=["halved", "zero", "groups rolled", "zero-points half a step up", "zero-points of other rows"],
)
def test_wrong_groups(kind: str, edit: Change, wan: Callable[[str], Stored], tmp_path: Path) -> None:
    export = wan("w4a8")
    tree = damaged(export, tmp_path, f"{VICTIM}.{kind}", edit)
    for recorded in (True, False):
        with pytest.raises(ExportError, match=VICTIM.replace("+", r"\+")):
            export.verify(tree, recorded=recorded)


def test_without_gptq_every_code_is_judged_alone(wan: Callable[[str], Stored], tmp_path: Path) -> None:
    """Even where the record agrees with the fault."""
    export = wan("weights-only")
    tree = damaged(export, tmp_path, f"{VICTIM}.weight", one_code)
    with pytest.raises(ExportError, match=r"relative error of its weight"):
        export.verify(tree)
    layers = tuple({**entry, "relative_mse": None} for entry in export.packed.layers)
    forged = dataclasses.replace(export, packed=dataclasses.replace(export.packed, layers=layers))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"row 3 has a code 1\.\d+ steps"):
        forged.verify(tree)
    forged.verify()


@pytest.mark.parametrize("index", [0, -1])
def test_a_bit_of_a_kept_tensor(index: int, wan: Callable[[str], Stored], tmp_path: Path) -> None:
    export = wan("w4a4")

    def edit(value: Tensor) -> None:
        value.view(-1).view(torch.int16)[index] ^= 1

    for name in (KEPT, "proj_out.weight"):
        tree = damaged(export, tmp_path / name, name, edit)
        with pytest.raises(ExportError, match=name):
            export.verify(tree)


def test_a_doubled_shift(wan: Callable[[str], Stored], tmp_path: Path) -> None:
    export = wan("w4a4")
    shifted = [spec.name for spec in export.plan.layers if spec.shifted]
    assert shifted
    tree = damaged(export, tmp_path, f"{shifted[0]}.pre_quant_shift", lambda t: t * 2)
    with pytest.raises(ExportError, match=r"bias\[\d+\].*pre_quant_shift"):
        export.verify(tree)


@pytest.mark.parametrize("count", [15, pytest.param(1500, marks=pytest.mark.stress)])
def test_no_byte_of_the_weights_changes_unnoticed(count: int, wan: Callable[[str], Stored], tmp_path: Path) -> None:
    """Codes, transforms of the input and 16-bit tensors: any byte. Biases and shifts in fp32: what is more than rounding.
    The scale of a row: half a percent, which costs a thousandth of the row's error."""
    export = wan("w4a4")
    path = export.tree / "onnx/transformer.safetensors"
    tree = Path(shutil.copytree(export.tree, tmp_path / "tree"))
    tensors = [info for name, info in read_header(path).tensors.items() if not name.startswith("__pad.")]
    random = Random(count)
    for _ in range(count):
        info = random.choice(tensors)
        place, bit = info.offset + random.randrange(info.nbytes), 1 << random.randrange(8)
        original = read_tensor(path, info)
        with (tree / "onnx/transformer.safetensors").open("r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ bit]))
            file.flush()
            said = ""
            try:
                export.verify(tree)
            except ExportError as error:
                said = str(error)
            if said:
                assert info.name.rpartition(".")[0] in said
            else:
                assert info.dtype == "F32", (info, place, bit)
                assert not info.name.endswith("pre_quant_scale")
                change = (read_tensor(Path(file.name), info) - original).abs().max()
                most = 5e-3 if info.name.endswith("weight_scale") else 1e-5
                assert change <= most * original.abs().max(), (info, place, bit)
            file.seek(place)
            file.write(bytes([byte]))
    export.verify(tree)


def test_nan_that_was_accepted_is_stored_as_zero(tmp_path: Path) -> None:
    from tests.support.commands import poke

    source = tiny.write_checkpoint(tmp_path / "model", tiny.WAN_ONE)
    for name in ("blocks.0.attn2.to_k.weight", "blocks.0.attn1.to_q.bias", KEPT):
        poke(name, float("nan"))(source)
    checkpoint = open_checkpoint(source)
    plan = plan_model(checkpoint.config, get_recipe("w4a4"), torch.bfloat16)
    with ExportTransaction(tmp_path / "work") as transaction:
        packed = quantize_checkpoint(checkpoint, plan, transaction, Progress(), allow_nonfinite=True)
        assert len(packed.nonfinite) == 3
        arguments = ("transformer", transaction.tree, checkpoint, plan, packed.tensors, packed.layers)
        verify_stored(*arguments, allow_nonfinite=True)
        with pytest.raises(ExportError):
            verify_stored(*arguments)


# ----------------------------------------------------------------------------------------------------- by the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


@pytest.fixture(scope="module")
def verified(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "wan"
    text = in_process(*arguments(model, out))
    assert "7 quantized layers" in text
    return out


def arguments(model: Path, out: Path) -> list[object]:
    return [model, "-o", out, "--target", "graphs", "--verify", *SIZES]


def test_the_manifest_says_what_was_verified(verified: Path, model: Path) -> None:
    manifest = load_manifest(verified)
    assert manifest.verified is not None
    assert manifest.verified["layers"] == len(manifest.layers) == 7
    assert manifest.verified["graphs"] == [graph["path"] for graph in manifest.graphs]
    assert manifest.tools["device"] == "cpu"
    card = (verified / "README.md").read_text()
    assert "verified by dvdquant" in card
    assert "22 tensors in 16 bit" in card


WEIGHTS = "onnx/transformer.safetensors"
BY_COMMAND: dict[str, tuple[str, Change]] = {
    f"{VICTIM}.weight": GROSS["every byte inverted"],
    f"{VICTIM}.pre_quant_scale": GROSS["pre_quant_scale doubled"],
    f"{SHIFTED}.pre_quant_shift": ("", lambda t: t * 2),
    KEPT: ("", lambda t: t * 1.01),
}


@pytest.mark.parametrize("name", BY_COMMAND)
def test_an_export_that_is_there_is_judged_again(name: str, verified: Path, model: Path, tmp_path: Path) -> None:
    """The way a user takes: the same command with --verify on a folder that is up to date."""
    out = Path(shutil.copytree(verified, tmp_path / "out"))
    change(out / WEIGHTS, name, BY_COMMAND[name][1])
    rehash(out, WEIGHTS)
    verify_files(out, load_manifest(out))  # the hashes have nothing to say against it
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(run(*arguments(model, out)), name.removesuffix(".weight").partition(".pre_quant")[0], "checkpoint")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_intact_export_is_verified_and_says_so(verified: Path, model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(verified, tmp_path / "out"))
    manifest = load_manifest(out)
    old = json.loads((out / "manifest.json").read_text())
    del old["verified"]  # as versions before it wrote it
    (out / "manifest.json").write_text(json.dumps(old))
    before = load_manifest(out)
    assert before.verified is None
    assert "not verified" in model_card(before)
    in_process(*arguments(model, out))
    again = load_manifest(out)
    assert again.verified == manifest.verified
    assert again.layers == manifest.layers
    assert digests(out, "onnx") == digests(verified, "onnx")
    in_process(*[argument for argument in arguments(model, out) if argument != "--verify"])
    assert load_manifest(out).verified == again.verified, "what was verified is forgotten"
