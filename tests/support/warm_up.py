"""Compile once what test processes need: the quantizer's loops, and the test files as pytest rewrites them.

Else every test process would wait for the one that compiles, or compile what that one has not come to. The loops of real
zero-points take as long as all others, so each half has a process.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _pytest.assertion import rewrite
from _pytest.config import get_config

from dvdquant.numerics.hadamard import Rotation
from dvdquant.quantize.bgr import quantize_weight, refine_grid
from dvdquant.quantize.error_table import squared_errors_of
from dvdquant.quantize.gptq import gptq_round
from dvdquant.quantize.layer import pack_codes, rotate_rows
from dvdquant.recipe import SOLVERS, ZERO_POINTS, WeightSpec
from tests.support.rare_collections import collect_rarely

TESTS = Path(__file__).resolve().parents[1]


def rewrite_assertions() -> None:
    """Write the compiled test files that pytest looks for in ``__pycache__``.

    pytest has no command for it, so these are its own inner functions. A release without them costs time, not a test.
    """
    config = get_config()
    config.parse([])
    state = config.stash[rewrite.assertstate_key]
    for path in sorted(TESTS.rglob("test_*.py")):
        cached = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(path, cached, state.trace) is None and rewrite.try_makedirs(cached.parent):
            status, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(state, code, status, cached)


def compile_loops(zero_points: Sequence[str]) -> None:
    """Call the compiled functions with every kind of argument they are compiled for.

    Args:
        zero_points: Those whose functions are called.
    """
    weight = rotate_rows(torch.randn(32, 256), Rotation.for_features(256, "auto"))
    for zero_point in zero_points:
        for solver in SOLVERS:
            for group in (0, 32):
                refine_grid(weight, group, zero_point, solver)
                if zero_point == "paper" and group:
                    continue
                quantized = quantize_weight(weight, WeightSpec(group, zero_point, solver))  # type: ignore[arg-type]
                squared_errors_of(weight, quantized)
                pack_codes(quantized.codes)
                gptq_round(weight, quantized, torch.eye(256))


def compile_in_two_processes() -> list[Any]:
    """Start two processes that compile the loops. They are forked, so this one may have no second thread."""
    parts = (["float"], [name for name in ZERO_POINTS if name != "float"])
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=compile_loops, args=(part,)) for part in parts]
    for process in started:
        process.start()
    return started


def main() -> None:
    """Compile both."""
    collect_rarely()
    compiling = compile_in_two_processes()
    try:
        rewrite_assertions()
    except (AttributeError, KeyError, TypeError) as error:
        print(f"the test files are not compiled ahead: pytest is built otherwise ({error!r})")
    for process in compiling:
        process.join()
    sys.exit(any(process.exitcode for process in compiling))


if __name__ == "__main__":
    main()
