"""Kernel launches of a compiled Wan block, in the code that inductor writes for a GPU that is not there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compiled_launches.py"
# What lies between the quantized layers and the two attentions of a block, at most.
MOST = 13


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which PyTorch for CUDA brings along: make launches-check",
)
@pytest.mark.parametrize("sizes", [(), ("--ranged",)], ids=["static", "ranged"])
@pytest.mark.parametrize(
    ("options", "layers"), [((), 7), (("--fuse",), 3), (("--fuse", "--rope"), 3)], ids=["plain", "fused", "rope"]
)
def test_a_block_has_few_launches(options: tuple[str, ...], layers: int, sizes: tuple[str, ...]) -> None:
    size = ("--width", "1536", "--ffn", "8960", "--heads", "12", "--tokens", "4680", *sizes)
    command = [sys.executable, str(SCRIPT), *size, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) launches .* opaque: (\d+) quantized layers.*, 2 attentions", done.stdout)
    assert found is not None, done.stdout
    assert 0 < int(found[1]) <= MOST
    assert int(found[2]) == layers
