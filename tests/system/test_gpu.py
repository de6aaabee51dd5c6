"""The GPU as its driver describes it, and plugin libraries as their bytes do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dvdquant.errors import UnsupportedError
from dvdquant.system.plugin_file import machine_name, read_plugin
from tests.support.device_build import environment, plugin_library

ASK = "import json; from dvdquant.system.gpu import read_gpu; g = read_gpu(); print(json.dumps(g and vars(g)))"


def ask(**variables: str) -> dict[str, object] | None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment(**variables), capture_output=True, text=True, check=True
    )  # type: ignore[arg-type]
    found: dict[str, object] | None = json.loads(done.stdout)
    return found


def test_a_gpu_is_read_through_its_driver(tmp_path: Path) -> None:
    assert ask(HOST_CUDA_SM="110", HOST_CUDA_MEMORY="137438953472") == {
        "name": "host",
        "sm": "11.0",
        "memory_bytes": 128 << 30,
        "shared_memory": False,
    }
    # A file of that name that is no driver, and none at all.
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    assert ask(LD_LIBRARY_PATH=str(tmp_path)) is None


def test_plugin_files(tmp_path: Path) -> None:
    library = read_plugin(plugin_library(tmp_path / "a.so", 10, "aarch64", "87;110"))
    assert (library.machine, library.tensorrt_major, library.architectures) == ("aarch64", 10, ("87", "110"))
    library = read_plugin(plugin_library(tmp_path / "b.so", None, kernels=""))
    assert (library.machine, library.tensorrt_major, library.architectures) == (machine_name(), None, ())
    for number, data in enumerate((b"", b"MZ", b"\x7fELF\x01" + bytes(40), b"\x7fELF\x02" + bytes(13) + b"\x08\x00")):
        (tmp_path / f"{number}.so").write_bytes(data)
        with pytest.raises(UnsupportedError, match=r"\.so"):
            read_plugin(tmp_path / f"{number}.so")
    with pytest.raises(UnsupportedError, match="cannot be read: it is empty"):
        read_plugin(tmp_path / "0.so")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        read_plugin(tmp_path / "missing.so")
