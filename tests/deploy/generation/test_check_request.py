"""Checking a request without torch: what a server's front does, with the answers of the generators."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import TableChecker, open_checker
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.pipelines.call_defaults import call_defaults
from dvdquant.deploy.pipelines.parts import PIPELINES
from dvdquant.errors import CheckpointError, DvdquantError, OutputError, ShapeError
from tests.support.exporting import TINY_WAN
from tests.support.folders import process_folder
from tests.support.running import PROMPT, short_wan_export, wan_pipeline

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "onnx", "numpy")
FRONT = """
import json, sys
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.faults import fault_of
from dvdquant.deploy.generation.check import open_checker
from dvdquant.deploy.generation.limits import Limits
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.switching.schedule import Schedule

out, pipeline, prompt, *heavy = sys.argv[1:]
checker = open_checker(Artifact.open(out), pipeline=pipeline, limits=Limits(steps=60))
filled = checker.check(GenerateRequest(prompt))
refused = []
for fields in ({"steps": 61}, {"prompt": " "}, {"mode": "a3"}, {"height": 7}):
    try:
        checker.check(GenerateRequest(**{"prompt": prompt, **fields}))
    except Exception as error:
        refused.append([type(error).__name__, fault_of(error)])
heavy = [name for name in heavy if name in sys.modules]
memory = next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([filled.to_json(), refused, heavy, memory, checker.fps(filled.num_frames)]))
"""


def place(model: str) -> tuple[Path, Path, str]:
    """(export, model, prompt) of the toy model with a table, or of a tiny pipeline."""
    if model == "table":
        return short_wan_export(), Path(TINY_WAN), PROMPT
    out, folder = wan_pipeline()
    return out, folder, "a red cat"


@pytest.mark.parametrize("model", ["table", "pipeline"])
def test_a_fresh_process_checks_without_torch(model: str) -> None:
    """The process is a fresh one: its peak of memory is what the check takes, and no framework was imported."""
    out, pipeline, prompt = place(model)
    done = subprocess.run(
        [sys.executable, "-c", FRONT, str(out), str(pipeline), prompt, *HEAVY],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    filled, refused, heavy, memory, fps = json.loads(done.stdout)
    assert heavy == []
    assert memory < 150  # MB, as the kernel counts them
    with open_generator(Artifact.open(out), pipeline=pipeline, device="cpu") as generator:
        assert filled == generator.check(GenerateRequest(prompt)).to_json()
        assert fps == generator.fps(filled["num_frames"])
    names = ["ShapeError", "ShapeError", "UnsupportedError", "ShapeError"]
    assert refused == [[name, "request"] for name in names]


BAD: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": "x" * 5000},
    {"prompt": 3},
    {"steps": 0},
    {"steps": 10**9},
    {"steps": True},
    {"guidance": float("nan")},
    {"seed": -1},
    {"mode": "a6"},
    {"mode": "planned"},
    {"mode": "a8", "delta": 1.0},
    {"mode": "16", "cache": 0.1},
    {"num_frames": 1000},
    {"height": 31},
    {"width": 0},
    {"cache": "much"},
    {"cache_policy": "teacache"},
    {"mode": "16", "cache_policy": "easycache"},
    {"weighting": "none "},
]


@pytest.mark.parametrize("model", ["table", "pipeline"])
def test_the_errors_are_the_generators(model: str) -> None:
    out, pipeline, prompt = place(model)
    artifact = Artifact.open(out)
    checker = open_checker(artifact, pipeline=pipeline)
    with open_generator(artifact, pipeline=pipeline, device="cpu") as generator:
        for fields in [*BAD, {"prompt": "zzz"} if model == "table" else {"negative_prompt": 1}]:
            request = GenerateRequest(**{"prompt": prompt, **fields})
            with pytest.raises(DvdquantError) as ours:
                checker.check(request)
            with pytest.raises(DvdquantError) as theirs:
                generator.check(request)
            assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value)), fields


def test_limits() -> None:
    artifact = Artifact.open(short_wan_export())
    request = GenerateRequest(PROMPT)
    size = open_checker(artifact, pipeline=TINY_WAN).check(request)
    assert size.steps is not None
    assert size.num_frames is not None
    pixels = size.num_frames * (size.height or 0) * (size.width or 0)
    exact = Limits(steps=size.steps, pixels=pixels, prompt=len(PROMPT))
    assert open_checker(artifact, pipeline=TINY_WAN, limits=exact).check(request) == size
    for tighter, said in (
        ({"steps": size.steps - 1}, f"{size.steps} steps"),
        ({"pixels": pixels - 1}, f"are {pixels} pixels"),
        ({"prompt": len(PROMPT) - 1}, "the prompt has"),
    ):
        with pytest.raises(ShapeError, match=said) as error:
            open_checker(artifact, pipeline=TINY_WAN, limits=dataclasses.replace(exact, **tighter)).check(request)
        assert "here" in str(error.value)
    with open_generator(artifact, pipeline=TINY_WAN, limits=Limits(steps=3)) as generator:
        assert generator.check(GenerateRequest(PROMPT, steps=3)).steps == 3
        with pytest.raises(ShapeError, match="4 steps"):
            generator.generate(GenerateRequest(PROMPT, steps=4))
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(ShapeError, match="the limit of steps"):
            Limits(steps=wrong)  # type: ignore[arg-type]


def test_defaults_are_those_of_the_installed_pipelines() -> None:
    """Read from the source, they are what Python itself says of the classes' calls."""
    import diffusers

    for name in PIPELINES:
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        found = call_defaults(name)
        for argument in ("num_inference_steps", "guidance_scale", "num_frames", "output_type", "latents"):
            assert found[argument] == parameters[argument].default, (name, argument)


def test_a_class_that_is_not_in_the_source_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvdquant.deploy.pipelines import call_defaults as module

    monkeypatch.setattr(module, "pipeline_sources", list)
    module.call_defaults.cache_clear()
    try:
        assert module.call_defaults("WanPipeline")["num_inference_steps"] == 50
    finally:
        module.call_defaults.cache_clear()


def test_what_is_no_model() -> None:
    artifact, folder = Artifact.open(short_wan_export()), process_folder("check-request")
    with pytest.raises(CheckpointError):
        open_checker(artifact, pipeline=folder)
    (folder / "prompts.json").write_text('{"words": []}')
    with pytest.raises(CheckpointError, match=r"prompts\.json cannot be used"):
        open_checker(artifact, pipeline=folder)
    with pytest.raises(OutputError):
        Artifact.open(folder)
    assert isinstance(open_checker(artifact, pipeline=TINY_WAN), TableChecker)
