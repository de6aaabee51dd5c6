"""NVIDIA Dynamo: its requests in our names, and its own frontend before a worker of ours."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import open_generator
from dvdquant.deploy.generation.request import GenerateRequest
from dvdquant.deploy.generation.video import write_mp4
from dvdquant.deploy.serve.bridges.dynamo_request import fields_of
from dvdquant.errors import DvdquantError
from tests.support.dynamo import dynamo
from tests.support.exporting import TINY_WAN
from tests.support.running import PROMPT, short_wan_export


def test_a_request_of_dynamo_in_our_names() -> None:
    request = {
        "prompt": "a cat",
        "model": "wan",
        "size": "64x48",
        "user": "someone",
        "stream": False,
        "_HEALTH_CHECK": True,
        "nvext": {"num_frames": 9, "seed": 3, "fps": None, "annotations": ["x"]},
        "extra_args": {"media_passthrough": {"mode": "a8", "seed": 3}},
    }
    asked = {"prompt": "a cat", "size": "64x48", "num_frames": 9, "seed": 3, "mode": "a8"}
    assert fields_of(request) == (asked, True)
    assert fields_of({"prompt": "a", "response_format": "b64_json"}) == ({"prompt": "a"}, False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"output_format": "webm"}, "available: mp4"),
        ({"stream": True}, "not streamed"),
        ({"response_format": "png"}, "url, b64_json"),
        ({"nvext": 3}, "nvext is 3"),
        ({"extra_args": {"media_passthrough": []}}, "extra_args is"),
        ({"seed": 1, "nvext": {"seed": 2}}, "given twice"),
    ],
)
def test_requests_that_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(DvdquantError) as error:
        fields_of({"prompt": "a", **more})
    assert said in str(error.value)


@pytest.mark.slow
def test_dynamos_frontend_draws_with_a_worker(tmp_path: Path) -> None:
    out = short_wan_export()
    asked = {"prompt": PROMPT, "model": "tiny", "response_format": "b64_json"}
    arguments = [f"tiny={out}", "--pipeline", TINY_WAN, "--device", "cpu", "--backend", "onnxruntime"]
    with dynamo(arguments, "tiny", tmp_path) as url, httpx.Client(base_url=url, timeout=300) as client:
        nvext = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 5}
        answer = client.post("/v1/videos", json={**asked, "nvext": nvext, "mode": "a8"})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["status"], body["model"], body["data"][0]["output_format"]) == ("completed", "tiny", "mp4")
        clip = base64.b64decode(body["data"][0]["b64_json"])
        # The same clip as the library's own.
        with open_generator(Artifact.open(out), pipeline=TINY_WAN, backend="onnxruntime", device="cpu") as generator:
            result = generator.generate(GenerateRequest(PROMPT, steps=4, guidance=1, seed=5, mode="a8"))
            write_mp4(tmp_path / "library.mp4", result.frames, generator.fps(len(result.frames)))
        assert clip == (tmp_path / "library.mp4").read_bytes()
        # By address: in the place that Dynamo names.
        answer = client.post("/v1/videos", json={**asked, "nvext": nvext, "mode": "a8", "response_format": "url"})
        place = answer.json()["data"][0]["url"].removeprefix("https://clips.example/")
        assert (tmp_path / "clips" / place).read_bytes() == clip
        # Wrong requests are the client's, in words, and no path gets out.
        for more, word in (
            ({"prompt": "a cat"}, "does not know the word"),
            ({"nvext": {"num_inference_steps": 1001}}, "steps"),
            ({"nonsense": 1}, "nonsense"),
            ({"nvext": {"boundary_ratio": 0.5}}, "boundary_ratio"),
        ):
            answer = client.post("/v1/videos", json={**asked, **more})
            assert answer.status_code == 400, answer.text
            assert word in answer.text
            assert str(out) not in answer.text
        # The clip of a client that goes is not drawn to its end.
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/videos", json={**asked, "nvext": {"num_inference_steps": 100}}, timeout=0.5)
        end = time.monotonic() + 120
        while "request_cancelled" not in (tmp_path / "worker.log").read_text():
            assert time.monotonic() < end
            time.sleep(0.2)
        assert client.post("/v1/videos", json={**asked, "nvext": nvext}).status_code == 200
