"""``dvdq-run`` in this process, the export of tiny-wan it runs on, and a pipeline of tiny random parts."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from dvdquant.cli.run import main as run_main
from tests.support import tiny_pipelines
from tests.support.commands import SINGLE, edit_config, in_process
from tests.support.exporting import TINY_WAN
from tests.support.folders import shared_folder
from tests.support.traces import without_graphs

# Sessions are fast enough; what costs is the number of steps.
QUICK = ("--steps", 4, "--backend", "onnxruntime", "--device", "cpu")
PROMPT = "ring red right large black"
_LATER_BLOCKS = tuple(f"blocks.{number}." for number in range(1, 6))


@functools.cache
def tiny_wan_export() -> Path:
    """The graphs of the trained toy model, made once a run; its prompt table decides the sizes and the text tokens.

    The manifest names the model by the checkout's own path.
    """
    how = ("--target", "graphs", "--recipe", "w4a4")
    return shared_folder("tiny-wan", lambda folder: in_process(TINY_WAN, "-o", folder / "out", *how)) / "out"


@functools.cache
def tiny_wan_weights() -> Path:
    """As :func:`tiny_wan_export` for PyTorch sessions alone: its graphs have no node, and are made in no time."""

    def make(folder: Path) -> None:
        with without_graphs():
            in_process(TINY_WAN, "-o", folder / "out", "--target", "graphs", "--recipe", "w4a4")

    return shared_folder("tiny-wan-weights", make) / "out"


@functools.cache
def short_wan() -> Path:
    """A folder as that of tiny-wan with one of its six blocks, for tests to which it is no matter what a clip shows."""

    def make(folder: Path) -> None:
        weights = Path("transformer") / SINGLE
        shutil.copytree(TINY_WAN, folder / "short-wan", ignore=shutil.ignore_patterns(SINGLE))
        kept = {n: t for n, t in load_file(TINY_WAN / weights).items() if not n.startswith(_LATER_BLOCKS)}
        save_file(kept, folder / "short-wan" / weights)
        edit_config(lambda config: config.update(num_layers=1))(folder / "short-wan" / "transformer")

    return shared_folder("short-wan", make) / "short-wan"


@functools.cache
def short_wan_export() -> Path:
    """As :func:`tiny_wan_export`, of :func:`short_wan`: a sixth of the work in every export, session and call."""
    return (
        shared_folder(
            "short-wan-export",
            lambda folder: in_process(short_wan(), "-o", folder / "out", "--target", "graphs", "--recipe", "w4a4"),
        )
        / "out"
    )


@functools.cache
def wan_pipeline(components: int = 1) -> tuple[Path, Path]:
    """(export, folder of the whole pipeline) of a Wan with tiny random parts; with two transformers a Wan 2.2."""
    import diffusers
    import torch

    def make(folder: Path) -> None:
        exported = tiny_pipelines.export_kind("wan", folder, components=components)
        parts = [
            diffusers.WanTransformer3DModel.from_pretrained(exported.source / name, torch_dtype=torch.bfloat16)
            for name in ("transformer", "transformer_2")[:components]
        ]
        more: dict[str, Any] = {"transformer_2": parts[1], "boundary_ratio": 0.7} if components > 1 else {}
        tiny_pipelines.build_pipeline("wan", parts[0], **more).save_pretrained(folder / "pipeline")

    folder = shared_folder(f"wan-pipeline-{components}", make)
    return folder / "out", folder / "pipeline"


def call(out: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a short run with one block of the toy model."""
    return (out, "--pipeline", short_wan(), *QUICK, *more)


def run(*arguments: object) -> Result:
    """``dvdq-run`` in this process."""
    return CliRunner().invoke(run_main, [str(a) for a in arguments])


def drawn(*arguments: object) -> str:
    """As :func:`run`, for a run that succeeds; its output."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def decode(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Frames [F, H, W, 3] of an mp4 or GIF, by the decoder."""
    import imageio.v3

    return np.stack([frame[..., :3] for frame in imageio.v3.imiter(path)])
