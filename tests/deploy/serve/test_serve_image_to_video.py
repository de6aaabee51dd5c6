"""Image to video over HTTP: OpenAI's client, forms and JSON; the picture of a request begins its clip, and goes with its job."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation import images
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


RED, BLUE = picture((200, 10, 10)), picture((10, 10, 200))
URL = "data:image/png;base64," + base64.b64encode(RED).decode()


@pytest.fixture(scope="module")
def model() -> ImageModel:
    """A model that takes a first and a last image, or none."""
    return image_model("ltx-condition")


@pytest.fixture(scope="module")
def server(model: ImageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """It draws on the CPU."""
    data = tmp_path_factory.mktemp("i2v") / "data"
    with local_server(model.made.out, data, model.pipeline, LIMITS, backend="pytorch") as server:
        yield server


def _drawn(server: LocalServer, client: httpx.Client, made: httpx.Response) -> bytes:
    assert made.status_code == 200, made.text
    place = f"/v1/videos/{made.json()['id']}"
    state = client.get(place, params={"wait": 60}).json()
    assert state["status"] == "completed", state
    return client.get(f"{place}/content").content


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
        Artifact.open(model.made.out), pipeline=model.pipeline, backend="pytorch", device="cpu"
    ) as generator:
        result = generator.generate(GenerateRequest("a cat", steps=1, guidance=1, seed=3, mode="a8", image=RED))
        write_mp4(path, result.frames, generator.fps(len(result.frames)))
    assert path.read_bytes() == clips[0]


def test_the_last_picture_counts_and_json_is_as_good_as_a_form(server: LocalServer) -> None:
    with server.client() as client:
        asked = {**ASKED, "num_frames": 9}  # the tokens of a last picture come on top
        one = {"input_reference": URL}
        both = {**one, "last_reference": base64.b64encode(BLUE).decode()}
        first = _drawn(server, client, client.post("/v1/videos", json={**asked, **one}))
        made = client.post("/v1/videos", json={**asked, **both})
        clip = _drawn(server, client, made)
        assert clip != first
        files = {"input_reference": ("a", RED), "last_reference": ("b", BLUE)}
        assert _drawn(server, client, client.post("/v1/videos", data=asked, files=files)) == clip
        told = client.get(f"/v1/videos/{made.json()['id']}").json()["dvdquant"]["request"]["last_reference"]
        assert (told["width"], told["height"], len(told["sha256"])) == (128, 96, 64)
        facts = client.get("/v1/models/model").json()["dvdquant"]
        assert facts["pictures"] == {"input_reference": "optional", "last_reference": "optional"}
        plan = client.post("/preflight", json={**asked, **both})
        assert plan.json()["transformer_calls"] == 1


def test_pictures_that_cannot_be_taken(server: LocalServer) -> None:
    before = len(list(server.service.files.pictures.rglob("*.png")))
    with server.client() as client:
        for path in ("/v1/videos", "/preflight"):
            for raw, said in (
                (b"no picture", "no image that can be read"),
                (RED[:60], "damaged"),
                (picture((1, 1, 1), (200, 200)), "200×200 pixels"),
                (b"x" * 100_001, "100001 bytes"),
            ):
                answer = client.post(path, data=ASKED, files={"input_reference": ("../../x.png", raw)})
                assert answer.status_code == 400, answer.text
                assert said in answer.json()["error"]["message"]
                assert str(server.service.settings.data) not in answer.text
            answer = client.post(path, data=ASKED, files={"last_reference": ("x.png", RED), "other": ("y", RED)})
            assert "'other' is unknown" in answer.json()["error"]["message"]
        most = server.service.settings.limits.body_with_pictures
        assert client.post("/v1/videos", json={"prompt": "x" * most}).status_code == 413
    assert len(list(server.service.files.pictures.rglob("*.png"))) == before


def test_a_full_queue_is_said_before_a_picture_is_decoded_and_leaves_no_file(
    model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a worker that never comes; a start on the same folder finds the picture."""
    from dvdquant.deploy.serve import service

    decoded: list[str] = []
    original = service.decode_picture
    monkeypatch.setattr(
        service, "decode_picture", lambda raw, name, most: decoded.append(name) or original(raw, name, most)
    )
    limits = Limits(queue=1, body=4096, picture=100_000)
    with (
        local_server(model.made.out, tmp_path, model.pipeline, limits, draws=False, backend="pytorch") as waiting,
        waiting.client() as client,
    ):
        made = client.post("/v1/videos", data=ASKED, files={"input_reference": ("x", RED)})
        assert made.status_code == 200
        assert client.post("/v1/videos", data=ASKED, files={"input_reference": ("x", RED)}).status_code == 429
        assert decoded == ["input_reference"]
        monkeypatch.setattr(waiting.service, "queue_is_full", lambda: False)  # another request came first
        assert client.post("/v1/videos", data=ASKED, files={"input_reference": ("x", RED)}).status_code == 429
        assert len(list((tmp_path / "pictures").rglob("*.png"))) == 1
        video = made.json()["id"]
        kept = images.open_picture(waiting.service.files.picture(video, "input_reference"), "x").image
        assert kept.getpixel((0, 0)) == (200, 10, 10)
    again = local_server(model.made.out, tmp_path, model.pipeline, limits, backend="pytorch")
    with again as server, server.client() as client:
        state = client.get(f"/v1/videos/{video}", params={"wait": 60}).json()
        assert (state["status"], state["dvdquant"]["attempts"]) == ("completed", 1)
