"""The stages of a clip apart: text to embeddings, the loop, latents to pictures; each as the pipeline's own call has it."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import GenerateRequest, open_generator
from dvdquant.deploy.generation.pipeline_stages import decode_video, encode_text, frames_of
from dvdquant.errors import EngineError
from dvdquant.model.families import get_family
from tests.support.running import PROMPT, short_wan_export, wan_pipeline
from tests.support.tiny_pipelines import KINDS, TOKENS, build_pipeline

pytestmark = pytest.mark.usefixtures("lent_sessions")


def as_bytes(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Frames of diffusers in [0, 1] as pictures, in float64."""
    return np.rint(frames.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("guidance", "kind"),
    [
        *((4.0, kind) for kind in ("wan", "hunyuan-video", "cogvideox", "ltx-video")),
        *((1.0, kind) for kind in ("wan", "cogvideox-1.5")),
        pytest.param(4.0, "cogvideox-1.5", marks=pytest.mark.stress),
        *(pytest.param(1.0, kind, marks=pytest.mark.stress) for kind in ("hunyuan-video", "cogvideox", "ltx-video")),
    ],
)
def test_stages_are_the_call_of_the_pipeline(kind: str, guidance: float) -> None:
    """Both ends of a pipeline, with its own loop between them, give the frames of one call, bit by bit."""
    config = KINDS[kind].config
    torch.manual_seed(0)
    model = getattr(diffusers, config["_class_name"]).from_config(config).to(torch.bfloat16).eval()
    pipe, family = build_pipeline(kind, model), get_family(config)
    call = {"num_inference_steps": 2, "guidance_scale": guidance, "max_sequence_length": TOKENS, **KINDS[kind].size}
    negative = {} if kind == "hunyuan-video" else {"negative_prompt": "snow"}
    whole = pipe("a red cat", **negative, generator=torch.Generator().manual_seed(5), output_type="np", **call).frames[
        0
    ]
    request = GenerateRequest("a red cat", guidance=guidance, **negative, **KINDS[kind].size)
    with torch.no_grad():
        embeddings = encode_text(pipe, family, request, TOKENS)
        assert ("negative_prompt_embeds" in embeddings) == (guidance > 1 and kind != "hunyuan-video")
        latents = pipe(**embeddings, generator=torch.Generator().manual_seed(5), output_type="latent", **call).frames
        video = decode_video(pipe, family, request, latents, embeddings["prompt_embeds"].dtype)
        frames = frames_of(video)
    assert np.array_equal(frames, as_bytes(whole))
    assert len(np.unique(frames)) > 3


def test_a_timestep_of_the_vae_is_the_pipelines() -> None:
    """LTX's later VAEs take a timestep; the pipeline's default mixes no noise in."""
    config = KINDS["ltx-video"].config
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel.from_config(config).to(torch.bfloat16).eval()
    pipe, family = build_pipeline("ltx-video", model), get_family(config)
    torch.manual_seed(2)
    pipe.vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=True,
    ).eval()
    call = {"num_inference_steps": 2, "max_sequence_length": TOKENS, **KINDS["ltx-video"].size}
    whole = pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="np", **call).frames[0]
    latents = pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="latent", **call).frames
    request = GenerateRequest("a cat", **KINDS["ltx-video"].size)
    with torch.no_grad():
        frames = frames_of(decode_video(pipe, family, request, latents, torch.bfloat16))
    assert np.array_equal(frames, as_bytes(whole))


def test_pictures_that_are_not_finite() -> None:
    video = torch.zeros(1, 3, 4, 8, 8)
    assert frames_of(video).tolist() == np.full((4, 8, 8, 3), 128).tolist()
    video[0, 2, 3, 7, 7] = float("nan")
    with pytest.raises(EngineError, match="NaN or infinities"):
        frames_of(video)


@pytest.mark.parametrize("model", ["table", "pipeline"])
def test_a_generator_in_stages(model: str) -> None:
    """Text, loop and pictures by three generators, as three servers would have them, are the clip of one."""
    out, folder = wan_pipeline() if model == "pipeline" else (short_wan_export(), None)
    prompt = "a red cat" if model == "pipeline" else PROMPT
    artifact = Artifact.open(out)
    options: dict[str, Any] = {"pipeline": folder, "backend": "onnxruntime", "device": "cpu"}
    with (
        open_generator(artifact, **options) as first,
        open_generator(artifact, **options) as second,
        open_generator(artifact, **options) as third,
    ):
        for mode in ("a4", "16"):
            request = first.check(GenerateRequest(prompt, steps=2, seed=4, mode=mode))
            heard: list[Any] = []
            done = second.denoise(request, first.encode_prompt(request), heard.append)
            frames = third.decode(request, done.latents)
            whole = first.generate(request)
            assert np.array_equal(frames, whole.frames)
            assert torch.equal(done.latents.float(), whole.latents)
            assert heard == done.trace
            assert [r.bits for r in done.trace] == [r.bits for r in whole.trace]
