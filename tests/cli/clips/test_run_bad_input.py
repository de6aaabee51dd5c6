"""Everything a user of ``dvdq-run`` can get wrong: exit code 2, the way out in words, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.deploy.generation.request import GenerateRequest, resolve_size
from dvdquant.errors import ShapeError
from dvdquant.model.families import Axis, Sizes
from tests.support.commands import environment, refused
from tests.support.exporting import TINY_WAN
from tests.support.running import PROMPT, call, drawn, run, short_wan_export


@pytest.fixture(scope="module")
def out() -> Path:
    return short_wan_export()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "rign red right large black"), ("'rign'", "did you mean 'ring'", "circle")),
        (("--prompt", "  "), ("empty",)),
        ((), ("no prompt",)),
        (("--prompts", "empty.txt"), ("empty.txt", "is empty")),
        (("--prompts", "large.txt"), ("large.txt", "256 KiB")),
        (("--prompts", "latin.txt"), ("latin.txt", "UTF-8")),
        (("--prompts", "gone.txt"), ("gone.txt",)),
        (("--prompt", PROMPT, "--steps", "0"), ("--steps is 0", "1 to 1000")),
        (("--prompt", PROMPT, "--seed", "-1"), ("--seed is -1",)),
        (("--prompt", PROMPT, "--guidance", "nan"), ("--guidance is nan",)),
        (("--prompt", PROMPT, "--delta", "-0.1"), ("--delta is -0.1",)),
        (("--prompt", PROMPT, "--height", "32"), ("--height is 32", "profile", "24", "24:32")),
        (("--prompt", PROMPT, "--cache", "some"), ("--cache is 'some'",)),
        (("--prompt", PROMPT, "--cache", "inf"), ("--cache is inf",)),
        (("--prompt", PROMPT, "--mode", "a4", "--delta", "0.1"), ("--delta", "--mode a4")),
        (("--prompt", PROMPT, "--mode", "16", "--compare"), ("--compare", "--mode 16")),
        (("--prompt", PROMPT, "--mode", "16", "--backend", "onnxruntime"), ("--mode 16", "--backend onnxruntime")),
        (("--prompt", PROMPT, "--average-bits", "6"), ("--average-bits", "dvdq-plan")),
        (("--prompt", PROMPT, "--schedule", "gone.json"), ("gone.json", "dvdq-plan")),
        (("--prompt", PROMPT, "--fps", "0"), ("--fps is 0",)),
        (("--prompt", PROMPT, "--device", "tpu"), ("tpu", "cpu")),
        (("--prompt", PROMPT, "-o", "clip.avi"), (".avi", ".mp4")),
        (("--prompt", PROMPT, "-o", "empty.txt/clip.mp4"), ("empty.txt",)),
        (("--prompt", PROMPT, "--strip", "c.jpg"), (".jpg", ".png")),
        (("--prompt", PROMPT, "-o", "c.gif", "--gif", "c.gif"), ("c.gif", "--gif")),
        (("--prompt", PROMPT, "--pipeline", "nowhere"), ("nowhere", "--pipeline")),
    ],
)
def test_refused(
    options: tuple[str, ...], said: tuple[str, ...], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "large.txt").write_text("a\n" * 200_000)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    before = sorted(p.name for p in tmp_path.iterdir())
    more = () if "-o" in options else ("-o", "c.mp4")
    given = () if "--pipeline" in options else ("--pipeline", str(TINY_WAN))
    refused(run(out, *given, *more, *options), *said)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_no_engine_for_this_machine(out: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    for options in (("--backend", "rtx"), ("--backend", "tensorrt"), ("--device", "cuda")):
        arguments = (out, "--pipeline", TINY_WAN, "--prompt", PROMPT, "-o", tmp_path / "c.mp4", *options)
        refused(run(*arguments), "cpu")
    assert list(tmp_path.iterdir()) == []


def _swap_graphs(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["graphs"] = [g for g in data["graphs"] if g["act_bits"] == 8]
    path.write_text(json.dumps(data))


def _widen(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["shapes"] |= {"frames": [4, 8, 8], "height": [24, 48, 48], "width": [24, 48, 48]}
    path.write_text(json.dumps(data))


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        path = folder / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    return flip


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (_flip("onnx/transformer.safetensors"), (), ("transformer.safetensors",)),
        (_flip("onnx/transformer_a4.onnx"), (), ("transformer_a4.onnx",)),
        (_flip("config.json"), (), ("config.json",)),
        (lambda f: (f / "onnx" / "transformer_a8.onnx").unlink(), (), ("transformer_a8.onnx",)),
        (lambda f: (f / "manifest.json").unlink(), (), ("not a dvdquant export",)),
        (lambda f: (f / "manifest.json").write_text('{"format_version": 99}'), (), ("newer",)),
        (_swap_graphs, ("--mode", "a4"), ("a4", "a8", "dvdq-export")),
        (_swap_graphs, ("--mode", "switch"), ("switch", "a8")),
        # Without a VAE a latent is a pixel, and the patch is 4 of them.
        (_widen, ("--height", "46"), ("--height is 46", "available: 44 or 48; ", "24 to 48 in steps of 4")),
        (_widen, ("--height", "50"), ("--height is 50", "24 to 48", "(24:52 for this axis)")),
        (_widen, ("--width", "10"), ("--width is 10", "(8:48 for this axis)")),
    ],
)
def test_exports_that_cannot_be_used(
    damage: Callable[[Path], Any], options: tuple[str, ...], said: tuple[str, ...], out: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    damage(copy)
    refused(run(*call(copy, "--prompt", PROMPT, "-o", tmp_path / "c.mp4", *options)), *said, way_out=False)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("options", "what", "available", "fix"),
    [
        (
            {"height": 68},
            "the VAE does not divide",
            "64 or 80; the export's profile is 32 to 96 in steps of 16",
            "these",
        ),
        ({"height": 40}, "no multiple of the 16", "32 or 48; the export's profile is 32 to 96 in steps of 16", "these"),
        ({"width": 152}, "outside the profile", "32 to 96 in steps of 16", "--width 32:160"),
        ({"width": 8}, "outside the profile", "32 to 96 in steps of 16", "--width 16:96"),
        ({"num_frames": 17}, "outside the profile", "5 to 13 in steps of 4", "--num-frames 5:17"),
    ],
)
def test_sizes_in_the_pixels_of_a_vae(options: dict[str, int], what: str, available: str, fix: str | None) -> None:
    """Every size that is advised is one that dvdq-export takes: a multiple of the VAE's factor and the patch."""
    request = GenerateRequest("a cat", **options)  # type: ignore[arg-type]
    sizes = Sizes(Axis(2, 3, 4), Axis(4, 8, 12), Axis(4, 8, 12), 12)
    with pytest.raises(ShapeError) as caught:
        resolve_size(request, sizes, (4, 8, 8), (1, 2, 2), causal=True)
    assert what in caught.value.what
    assert caught.value.available == available
    assert (fix or "") in (caught.value.fix or "")


def test_an_export_of_one_bit_width_runs_at_it(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    _swap_graphs(copy)
    assert "4 on a8" in drawn(*call(copy, "--prompt", PROMPT, "-o", tmp_path / "c.mp4"))


@pytest.mark.stress  # the commands' own tests stop a forked one
def test_interrupted_leaves_the_old_clip(out: Path, tmp_path: Path) -> None:
    """Ctrl-C while steps run: exit code 130, nothing half-written, the earlier file untouched."""
    (tmp_path / "c.mp4").write_bytes(b"the clip of yesterday")
    arguments = [str(a) for a in call(out, "--steps", 1000, "--prompt", PROMPT, "-o", tmp_path / "c.mp4")]
    line = [sys.executable, "-m", "dvdquant.cli.run", *arguments, "--log-format", "json"]
    # Tests started in the background ignore SIGINT, and would hand that down.
    process = subprocess.Popen(
        line,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while '"event": "step"' not in process.stderr.readline():
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"c.mp4": b"the clip of yesterday"}
