"""A ComfyUI checkout for tests, the exports it is given, and its Euler sampler on our own runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.sessions import open_session
from dvdquant.deploy.switching.factory import make_controller
from dvdquant.deploy.switching.runner import StepRunner
from tests.support.commands import environment, in_process
from tests.support.exporting import REPOSITORY, TINY_WAN

NODES = REPOSITORY / "deploy" / "comfyui-dvdquant"
CHILD = Path(__file__).with_name("comfyui_child.py")
# What ComfyUI imports for sampling, besides what dvdquant needs. torchvision and torchaudio may lack: see comfyui_child.
NEEDED = ("aiohttp", "av", "einops", "scipy", "sentencepiece", "torchsde")


def comfyui_root() -> Path:
    """The checkout that COMFYUI_ROOT names; skips without one."""
    root = os.environ.get("COMFYUI_ROOT")
    if not root:
        pytest.skip("needs a checkout of ComfyUI: set COMFYUI_ROOT to it")
    path = Path(root)
    if not (path / "comfy" / "samplers.py").is_file():
        pytest.fail(f"COMFYUI_ROOT is {root}, which is no checkout of ComfyUI")
    for name in NEEDED:
        pytest.importorskip(name, reason=f"ComfyUI needs {name}: install the requirements of COMFYUI_ROOT")
    return path.resolve()


def comfyui_base(folder: Path) -> Path:
    """A base folder for ComfyUI with tiny-wan, an export of it, a LoRA and the example workflow."""
    models = folder / "models" / "dvdquant"
    models.mkdir(parents=True)
    (models / "tiny-wan").symlink_to(TINY_WAN, target_is_directory=True)
    in_process(TINY_WAN, "-o", models / "tiny-export", "--target", "graphs", "--recipe", "rtn")
    (folder / "models" / "loras").mkdir()
    shutil.copy(NODES / "example_workflows" / "tiny-wan.json", folder / "workflow.json")
    return folder


def in_comfyui(root: Path, base: Path, *scenarios: str) -> dict[str, Any]:
    """Run scenarios inside of ComfyUI, in a process of its own; their results."""
    results = base / f"{'-'.join(scenarios)}.pt"
    command = [sys.executable, str(CHILD), *map(str, (root, base, NODES, results)), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, Any] = torch.load(results, weights_only=False)
    return found


@torch.inference_mode()
def euler(
    out: Path, noise: Tensor, sigmas: Tensor, words: str, guidance: float, backend: str, mode: str, **options: Any
) -> tuple[Tensor, list[tuple[int, str, int | None, str]]]:
    """Latents and trace of our own runtime, with the sampler's arithmetic in ComfyUI's order of operations.

    x₀ = x − σ·v for each branch, guidance between the two, then x + (x − x₀) / σ · Δσ, all in float32.
    """
    artifact = Artifact.open(out)
    table = PromptTable.open(TINY_WAN)
    texts = {"cond": table.encode(words), "uncond": table.encode(None)}
    steps = len(sigmas) - 1
    with open_session(artifact, backend=backend, device="cpu") as session:
        session.set_loras(options.pop("loras", ()))
        controller = make_controller(
            mode, component="transformer", family="wan", bits=session.bits, **(options if mode == "switch" else {})
        )
        runner = StepRunner(session, controller)
        runner.begin_request(steps)
        x = sigmas[0] * noise + (1.0 - sigmas[0]) * torch.zeros_like(noise)
        for step in range(steps):
            sigma = sigmas[step]
            clean = {}
            for branch, text in texts.items():
                inputs = {
                    "hidden_states": x.to(session.dtype),
                    "timestep": (sigma * 1000).float().reshape(1),
                    "encoder_hidden_states": text.to(session.dtype),
                }
                clean[branch] = x - runner.run(inputs, branch=branch, step=step, steps=steps).float() * sigma
            guided = clean["uncond"] + (clean["cond"] - clean["uncond"]) * guidance
            x = x + (x - guided) / sigma * (sigmas[step + 1] - sigma)
        return x, [(record.step, record.branch, record.bits, record.reason) for record in runner.trace]
