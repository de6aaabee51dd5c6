"""The nodes inside of a real ComfyUI on a CPU: its loader, its samplers, its memory management and its executor.

The latents equal those of our own runtime to the bit, on both backends, at one width and switched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.comfyui import comfyui_base, comfyui_root, euler, in_comfyui
from tests.support.exporting import TINY_WAN
from tests.support.lora_files import blocks, low_rank, write_peft

WORDS, GUIDANCE = "ring red right large black", 3.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root() -> Path:
    return comfyui_root()


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui_base(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def same(root: Path, base: Path) -> dict[str, Any]:
    return in_comfyui(root, base, "same_latents")["same_latents"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime"])
@pytest.mark.parametrize("mode", ["a8", "a4", "switch"])
def test_latents_and_trace_equal_our_own_runtime(same: dict[str, Any], base: Path, backend: str, mode: str) -> None:
    export = base / "models" / "dvdquant" / "tiny-export"
    latents, trace = euler(export, same["noise"], same["sigmas"], WORDS, GUIDANCE, backend, mode, delta=0.1)
    assert torch.equal(latents, same[f"{backend}-{mode}"])
    assert trace == same[f"{backend}-{mode}-trace"]
    if mode == "switch":
        assert {bits for _, _, bits, _ in trace} == {4, 8}


def test_free_memory_does_not_change_the_clip(same: dict[str, Any]) -> None:
    """ComfyUI calls with both conditions at once, or first with the negative one alone if memory is short."""
    assert same["apart-trace"][0][1] == "uncond"
    assert torch.equal(same["apart"], same["pytorch-switch"])


def test_other_samplers(root: Path, base: Path) -> None:
    found = in_comfyui(root, base, "samplers")["samplers"]
    for name in ("heun", "dpmpp_2m", "dpmpp_2s_ancestral", "euler_ancestral", "uni_pc", "lcm", "res_multistep"):
        finite, trace = found[name]
        assert finite, name
        assert [step for step, *_ in trace] == sorted(step for step, *_ in trace), name
        assert {step for step, *_ in trace} == set(range(6)), name
    # Heun takes two calls for each condition in every step but the first and the last.
    assert [sum(step == s for s, *_ in found["heun"][1]) for step in range(6)] == [2, 4, 4, 4, 4, 4]
    assert {step for step, *_ in found["first half"]} == set(range(6))
    assert not any("last" in reason for *_, reason in found["first half"])
    assert {step for step, *_ in found["second half"][1]} == set(range(6, 12))
    assert sum("last 2 steps" in reason for *_, reason in found["second half"][1]) == 4
    assert "total_steps is 12" in found["too many"]


def test_what_an_engine_does_not_have_is_refused_in_words(root: Path, base: Path) -> None:
    found = in_comfyui(root, base, "refusals")["refusals"]
    for name, words in {
        "lora": "LoRA for dvdquant export",
        "save": "copy the export's folder",
        "merge": "merge before the export",
        "patch": "attn1_patch",
        "size": "--height",
        "channels": "[batch, 3, frames, height, width]",
        "missing": "models/dvdquant",
    }.items():
        assert words in found[name], (name, found[name])
        assert "Error: " in found[name], name


def test_memory_management_and_interruption(root: Path, base: Path) -> None:
    found = in_comfyui(root, base, "memory")["memory"]
    assert (found["before"], found["loaded"], found["unloaded"], found["shared"]) == (False, True, True, True)
    said, loaded, held = found["sizes"]
    assert said == loaded == held > 0
    assert found["interrupted"].startswith("InterruptProcessingException")
    assert found["cut"] == 4 * 2
    assert found["again"]
    assert found["preview"] == (24, 24)


def test_lora_beside_the_weights(root: Path, base: Path) -> None:
    folder = TINY_WAN / "transformer"
    changes = low_rank(folder, [name for name in blocks(folder) if ".attn1." in name])
    write_peft(base / "models" / "loras" / "style.safetensors", changes)
    found = in_comfyui(root, base, "lora")["lora"]
    assert found["off"]
    assert found["plain again"]
    assert 1e-3 < found["changes"] < float("inf")
    assert "no place for a LoRA" in found["wrong backend"]
    assert "onnxruntime" in found["wrong backend"]


def test_the_example_workflow_runs_in_the_executor(root: Path, base: Path) -> None:
    found = in_comfyui(root, base, "workflow")["workflow"]
    assert found["valid"], found
    assert found["success"], found["messages"]
    (table,) = {text for text in found["texts"] if "bits on average" in text}
    assert "tiny-export on onnxruntime (cpu), switch" in table
    assert len(table.splitlines()) == 3 + 20
    assert len(found["images"]) == 8 + 1
