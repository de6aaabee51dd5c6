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
from typing import Any

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


# Reads [module, function, name, arguments] of each command; forks for each, so that nothing but click is there before it.
ASK = """
import click, contextlib, importlib, io, json, traceback
def asked(module, function, name, words):
    said, problems, code = io.StringIO(), io.StringIO(), 1
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(problems):
        try:
            getattr(importlib.import_module(module), function)(words, prog_name=name)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    loaded = [name for name, module in sys.modules.items() if module]
    return {"code": code, "out": said.getvalue(), "err": problems.getvalue(), "loaded": loaded}
answers = []
for command in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        with open(writer, "w") as answer:
            json.dump(asked(*command), answer)
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        answers.append(json.loads(answer.read()))
    os.waitpid(pid, 0)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], dict[str, Any]]:
    """What every command says to ``--help`` and to an option that it does not have, where there is no framework."""
    asked = [(script, option) for script in SCRIPTS for option in ("--help", "--no-such-option")]
    commands = [[*SCRIPTS[script].split(":"), script, [option]] for script, option in asked]
    done = _python(f"{BARE}\n{ASK}", json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


def _modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(dvdquant.__path__, "dvdquant."))


def test_there_are_scripts_and_modules() -> None:
    assert {"dvdq-export", "dvdq-inspect"} <= SCRIPTS.keys()
    assert {"dvdquant.export.pipeline", "dvdquant.deploy", "dvdquant.cli.inspect"} <= set(_modules())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_framework(script: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    answer = answers[script, "--help"]
    assert (answer["code"], answer["err"]) == (0, "")
    assert answer["out"].startswith(f"Usage: {script} ")
    assert not {name.partition(".")[0] for name in answer["loaded"]} & HEAVY
    # The interpreter and click are about 200; a framework brings a thousand.
    assert len(answer["loaded"]) < 400, sorted(answer["loaded"])


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
def test_unknown_option_is_an_error(script: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    answer = answers[script, "--no-such-option"]
    assert answer["code"] == 2
    assert "--no-such-option" in answer["err"]
    assert "Traceback" not in answer["err"]


def test_import_is_light() -> None:
    loaded = _loaded(f"{BARE}\nimport dvdquant")
    assert not {name.partition(".")[0] for name in loaded} & (HEAVY | {"numpy", "click"})


def test_every_module_imports_without_gpu_tensorrt_or_network() -> None:
    # What runs inside ComfyUI imports ComfyUI, what runs on a Ray cluster, in Triton or behind Dynamo imports theirs.
    servers = ("ray_app", "triton_models", "bridges.dynamo_worker", "bridges.ray_figures")
    elsewhere = ("dvdquant.deploy.comfyui.", *(f"dvdquant.deploy.serve.{name}" for name in servers))
    names = [name for name in _modules() if not name.startswith(elsewhere)]
    code = f"""{BARE}
import importlib
import dvdquant.deploy.generation.generate, dvdquant.deploy.generation.video
assert "torch._dynamo" not in sys.modules, "a clip of an export needs no compiler, whose import takes long"
for name in {names!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""
    assert set(names) <= _loaded(code)
