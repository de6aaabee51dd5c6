"""The public functions: wrong arguments are refused in words, before any work; what is meant by one thing is taken as one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

import dvdquant
from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.cli.export import main as export_main
from dvdquant.cli.plan import main as plan_main
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.request import GenerateRequest, check_request
from dvdquant.deploy.planning import planner
from dvdquant.deploy.switching.controller import StepController
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.step_cache import StepCachePolicy
from dvdquant.errors import DvdquantError, ShapeError
from dvdquant.hardware.advice import choose
from dvdquant.recipe import get_recipe
from dvdquant.system.progress import Progress
from tests.support.commands import refused
from tests.support.exporting import TINY_WAN
from tests.support.running import short_wan_export


@pytest.fixture(scope="module")
def out() -> Path:
    return short_wan_export()


class Planned(Exception):
    """An export came as far as its plan, or a plan as far as its generator."""


def plan_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a generator was opened")

    monkeypatch.setattr(planner, "open_generator", opens)


WRONG_PLANS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "no prompt"),
    ((), {}, "no prompt"),
    (None, {}, "prompt"),
    (3, {}, "prompt"),
    (b"circle", {}, "prompt"),
    ([None], {}, "prompt"),
    (["circle", 3], {}, "prompt"),
    ([["circle"]], {}, "prompt"),
    ("circle", {"seeds": []}, "no seed"),
    ("circle", {"seeds": [0.5]}, "seed"),
    ("circle", {"seeds": ["0"]}, "seed"),
    ("circle", {"seeds": None}, "seed"),
    ("circle", {"seeds": True}, "seed"),
    ("circle", {"average_bits": "6"}, "goal"),
    ("circle", {"seconds": -1}, "goal seconds"),
    ("circle", {"average_bits": 6, "delta": 0.1}, "more than one goal"),
    ("circle", {"promts": ["a"]}, "promts"),
    ("circle", {"output": ""}, "output"),
    ("circle", {"output": 3}, "output"),
    ("circle", {"lora": "style.safetensors:nan"}, "style.safetensors"),
    ("circle", {"lora": [3]}, "a LoRA is 3"),
    ("circle", {"lora": 3}, "a LoRA is 3"),
    ("circle", {"lora": None}, "a LoRA is None"),
    ("circle", {"plugins": "/no/such/plugin.so"}, "/no/such/plugin.so is not there"),
    ("circle", {"output": "/no/such/folder/schedule.json"}, "/no/such/folder"),
]


@pytest.mark.parametrize(("prompts", "options", "text"), WRONG_PLANS)
def test_plan_schedule_refuses(
    out: Path, prompts: Any, options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_nothing(monkeypatch)
    with pytest.raises(DvdquantError, match=text) as caught:
        dvdquant.plan_schedule(out, prompts, **options)
    assert caught.value.fix or caught.value.available
    assert not (out / "schedule.json").exists()


@pytest.mark.parametrize(
    "given",
    ["style.safetensors:0.8", ["style.safetensors:0.8"], (LoraSpec(Path("style.safetensors"), 0.8),)],
    ids=str,
)
def test_a_plan_reads_loras_and_plugins_as_the_commands_do(
    out: Path, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(*_: Any, **options: Any) -> None:
        raise Planned(options)

    monkeypatch.setattr(planner, "open_generator", opens)
    plugin = tmp_path / "plugin.so"
    plugin.touch()
    with pytest.raises(Planned) as caught:
        dvdquant.plan_schedule(out, "circle", lora=given, plugins=str(plugin), output=tmp_path / "s.json")
    opened = caught.value.args[0]
    assert opened["lora"] == (LoraSpec(Path("style.safetensors"), 0.8),)
    assert opened["plugins"] == (plugin,)


def test_a_lora_that_is_not_there_is_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DvdquantError, match=r"no-such\.safetensors") as caught:
        dvdquant.plan_schedule(out, "circle", lora="no-such.safetensors:0.8", output=tmp_path / "s.json")
    assert caught.value.fix


def test_goals_have_the_names_of_the_arguments_and_of_the_options(out: Path) -> None:
    with pytest.raises(DvdquantError, match="more than one goal") as caught:
        dvdquant.plan_schedule(out, "circle", seconds=3, delta=0.1)
    assert caught.value.available == "average_bits, seconds, delta"
    assert set(caught.value.available.split(", ")) <= signature(dvdquant.plan_schedule).parameters.keys()
    told = CliRunner().invoke(plan_main, [str(out), "--prompt", "circle", "--time-budget", "3", "--delta", "0.1"])
    refused(told, "more than one goal", "--average-bits, --time-budget, --delta")


def test_one_text_is_one_prompt_and_one_number_one_seed(out: Path, tmp_path: Path) -> None:
    prompt = "circle red right small black"
    found = dvdquant.plan_schedule(
        out, prompt, seeds=3, delta=0.5, steps=4, backend="onnxruntime", output=tmp_path / "s.json"
    )
    assert found.schedule.prompts == (prompt,)
    assert found.schedule.seeds == (3,)
    assert {(clip.prompt, clip.seed) for clip in found.clips} == {(prompt, 3)}
    assert (tmp_path / "s.json").is_file()


@pytest.mark.parametrize("folder", [None, "", 3, b"x", []])
def test_a_folder_that_is_none(folder: Any) -> None:
    for call in (dvdquant.inspect_export, lambda out: dvdquant.plan_schedule(out, "circle")):
        with pytest.raises(DvdquantError, match="out is"):
            call(folder)
    with pytest.raises(DvdquantError, match="model is"):
        dvdquant.export_model(folder, "out")
    with pytest.raises(DvdquantError, match="out is"):
        dvdquant.export_model(TINY_WAN, folder)


WRONG_EXPORTS: list[tuple[dict[str, Any], str]] = [
    ({"recipe": None}, "recipe"),
    ({"recipe": ["w4a4"]}, "recipe"),
    ({"recipe": "w3"}, "recipe"),
    ({"target": []}, "target"),
    ({"target": "rtx,onnx"}, "target"),
    ({"sm": []}, "sm"),
    ({"sm": [None]}, "sm"),
    ({"sm": "8.9.1"}, "8.9.1"),
    ({"dtype": 16}, "dtype"),
    ({"dtype": "fp8"}, "fp8"),
    ({"height": 480.5}, "height"),
    ({"height": (480, 720)}, "height"),
    ({"latent": (8, 24, 24)}, "latent"),
    ({"text_tokens": "five"}, "text_tokens"),
    ({"text_tokens": 5.5}, "text_tokens"),
    ({"batch": None}, "batch"),
    ({"workspace_gib": "much"}, "workspace_gib"),
    ({"samples": "one"}, "samples"),
    ({"device": 0}, "device"),
    ({"plugins": "libdvdquant.so"}, "libdvdquant.so"),
    ({"plugins": None}, "plugins"),
    ({"sms": ["8.9"]}, "sms"),
    ({"heigth": 480}, "heigth"),
    ({"activations": 6}, "6 bits"),
    ({"modulation": "a4"}, "a4"),
    ({"attention": "fp4"}, "fp4"),
    ({"keep": [3.5, None]}, "keep"),
    ({"force": True}, "force"),
    ({"activations": "8"}, "8' bits"),
    ({"activations": 8, "recipe": get_recipe("w4a4").with_activations((4,))}, "no 8-bit activations"),
]


@pytest.mark.parametrize(("options", "text"), WRONG_EXPORTS)
def test_export_model_refuses(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(DvdquantError, match=text) as caught:
        dvdquant.export_model(TINY_WAN, tmp_path / "out", **{"target": "graphs", **options})
    assert caught.value.fix or caught.value.available
    assert not (tmp_path / "out").exists()


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """What ``export_model`` asks the exporter for, which is not called."""
    from dvdquant.export import plan

    def stop(options: Any) -> None:
        raise Planned(options)

    def asked(**arguments: Any) -> Any:
        with pytest.raises(Planned) as caught:
            dvdquant.export_model(TINY_WAN, tmp_path / "out", **arguments)
        return caught.value.args[0]

    monkeypatch.setattr(plan, "plan_export", stop)
    return asked


@pytest.mark.parametrize("recipe", ["auto", "w4a4", get_recipe("w4a4")], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_one_width_of_activations_alone(options_of: Callable[..., Any], recipe: Any, bits: int) -> None:
    made = options_of(recipe=recipe, activations=bits, target="graphs").recipe
    assert [activation.bits for activation in made.activations] == [bits]


def test_the_function_and_the_command_make_the_same_recipe(options_of: Callable[..., Any], tmp_path: Path) -> None:
    """What changes a recipe, by itself and all at once; the command is stopped at the same place."""
    given = {"modulation": "a8", "attention": "int8", "keep": "blocks.0.*", "force": ["proj_out", "blocks.1.*"]}
    words = {
        "modulation": ["--modulation", "a8"],
        "attention": ["--attention", "int8"],
        "keep": ["--keep", "blocks.0.*"],
        "force": ["--force", "proj_out", "--force", "blocks.1.*"],
    }
    for names in ([], *([name] for name in given), list(given)):
        made = options_of(recipe="w4a4", target="graphs", **{name: given[name] for name in names}).recipe
        line = [str(TINY_WAN), "-o", str(tmp_path / "out"), "--recipe", "w4a4", "--target", "graphs"]
        stopped = CliRunner().invoke(export_main, [*line, *(word for name in names for word in words[name])])
        assert isinstance(stopped.exception, Planned), stopped.output
        assert made == stopped.exception.args[0].recipe
        assert (made == get_recipe("w4a4")) == (not names)
    own = options_of(recipe=get_recipe("w4a4"), target="graphs", **given).recipe
    assert own == made


def test_a_pipeline_that_the_runtime_could_not_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DvdquantError) as asked:
        dvdquant.export_model(
            TINY_WAN, tmp_path / "out", recipe="w4a4", target="graphs", latent="8x24x24", text_tokens=5,
            pipeline=str(tmp_path),
        )  # fmt: skip
    assert str(tmp_path) in asked.value.what
    assert not (tmp_path / "out").exists()


def test_what_was_chosen_and_why_goes_to_the_progress(
    options_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Planned

    class Said(Progress):
        lines: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    monkeypatch.setattr("dvdquant.export.plan.plan_export", lambda options: SimpleNamespace(options=options))
    monkeypatch.setattr("dvdquant.export.pipeline.run_export", stop)
    with pytest.raises(Planned):
        dvdquant.export_model(TINY_WAN, tmp_path / "out", sm="10.3", target="graphs", progress=Said())
    assert tuple(Said.lines) == choose((), ("10.3",), ("graphs",)).notes
    assert any("slow in 8 bits" in line for line in Said.lines)


def test_a_number_stands_for_its_compute_capability(options_of: Callable[..., Any]) -> None:
    options = options_of(target=("rtx", "onnx"), sm=[8.9, 12.0], timing_cache="cache")
    assert (options.targets, options.sms, options.timing_cache) == (("rtx", "onnx"), ("8.9", "12.0"), Path("cache"))


WRONG_REQUESTS: list[dict[str, Any]] = [
    {"prompt": None},
    {"prompt": ["circle"]},
    {"negative_prompt": 3},
    {"steps": "20"},
    {"steps": 2.5},
    {"steps": True},
    {"seed": "0"},
    {"seed": 0.5},
    {"guidance": "5"},
    {"guidance": float("nan")},
    {"delta": "0.1"},
    {"last_high": 1.5},
    {"weighting": "steps"},
    {"weighting": ["step"]},
    {"cache": "0.1"},
    {"cache_policy": 1},
    {"cache_policy": ["easycache"]},
    {"height": 24.5},
    {"num_frames": [8]},
]


@pytest.mark.parametrize("fields", WRONG_REQUESTS)
def test_a_request_of_other_kinds(out: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ShapeError) as caught:
        check_request(GenerateRequest(**{"prompt": "circle", **fields}), Artifact.open(out))
    assert caught.value.available or caught.value.fix


WRONG_CONTROLLERS: list[dict[str, Any]] = [
    {"delta": "0.1"},
    {"delta": [0.1]},
    {"delta": True},
    {"delta": float("nan")},
    {"delta": 0.1, "last_high": 1.5},
    {"delta": 0.1, "last_high": "2"},
    {"delta": 0.1, "low": "4"},
    {"mode": "fixed", "bits": "8"},
    {"mode": "planned", "schedule": "884"},
    {"mode": "planned", "schedule": []},
    {"mode": "planned", "schedule": [8, "4"]},
    {"mode": "planned", "schedule": 8},
    {"mode": "callback", "callback": 8},
    {"delta": 0.1, "cache": 0.1},
]


@pytest.mark.parametrize("options", WRONG_CONTROLLERS)
def test_a_controller_of_other_kinds(options: dict[str, Any]) -> None:
    with pytest.raises(DvdquantError) as caught:
        StepController(**options)
    assert caught.value.available or caught.value.fix


@pytest.mark.parametrize("options", [{"cache": "0.1"}, {"cache": True}, {"mode": None}, {"mode": 8}, {"mode": "b8"}])
def test_the_factory_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(DvdquantError) as caught:
        make_controller(**{"mode": "switch", "component": "transformer", "family": "wan", "bits": (4, 8), **options})
    assert caught.value.available or caught.value.fix
    for skips in (0, 1.5, "2"):
        with pytest.raises(DvdquantError, match="max_skips"):
            StepCachePolicy(0.1, max_skips=skips)  # type: ignore[arg-type]
