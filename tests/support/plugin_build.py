"""The plugin library with its harness, built by CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["configure"]

ROOT = Path(__file__).resolve().parents[2]


def _cuda_include() -> Path | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(place) for place in places if place] + sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((f / "include" for f in folders if (f / "include/cuda_runtime_api.h").is_file()), None)


def configure(build: Path, *options: str) -> Path:
    """Build plugin and harness in the folder, or skip for what is missing."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} to build the plugin")
    include = _cuda_include()
    if include is None:
        pytest.skip("needs cuda_runtime_api.h, which TensorRT's headers include: set CUDA_HOME")
    command = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(build), f"-DCUDA_INCLUDE={include}", *options]
    for step in (command, ["cmake", "--build", str(build), "-j", "2"]):
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build
