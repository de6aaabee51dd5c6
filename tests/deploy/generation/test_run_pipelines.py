"""``dvdq-run`` with whole diffusers pipelines of tiny random parts, sound and damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.checkpoint.lora.spec import LoraSpec
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import GenerateRequest, generate, open_generator
from tests.support.commands import refused
from tests.support.lora_files import blocks, low_rank, write_peft
from tests.support.running import decode, drawn, run, wan_pipeline


@pytest.mark.parametrize("components", [1, 2])
def test_a_whole_pipeline(components: int, tmp_path: Path) -> None:
    out, pipeline = wan_pipeline(components)
    arguments = (out, "--pipeline", pipeline, "--steps", 4, "--backend", "onnxruntime", "--prompt", "a red cat")
    files = ("-o", tmp_path / "c.mp4", "--trace", tmp_path / "t.json", "--delta", 1000, "--last-high", 0)
    drawn(*arguments, *files, "--compare")
    clips = json.loads((tmp_path / "t.json").read_text())["clips"]
    assert decode(tmp_path / "c.mp4").shape[0] == 5
    assert [clip["request"]["mode"] for clip in clips] == ["16", "a8", "switch", "a4"]
    for clip in clips:
        assert [r["step"] for r in clip["records"]] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [r["branch"] for r in clip["records"]] == ["cond", "uncond"] * 4
        assert clip["request"]["num_frames"] == 5
        assert clip["request"]["guidance"] == 5.0
    assert clips[2]["blocks"] == ("██▄▄" if components == 1 else clips[2]["blocks"])
    assert clips[1]["psnr_to_16_bit"] > 25


def test_pipeline_generates_what_diffusers_does() -> None:
    """The original checkpoint through the generator is the pipeline called by hand."""
    import diffusers

    out, folder = wan_pipeline()
    made = generate(Artifact.open(out), GenerateRequest("a red cat", steps=3, seed=2, mode="16"), pipeline=folder)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=dtypes)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    size = {"num_frames": 5, "height": 32, "width": 32, "max_sequence_length": 12}
    frames = pipe("a red cat", num_inference_steps=3, generator=generator, output_type="np", **size).frames[0]
    assert np.array_equal(made.frames, np.rint(np.clip(frames.astype(np.float64), 0, 1) * 255).astype(np.uint8))


def test_defaults_of_a_distilled_export_and_a_lora_beside_it(tmp_path: Path) -> None:
    """A pipeline takes the recorded steps and guidance; its 16-bit model gets the LoRA that the export does not have."""
    out, folder = wan_pipeline()
    artifact = Artifact.open(out)
    distilled = dataclasses.replace(artifact.manifest, sampling={"steps": 4, "guidance": 1.0})
    path = write_peft(tmp_path / "lora.safetensors", low_rank(folder / "transformer", blocks(folder / "transformer")))
    loras = [LoraSpec(path, 0.5)]
    with open_generator(
        dataclasses.replace(artifact, manifest=distilled), pipeline=folder, backend="pytorch", device="cpu", lora=loras
    ) as generator:
        request = generator.check(GenerateRequest("a red cat", mode="a8"))
        assert (request.steps, request.guidance) == (4, 1.0)
        assert generator.check(GenerateRequest("a red cat", steps=7, guidance=3.0)).steps == 7
        made = [generator.generate(dataclasses.replace(request, mode=mode)) for mode in ("16", "a8")]
    assert all(len(one.trace) == 4 for one in made)
    assert made[1].executed["lora"] == [{"path": str(path), "scale": 0.5}]
    plain = generate(artifact, dataclasses.replace(request, mode="16"), pipeline=folder)
    assert not np.array_equal(made[0].latents, plain.latents)


def _no(*parts: str) -> Callable[[Path], Any]:
    return lambda folder: [shutil.rmtree(folder / part) for part in parts]


def _pickled(folder: Path) -> None:
    for path in (folder / "vae").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no("vae", "tokenizer"), ("tokenizer/ is missing", "vae/ is missing", "hf download")),
        (_pickled, ("pickled weights",)),
        (lambda f: (f / "vae" / "model.py").write_text(""), ("holds code",)),
        (lambda f: (f / "model_index.json").unlink(), ("model_index.json",)),
        (_index(lambda i: i.update(vae=["evil", "Thing"])), ("never run",)),
        (_index(lambda i: i.update(_class_name="WanVACEPipeline")), ("WanVACEPipeline", "WanPipeline")),
        (_index(lambda i: i.update(_class_name="LTXPipeline")), ("family wan",)),
        (_index(lambda i: i.update(transformer_2=i["transformer"])), ("transformer_2", "dvdq-export")),
        (lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"\1\2"), ("safetensors",)),
    ],
)
def test_pipelines_that_cannot_be_used(damage: Callable[[Path], Any], said: tuple[str, ...], tmp_path: Path) -> None:
    out, pipeline = wan_pipeline()
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    damage(folder)
    result = run(out, "--pipeline", folder, "--prompt", "a cat", "-o", tmp_path / "c.mp4", "--steps", 2)
    refused(result, *said)
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]


def test_a_link_out_of_the_pipeline_is_refused(tmp_path: Path) -> None:
    out, pipeline = wan_pipeline()
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    shutil.move(folder / "vae", tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    refused(
        run(out, "--pipeline", folder, "--prompt", "a cat", "-o", tmp_path / "c.mp4"), "reads outside", way_out=False
    )
