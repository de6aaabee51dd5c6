"""Running the commands, in this process and in their own, and the ways in which a test damages a model folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from dvdquant.cli.export import main as export_main
from dvdquant.system.files import hash_file
from dvdquant.system.safetensors_reader import read_header, read_tensor
from tests.support.exporting import REPOSITORY

SINGLE = "diffusion_pytorch_model.safetensors"
SIZES = ["--latent", "2x8x8", "--text-tokens", "4"]


# ------------------------------------------------------------------------------------------------------ in this process


def run(*arguments: object) -> Result:
    """``dvdq-export`` in this process."""
    return CliRunner().invoke(export_main, [str(a) for a in arguments])


def in_process(*arguments: object) -> str:
    """As :func:`run`, for a run that succeeds; its output."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def logged(*arguments: object) -> list[dict[str, Any]]:
    """As :func:`run` with ``--log-format json``, for a run that succeeds; the JSON lines it wrote."""
    result = run(*arguments, "--log-format", "json")
    assert result.exit_code == 0, (result.output, result.exception)
    return [json.loads(line) for line in result.stderr.splitlines()]


def refused(result: Result, *named: str, way_out: bool = True) -> None:
    """Exit code 2, every text in the message, a way out, and no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for text in named:
        assert text in result.output, (text, result.output)
    assert not way_out or any(text in result.output for text in ("Usage:", "available:", "fix:")), result.output


# ------------------------------------------------------------------------------------------------------- as a process


def environment() -> dict[str, str]:
    """That finds this checkout, with as many threads as this process: what an export writes depends on their number."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def digests(out: Path, *below: str) -> dict[str, str]:
    """SHA-256 of every file below ``out``, or below some of its folders."""
    files = [p for top in below or ("",) for p in (out / top).rglob("*") if p.is_file()]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------------------------------ damaged models


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change to the parsed config.json of a model folder."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A change to the tensors of a model folder."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return edit


def poke(name: str, value: float, index: int = 3) -> Callable[[Path], None]:
    """One value of one tensor."""
    return edit_weights(lambda tensors: tensors[name].view(-1).__setitem__(index, value))


def set_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    """A file with that content."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def truncate(folder: Path) -> None:
    """Cut the last 1000 bytes off the weights."""
    path = folder / SINGLE
    os.truncate(path, path.stat().st_size - 1000)


# ----------------------------------------------------------------------------------------------------- damaged exports


def change(path: Path, name: str, edit: Callable[[torch.Tensor], Any]) -> None:
    """Edit one stored tensor in its place; ``edit`` works in place or returns the new values."""
    info = read_header(path).tensors[name]
    value = read_tensor(path, info)
    result = edit(value)
    value = value if result is None else result.to(value.dtype)
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def rehash(out: Path, *names: str) -> None:
    """Make the manifest vouch for changed files, as somebody does who wants them used."""
    path = out / "manifest.json"
    data = json.loads(path.read_text())
    for name in names:
        data["files"][name] = hash_file(out / name)
    path.write_text(json.dumps(data))
