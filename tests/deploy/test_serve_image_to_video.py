"""Image to video over HTTP: OpenAI's client, forms and JSON; the picture of a request begins its clip, and goes with its job."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.video import write_mp4
from dvdquant.deploy.serve.settings import Limits
from tests.support.image_pipelines import ImageModel, image_model
from tests.support.serving import LocalServer, local_server

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"prompt": "a cat", "mode": "a8", "num_inference_steps": 1, "guidance_scale": 1, "seed": 3}
LIMITS = Limits(body=4096, picture=100_000, picture_pixels=20_000)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (128, 96)) -> bytes:
    """A picture of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED = picture((200, 10, 10))
URL = "data:image/png;base64," + base64.b64encode(RED).decode()


@pytest.fixture(scope="module")
def model() -> ImageModel:
    """A model that takes a first and a last image, or none."""
    return image_model("ltx-condition")


@pytest.fixture(scope="module")
def server(model: ImageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """It draws on the CPU."""
    with local_server(model.made.out, tmp_path_factory.mktemp("i2v") / "data", model.pipeline, LIMITS) as server:
        yield server


def test_openai_client_begins_a_clip_with_a_picture(server: LocalServer, model: ImageModel, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="needs openai: pip install 'dvdquant[test]'")
    more = {name: value for name, value in ASKED.items() if name != "prompt"}
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        made = client.videos.create(prompt="a cat", model="model", input_reference=("a.png", RED), extra_body=more)
        # The client itself takes no object here, though its types have one.
        by_url = {**more, "input_reference": {"image_url": URL}}
        same = client.videos.create(prompt="a cat", model="model", extra_body=by_url)
        clips = []
        for video in (made, same):
            assert client.videos.poll(video.id, poll_interval_ms=100).status == "completed"
            clips.append(client.videos.download_content(video.id).read())
        assert clips[0] == clips[1]
        folder = server.service.files.pictures
        assert len(list(folder.rglob("*.png"))) == 2
        for video in (made, same):
            assert client.videos.delete(video.id).deleted
        assert list(folder.rglob("*.png")) == []
        with pytest.raises(openai.BadRequestError, match="fetches nothing"):
            client.videos.create(
                prompt="a cat", extra_body={"input_reference": {"image_url": "https://example.org/x.png"}}
            )
    path = tmp_path / "library.mp4"
    with open_generator(
        Artifact.open(model.made.out), pipeline=model.pipeline, backend="onnxruntime", device="cpu"
    ) as generator:
        result = generator.generate(GenerateRequest("a cat", steps=1, guidance=1, seed=3, mode="a8", image=RED))
        write_mp4(path, result.frames, generator.fps(len(result.frames)))
    assert path.read_bytes() == clips[0]
