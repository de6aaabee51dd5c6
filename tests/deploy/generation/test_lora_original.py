"""``dvdq-run`` on an export with a LoRA: the 16-bit model is fused as well, and its steps and guidance are the defaults."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.cli.plan import main as plan_main
from dvdquant.cli.run import undecided
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.report.page import collect, render_report
from dvdquant.deploy.switching.gbs import free_steps
from dvdquant.errors import CheckpointError
from dvdquant.system.progress import Progress
from tests.support.commands import in_process, refused
from tests.support.lora_files import Changes, blocks, fused_folder, low_rank, write_peft
from tests.support.running import PROMPT, drawn, run, short_wan


@dataclass
class Made:
    """A trained toy model exported with a LoRA that changes it a little."""

    out: Path
    lora: Path
    changes: Changes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("lora")
    changes = low_rank(short_wan() / "transformer", blocks(short_wan() / "transformer"))
    lora = write_peft(root / "fast.safetensors", changes)
    options = ("--recipe", "w4a4", "--target", "graphs", "--lora", f"{lora}:0.1", "--steps", 4, "--guidance", 1)
    in_process(short_wan(), "-o", root / "out", *options)
    return Made(root / "out", lora, changes)


def original(made: Made, dtype: torch.dtype, *lora: LoraSpec) -> dict[str, torch.Tensor]:
    artifact = Artifact.open(made.out)
    return load_original(artifact, short_wan(), "transformer", torch.device("cpu"), dtype, lora).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_original_is_a_fused_folder_loaded_by_diffusers(dtype: torch.dtype, made: Made, tmp_path: Path) -> None:
    folder = fused_folder(short_wan() / "transformer", tmp_path / "fused", (made.changes, 0.1))
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).state_dict()
    ours = original(made, dtype)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    plain = diffusers.WanTransformer3DModel.from_pretrained(short_wan() / "transformer", torch_dtype=dtype).state_dict()
    assert not torch.equal(ours["blocks.0.attn1.to_q.weight"], plain["blocks.0.attn1.to_q.weight"])


def test_a_lora_that_has_moved(made: Made, tmp_path: Path) -> None:
    """Refused with its hash; taken where the user says it is; no other file in its place."""
    clip = (made.out, "--prompt", PROMPT, "-o", tmp_path / "c.gif", "--steps", 1, "--device", "cpu")
    moved = shutil.copy(made.lora, tmp_path / "moved.safetensors")
    other = write_peft(tmp_path / "other.safetensors", made.changes, how="keys")
    before = original(made, torch.float32)
    made.lora.unlink()
    try:
        digest = Artifact.open(made.out).manifest.lora[0]["sha256"]
        refused(run(*clip, "--mode", "16"), "fast.safetensors", digest, "--lora FILE")
        with pytest.raises(CheckpointError, match="no longer there"):
            original(made, torch.float32)
        after = original(made, torch.float32, LoraSpec(moved))
        assert all(torch.equal(before[name], after[name]) for name in before)
        drawn(*clip, "--mode", "16", "--lora", moved)
        refused(run(*clip, "--mode", "16", "--lora", other), "no longer there", digest)
        refused(run(*clip, "--lora", f"{moved}:0.7"), "scale 0.1", "0.7")
        shutil.copy(other, made.lora)
        refused(run(*clip, "--mode", "16"), "another file by now", digest)
    finally:
        shutil.copy(moved, made.lora)


def test_steps_and_guidance_of_the_export_are_the_defaults(made: Made, tmp_path: Path) -> None:
    common = (made.out, "--prompt", PROMPT, "-o", tmp_path / "c.gif", "--trace", tmp_path / "t.json", "--device", "cpu")
    result = run(*common)
    assert result.exit_code == 0, result.output
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert (clip["request"]["steps"], clip["request"]["guidance"]) == (4, 1.0)
    assert [record["branch"] for record in clip["records"]] == ["cond"] * 4
    assert "delta decides nothing; --last-high 0 leaves it 2" in result.output
    drawn(*common, "--steps", 2, "--guidance", 2, "--mode", "16")
    (clip,) = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert (clip["request"]["steps"], len(clip["records"])) == (2, 4)


def test_the_plan_says_what_is_left_to_delta(made: Made, tmp_path: Path) -> None:
    common = (made.out, "--prompt", PROMPT, "-o", tmp_path / "s.json", "--backend", "pytorch", "--device", "cpu")
    result = CliRunner().invoke(plan_main, [str(a) for a in common])
    refused(result, "no δ gives 6 bits", "--last-high 0", "with 4 steps")
    result = CliRunner().invoke(plan_main, [str(a) for a in (*common, "--last-high", 0)])
    assert result.exit_code == 0, result.output
    assert "with 4 steps" in result.output
    assert "2 are left to δ" in result.output
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 4


def test_free_steps_and_their_words() -> None:
    assert [free_steps(n, 2) for n in (2, 4, 5, 20)] == [0, 0, 1, 16]
    assert free_steps(4, 0, 2) == 0
    assert undecided(GenerateRequest("x", steps=20), 1) is None
    assert undecided(GenerateRequest("x", steps=4, mode="a4"), 1) is None
    words = undecided(GenerateRequest("x", steps=4), 2) or ""
    assert "each of 2 transformers" in words
    assert "--last-high" not in words


def test_the_report_knows_the_source_again(made: Made) -> None:
    report = collect(made.out, Artifact.open(made.out).manifest, Progress())
    assert report.checkpoint_bytes
    page = render_report(report)
    assert "fast.safetensors" in page
    assert "4 steps, guidance 1" in page
