"""A finished export is replaced by another one only where that was asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dvdquant.artifact.manifest import load_manifest
from dvdquant.artifact.transaction import ExportTransaction
from dvdquant.artifact.verify_files import verify_files
from dvdquant.cli.export import main
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process
from tests.support.exporting import state_of

GRAPHS = ("--target", "graphs", "--recipe", "rtn", *SIZES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    in_process(model, "-o", out, *GRAPHS)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    for word in ("holds a finished export", "--replace", *words):
        assert word in result.output, result.output


@pytest.fixture(scope="module")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("other") / "wan", tiny.WAN_ONE, seed=7)


OTHERS = {
    "recipe": (["--recipe", "weights-only", "--target", "graphs", *SIZES], "recipe: rtn before, weights-only now"),
    "a recipe of one name": ([*GRAPHS, "--keep", "blocks.0.attn1.*"], "recipe rtn: keep"),
    "sizes": (["--target", "graphs", "--recipe", "rtn", "--latent", "2x4x4", "--text-tokens", "4"], "height"),
    "dtype": ([*GRAPHS, "--dtype", "fp16"], "dtype: bf16 before, fp16 now"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_export_is_refused_and_nothing_is_touched(name: str, out: Path, model: Path) -> None:
    options, words = OTHERS[name]
    before = state_of(out)
    for more in ([], ["--resume"], ["--dry-run"]) if name == "recipe" else ([],):
        result = run(model, "-o", out, *options, *more)
        refused(result, words)
        # Where a recipe was picked by the card, the one that is there can be named.
        assert ("--recipe rtn goes on with it" in result.output) == (name == "recipe")
    assert state_of(out) == before


def test_another_width_of_the_recipe_names_the_options_that_go_on(out: Path, model: Path) -> None:
    refused(
        run(model, "-o", out, *GRAPHS, "--activations", "8"),
        "recipe rtn: other activations",
        "--recipe rtn goes on with it",
    )
    recorded = json.loads((out / "manifest.json").read_text())
    recorded["recipe"]["activations"] = recorded["recipe"]["activations"][1:]
    (out / "manifest.json").write_text(json.dumps(recorded))
    refused(run(model, "-o", out, *GRAPHS), "--recipe rtn --activations 8 goes on with it")


def test_another_model_is_refused(out: Path, other_model: Path) -> None:
    before = state_of(out)
    refused(run(other_model, "-o", out, *GRAPHS), "model: ", str(other_model))
    assert state_of(out) == before


def test_new_weights_in_the_same_place_are_another_model(out: Path, other_model: Path, model: Path) -> None:
    """The manifest names the folder of a model; what lies there may have been trained on since."""
    recorded = json.loads((out / "manifest.json").read_text())
    recorded["source"]["model"] = str(other_model)
    (out / "manifest.json").write_text(json.dumps(recorded))
    refused(run(other_model, "-o", out, *GRAPHS), "other weights or other LoRAs")


def test_replace_puts_the_new_export_in_its_place(out: Path, model: Path) -> None:
    in_process(model, "-o", out, "--recipe", "w4a8", "--target", "graphs", *SIZES, "--replace")
    manifest = load_manifest(out)
    assert manifest.recipe["name"] == "w4a8"
    verify_files(out, manifest)


def test_the_same_export_goes_on_without_asking(out: Path, model: Path, tmp_path: Path) -> None:
    """The same model, also where it lies elsewhere now, and another kind of graph in the same folder."""
    assert "up to date" in in_process(model, "-o", out, *GRAPHS)
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert "up to date" in in_process(moved, "-o", out, *GRAPHS)
    in_process(model, "-o", out, *GRAPHS, "--target", "onnx")
    assert {graph["target"] for graph in load_manifest(out).graphs} == {"tensorrt", "onnx"}


def test_an_export_that_finished_meanwhile_is_not_replaced(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was empty when the export was planned; the transaction looks again, under its lock."""
    out = tmp_path / "out"
    entering = ExportTransaction.__enter__

    def after_another_one(self: ExportTransaction) -> ExportTransaction:
        shutil.copytree(finished, out)
        return entering(self)

    monkeypatch.setattr(ExportTransaction, "__enter__", after_another_one)
    refused(run(model, "-o", out, "--recipe", "weights-only", "--target", "graphs", *SIZES), "recipe: rtn before")
    assert load_manifest(out).recipe["name"] == "rtn"
