"""``dvdq-serve`` before it listens: what can be wrong on its command line, told in words with exit code 2."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dvdquant.cli.serve import main
from dvdquant.cli.serve_options import allowed_names, devices, gpus, read_keys
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.serve.bridges.direct import DirectModel
from dvdquant.deploy.serve.request.model_names import named, named_export
from dvdquant.deploy.serve.service import open_models
from dvdquant.deploy.serve.settings import Limits, ModelSource, ServerSettings, SessionSettings
from dvdquant.deploy.serve.workers.worker import open_model
from dvdquant.deploy.sessions import open_session
from dvdquant.errors import DvdquantError, UnsupportedError
from tests.support.commands import refused
from tests.support.session_exports import family_export

KEY = "0123456789abcdef"
LIBRARY = ("--attention-backend", "reference")


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """The server takes the log of its process; the tests after it get theirs back."""
    root, ours = logging.getLogger(), logging.getLogger("dvdquant.deploy.serve")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture(scope="module")
def out() -> Path:
    """Some export."""
    return family_export("wan")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """The settings that the command would serve with."""
    seen: list[ServerSettings] = []
    monkeypatch.setattr("dvdquant.deploy.serve.server.serve", lambda given, **_: seen.append(given))
    return seen


def test_models_have_names_and_devices_have_workers(out: Path, settings: list[ServerSettings], tmp_path: Path) -> None:
    words = [
        f"small={out}",
        f"large={out}",
        "--pipeline",
        "large=org/model",
        "--device",
        "cuda:0,cuda:2",
        "--workers",
        2,
    ]
    assert _run(*words, "--data", tmp_path / "data", "--queue", 5, "--keep-hours", 2).exit_code == 0
    (given,) = settings
    assert [(model.name, model.pipeline) for model in given.models] == [("small", None), ("large", "org/model")]
    assert given.devices == ("cuda:0", "cuda:0", "cuda:2", "cuda:2")
    assert (given.host, given.limits.queue, given.keep, given.api_keys) == ("127.0.0.1", 5, 7200, ())
    assert given.allowed_hosts == ("127.0.0.1", "localhost", "[::1]")
    assert given.worker("w", "cuda:2").device == "cuda:2"


def test_how_steps_run_reaches_the_sessions_of_workers(
    out: Path, settings: list[ServerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[object, ...]] = []
    names = ("cuda_graphs", "attention", "attention_backend")
    monkeypatch.setattr(
        "dvdquant.deploy.generation.generate.open_generator",
        lambda *_, **given: opened.append(tuple(given[name] for name in names)),
    )
    for words in ((), ("--cuda-graphs",), ("--attention", "fp8"), ("--attention", "int8", *LIBRARY)):
        assert _run(out, "--data", tmp_path / "data", *words).exit_code == 0
        worker = settings[-1].worker("w", "cpu")
        open_model(worker, worker.models[0])
    assert opened == [(False, None, None), (True, None, None), (False, "fp8", None), (False, "int8", "reference")]


def test_plugins_reach_the_sessions_of_workers(
    out: Path, settings: list[ServerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "dvdquant.deploy.generation.generate.open_generator", lambda *_, **given: opened.append(given["plugins"])
    )
    (tmp_path / "plugin.so").touch()
    monkeypatch.chdir(tmp_path)
    assert _run(out, "--data", tmp_path / "data", "--plugin", "plugin.so").exit_code == 0
    worker = settings[-1].worker("w", "cpu")
    open_model(worker, worker.models[0])
    assert opened == [(str(tmp_path / "plugin.so"),)]


def test_options_of_sessions_reach_a_worker_of_dynamo(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo itself is not needed: its worker opens the model that is handed to it here."""
    opened: list[dict[str, Any]] = []

    def serve_dynamo(source: ModelSource, sessions: SessionSettings, limits: Limits) -> None:
        DirectModel(source, sessions, limits)

    worker = "dvdquant.deploy.serve.bridges.dynamo_worker"
    monkeypatch.setitem(sys.modules, worker, SimpleNamespace(serve_dynamo=serve_dynamo))  # type: ignore[arg-type]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name.startswith("dynamo") else find(name))
    monkeypatch.setattr("dvdquant.deploy.serve.bridges.direct.ServedModel", lambda *_: None)
    monkeypatch.setattr("dvdquant.deploy.serve.bridges.direct.open_generator", lambda *_, **given: opened.append(given))
    plugin = tmp_path / "plugin.so"
    plugin.touch()
    words = ("--compile", "--no-fuse", "--cuda-graphs", "--weights", "packed", "--device", "cpu", "--plugin", plugin)
    words += ("--attention", "int8", *LIBRARY)
    for given in ((), words):
        done = _run(out, "--dynamo", *given)
        assert done.exit_code == 0, done.output
    usual = {"pipeline": None, "backend": "auto", "device": "auto", "weights": "auto", "plugins": ()}
    usual |= {"attention": None, "attention_backend": None}
    assert opened[0] == {**usual, "compile": False, "fuse": None, "cuda_graphs": False}
    changed = {"compile": True, "fuse": False, "cuda_graphs": True, "weights": "packed", "device": "cpu"}
    changed |= {"plugins": (str(plugin),), "attention": "int8", "attention_backend": "reference"}
    assert opened[1] == {**usual, **changed}


def test_options_of_sessions_without_effect_are_refused_before_an_export_is_opened(tmp_path: Path) -> None:
    """In dvdq-run's words: the export is not even there."""
    gone = tmp_path / "gone"
    for words, said in (
        (("--cuda-graphs", "--backend", "onnxruntime"), "ONNX Runtime has none, so --cuda-graphs does not apply"),
        (("--compile", "--backend", "rtx"), "--compile runs in PyTorch, so --backend rtx does not apply"),
        (("--fuse", "--backend", "tensorrt"), "--fuse runs in PyTorch, so --backend tensorrt does not apply"),
        (
            ("--plugin", __file__, "--backend", "rtx"),
            "--plugin is for TensorRT engines, so --backend rtx does not apply",
        ),
        (
            (*LIBRARY, "--backend", "rtx"),
            "--attention-backend runs in PyTorch, so --backend rtx does not apply",
        ),
        (("--attention", "fp8", "--backend", "onnxruntime"), "in 16 bit, so --attention fp8 does not apply"),
        ((*LIBRARY, "--attention", "16", "--triton-repository", tmp_path / "t"), "--attention 16 does not apply"),
        (("--weights", "packed", "--backend", "rtx"), "as they were built, so --weights packed does not apply"),
        (("--compile", "--backend", "rtx", "--dynamo"), "--compile runs in PyTorch, so --backend rtx does not apply"),
    ):
        refused(_run(gone, *words), said, "leave one of the two out")
    refused(_run(gone, "--plugin", tmp_path / "none.so"), "none.so is not there", "make plugin")
    refused(_run(gone, "--attention-backend", "flash"), "unknown attention library 'flash'", "fa3-fwd", "reference")
    assert not list(tmp_path.iterdir())


def test_options_of_the_server_that_triton_and_dynamo_have_no_place_for_are_refused(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVDQ_STORE", "postgresql://none.invalid/jobs")  # of the environment: for all commands
    folder = tmp_path / "triton"
    for words, said in (
        (("--queue", 5), "--triton-repository writes files and serves nothing, so --queue does not apply"),
        (("--schedule", "s.json", "--dynamo"), "so --schedule, --dynamo do not apply"),
        (("--host", "0.0.0.0", "--workers", 2), "so --host, --workers do not apply"),
    ):
        refused(_run(out, "--triton-repository", folder, *words), said, "leave out what does not apply")
    for words, said in (
        (
            ("--port", 9000),
            "--dynamo serves no HTTP, keeps no queue, and warms up in any case, so --port does not apply",
        ),
        (("--store", "postgresql://x/y", "--no-warm-up"), "so --store, --no-warm-up do not apply"),
    ):
        refused(_run(out, "--dynamo", "--max-steps", 9, "-v", *words), said, "leave out what does not apply")
    assert not list(tmp_path.iterdir())
    assert _run(out, "--triton-repository", folder, "--device", "cpu", "--weights", "packed", "-v").exit_code == 0


def test_a_library_of_attention_that_a_recipe_in_16_bit_excludes_is_refused_before_a_worker_starts(
    out: Path, tmp_path: Path
) -> None:
    """In the words of a session, by the server, for Triton and for Dynamo; nothing is written."""
    with pytest.raises(UnsupportedError) as session:
        open_session(Artifact.open(out), device="cpu", attention_backend="reference")
    where = ("--data", tmp_path / "data", "--port", 0)
    for words in (where, ("--triton-repository", tmp_path / "triton"), ("--dynamo",)):
        refused(_run(out, *words, *LIBRARY), session.value.what, session.value.fix or "", "int8, fp8")
        on_a_cpu = ("--attention", "int8", "--attention-backend", "cudnn", "--device", "cpu")
        refused(_run(out, *words, *on_a_cpu), "attention by cudnn is not possible: it needs a CUDA device", "reference")
    assert not list(tmp_path.iterdir())


def test_an_export_in_16_bit_does_not_take_the_place_of_one_in_8_while_a_library_of_attention_is_named(
    out: Path,
) -> None:
    """The interface says so, also where the server or Ray's builder does not reach the export."""
    settings = ServerSettings(models=(ModelSource("wan", str(out)),), data=out, attention_backend="reference")
    with pytest.raises(UnsupportedError, match="'reference' computes 8-bit attention, and attention is in 16 bit"):
        open_models(settings)
    assert list(open_models(dataclasses.replace(settings, attention="int8"))) == ["wan"]


def test_what_is_wrong_is_said_before_anything_starts(out: Path, tmp_path: Path) -> None:
    refused(_run(), "Missing argument", way_out=False)
    refused(_run(tmp_path), str(tmp_path))
    refused(_run(f"a={out}", f"a={out}"), "two models are called a")
    refused(_run(out, "--host", "0.0.0.0"), "no API key", "--open")
    refused(_run(f"a={out}", f"b={out}", "--pipeline", "org/model"), "is for no model here")
    refused(_run(out, "--schedule", tmp_path / "none.json"), "none.json")
    refused(_run(out, "--api-key-file", tmp_path / "none"), "cannot be read")
    refused(_run(out, "--s3-endpoint", "http://minio:9000"), "--s3-endpoint is for clips in an object store", "--files")
    refused(_run(out, "--device", ","), "names no device", "available: auto")
    refused(_run(out, "--port", 99999), "99999", way_out=False)
    (tmp_path / "keys").write_text("# none\n\n")
    refused(_run(out, "--api-key-file", tmp_path / "keys"), "holds no key")


def test_an_address_in_use_is_refused(out: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(_run(out, "--data", tmp_path / "data", "--port", taken.getsockname()[1]), "cannot listen", "--port")
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    refused(_run(out, "--data", tmp_path / "data" / "server.lock"), "server.lock")
    refused(_run(out, "--data", tmp_path / "other", "--host", "no.such.host.invalid", "--open"), "cannot listen")


def test_a_model_without_its_pipeline_is_refused_before_the_server_listens(out: Path, tmp_path: Path) -> None:
    refused(_run(out, "--data", tmp_path / "data", "--port", 0, "--pipeline", tmp_path / "gone"), "gone", "fix:")


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DVDQ_API_KEY", raising=False)
    assert read_keys(None) == []
    monkeypatch.setenv("DVDQ_API_KEY", f" {KEY}\n")
    assert read_keys(None) == [KEY]
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n{KEY[::-1]}\n")
    assert read_keys(path) == [KEY, KEY[::-1]]
    bad: Any
    for bad in ("short", KEY + " x", KEY + "é", KEY + "\x01"):
        path.write_text(bad)
        with pytest.raises(DvdquantError, match="shorter than 16"):
            read_keys(path)


def test_small_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert named("a=b") == ("a", "b")
    assert named("/x/a=b") is None
    assert named("plain") is None
    assert named_export("/x/a=b/out") == ("out", "/x/a=b/out")
    assert named_export("a=/x/out/") == ("a", "/x/out")
    assert allowed_names("0.0.0.0", ()) == ()
    assert allowed_names("0.0.0.0", ("Video.Example",)) == ("127.0.0.1", "localhost", "[::1]", "video.example")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert devices("auto", 1) == ("cuda:0", "cuda:1", "cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices("auto", 2) == ("auto", "auto")
    assert devices("cpu", 1) == ("cpu",)
