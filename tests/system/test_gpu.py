"""The GPU as its driver describes it, and plugin libraries as their bytes do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dvdquant.errors import UnsupportedError
from dvdquant.system.plugin_file import MAX_PLUGIN, machine_name, read_plugin
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
    library = read_plugin(plugin_library(tmp_path / "b.so", kernels=""))
    assert (library.machine, library.tensorrt_major, library.architectures) == (machine_name(), 11, ())
    whole = (tmp_path / "a.so").read_bytes()
    for number, data in enumerate(
        (
            b"",
            b"MZ",
            b"\x7fELF\x01" + bytes(40),
            whole[:16],
            whole.replace(b"\x7fELF\x02\x01", b"\x7fELF\x02\x02"),  # big-endian
            whole[:16] + b"\x01" + whole[17:],  # an object file
            whole[:18] + b"\x08" + whole[19:],  # of another processor
        )
    ):
        (tmp_path / f"{number}.so").write_bytes(data)
        with pytest.raises(UnsupportedError, match=r"\.so (is no plugin library for Linux|cannot be read)"):
            read_plugin(tmp_path / f"{number}.so")
    with pytest.raises(UnsupportedError, match="cannot be read: it is empty"):
        read_plugin(tmp_path / "0.so")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        read_plugin(tmp_path / "missing.so")
    (tmp_path / "other.so").write_bytes(whole.replace(b"@dvdquant", b"@anything"))
    with pytest.raises(UnsupportedError, match="it is another library or program, for aarch64"):
        read_plugin(tmp_path / "other.so")
    with pytest.raises(UnsupportedError, match="it holds dvdquant's kernels without the plugin, for aarch64"):
        read_plugin(plugin_library(tmp_path / "kernels.so", None, "aarch64"))


def test_a_huge_file_is_no_plugin_library(tmp_path: Path) -> None:
    """By its size: its marks, which are at its beginning, are not looked for."""
    path = plugin_library(tmp_path / "huge.so")
    assert read_plugin(path).path == path
    os.truncate(path, MAX_PLUGIN + 1)
    with pytest.raises(UnsupportedError, match="has more than 256 MiB"):
        read_plugin(path)
