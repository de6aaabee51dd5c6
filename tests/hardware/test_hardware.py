"""The table of GPUs: names in any form, what is offered, and the recipe that suits a card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.export.engines.precision import RTX_SMS, TENSORRT_SMS, choose_precision, plan_engines, what_executes
from dvdquant.export.estimate import BYTES_PER_WEIGHT
from dvdquant.hardware.advice import BOTH_BYTES, QUALITY, choose, choose_recipe
from dvdquant.hardware.capabilities import CAPABILITIES, JETSONS, parse_sm, sm_number
from dvdquant.hardware.find import find_gpu, installed_gpus
from dvdquant.hardware.gpus import GPUS, KINDS, cards_with, machine_of
from dvdquant.hardware.listing import HEADER, gpu_rows, runs_text
from dvdquant.hardware.weights import slower_in_int8
from dvdquant.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]

NAMES = {
    "RTX 4090": "RTX 4090",
    "rtx4090": "RTX 4090",
    "4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "RTX 4090 Laptop",
    "RTX4070TiSuper": "RTX 4070 Ti SUPER",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA GH200 480GB": "GH200",
    "L40S": "L40S",
    "Jetson AGX Orin": "AGX Orin",
    "Jetson AGX Thor": "Thor T5000",
    "DGX Spark": "GB10",
    "Tesla T4": "T4",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_found_however_it_is_written(name: str) -> None:
    assert find_gpu(name).name == NAMES[name]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_card_is_found_by_its_own_name_and_the_driver_s(gpu: object) -> None:
    name = gpu.name  # type: ignore[attr-defined]
    assert find_gpu(name) is gpu
    assert find_gpu(f"NVIDIA GeForce {name.upper()}") is gpu


@pytest.mark.parametrize(("name", "near"), [("RTX 4099", "RTX 4090"), ("H1000", "H100"), ("6000", "RTX 6000 Ada")])
def test_near_names_are_suggested(name: str, near: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        find_gpu(name)
    assert near in (raised.value.available or "")


@pytest.mark.parametrize("text", ["8.9", "89", "sm_89", "SM89", "sm 8.9", "compute_89"])
def test_a_compute_capability_in_any_form(text: str) -> None:
    assert parse_sm(text) == "8.9"


@pytest.mark.parametrize(("text", "sm"), [("sm_90a", "9.0"), ("100", "10.0"), ("12.1", "12.1"), ("sm_120", "12.0")])
def test_other_forms(text: str, sm: str) -> None:
    assert parse_sm(text) == sm


@pytest.mark.parametrize("text", ["", "9.9", "ada", "8.99", "sm_", "7.5", "-8.9", "8,9", "8.9;rm"])
def test_no_compute_capability(text: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        parse_sm(text)
    assert raised.value.fix


def test_the_facts_are_those_of_the_exporter() -> None:
    offered = {each.sm: each for each in CAPABILITIES.values() if not each.refused}
    assert {sm for sm, each in offered.items() if each.rtx} == set(RTX_SMS)
    assert {sm for sm, each in offered.items() if each.kernels} == set(TENSORRT_SMS)
    assert {gpu.sm for gpu in GPUS} <= set(CAPABILITIES)
    assert {gpu.kind for gpu in GPUS} == set(KINDS)
    row, group = (RECIPES[name].activations[0] for name in ("w4a4", "w4a4-g64"))
    for sm, each in offered.items():
        if each.rtx:
            words = what_executes(choose_precision("tensorrt_rtx", sm, row), 4, sm)
            assert bool(each.rtx_a4) == ("no faster than a8" not in words), sm
        if each.kernels:
            words = what_executes(choose_precision("tensorrt", sm, group), 4, sm)
            assert bool(each.kernels_a4) == ("no faster than A8" not in words), sm


def test_which_processor_a_gpu_is_sold_with() -> None:
    offered = [each.sm for each in CAPABILITIES.values() if not each.refused]
    assert {sm for sm in offered if machine_of(sm) == "aarch64"} == {*JETSONS, "12.1"}
    assert {machine_of(sm) for sm in offered if sm not in (*JETSONS, "12.1")} == {None}
    assert [cards_with(sm, "aarch64") for sm in ("9.0", "10.0", "10.3", "8.9")] == [["GH200"], ["GB200"], ["GB300"], []]


def test_the_quality_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "quality" / "index.md").read_text().splitlines()
    for (recipe, bits), value in QUALITY.items():
        rows = [line.replace("*", "") for line in page if line.startswith(f"| A{bits} | dvdquant {recipe} |")]
        assert any(f"| {value:.2f} ±" in row for row in rows), (recipe, bits)


def test_no_graph_of_the_chosen_recipe_multiplies_in_16_bit() -> None:
    """A recipe that an engine can only run with 16-bit activations gains nothing, whatever its quality."""
    for sm, each in CAPABILITIES.items():
        if each.rtx:
            recipe = RECIPES[choose_recipe([sm], ["rtx"]).recipe]
            precisions = {choose_precision("tensorrt_rtx", sm, activation) for activation in recipe.activations}
            assert "int4-weight-only" not in precisions, sm


CHOICES = [
    (("RTX 4090",), (), ("8.9",), "rtx", "w4a8"),
    (("RTX 5090",), (), ("12.0",), "rtx", "w4a8"),
    (("RTX 5090", "DGX Spark"), (), ("12.0", "12.1"), "rtx", "w4a8"),
    (("H100",), (), ("9.0",), "graphs", "w4a8"),
    (("B200",), ("tensorrt",), ("10.0",), "tensorrt", "w4a8"),
    (("A100",), (), ("8.0",), "graphs", "w4a4-g64"),
    (("A100", "H100"), (), ("8.0", "9.0"), "graphs", "w4a4-g64"),
    (("A100", "RTX 4090"), (), ("8.0", "8.9"), "rtx", "w4a8"),
    (("A100",), ("rtx",), ("8.0",), "rtx", "w4a8"),
    (("Orin",), (), ("8.7",), "tensorrt", "w4a4-g64"),
    (("Orin",), ("graphs",), ("8.7",), "graphs", "w4a4-g64"),
    (("Thor",), (), ("11.0",), "tensorrt", "w4a8"),
    (("RTX 4090", "RTX 5090"), (), ("8.9", "12.0"), "rtx", "w4a8"),
    (("RTX 3090", "RTX 4090", "RTX 5090", "DGX Spark"), (), ("8.6", "8.9", "12.0", "12.1"), "rtx", "w4a8"),
    (("Orin", "Thor"), (), ("8.7", "11.0"), "tensorrt", "w4a4-g64"),
    (("H100", "B200"), (), ("9.0", "10.0"), "graphs", "w4a8"),
    (("RTX 4090",), ("onnx",), ("8.9",), "onnx", "w4a4"),
]
SEVERAL_TARGETS = [
    ("8.9", ("rtx", "graphs"), "w4a8"),
    ("8.6", ("rtx", "tensorrt"), "w4a8"),
    ("12.0", ("rtx", "graphs"), "w4a8"),
    ("8.9", ("rtx", "onnx"), "w4a8"),
    ("8.9", ("graphs", "onnx"), "w4a4"),
]


@pytest.mark.parametrize(("sm", "targets", "recipe"), SEVERAL_TARGETS)
def test_engines_beside_kernels_get_a_recipe_that_both_multiply(sm: str, targets: tuple[str, ...], recipe: str) -> None:
    found = choose((), (sm,), targets)
    assert found.recipe == recipe
    precisions = {choose_precision("tensorrt_rtx", sm, each) for each in RECIPES[recipe].activations}
    assert "int4-weight-only" not in precisions or 4 not in {each.bits for each in RECIPES[recipe].activations}


@pytest.mark.parametrize(("gpus", "targets", "sms", "target", "recipe"), CHOICES)
def test_a_card_decides(
    gpus: tuple[str, ...], targets: tuple[str, ...], sms: tuple[str, ...], target: str, recipe: str
) -> None:
    choice = choose(gpus, (), targets)
    assert (choice.sms, choice.targets, choice.recipe) == (sms, (target,), recipe)
    assert all(any(part in note for note in choice.notes) for part in (f"SM {sms[0]}", f"recipe {recipe}"))


@pytest.mark.parametrize("target", ["graphs", "tensorrt"])
def test_a_card_that_is_slow_in_eight_bits_is_not_praised(target: str) -> None:
    slow = [sm for sm, each in CAPABILITIES.items() if not each.refused and slower_in_int8(sm_number(sm))]
    assert slow == ["10.3"]
    assert "slower than bf16" in runs_text("10.3")
    assert "slower than 16 bit" in what_executes("plugin", 8, "10.3")
    notes = choose(("B300", "B200"), (), (target,)).notes
    assert [note for note in notes if "run it in bf16" in note] == [notes[-1]]
    assert "15 times" in notes[-1]


def test_what_was_said_is_not_changed() -> None:
    choice = choose(("RTX 4090",), ("8.6",), ("rtx", "onnx"), "paper")
    assert (choice.sms, choice.targets, choice.recipe) == (("8.9", "8.6"), ("rtx", "onnx"), "paper")


@pytest.mark.parametrize("target", ["", "rtx", "graphs", "tensorrt", "onnx"])
def test_without_a_card_the_default_card_decides_as_if_it_had_been_named(target: str) -> None:
    """The plain command must not make engines that the same page calls not worth having."""
    targets = (target,) if target else ()
    choice, named = choose((), (), targets), choose((), ("8.9",), targets)
    assert (choice.sms, choice.targets, choice.recipe) == (("8.9",), (target or "rtx",), named.recipe)
    assert "--gpu" in choice.notes[0]
    assert choice.recipe in choice.notes[-1]
    bits = {activation.bits for activation in RECIPES[choice.recipe].activations}
    assert (4 in bits) == (target == "onnx" or bool(CAPABILITIES["8.9"].gain(target or "rtx")))


def test_the_card_of_this_machine_is_named_where_nobody_took_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine for SM 8.9 does not run on it, and the plain line must say so before the work."""
    put_nvidia_smi(tmp_path, 'print("NVIDIA GeForce RTX 5090, 12.0, 32607, 580.65")', monkeypatch)
    choice = choose((), (), ())
    assert (choice.sms, choice.gpus) == (("8.9",), ())
    assert "this machine has NVIDIA GeForce RTX 5090, which --gpu auto takes" in choice.notes[0]


def test_without_a_card_a_named_recipe_is_taken() -> None:
    assert choose((), (), (), "w4a4").recipe == "w4a4"


def test_every_offered_card_can_be_exported_for() -> None:
    for gpu in GPUS:
        if CAPABILITIES[gpu.sm].refused:
            with pytest.raises(UnsupportedError, match="nothing is offered"):
                choose((gpu.name,), (), ())
            continue
        choice = choose((gpu.name,), (), ())
        assert choice.recipe in RECIPES
        assert choice.targets[0] in CAPABILITIES[gpu.sm].targets


def test_eight_bits_where_four_gain_nothing() -> None:
    for sm, each in CAPABILITIES.items():
        for target in each.targets:
            bits = {a.bits for a in RECIPES[choose_recipe([sm], [target]).recipe].activations}
            assert (4 in bits) == (target != "rtx" and bool(each.gain(target))), (sm, target)


MIXTURES = [("8.9", "12.0"), ("8.0", "8.6", "8.9", "12.0", "12.1"), ("12.0", "12.1")]


@pytest.mark.parametrize("sms", [*((sm,) for sm in RTX_SMS), *MIXTURES], ids="+".join)
@pytest.mark.parametrize("others", [(), ("graphs",), ("onnx",)], ids=["rtx", "graphs", "onnx"])
@pytest.mark.parametrize("layouts", [(), ("comfy",)], ids=["", "comfy"])
def test_engines_that_share_no_weights_are_one(
    sms: tuple[str, ...], others: tuple[str, ...], layouts: tuple[str, ...]
) -> None:
    """All SMs share an engine of one width, and each target runs that width."""
    choice = choose((), sms, ("rtx", *others), layouts=layouts)
    recipe = RECIPES[choice.recipe].with_activations(choice.activations)
    (engine,) = plan_engines("tensorrt_rtx", sms, recipe.activations)
    assert (engine.sms, engine.act_bits, engine.precision) == (sms, 8, "int8")


def test_the_bytes_of_both_engines_are_those_of_the_estimate() -> None:
    assert BYTES_PER_WEIGHT["int8"] + BYTES_PER_WEIGHT["nvfp4"] == BOTH_BYTES
    assert BOTH_BYTES + 0.5 > 2, "with the packed weights they are larger than bf16"


ALONE = [
    (("8.9",), ("rtx",), 4, "w4a4"),
    (("8.9", "12.0"), ("rtx",), 4, "w4a4"),
    (("12.0",), ("rtx",), 4, "w4a4-g64"),
    (("8.0",), ("graphs",), 4, "w4a4-g64"),
    (("8.9",), ("onnx",), 4, "w4a4"),
    (("8.0",), ("graphs",), 8, "w4a8"),
    (("12.0",), ("rtx",), 8, "w4a8"),
]


@pytest.mark.parametrize(("sms", "targets", "bits", "recipe"), ALONE)
def test_a_width_that_was_asked_for_is_made_alone(
    sms: tuple[str, ...], targets: tuple[str, ...], bits: int, recipe: str
) -> None:
    choice = choose((), sms, targets, only=bits)
    assert (choice.recipe, choice.activations) == (recipe, (bits,))
    made = RECIPES[recipe].with_activations(choice.activations)
    assert [activation.bits for activation in made.activations] == [bits]
    precisions = {engine.precision for engine in plan_engines("tensorrt_rtx", sms, made.activations)}
    assert "rtx" not in targets or "int4-weight-only" not in precisions
    assert choose((), sms, targets, "paper", only=bits).activations == (bits,)
    assert choose((), sms, targets, "paper").activations == ()


@pytest.mark.parametrize(
    ("gpus", "jetson", "recipe"), [(("Orin", "RTX 4090"), "8.7", "w4a4-g64"), (("RTX 5090", "Thor"), "11.0", "w4a8")]
)
def test_a_jetson_and_a_card_share_graphs_alone(gpus: tuple[str, ...], jetson: str, recipe: str) -> None:
    """They run different engines; what both run are the weights, in sessions."""
    with pytest.raises(UnsupportedError, match=f"builds no engines for SM {jetson}") as raised:
        choose(gpus, (), ())
    assert f"--sm {jetson} --target graphs" in (raised.value.fix or "")
    choice = choose(gpus, (), ("graphs",))
    assert (choice.recipe, choice.activations) == (recipe, ())


def test_where_four_bits_gain_on_one_card_alone_the_other_is_named() -> None:
    note = choose(("A100", "H100"), (), ()).notes[-1]
    assert "tensor cores of SM 8.0" in note
    assert "on SM 9.0 a4 takes the time and the memory of a8" in note
    assert "takes the time" not in choose(("A100",), (), ()).notes[-1]


def test_a_target_that_makes_nothing_names_the_one_that_does() -> None:
    with pytest.raises(UnsupportedError) as raised:
        choose((), ("8.7",), ("rtx",))
    assert "--target graphs" in (raised.value.fix or "")


def test_the_table_shows_every_card_once() -> None:
    rows = list(gpu_rows())
    text = "\n".join(row.names for row in rows)
    assert all(len(row.cells()) == len(HEADER) for row in rows)
    refused = {row.sm for row in rows if row.refused}
    assert refused == {row.sm for row in rows if CAPABILITIES[row.sm].refused} != set()
    assert all(gpu.name in text for gpu in GPUS)


def put_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_auto_asks_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, 'print("NVIDIA GeForce RTX 5090, 12.0, 32607, 580.65")', monkeypatch)
    choice = choose(("auto",), (), ())
    assert (choice.sms, choice.gpus, choice.recipe) == (("12.0",), ("NVIDIA GeForce RTX 5090",), "w4a8")


@pytest.mark.parametrize(
    "script", ["raise SystemExit(9)", 'print("No devices were found")', "", r'print("\x1b[31m, 8.9")']
)
def test_auto_without_a_gpu_says_what_to_do(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, script, monkeypatch)
    assert installed_gpus() == []
    with pytest.raises(DvdquantError) as raised:
        choose(("auto",), (), ())
    assert "--gpu" in (raised.value.fix or "")


def test_list_gpus_needs_no_pytorch() -> None:
    code = "import sys; sys.modules['torch'] = None; from dvdquant.cli.export import main; main(['--list-gpus'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "RTX 4090" in done.stdout
    assert "w4a8" in done.stdout
