"""What dvdq-build asks of a new engine: finite, not constant, near the PyTorch session; its time is that of a pass."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from dvdquant.deploy.engine_check import PASSES, check_engine, judge_output, measure
from dvdquant.errors import EngineError

ENTRY: Any = {"path": "engines/x.engine", "precision": "plugin", "sm": ["8.7"], "act_bits": 4, "backend": "tensorrt"}


def test_outputs() -> None:
    exact = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert judge_output(ENTRY, exact, exact) == 0
    assert judge_output(ENTRY, exact * 1.1, exact) == pytest.approx(0.1, rel=1e-5)
    assert judge_output(ENTRY, exact, None) is None
    for wrong in (exact * 1.3, -exact, exact.flip(0)):
        with pytest.raises(EngineError, match="computes something else"):
            judge_output(ENTRY, wrong, exact)
    for wrong in (torch.full((4, 5), 2.0), exact / 0, torch.full((4, 5), float("nan"))):
        with pytest.raises(EngineError, match="not finite or constant"):
            judge_output(ENTRY, wrong, exact)


def test_a_session_is_measured() -> None:
    calls = []

    class Session:
        def run(self, inputs: Any, bits: int) -> torch.Tensor:
            calls.append(bits)
            time.sleep(0.02)
            return torch.tensor(len(calls))

    output, seconds = measure(Session(), {}, 8)  # type: ignore[arg-type]
    assert calls == [8] * (PASSES + 1)
    assert int(output) == 1
    assert 0.02 <= seconds < 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Any) -> None:
    assert check_engine(tmp_path, ENTRY, "transformer", ()) is None
