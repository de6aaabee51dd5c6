"""Calls in a process of their own: what they return and raise, and what becomes of one that crashes or hangs."""

from __future__ import annotations

import math
import operator
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks import step_time
from benchmarks.apart import Apart, EndedError, context_works
from benchmarks.step_cases import CASES, Flavour


@pytest.fixture
def apart() -> Iterator[Apart]:
    made = Apart(60)
    yield made
    made.close()


def test_a_crash_ends_the_process_and_the_next_call_has_another(apart: Apart) -> None:
    first = apart(os.getpid)
    assert first != os.getpid()
    assert apart(os.getpid) == first, "one process for all calls"
    with pytest.raises(ZeroDivisionError):
        apart(operator.truediv, 1, 0)
    assert apart(math.sqrt, 4.0) == 2.0
    with pytest.raises(EndedError, match="SIGSEGV"):
        apart(os.kill, first, signal.SIGSEGV)
    second = apart(os.getpid)
    assert second not in (first, os.getpid())
    with pytest.raises(EndedError, match="status 3"):
        apart(os._exit, 3)


def test_a_call_that_hangs_is_ended(apart: Apart) -> None:
    process = psutil.Process(apart(os.getpid))
    apart.seconds = 0.2
    with pytest.raises(EndedError, match="within 0 s"):
        apart(time.sleep, 600)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    apart.seconds = 60
    assert apart(math.sqrt, 9.0) == 3.0


def test_a_context_that_is_broken_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's calls fail from then on, whatever they are."""
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None))
    assert context_works()
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not context_works()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert context_works()


def test_a_call_that_breaks_the_context_is_answered_and_its_process_ends(apart: Apart) -> None:
    first = apart(os.getpid)
    assert apart(break_context) == "what it returns"
    assert apart(os.getpid) != first


def break_context() -> str:
    """In the other process, as a kernel that reads beyond its memory does."""
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = fail
    return "what it returns"


def fail() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.slow
def test_step_time_measures_in_another_process(apart: Apart) -> None:
    apart.seconds = 600
    options: Any = SimpleNamespace(device="cpu", scale=32, steps=1, budget=True, recipe="w4a4")
    case = replace(CASES[-1], depths=(1, 2))
    row = step_time.row_of(case, Flavour(16), options, plain := {}, apart)
    assert not row.refused
    assert row.classes
    assert torch.isfinite(plain[16]).all(), "the output came over"
    assert "no mask" in step_time.row_of(case, Flavour(16, masked=True), options, {}, apart).refused
