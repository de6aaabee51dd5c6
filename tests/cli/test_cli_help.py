"""Every ``--help`` and every import works without a GPU, TensorRT or network, and help does not load the frameworks."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import dvdquant

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = {"torch", "numba", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "diffusers", "transformers", "modelopt"} | {
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
}

# Runs first in a child: no CUDA, no TensorRT, no network, whatever this machine has.
BARE = """
import gc, os, socket, sys
gc.disable()  # much of an import of PyTorch
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("tensorrt", "tensorrt_rtx", "polygraphy"):
    sys.modules[name] = None
def refuse(*args, **kwargs):
    raise OSError("this test has no network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )


def _loaded(code: str) -> set[str]:
    """Names in sys.modules of a child after ``code``, which prints nothing on its last line."""
    done = _python(f"{code}\nimport json, sys\nprint(json.dumps([n for n, m in sys.modules.items() if m]))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def _modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(dvdquant.__path__, "dvdquant."))


def test_there_are_scripts_and_modules() -> None:
    assert {"dvdq-export", "dvdq-inspect"} <= SCRIPTS.keys()
    assert {"dvdquant.export.pipeline", "dvdquant.deploy", "dvdquant.cli.inspect"} <= set(_modules())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_framework(script: str) -> None:
    module, function = SCRIPTS[script].split(":")
    code = f"""{BARE}
from {module} import {function} as main
try:
    main(["--help"], prog_name={script!r})
except SystemExit as end:
    assert end.code == 0, end.code
"""
    loaded = _loaded(code)
    assert not {name.partition(".")[0] for name in loaded} & HEAVY
    # The interpreter and click are about 200; a framework brings a thousand.
    assert len(loaded) < 400, sorted(loaded)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_examples_that_parse(script: str) -> None:
    import importlib
    import shlex

    module, function = SCRIPTS[script].split(":")
    command = getattr(importlib.import_module(module), function)
    lines = [line for line in command.examples.splitlines() if line.startswith("dvdq")]
    assert lines, "no examples"
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == script
        with contextlib.suppress(click.exceptions.Exit):  # --list-gpus ends the command
            command.make_context(name, arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_option_is_an_error(script: str) -> None:
    module, function = SCRIPTS[script].split(":")
    done = _python(f"from {module} import {function} as main; main(prog_name={script!r})", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


def test_import_is_light() -> None:
    loaded = _loaded(f"{BARE}\nimport dvdquant")
    assert not {name.partition(".")[0] for name in loaded} & (HEAVY | {"numpy", "click"})


def test_every_module_imports_without_gpu_tensorrt_or_network() -> None:
    # What runs inside ComfyUI imports ComfyUI, what runs on a Ray cluster, in Triton or behind Dynamo imports theirs.
    servers = ("ray_", "triton_models", "dynamo_worker")
    elsewhere = ("dvdquant.deploy.comfyui.", *(f"dvdquant.deploy.serve.{name}" for name in servers))
    names = [name for name in _modules() if not name.startswith(elsewhere)]
    code = f"""{BARE}
import importlib
for name in {names!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""
    assert set(names) <= _loaded(code)
