"""The tutorial: its notebook and its script run on the toy model, and the page shows what the notebook said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.commands import environment
from tests.support.exporting import REPOSITORY, TINY_WAN
from tests.support.running import PROMPT, short_wan, short_wan_export
from tests.support.scripts import load_script

FOLDER = REPOSITORY / "examples" / "wan2.1"


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    pytest.importorskip("nbclient", reason="needs nbclient: pip install 'dvdquant[test]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'dvdquant[test]'")
    return load_script(REPOSITORY / "docs" / "scripts" / "notebook.py")


def _run(notebooks: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> str:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    text: str = notebooks.said(notebooks.run(FOLDER / "wan2.1.ipynb", folder, parameters))
    return text


@pytest.mark.slow
def test_the_notebook_runs(notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an export that is there, so that it is not made again; every other cell does its work."""
    shutil.copytree(short_wan_export(), tmp_path / "out")
    few = {"MODEL": str(short_wan()), "OUT": "out", "STEPS": 2, "BACKEND": "onnxruntime", "LORA": "made", "REPEATS": 1}
    said = _run(notebooks, tmp_path, monkeypatch, **few)
    for words in (
        "what you get",
        "is up to date",
        "ring red right large black",
        "dB to 16 bit",
        "prompt table draws",
        "a call",
    ):
        assert words in said, said[-3000:]
    clips = tmp_path / "out-clips"
    assert {"compare.mp4", "compare.png", "compare.json", "lora.mp4", "lora.png"} <= {p.name for p in clips.iterdir()}
    modes = [clip["request"]["mode"] for clip in json.loads((clips / "compare.json").read_text())["clips"]]
    assert modes == ["16", "a8", "switch", "a4"]


def test_an_unknown_parameter_is_refused(notebooks: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter MODELS; it has BACKEND"):
        notebooks.run(FOLDER / "wan2.1.ipynb", tmp_path, {"MODELS": "x"})


@pytest.mark.stress
def test_the_notebook_from_nothing_with_a_server(
    notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"MODEL": str(TINY_WAN), "OUT": "out", "STEPS": 3, "LORA": "made", "SERVE_PORT": 8017}
    said = _run(notebooks, tmp_path, monkeypatch, **few)
    assert "manifest.json written" in said
    assert "completed" in said
    assert (tmp_path / "out-clips" / "served.mp4").stat().st_size > 1000


@pytest.mark.stress
def test_the_notebook_with_a_model_of_images(
    notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.image_pipelines import image_model, picture
    from tests.support.tiny_pipelines import KINDS, TOKENS

    model = image_model("wan-i2v-21")
    picture(0).save(tmp_path / "first.png")
    sizes = ["--latent", KINDS["wan-i2v-21"].latent, "--text-tokens", TOKENS, "--recipe", "w4a4"]
    few = {
        "MODEL": str(model.pipeline),
        "OUT": "out",
        "PROMPT": "a red cat",
        "STEPS": 2,
        "IMAGE": "first.png",
        "REPEATS": 1,
    }
    few["SIZES"] = sizes
    _run(notebooks, tmp_path, monkeypatch, **few, PIPELINE=str(model.pipeline), BACKEND="pytorch")
    assert (tmp_path / "out-clips" / "compare.mp4").stat().st_size > 1000


def test_the_script_takes_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(short_wan_export(), tmp_path / "out")
    load_script(FOLDER / "wan.py").main([str(short_wan()), str(tmp_path / "out"), "--prompt", PROMPT, "--steps", "2"])
    said = capsys.readouterr().out
    for line in ("$ dvdq export", "--dry-run", "$ dvdq inspect", "$ dvdq run", "$ dvdq bench", "ms a call"):
        assert line in said
    assert {p.name for p in (tmp_path / "out-clips").iterdir()} == {"clip.mp4", "clip.json", "clip.png"}


def test_the_page_shows_what_the_notebook_said(notebooks: ModuleType) -> None:
    """The file holds outputs of every cell but those that set things, and no path of a machine."""
    page = notebooks.page(FOLDER / "wan2.1.ipynb")
    for words in ("## From a checkpoint", "```text", "data:image/png;base64,", "PSNR", "completed"):
        assert words in page, words
    raw = (FOLDER / "wan2.1.ipynb").read_text()
    assert str(REPOSITORY) not in raw
    assert "/home/" not in raw
