"""A folder of ComfyUI's files becomes an export and a clip: text encoder, VAE and scheduler come from a named pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvdquant.artifact.manifest import load_manifest
from dvdquant.deploy.artifact import Artifact
from dvdquant.model.families.pipelines import known_pipeline
from tests.support import other_formats as formats
from tests.support import tiny_models as tiny
from tests.support.commands import in_process, refused
from tests.support.commands import run as export
from tests.support.running import decode, drawn, run, wan_pipeline
from tests.support.tiny_pipelines import KINDS, TOKENS

SIZES = ("--latent", KINDS["wan"].latent, "--text-tokens", TOKENS, "--target", "graphs", "--recipe", "w4a4")
CLIP = ("--prompt", "a red cat", "--steps", 2, "--mode", "a8", "--backend", "onnxruntime", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders, with the transformer of :func:`wan_pipeline` in ComfyUI's form."""
    root = tmp_path_factory.mktemp("comfy") / "models"
    source = wan_pipeline()[0].parent / "source" / "transformer"
    tensors = formats.wan_original(formats.folder_tensors(source))
    formats.save_single(root / "diffusion_models" / "wan.safetensors", tensors, "model.diffusion_model.")
    for name in ("text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "vae/wan_2.1_vae.safetensors"):
        (root / name).parent.mkdir()
        formats.save_single(root / name, {"weight": next(iter(tensors.values()))})
    shutil.copy(source / "config.json", root / "config.json")  # the tiny model's heads do not show in its shapes
    return root


def test_one_line_exports_and_the_next_draws(models: Path, tmp_path: Path) -> None:
    plain, pipeline = wan_pipeline()
    common = (models / "diffusion_models", "-o", tmp_path / "out", *SIZES, "--config", models / "config.json")
    assert f"text encoder, VAE and scheduler: {pipeline}" in in_process(*common, "--pipeline", pipeline, "--dry-run")
    in_process(*common, "--pipeline", pipeline)
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.manifest.source["pipeline"] == str(pipeline)
    assert f"--pipeline {pipeline}" in artifact.rebuild_command()
    drawn(tmp_path / "out", *CLIP, "-o", tmp_path / "ours.gif")
    drawn(plain, "--pipeline", pipeline, *CLIP, "-o", tmp_path / "theirs.gif")
    np.testing.assert_array_equal(decode(tmp_path / "ours.gif"), decode(tmp_path / "theirs.gif"))
    # Another pipeline is recorded without making the weights anew.
    moved = Path(shutil.copytree(pipeline, tmp_path / "moved"))
    before = load_manifest(tmp_path / "out").files["onnx/transformer.safetensors"]
    assert "up to date" in export(*common, "--pipeline", moved).stderr
    after = load_manifest(tmp_path / "out")
    assert (after.source["pipeline"], after.files["onnx/transformer.safetensors"]) == (str(moved), before)


def test_without_a_pipeline_the_error_says_which(models: Path, tmp_path: Path) -> None:
    plain = wan_pipeline()[0]
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    data = json.loads((out / "manifest.json").read_text())
    for model, words in (
        (models / "diffusion_models" / "wan.safetensors", "the single file"),
        (models / "diffusion_models", "the files in"),
    ):
        data["source"]["model"] = str(model)
        (out / "manifest.json").write_text(json.dumps(data))
        refused(run(out, *CLIP, "-o", tmp_path / "c.gif"), words, "--pipeline ORG/NAME", "dvdq-export --pipeline")
    dry = ("-o", tmp_path / "new", *SIZES, "--config", models / "config.json", "--dry-run")
    assert "give --pipeline FOLDER" in in_process(models / "diffusion_models", *dry)
    for place, words in ((models, "is no diffusers pipeline"), (tmp_path / "none", "none")):
        refused(export(models / "diffusion_models", *dry, "--pipeline", place), words)


@pytest.mark.parametrize(
    ("family", "config", "transformers", "name"),
    [
        ("wan", {"num_layers": 40, "in_channels": 16}, 1, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("wan", {"num_layers": 30, "in_channels": 16}, 1, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("wan", {"num_layers": 40, "in_channels": 16}, 2, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("wan", {"num_layers": 40, "in_channels": 36}, 2, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        ("wan", {"num_layers": 30, "in_channels": 48}, 1, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("wan", {"num_layers": 40, "in_channels": 36, "image_dim": 1280}, 1, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ("wan", {"image_dim": 1280, "pos_embed_seq_len": 514}, 1, "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"),
        ("wan", {**tiny.WAN}, 1, None),
        ("hunyuan-video", {"num_layers": 20}, 1, "hunyuanvideo-community/HunyuanVideo"),
        (
            "hunyuan-video",
            {"num_layers": 20, "image_condition_type": "token_replace"},
            1,
            "hunyuanvideo-community/HunyuanVideo-I2V",
        ),
        ("ltx-video", {"num_layers": 28}, 1, "Lightricks/LTX-Video"),
    ],
)
def test_pipelines_of_published_models(
    family: str, config: dict[str, Any], transformers: int, name: str | None
) -> None:
    assert known_pipeline(family, {"text_dim": 4096, **config}, transformers) == name
