"""A machine for ``dvdq-build``: the host as its GPU, a double of TensorRT, and files that look like plugin libraries."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dvdquant.backends import Backend
from dvdquant.cli.build import main as build_main
from dvdquant.cli.bundle import main as bundle_main
from dvdquant.export import on_device
from dvdquant.export.engines import BuildReport, stage
from dvdquant.system.gpu import Gpu
from dvdquant.system.plugin_file import machine_name
from tests.support import tiny_models as tiny
from tests.support.commands import in_process
from tests.support.exporting import REPOSITORY
from tests.support.folders import process_folder, shared_folder
from tests.support.session_exports import RANGES

DOUBLE = REPOSITORY / "tests" / "support" / "tensorrt_double"
ORIN = Gpu("Orin", "8.7", 16 << 30, True)
_MACHINES = {"x86_64": 62, "aarch64": 183}
A4, A8 = (f"engines/tensorrt-sm87/transformer_a{bits}.engine" for bits in (4, 8))


def _make(folder: Path) -> None:
    model = tiny.write_checkpoint(folder / "wan", tiny.WAN_ONE)
    in_process(model, "-o", folder / "orin", "--recipe", "rtn", "--target", "tensorrt", "--sm", "8.7", *RANGES)


@pytest.fixture(scope="module")
def made() -> Path:
    """An export for an Orin, made where there is neither TensorRT nor a GPU. Nobody writes into it."""
    return shared_folder("device-build", _make) / "orin"


@pytest.fixture(scope="module")
def model(made: Path) -> Path:
    """The model of that export."""
    return made.parent / "wan"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the export."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT by its version alone, for what is decided before it is used."""
    monkeypatch.setattr(on_device, "load_backend", lambda name: Backend(name, None, "11.4.0.1"))


@pytest.fixture
def quick_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that writes a file only, in this process."""

    def build_engine(graph: Path, engine: Path, **options: Any) -> BuildReport:
        engine.write_bytes(b"an engine")
        return BuildReport(options["backend"], "11.4.0.1", tuple(options["sms"]), 1.0, 9, 1, "0" * 64)

    monkeypatch.setattr(stage, "build_engine", build_engine)


def flip_last_bit(path: Path) -> None:
    """Change a file, and not its size."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def engine_of(out: Path, path: str) -> dict[str, object]:
    """What the double wrote."""
    return dict(json.loads((out / path).read_text()))


@functools.cache
def host_driver() -> Path:
    """The folder of a libcuda.so.1 whose GPU is the host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build the stand-in of the GPU's driver")
    folder = process_folder("host-driver")
    folder.mkdir(parents=True, exist_ok=True)
    source = REPOSITORY / "plugins" / "harness" / "host_cuda.cpp"
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True, timeout=120
    )
    return folder


def environment(sm: int | None = 87, **variables: str) -> dict[str, str]:
    """The variables of a machine with such a GPU and TensorRT; None is a machine without GPU."""
    found = dict(os.environ) | {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(DOUBLE)))}
    if sm is not None:
        found |= {"LD_LIBRARY_PATH": str(host_driver()), "HOST_CUDA_SM": str(sm)}
    return found | variables


def build(*arguments: object, sm: int | None = 87, **variables: str) -> subprocess.CompletedProcess[str]:
    """``dvdq-build`` as a process of that machine."""
    command = [sys.executable, "-m", "dvdquant.cli.build", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(sm, **variables), timeout=600)


def build_here(
    patched: pytest.MonkeyPatch, *arguments: object, gpu: Gpu | None = ORIN, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As :func:`build`, with the command in this process, which takes the machine's GPU and the release of its TensorRT
    from here; the builder is a process of that machine."""
    found = environment(None if gpu is None else int(gpu.sm.replace(".", "")), **variables)
    with patched.context() as context:
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH", "HOST_CUDA_SM", *variables):
            if name in found:
                context.setenv(name, found[name])
        context.setattr("dvdquant.system.gpu.read_gpu", lambda: gpu)
        if gpu is not None:
            for room in ("dvdquant.backends", "dvdquant.export.on_device"):
                context.setattr(f"{room}.load_backend", lambda name: Backend(name, None, "11.4.0.1"))
        result = CliRunner().invoke(build_main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(["dvdq-build"], result.exit_code, result.stdout, result.stderr)


def plugin_library(path: Path, major: int | None = 11, machine: str | None = None, kernels: str = "87;110") -> Path:
    """A file with the head and the marks of a plugin library, and no code."""
    number = _MACHINES[machine or machine_name()]
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + number.to_bytes(2, "little") + bytes(44)
    marks = b"" if major is None else f"@dvdquant-plugin tensorrt={major}\0".encode()
    marks += f"@dvdquant-kernels={kernels}\0".encode() if kernels else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + marks + bytes(100))
    return path


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A file that ``--plugin`` takes."""
    return plugin_library(tmp_path / "libdvdquant_plugins.so")


def pack(out: Path, target: Path, *arguments: object) -> str:
    """Pack a bundle; what ``dvdq-bundle`` says."""
    result = CliRunner().invoke(bundle_main, [str(a) for a in (out, "-o", target, *arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output
