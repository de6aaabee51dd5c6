"""The device a user names, also on machines that have several GPUs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdquant.deploy.sessions.engine_choice import device_sm
from dvdquant.errors import UnsupportedError
from dvdquant.system.devices import cuda_sm, resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, the second one current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_with_two_gpus(gpus: None) -> None:
    for name, wanted in (
        ("auto", "cuda:1"),
        ("cuda", "cuda:1"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
    ):
        assert resolve_device(name) == torch.device(wanted)
        assert str(resolve_device(name)) == wanted
    assert str(resolve_device(torch.device("cuda:0"))) == "cuda:0"
    with pytest.raises(UnsupportedError, match="cuda:2") as caught:
        resolve_device("cuda:2")
    assert "cuda:1" in str(caught.value.available)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("auto", "cpu", "cpu:0"):
        assert str(resolve_device(name)) == "cpu"
    names: list[Any] = ["cuda", "cuda:1", "cuda:-1", "cuda:x", "gpu", "", "mps", "meta", 3.5, None, "cuda:99999999999"]
    for name in names:
        with pytest.raises(UnsupportedError):
            resolve_device(name)


def test_the_compute_capability_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number for kernels, and words for engines and errors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, number, words in (((8, 9), 89, "8.9"), ((10, 3), 103, "10.3"), ((12, 1), 121, "12.1")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, sm=found: sm)
        assert cuda_sm(torch.device("cuda:1")) == number
        assert device_sm(torch.device("cuda:1")) == words


def test_the_original_checkpoint_goes_to_the_device_that_was_named(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both generators ask here; what they load goes where this says."""
    import threading
    from types import SimpleNamespace

    from dvdquant.deploy.generation import from_table as generate
    from dvdquant.deploy.generation import in_pipeline as pipeline_generate
    from dvdquant.deploy.generation.request import GenerateRequest
    from dvdquant.deploy.generation.session_options import SessionOptions

    places: list[torch.device] = []

    def load(artifact: Any, root: Any, component: str, device: torch.device, dtype: torch.dtype, *more: Any) -> Any:
        places.append(device)
        raise InterruptedError

    for module in (generate, pipeline_generate):
        monkeypatch.setattr(module, "load_original", load)
    table = object.__new__(generate.TableGenerator)
    pipeline = object.__new__(pipeline_generate.PipelineGenerator)
    artifact = SimpleNamespace(dtype=torch.bfloat16)
    taken: dict[str, Any] = {"artifact": artifact, "check": lambda request: request, "lora": ()}
    vars(table).update(
        taken,
        options=SessionOptions(device="cuda:1"),
        table=SimpleNamespace(root="r"),
        component="t",
        _original=None,
        _loading=threading.Lock(),
        beside={"t": ()},
    )
    folder = SimpleNamespace(root="r", transformers=("transformer",))
    vars(pipeline).update(
        taken,
        options=SessionOptions(device="cuda:0"),
        folder=folder,
        checker=SimpleNamespace(text=None, pipeline_of=lambda request: "WanPipeline"),
        _originals={},
        _denoising=threading.RLock(),
        _loading=threading.Lock(),
        beside={"transformer": ()},
    )
    monkeypatch.setattr(pipeline_generate.PipelineGenerator, "family", SimpleNamespace(name="wan"), raising=False)
    for generator in (table, pipeline):
        with pytest.raises(InterruptedError):
            generator.prepare(GenerateRequest("a", mode="16"))
    assert [str(place) for place in places] == ["cuda:1", "cuda:0"]


def test_the_index_of_a_gpu_reaches_the_weights_of_the_original(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch is asked to move them to, in mode 16."""
    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.generation.original import load_original
    from tests.support.running import short_wan, short_wan_export

    moved: list[Any] = []

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        moved.append(args[0] if args else kwargs)
        return module

    artifact = Artifact.open(short_wan_export())
    request.getfixturevalue("gpus")
    monkeypatch.setattr(torch.nn.Module, "to", to)  # there is no such GPU to move anything to
    load_original(artifact, short_wan(), "transformer", resolve_device("cuda:1"), torch.bfloat16)
    assert torch.device("cuda", 1) in moved
    assert torch.device("cuda", 0) not in moved


def test_nothing_else_in_deploy_reads_a_device_name() -> None:
    import dvdquant.deploy.generation.from_table
    import dvdquant.deploy.generation.in_pipeline
    import dvdquant.deploy.sessions

    for module in (
        dvdquant.deploy.generation.from_table,
        dvdquant.deploy.generation.in_pipeline,
        dvdquant.deploy.sessions,
    ):
        assert "is_available" not in inspect.getsource(module)
        assert "resolve_device" in inspect.getsource(module)


def test_no_other_file_decides_what_a_device_name_means() -> None:
    """The exporter, the runtime, the benchmarks and the kernels' scripts ask the one place."""
    root = Path(__file__).resolve().parents[2]
    own = re.compile(r'"cuda" if [\w.]*is_available\(\)|torch\.device\((options|args|arguments)\.|type=torch\.device')
    found = [
        str(path.relative_to(root))
        for room in ("dvdquant", "export", "deploy", "benchmarks", "kernels")
        for path in (root / room).rglob("*.py")
        if own.search(path.read_text()) and path != root / "dvdquant/system/devices.py"
    ]
    assert not found
