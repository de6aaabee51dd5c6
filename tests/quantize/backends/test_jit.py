"""Compiled loops: processes that start together on a cold cache compile once and run the same machine code."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
import pytest
from numba.core.dispatcher import Dispatcher

import dvdquant.quantize.backends.jit  # noqa: F401  before the forks

LOOPS = """
import sys
import numpy as np
from dvdquant.quantize.backends.jit import jit

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


class Running:
    """A script in a process that was forked with numba imported: an import takes longer than what is tested."""

    def __init__(self, script: Path, cache: Path) -> None:
        self.returncode: int | None = None
        out, said = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(out[1], 1)
            os.dup2(said[1], 2)
            _run_script(script, cache)
        os.close(out[1])
        os.close(said[1])
        self.out, self.said = os.fdopen(out[0]), os.fdopen(said[0])

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it wrote on both streams; it is killed after ``timeout`` seconds."""
        killer = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
        killer.start()
        with self.out, self.said:  # little is written: a pipe holds it
            written = self.out.read(), self.said.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        killer.cancel()
        return written


def _run_script(script: Path, cache: Path) -> None:
    """Run a script in this (forked) process; never returns."""
    code = 1
    try:
        os.closerange(3, 1 << 16)  # a lock that this process inherited would be held by both
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        logging.root.handlers.clear()  # those of pytest
        numba.core.config.CACHE_DIR = str(cache)
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="module", autouse=True)
def _numba_is_loaded() -> None:
    numba.njit(lambda x: x)(1.0)


def start(script: Path, cache: Path) -> Running:
    return Running(script, cache)


def run(script: Path, cache: Path) -> tuple[str, str, str]:
    """Run the loops; returns their value, how many signatures were compiled, and what was said."""
    process = start(script, cache)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    value, misses = out.split()
    return value, misses, said


def test_the_cache_of_a_process_of_its_own(tmp_path: Path) -> None:
    """As the environment names it; the other tests fork."""
    script, cache = tmp_path / "loops.py", tmp_path / "cache"
    script.write_text(LOOPS)
    for misses in ("1", "0"):
        done = subprocess.run(
            [sys.executable, script],
            capture_output=True, text=True, check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        )  # fmt: skip
        assert done.stdout.split()[1] == misses
    assert list(cache.rglob("*.nb?"))


def lock_file(cache: Path) -> Path:
    """Return the lock of the one folder in a cache that was filled."""
    (found,) = cache.rglob(".*.lock")
    return found


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock as another process that compiles does: this one."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "loops.py"
    path.write_text(
        "import dvdquant.quantize.backends.jit\ndvdquant.quantize.backends.jit.SAY_AFTER_SECONDS = 0.2\n" + LOOPS
    )
    return path


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


def empty_cache(script: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Fill a cache and empty it; returns it and its lock file, which is where the next run looks for it."""
    cache = tmp_path / "cache"
    run(script, cache)
    lock = lock_file(cache)
    for path in lock.parent.glob("*.nb?"):
        path.unlink()
    return cache, lock


def test_a_warm_cache_does_not_ask_for_the_lock(script: Path, tmp_path: Path) -> None:
    """Another process holds it and never lets go; or something else stands where it was."""
    cache = tmp_path / "cache"
    value, misses, said = run(script, cache)
    assert (misses, said) == ("1", "")
    lock = lock_file(cache)
    with held(lock):
        assert run(script, cache) == (value, "0", "")
    lock.unlink()
    os.mkfifo(lock)
    assert run(script, cache) == (value, "0", "")


def test_waiting_is_said_and_ends_when_the_other_process_is_done(script: Path, tmp_path: Path) -> None:
    cache, lock = empty_cache(script, tmp_path)
    with held(lock):
        process = start(script, cache)
        said = process.said.readline()
        assert "waiting" in said
        assert f"process {os.getpid()} (" in said
        assert str(lock) in said
        assert process.poll() is None
    out, rest = process.communicate(timeout=120)
    assert (process.returncode, out.split()[1], rest) == (0, "1", "")


def test_who_compiles_another_file_is_not_waited_for(script: Path, tmp_path: Path) -> None:
    cache, lock = empty_cache(script, tmp_path)
    other = script.with_name("others.py")
    other.write_text(script.read_text())
    with held(lock):
        _, misses, said = run(other, cache)
    assert (misses, said) == ("1", "")


def test_a_process_that_never_lets_go_is_an_error_after_a_limit(script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import dvdquant.quantize.backends.jit\ndvdquant.quantize.backends.jit.WAIT_SECONDS = 0.5\n" + LOOPS
    )
    cache, lock = empty_cache(script, tmp_path)
    with held(lock):
        start_time = time.monotonic()
        process = start(script, cache)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "ResourceError" in said
    assert f"process {os.getpid()} (" in said
    assert "NUMBA_CACHE_DIR" in said
    assert time.monotonic() - start_time < 30
    # What the message advises helps, and so does the end of the other process.
    with held(lock):
        assert run(script, tmp_path / "other")[1] == "1"
    assert run(script, cache)[1] == "1"


def test_what_was_planted_as_the_lock_is_not_followed(script: Path, tmp_path: Path) -> None:
    """Nothing is written through it and nothing is stored; the loops run all the same."""
    cache, lock = empty_cache(script, tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    missing = tmp_path / "missing"
    plants: tuple[Callable[[], object], ...] = (
        lambda: lock.symlink_to(victim),
        lambda: lock.symlink_to(missing),
        lambda: os.mkfifo(lock),
        lock.mkdir,
    )
    for plant in plants:
        lock.unlink()
        plant()
        _, misses, said = run(script, cache)
        assert misses == "1"
        assert str(lock) in said
        assert victim.read_text() == "precious"
        assert not missing.exists()
        assert not list(cache.rglob("*.nb?"))


def test_a_lock_file_keeps_what_it_holds(script: Path, tmp_path: Path) -> None:
    """It may be a hard link to another file, and may be read-only."""
    cache, lock = empty_cache(script, tmp_path)
    lock.write_text("precious")
    lock.chmod(0o400)
    assert run(script, cache)[1:] == ("1", "")
    assert run(script, cache)[1:] == ("0", "")
    assert lock.read_text() == "precious"


def test_damaged_code_is_compiled_anew(script: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    value = run(script, cache)[0]
    for suffix in ("nbi", "nbc"):
        for path in cache.rglob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:20])
        again, misses, said = run(script, cache)
        assert (again, misses) == (value, "1")
        assert "made anew" in said
        assert run(script, cache) == (value, "0", "")


def test_a_numba_without_the_hooks_compiles_without_the_cache(script: Path, tmp_path: Path) -> None:
    missing = "Dispatcher._cache.load_overload"
    text = script.read_text()
    script.write_text(
        f"from dvdquant.quantize.backends import jit\njit.missing_hooks = lambda compiled: {missing!r}\n{text}"
    )
    cache = tmp_path / "cache"
    for _ in range(2):
        _, misses, said = run(script, cache)
        assert misses == "1"
        assert said.count(missing) == 1
        assert "pip install 'numba" in said
    assert not list(cache.rglob("*.nb?"))


def test_this_numba_has_the_hooks() -> None:
    """They are not public: without them every process compiles for seconds. The next numba may have moved them."""
    from numba import njit

    from dvdquant.quantize.backends import jit as module

    compiled = njit(cache=True)(module.jit)
    assert module.missing_hooks(compiled) == ""
    assert module.missing_hooks(object()) == "Dispatcher.compile"
    compiled._cache = object()
    assert module.missing_hooks(compiled) == "Dispatcher._cache.load_overload"


LOOP_FILES = ["numba_float_zero", "numba_gptq", "numba_rows", "numba_search", "torch_rows"]


@pytest.mark.parametrize("name", LOOP_FILES)
def test_what_a_compiled_function_calls_is_in_its_code(name: str) -> None:
    """Else the process that compiles runs other machine code than those that load what it kept."""
    module = importlib.import_module(f"dvdquant.quantize.backends.{name}")
    compiled = {key: each for key, each in vars(module).items() if isinstance(each, Dispatcher)}
    assert compiled
    called = {key for each in compiled.values() for key in each.py_func.__code__.co_names if key in compiled}
    for key, each in compiled.items():
        assert each.targetoptions["forceinline"] == (key in called), key


COLD_OR_WARM = """
import hashlib
import torch
from dvdquant.quantize.bgr import quantize_weight, refine_grid
from dvdquant.recipe import SOLVERS, ZERO_POINTS, WeightSpec

torch.manual_seed(0)
digest = hashlib.sha256()
for features in (64, 256):
    weight = torch.randn(2000, features)
    for zero_point in ZERO_POINTS:
        for solver in SOLVERS:
            for group in (0, 16, 32):
                grid = refine_grid(weight[:200], group, zero_point, solver)
                digest.update(grid.scale.numpy().tobytes() + grid.zero.numpy().tobytes())
                if not (zero_point == "paper" and group):
                    found = quantize_weight(weight, WeightSpec(group, zero_point, solver))
                    for each in (found.codes, found.scale, found.group_scale, found.zero):
                        digest.update(each.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.stress
def test_a_cold_cache_gives_the_codes_of_a_warm_one(tmp_path: Path) -> None:
    """Bit by bit, over every grid and solver: an export that is resumed has layers of both."""
    script, cache = tmp_path / "loops.py", tmp_path / "cache"
    script.write_text(COLD_OR_WARM)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "2"}
    cold, warm = (
        subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    )
    assert cold == warm
