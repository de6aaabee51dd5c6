"""Compiled loops: processes that start together on a cold cache compile once and run the same machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOOPS = """
import sys
import numpy as np
from dvdquant.jit import jit

@jit
def square(x: float) -> float:
    return x * x

@jit
def total(v):
    s = np.float32(0.0)
    for k in range(v.shape[0]):
        s += np.float32(square(v[k]))
    return s

print(repr(float(total(np.linspace(0, 1, 1001, dtype=np.float32)))), sum(total.stats.cache_misses.values()))
"""


def start(script: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_on_a_cold_cache_compile_once(tmp_path: Path) -> None:
    script = tmp_path / "loops.py"
    script.write_text(LOOPS)
    running = [start(script, tmp_path / "cache") for _ in range(4)]
    lines = [process.communicate(timeout=120)[0].split() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert len({value for value, _ in lines}) == 1
    assert sum(int(misses) for _, misses in lines) == 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    """A file stands where the cache folder would be."""
    script = tmp_path / "loops.py"
    script.write_text(LOOPS)
    (tmp_path / "cache").write_text("")
    process = start(script, tmp_path / "cache" / "inside")
    value, _ = process.communicate(timeout=120)[0].split()
    assert process.returncode == 0
    assert abs(float(value) - 1001 / 3) < 1
