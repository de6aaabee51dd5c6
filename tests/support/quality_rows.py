"""Made-up results of benchmarks/quality, and the tables that its report makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.quality_scripts import script

__all__ = [
    "METHODS",
    "OURS",
    "RIGHT",
    "Row",
    "WIDTHS",
    "cells",
    "clip",
    "delta",
    "figure",
    "made_up",
    "read",
    "report",
    "step",
    "study",
]

Row = dict[str, Any]

RIGHT = ("shape", "colour", "motion", "size", "background", "speed")

OURS = "dvdquant w4a4"

# Added to every clip of a method, in dB and as a factor of the error; per clip ±0.01, so that a difference of 1 dB is sure.
METHODS = {OURS: (0.0, 1.0), "QuaRot": (-1.0, 1.3), "RTN": (-4.0, 2.0)}

WIDTHS = {"A8": (30.0, 0.05), "A6": (27.0, 0.08), "A4": (24.0, 0.2)}


report = script("report")


def clip(method: str, width: str, seed: int, psnr: float | None, **fields: Any) -> Row:
    right = dict.fromkeys(RIGHT, True)
    row = {"kind": "clip", "model": "tiny", "method": method, "width": width, "prompt": "ring red", "seed": seed}
    row |= {"psnr": psnr, "ssim": 0.9, "bits": 1.0 * int(width.strip("AW")), "right": right, "visible": 1.0}
    return {**row, "smoothness": 0.8, "dynamic": 0.1, **fields}


def step(method: str, width: str, index: int, number: int, error: float) -> Row:
    place = {"kind": "step", "model": "tiny", "method": method, "width": width}
    return {**place, "clip": index, "step": number, "sigma": 1 - number / 4, "error": error}


def study(name: str, width: str, index: int, error: float, study: str = "ablation") -> Row:
    row = {"kind": "study", "study": study, "model": "tiny", "name": name, "width": width}
    return {**row, "clip": index, "error": error}


def delta(name: str, value: float | None, seed: int, bits: float, psnr: float) -> Row:
    row = {"kind": "delta", "model": "tiny", "name": name, "delta": value, "bits": bits, "computed": 0.75, "psnr": psnr}
    return {**row, "prompt": "ring red", "seed": seed, "right": dict.fromkeys(RIGHT, True)}


def made_up() -> list[Row]:
    rng = np.random.default_rng(0)
    base, rows = rng.normal(0, 3, 8), []
    for c in range(8):
        rows += [clip("fp32", "A16", c, None, ssim=None, dynamic=0.2), clip("bf16", "A16", c, 45.0 + base[c])]
        rows += [step("bf16", "A16", c, s, 0.003 + 0.001 * s) for s in range(4)]
        for method, (decibel, factor) in METHODS.items():
            for width, (psnr, error) in WIDTHS.items():
                rows.append(clip(method, width, c, psnr + decibel + base[c] + rng.normal(0, 0.01)))
                rows += [step(method, width, c, s, error * factor * (1 + s + 0.01 * rng.random())) for s in range(4)]
        for name, factor in (("neither", 1.3), ("BGR", 1.2), ("ARQ", 1.0), ("BGR + ARQ", 1.0)):
            rows.append(study(name, "A4", c, factor * (0.2 + 0.01 * c) + (-1) ** c * 1e-3 * (name == "ARQ")))
        for value, bits in ((0.05, 7.0), (0.2, 5.0)):
            rows.append(delta("δ-GBS", value, c, bits + 0.1 * rng.random(), 25 + bits))
            rows.append(delta("+ cache", value, c, bits, 24 + bits))
        rows.append(delta("last", None, c, 6.0, 30.5))
    run = {"kind": "run", "commit": "0123abc", "hardware": "a CPU", "date": "2026-01-02", "seconds": 90.0}
    return [*rows, {**run, "command": "python x.py"}]


def read(tmp_path: Path, rows: list[Row]) -> Any:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return report.read_results(path)


def cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without heads."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [row for row, after in zip(rows, [*rows[1:], [""]]) if row[0] != "---" and after[0] != "---"]


def figure(cell: str) -> float:
    found = re.search(r"-?\d+(\.\d+)?", cell)
    assert found, cell
    return float(found[0])
