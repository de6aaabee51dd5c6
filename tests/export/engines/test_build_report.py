"""What a build reports, and the memory factor the estimates rest on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from dvdquant.export.engines import BUILD_MEMORY_FACTOR
from dvdquant.export.engines import engine as engine_module
from dvdquant.export.engines.report import BuildRequest, layer_summary
from tests.support import quant_linear_graphs as qg
from tests.support.engine_building import build, save


def test_build_request_round_trip() -> None:
    request = BuildRequest(
        "tensorrt_rtx", "/m", "/e", ("8.9",), "/d", ("/d",), {"x": [[1], [2], [3]]}, ("/p.so",), 1, "/t", 2
    )
    assert BuildRequest.from_json(request.to_json()) == request


def test_layer_summary_skips_what_is_no_layer() -> None:
    assert layer_summary(["Layers:", "Name: x, IOMode: Input", ""]) == ({}, {})


@pytest.mark.slow
def test_build_memory_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: a fork has in memory from its start what a builder loads as it goes."""
    monkeypatch.setattr(engine_module, "subprocess", subprocess)
    peaks = {}
    for width in (64, 8192):
        folder = tmp_path / str(width)
        folder.mkdir()
        data = np.random.default_rng(0).integers(0, 256, width * width // 2, dtype=np.uint8)
        spec = qg.Spec("fp16", (width,) * 9, 8, block=1)
        spec.layers = [
            qg.Layer(
                f"blocks.{i}.ffn", data.reshape(width, -1), np.full(width, 0.01, np.float32),
                np.full((width, 1), 255, np.uint8), np.full(width, -0.5, np.float32), np.zeros(width, np.float32),
                qg.hadamard(1), qg.hadamard(1), 8, 0,
            )
            for i in range(4)
        ]  # fmt: skip
        peaks[width] = build(save(spec, folder, "int4-weight-only"), spec).peak_rss_bytes
    weights = 4 * 8192 * 8192 // 2
    assert (peaks[8192] - peaks[64]) / weights < 1.1 * BUILD_MEMORY_FACTOR
