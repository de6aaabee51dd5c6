"""What every test run shares: thread counts, markers that skip with a reason, a closing list of what did not run.

@pytest.mark.slow               more than about five seconds of a processor, or the second proof of a thing: `make slow`
@pytest.mark.gpu                needs a CUDA device
@pytest.mark.tensorrt           needs TensorRT itself, not TensorRT-RTX
@pytest.mark.tensorrt_lean      needs TensorRT's lean runtime
@pytest.mark.tensorrt_headers   needs TensorRT's C++ headers, found by TENSORRT_ROOT
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dvdquant.system.gpu import read_gpu
from dvdquant.system.processor import usable_cores
from tests.support.cpu_seconds import CpuSeconds
from tests.support.folders import STORE
from tests.support.longest_first import longest_first
from tests.support.rare_collections import collect_rarely

_TESTS = Path(__file__).parent

# Before torch, numba or ONNX Runtime are imported anywhere: parallel test processes share the cores, and every builder
# process inherits the number. At least 2, so that what is split among threads is tested as such. A caller's setting wins.
_CORES = usable_cores()
_THREADS = str(max(2, _CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)
# A thread that waits for others sleeps instead of spinning: the cores belong to the other test processes meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Most objects of a test process come from imports and traces, and live; pytest's own collection makes a million more.
collect_rarely()
# A process that a test forks lives for moments; one look for garbage there would copy every page of what was imported.
os.register_at_fork(after_in_child=gc.disable)
# No test may depend on the network; a hub id that is not cached fails at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the count of processor seconds, and of how test processes begin."""
    parser.addoption(
        "--forked-workers",
        action="store_true",
        help="with -n: import and compile once, in a process that test processes are forked from (not where a GPU is)",
    )
    parser.addoption(
        "--cpu-seconds", type=int, default=0, metavar="N", help="list N files and tests that cost most CPU"
    )
    parser.addoption("--cpu-seconds-file", metavar="PATH", help="write the CPU seconds of every test")


def pytest_configure(config: pytest.Config) -> None:
    """Count processor seconds; the first process makes the store of what test processes share."""
    config.pluginmanager.register(CpuSeconds(config), "cpu-seconds")
    if STORE not in os.environ:
        store = os.environ[STORE] = tempfile.mkdtemp(prefix="dvdq-tests-")
        config.add_cleanup(functools.partial(shutil.rmtree, store, ignore_errors=True))
        config.add_cleanup(functools.partial(os.environ.pop, STORE, None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork the test processes. CUDA does not outlive a fork, so where a GPU is they begin as usual, when all is compiled."""
    if not config.getoption("forked_workers"):
        return
    if read_gpu() is not None:
        subprocess.run([sys.executable, "-m", "tests.support.warm_up"], cwd=_TESTS.parent, check=True)
        return
    command = importlib.import_module("tests.support.forked_processes").start_with_tests(config.args)
    for spec in specs:
        spec.python = command


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """Look for garbage no more among what was imported and collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen_between_files() -> Iterator[None]:
    """Nor among what earlier files left: what a process traced, imported and keeps grows with every file."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _shared_traces() -> None:
    """Trace a model once a process, however many exports of it the tests make in this process."""
    if "dvdquant.export.graph.trace" in sys.modules:  # else nothing is exported, and the import would cost seconds
        importlib.import_module("tests.support.traces").share_traces()


@pytest.fixture(scope="session", autouse=True)
def _forked_builders() -> Iterator[None]:
    """Fork the builders of engines from one process (:mod:`tests.support.forked_builders`)."""
    if "dvdquant.export.engines.engine" not in sys.modules or importlib.util.find_spec("tensorrt_rtx") is None:
        yield
        return
    with importlib.import_module("tests.support.forked_builders").fork_builders():
        yield


@pytest.fixture(scope="module")
def without_graphs() -> Iterator[None]:
    """Exports of this module have graphs without a node: it reads weights and manifests alone."""
    with importlib.import_module("tests.support.traces").without_graphs():
        yield


@pytest.fixture(scope="module")
def lent_sessions() -> Iterator[None]:
    """Generators of this module borrow their sessions (:mod:`tests.support.lent_sessions`)."""
    with importlib.import_module("tests.support.lent_sessions").lend_sessions():
        yield


@functools.cache
def _no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    build = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return f"needs a CUDA device: torch.cuda.is_available() is False (torch {torch.__version__} is built {build})"


@functools.cache
def _no_tensorrt() -> str | None:
    try:
        importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        return (
            "needs TensorRT (libnvinfer): the Python module `tensorrt` cannot be imported "
            f"({type(error).__name__}); get it with: pip install 'dvdquant[tensorrt]'"
        )
    return None


@functools.cache
def _no_lean() -> str | None:
    # Looked for and not imported: without a driver, a later call of it may end the process.
    if importlib.util.find_spec("tensorrt_lean") is None:
        return "needs TensorRT's lean runtime; get it with: pip install 'dvdquant[tensorrt-lean]'"
    return None


@functools.cache
def _no_headers() -> str | None:
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        return "needs TensorRT's C++ headers: set TENSORRT_ROOT to the folder that holds include/NvInfer.h"
    if not (Path(root) / "include" / "NvInfer.h").is_file():
        return f"needs TensorRT's C++ headers: there is no include/NvInfer.h in TENSORRT_ROOT={root}"
    return None


_NEEDS: dict[str, Callable[[], str | None]] = {
    "gpu": _no_gpu,
    "tensorrt": _no_tensorrt,
    "tensorrt_lean": _no_lean,
    "tensorrt_headers": _no_headers,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, saying what; where several processes share the work, begin with the dearest files."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: longest_first(item.path, _TESTS))
    for item in items:
        for name, missing in _NEEDS.items():
            reason = missing() if item.get_closest_marker(name) else None
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List every skipped test under its reason."""
    reasons: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(text.removeprefix("Skipped: "), []).append(report.nodeid)
    if not reasons:
        return
    terminalreporter.section("not run here")
    for reason, names in sorted(reasons.items()):
        terminalreporter.write_line(f"{len(names)} × {reason}")
        for name in sorted(names):
            terminalreporter.write_line(f"    {name}")
