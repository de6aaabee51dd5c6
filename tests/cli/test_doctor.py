"""``dvdq doctor``: findings of this machine, of one with a GPU that a double of nvidia-smi describes, and of broken libraries."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dvdquant.backends import load_backend
from dvdquant.cli import diagnosis
from dvdquant.cli.diagnosis import Finding, driver_problem
from dvdquant.cli.doctor import main
from dvdquant.errors import EngineError


def doctor(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def findings() -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in json.loads(doctor("--json"))["findings"]}


def put_nvidia_smi(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({line!r})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "installed_gpus", list)


@pytest.mark.usefixtures("no_gpu")
def test_it_looks_at_everything() -> None:
    found = findings()
    assert {
        "dvdquant",
        "GPU",
        "PyTorch",
        "libraries",
        "CUDA kernels",
        "attention in 8 bits",
        "TensorRT-RTX",
        "TensorRT",
        "TensorRT lean runtime",
    } <= set(found)
    assert {"ONNX Runtime", "nvcc", "disk and memory", "what would run"} <= set(found)
    assert found["PyTorch"]["found"].startswith(torch.__version__)
    assert found["TensorRT-RTX"]["found"] == load_backend("rtx").version
    for each in found.values():
        assert each["state"] == "ok" or each["fix"], each


@pytest.mark.parametrize(
    ("release", "advice"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", "install NVIDIA's driver in Windows and none in WSL"),
        ("6.8.0-51-generic", "install its driver, and start a container with --gpus all"),
    ],
)
def test_wsl_takes_the_driver_of_windows(release: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(diagnosis, "installed_gpus", list)
    found = next(each for each in diagnosis.diagnose(Path()) if each.name == "GPU")
    assert advice in found.fix


@pytest.mark.usefixtures("no_gpu")
def test_the_text_says_the_same() -> None:
    text = doctor()
    for each in findings().values():
        assert each["name"] in text
        assert each["found"].split()[0] in text


def test_a_card_decides_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, "NVIDIA GeForce RTX 4090, 8.9, 24564, 580.95.05", monkeypatch)
    found = findings()
    assert found["GPU"]["found"] == "NVIDIA GeForce RTX 4090, SM 8.9, 24.0 GiB, driver 580.95.05"
    assert "recipe w4a8, target rtx" in found["what would run"]["found"]
    assert "SM 8.9" in found["attention in 8 bits"]["found"]
    if not torch.cuda.is_available():  # a GPU that PyTorch cannot use is a problem, whatever build it is
        assert found["PyTorch"]["state"] == "problem"
        assert re.search(r"\n1 problem: |\n\d+ problems: ", doctor())


def test_a_card_that_is_too_old_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, "Tesla T4, [N/A], 15360, 470.57.02", monkeypatch)
    assert findings()["GPU"]["state"] == "problem"
    assert "bf16" in findings()["GPU"]["found"]


@pytest.mark.parametrize(
    ("driver", "cuda", "wrong"),
    [
        ("580.65.06", "13.0", False),
        ("575.57.08", "13.0", True),
        ("525.60.13", "12.8", False),
        ("470.57.02", "12.8", True),
        ("unknown", "13.0", False),
        ("580.65.06", "99.0", False),
    ],
)
def test_a_driver_that_is_too_old_for_cuda(driver: str, cuda: str, wrong: bool) -> None:
    assert (driver_problem(driver, cuda) is not None) == wrong


@pytest.mark.usefixtures("no_gpu")
def test_broken_libraries_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise EngineError(
            f"{name} cannot be imported: libnvinfer.so.10: cannot open shared object file", fix="install it"
        )

    def worse() -> list[str]:
        raise ZeroDivisionError("in a library")

    monkeypatch.setattr("dvdquant.backends.load_backend", broken)
    monkeypatch.setattr("onnxruntime.get_available_providers", worse)
    found = findings()
    assert found["TensorRT"]["state"] == found["TensorRT lean runtime"]["state"] == "missing"
    assert "tensorrt_lean cannot be imported" in found["TensorRT lean runtime"]["found"]
    assert "libnvinfer" in found["TensorRT"]["found"]
    assert found["ONNX Runtime"]["found"] == "ZeroDivisionError: in a library"
    assert "what would run" in found


@pytest.mark.usefixtures("no_gpu")
def test_a_named_library_of_kernels_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVDQUANT_KERNELS", "/nowhere/lib.so")
    assert "/nowhere/lib.so" in findings()["CUDA kernels"]["found"]


def test_a_finding_is_plain_json() -> None:
    assert Finding("x", "ok", "y").to_json() == {"name": "x", "state": "ok", "found": "y", "fix": ""}
