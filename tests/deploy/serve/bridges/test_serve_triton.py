"""The model repository in a real tritonserver: a step to the bit, a clip with progress, a cancel, errors in words."""

from __future__ import annotations

import ast
import importlib
import json
import os
import queue
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.serve.settings import SessionSettings
from dvdquant.deploy.sessions import open_session
from dvdquant.errors import Cancelled, ShapeError
from tests.support.exporting import TINY_WAN
from tests.support.running import PROMPT, short_wan_export
from tests.support.triton_server import require_tritonserver, tritonserver


def _write(folder: Path, *more: str) -> str:
    """The repository by the command; what it prints."""
    from click.testing import CliRunner

    from dvdquant.cli.serve import main

    words = [short_wan_export(), "--triton-repository", folder, "--pipeline", TINY_WAN, "--device", "cpu"]
    done = CliRunner().invoke(main, [str(word) for word in [*words, *(more or ("--backend", "onnxruntime"))]])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_writes_two_models(tmp_path: Path) -> None:
    said = _write(tmp_path / "models")
    files = sorted(path.relative_to(tmp_path / "models") for path in (tmp_path / "models").rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        f"{model}/{name}" for model in ("dvdq_step", "dvdq_video") for name in ("1/model.py", "config.pbtxt")
    ]
    assert len(said.splitlines()) == 4
    step = (tmp_path / "models/dvdq_step/config.pbtxt").read_text()
    assert '{ name: "hidden_states" data_type: TYPE_FP32 dims: [ -1, -1, -1, -1, -1 ] }' in step
    assert "decoupled: true" in (tmp_path / "models/dvdq_video/config.pbtxt").read_text()
    for path in files:
        if path.suffix == ".py":
            code = (tmp_path / "models" / path).read_text()
            compile(code, str(path), "exec")
            places = ast.literal_eval(code.partition('"DVDQ_SITE", ')[2].partition(")")[0]).split(os.pathsep)
            assert (Path(places[0]) / "dvdquant" / "__init__.py").is_file()  # a checkout is found, too


def _models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The models. The module of Triton's stub exists in its process alone: here it only names the codes."""
    codes = SimpleNamespace(TritonError=lambda *said: said)
    for name in ("INTERNAL", "CANCELLED", "INVALID_ARG"):
        setattr(codes.TritonError, name, name)
    name = "dvdquant.deploy.serve.triton_models"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", codes)
    monkeypatch.delitem(sys.modules, name, raising=False)
    models = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return models


def test_options_of_sessions_are_in_the_repository_and_reach_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    plugin = tmp_path / "plugin.so"
    plugin.touch()
    _write(
        tmp_path,
        "--plugin",
        str(plugin),
        "--compile",
        "--no-fuse",
        "--cuda-graphs",
        "--weights",
        "packed",
        "--device",
        "auto",
        "--attention",
        "int8",
        "--attention-backend",
        "reference",
    )
    parameters = {
        name: {"string_value": json.loads(value)}
        for name, value in re.findall(
            r'key: "(\w+)" value \{ string_value: (".*") \}', (tmp_path / "dvdq_step/config.pbtxt").read_text()
        )
    }
    models = _models(monkeypatch)
    opened: list[dict[str, Any]] = []

    def open_double(_: Any, **given: Any) -> Any:
        opened.append(given)
        return SimpleNamespace(family=SimpleNamespace(inputs=lambda _: []), sizes=None)

    monkeypatch.setattr(models, "open_session", open_double)
    given = {"model_instance_kind": "GPU", "model_instance_device_id": "1"}
    with config.patch(compile_threads=2):  # pytest's way to put it back takes it out of the configuration
        models.StepModel().initialize({**given, "model_config": json.dumps({"parameters": parameters})})
        assert config.compile_threads == 1
    asked = {"backend": "auto", "compile": True, "fuse": False, "cuda_graphs": True, "weights": "packed"}
    asked |= {"plugins": [str(plugin)], "attention": "int8", "attention_backend": "reference"}
    assert opened == [{**asked, "device": "cuda:1"}]
    # A repository that an earlier release wrote.
    del parameters["sessions"]
    parameters |= {"backend": {"string_value": "pytorch"}, "device": {"string_value": "cpu"}}
    models.StepModel().initialize({**given, "model_config": json.dumps({"parameters": parameters})})
    assert opened[1] == SessionSettings(backend="pytorch", device="cpu").arguments()


def test_the_text_of_a_failure_is_in_the_log_and_not_in_the_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = _models(monkeypatch)
    with caplog.at_level("WARNING"):
        refused = ShapeError("no such size in /srv/out/x", available="24x24", fix="ask for it")
        assert models.triton_error(refused) == ("no such size in x; available: 24x24; fix: ask for it", "INVALID_ARG")
        assert models.triton_error(Cancelled("it was cancelled"))[1] == "CANCELLED"
        assert caplog.text == ""
        assert models.triton_error(RuntimeError("a secret of the device")) == ("RuntimeError", "INTERNAL")
    assert "a secret of the device" in caplog.text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server with both models."""
    require_tritonserver()  # before an export is made
    folder = tmp_path_factory.mktemp("triton")
    _write(folder / "models")
    with tritonserver(folder / "models", folder) as (_, address):
        sys.path.append(str(Path(os.environ["DVDQ_TRITON"]).absolute() / "client"))
        grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: make triton-check")
        with grpc.InferenceServerClient(address) as client:
            yield SimpleNamespace(grpc=grpc, client=client)


def _tensor(grpc: Any, name: str, values: np.ndarray[Any, Any], kind: str) -> Any:
    tensor = grpc.InferInput(name, values.shape, kind)
    tensor.set_data_from_numpy(values)
    return tensor


def _step(server: Any, inputs: dict[str, torch.Tensor], bits: int) -> np.ndarray[Any, Any]:
    kinds = {torch.float32: "FP32", torch.int64: "INT64"}
    sent = [_tensor(server.grpc, name, value.numpy(), kinds[value.dtype]) for name, value in inputs.items()]
    sent.append(_tensor(server.grpc, "bits", np.array([bits], "i4"), "INT32"))
    found: np.ndarray[Any, Any] = server.client.infer("dvdq_step", sent).as_numpy("sample")
    return found


@pytest.mark.slow
def test_a_step_is_that_of_our_runtime(server: Any) -> None:
    with open_session(Artifact.open(short_wan_export()), backend="onnxruntime", device="cpu") as session:
        for seed, bits in ((0, 8), (1, 4), (2, 8)):
            inputs = session.family.sample(session.sizes, torch.float32, seed)
            assert np.array_equal(_step(server, inputs, bits), session.run(inputs, bits).float().numpy())
        with pytest.raises(server.grpc.InferenceServerException, match=r"INVALID_ARGUMENT.*16-bit activations"):
            _step(server, inputs, 16)
        with pytest.raises(server.grpc.InferenceServerException, match=r"INVALID_ARGUMENT.*outside the profile"):
            _step(server, {**inputs, "hidden_states": inputs["hidden_states"][:, :, :, :3].contiguous()}, 8)
    if os.environ.get("DVDQ_TRITON_TIMES"):
        stats = server.client.get_inference_statistics("dvdq_step", as_json=True)["model_stats"][0]["inference_stats"]
        times = {k: int(v["ns"]) / int(v["count"]) / 1e6 for k, v in stats.items() if isinstance(v, dict) and "ns" in v}
        print("milliseconds by stage, mean:", {name: round(value, 3) for name, value in times.items()})


@pytest.mark.slow
def test_a_clip_with_progress_cancel_and_errors(server: Any) -> None:
    grpc, client = server.grpc, server.client
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def text(name: str, value: str) -> Any:
        return _tensor(grpc, name, np.array([value.encode()], object), "BYTES")

    def ask(prompt: str, **fields: Any) -> None:
        sent = [text("prompt", prompt), text("request", json.dumps(fields))]
        client.async_stream_infer("dvdq_video", sent)

    def follow() -> tuple[list[int], bytes]:
        seen = []
        while True:
            result, error = got.get(timeout=300)
            assert error is None, error
            seen.append(int(result.as_numpy("progress")[0]))
            if seen[-1] == 100:
                return seen, result.as_numpy("mp4").tobytes()

    def begin_stream(**more: Any) -> None:
        client.start_stream(callback=lambda result, error: got.put((result, error)), **more)

    begin_stream()
    ask(PROMPT, num_inference_steps=4, guidance_scale=1, seed=5)
    seen, clip = follow()
    assert seen == [25, 50, 75, 99, 100]
    from dvdquant.deploy.generation.encoder import count_frames

    path = short_wan_export().parent / "triton.mp4"
    path.write_bytes(clip)
    assert count_frames(path) > 0
    client.stop_stream()
    for prompt, fields, said in (
        ("a cat", {}, "does not know the word"),
        (PROMPT, {"num_inference_steps": 1001}, "steps"),
        (PROMPT, {"nonsense": 1}, "nonsense"),
    ):
        begin_stream(headers={"triton_grpc_error": "true"})  # with the code, and the stream ends by it
        ask(prompt, **fields)
        _, error = got.get(timeout=300)
        client.stop_stream()
        assert said in str(error)
        assert "INVALID_ARGUMENT" in str(error.status())
        assert str(short_wan_export()) not in str(error)
    # A long one is cancelled after its first step: the next one is drawn at once.
    begin_stream()
    ask(PROMPT, num_inference_steps=100, guidance_scale=1)
    got.get(timeout=300)
    client.stop_stream(cancel_requests=True)
    while not got.empty():
        got.get()
    begin_stream()
    begin = time.monotonic()
    ask(PROMPT, num_inference_steps=1, guidance_scale=1)
    results = []
    while not results or results[-1][0] is None or int(results[-1][0].as_numpy("progress")[0]) != 100:
        results.append(got.get(timeout=300))
    assert time.monotonic() - begin < 240  # a guard: a hundred steps would have taken longer
    client.stop_stream()
