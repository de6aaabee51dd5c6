"""Words for devices, and that ``dvdq-export`` quantizes on the device it was told: without a GPU, by what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.artifact.manifest import load_manifest
from dvdquant.checkpoint.opening import open_checkpoint
from dvdquant.errors import ExportError, UnsupportedError
from dvdquant.export import pipeline
from dvdquant.model.plan import plan_model
from dvdquant.quantize.hessian import build_skeleton, move_buffers, streamed
from dvdquant.quantize.synthetic_inputs import synthetic_inputs
from dvdquant.recipe import get_recipe
from dvdquant.system.devices import resolve_device
from tests.support import tiny_models as tiny
from tests.support.commands import SIZES, in_process, refused, run


def with_two_gpus(patched: pytest.MonkeyPatch) -> None:
    """As on a machine with two GPUs, the second of them current."""
    patched.setattr(torch.cuda, "is_available", lambda: True)
    patched.setattr(torch.cuda, "device_count", lambda: 2)
    patched.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_two_gpus(monkeypatch)


@pytest.fixture
def exporter_sees_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """While words are resolved, and no longer: PyTorch's tracing asks for the GPU that it believes in."""

    def resolve(text: str) -> torch.device:
        with pytest.MonkeyPatch.context() as patched:
            with_two_gpus(patched)
            return resolve_device(text)

    monkeypatch.setattr("dvdquant.export.options.resolve_device", resolve)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


NO_WORDS = (
    "",
    "tpu",
    "CUDA",
    "cuda:",
    "cuda:-1",
    "cuda:01",
    "cuda: 1",
    "cuda:1 ",
    "cuda:٣",
    "cuda:1:2",
    "meta",
)


@pytest.mark.parametrize("text", NO_WORDS)
def test_no_device(text: str, two_gpus: None) -> None:
    with pytest.raises(UnsupportedError, match="unknown device") as caught:
        resolve_device(text)
    assert caught.value.available == "auto, cpu, cuda, cuda:N"
    assert "--device" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("text", "device"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_with_gpus(text: str, device: str, two_gpus: None) -> None:
    assert resolve_device(text) == torch.device(device)


@pytest.mark.parametrize("text", ["cuda:2", "cuda:999", "cuda:123456789012345678901234567890"])
def test_a_gpu_that_is_not_there(text: str, two_gpus: None) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve_device(text)
    assert "cuda:1" in str(caught.value.available) or "cuda:N" in str(caught.value.available)


def test_without_a_gpu(no_gpu: None) -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for text in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(UnsupportedError, match="PyTorch sees no CUDA device") as caught:
            resolve_device(text)
        assert caught.value.available == "cpu"


# ----------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wan", tiny.WAN_ONE)


def arguments(model: Path, out: Path, device: str) -> list[object]:
    return [model, "-o", out, "--device", device, "--target", "graphs", "--recipe", "rtn", *SIZES]


@pytest.mark.parametrize("text", ["cuda", "cuda:1", "tpu"])
def test_refused_before_any_work(text: str, model: Path, tmp_path: Path, no_gpu: None) -> None:
    out = tmp_path / "out"
    refused(run(*arguments(model, out, text)), f"device {'cuda' if 'cuda' in text else repr('tpu')}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "device"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_the_quantizer_gets_the_device(
    text: str, device: str, model: Path, tmp_path: Path, exporter_sees_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does what predicts inputs."""
    seen: list[Any] = []

    def predict(*given: Any) -> None:
        seen.append(given[-1])
        raise ExportError("far enough")

    monkeypatch.setattr("dvdquant.quantize.checkpoint.predict_inputs", predict)
    refused(run(*arguments(model, tmp_path / "out", text)), "far enough", way_out=False)
    assert seen == [torch.device(device)]


def test_the_model_that_predicts_runs_there(model: Path) -> None:
    """On the device without memory: a tensor left behind on the CPU would meet one of another device."""
    checkpoint = open_checkpoint(model)
    plan = plan_model(checkpoint.config, get_recipe("w4a4"), torch.bfloat16)
    skeleton = build_skeleton(plan.family.config, torch.float32)
    move_buffers(skeleton, "meta")
    inputs = {name: value.to("meta") for name, value in synthetic_inputs(plan.family, 2).items()}
    read: set[torch.device] = set()
    with streamed(skeleton, checkpoint, lambda name, value: read.add(value.device), "meta"), torch.inference_mode():
        (output,) = skeleton(**plan.family.forward_kwargs(inputs), return_dict=False)
    assert output.device.type == "meta"
    assert read == {torch.device("meta")}


def test_memory_of_the_gpu(
    model: Path, tmp_path: Path, exporter_sees_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr("dvdquant.quantize.checkpoint.predict_inputs", fail)
    refused(run(*arguments(model, tmp_path / "out", "cuda")), "cuda:1", "20.00 GiB", "--device cpu")


def test_work_begun_on_another_device_is_not_gone_on_with(
    model: Path, tmp_path: Path, exporter_sees_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes of one export come from one device: at rounding ties they depend on the order of its sums."""
    out = tmp_path / "out"

    def stop(*_given: Any) -> None:
        raise ExportError("stopped after the weights")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "GraphWriter", stop)
        refused(run(*arguments(model, out, "cpu")), "stopped", way_out=False)
    refused(run(*arguments(model, out, "cuda"), "--resume"), "device: cpu before, cuda now", "--resume")
    in_process(*arguments(model, out, "cpu"), "--resume")
    assert load_manifest(out).tools["device"] == "cpu"
