"""The table and the picture of measure.py."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.page import replace_block
from benchmarks.switching.metrics import bootstrap
from dvdquant.system.processor import processor_name, usable_cores

Row = dict[str, Any]
MARK = "<!-- measured: {} -->"


def write_report(
    folder: Path, table: dict[str, list[Row]], arguments: argparse.Namespace, deltas: dict[str, float], seconds: float
) -> None:
    """Replace the quality section of README.md in ``folder`` and draw quality.png."""
    lines = [
        _setting(table, arguments, deltas, seconds),
        "",
        "| | bits | 8-bit steps | skipped | retries | relative cost | PSNR, dB | SSIM | against the line a4–a8, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in table.items():
        line = (
            ""
            if name in ("a4", "a8")
            else _interval([a - b for a, b in zip(_of(rows, "psnr"), _line(table, rows))], "+.2f")
        )
        lines.append(
            f"| {name} | {_mean(rows, 'average_bits'):.2f} | {_mean(rows, 'high_steps'):.1f} | {_mean(rows, 'skipped'):.1f} | "
            f"{sum(_of(rows, 'retries')):.0f} | {_mean(rows, 'relative_cost'):.3f} | {_interval(_of(rows, 'psnr'), '.2f')} | "
            f"{_interval(_of(rows, 'ssim'), '.4f')} | {line} |"
        )
    lines += ["", *_placements(table, deltas), "", "![PSNR against average bits](quality.png)"]
    _replace(folder / "README.md", "quality", "\n".join(lines))
    _draw(folder / "quality.png", table)


def write_cache_report(
    folder: Path, table: dict[str, list[Row]], arguments: argparse.Namespace, deltas: dict[str, float], seconds: float
) -> None:
    """Replace the step cache section of README.md in ``folder``."""
    lines = [
        _setting(table, arguments, deltas, seconds),
        "",
        "| | skipped | relative cost | PSNR, dB | against without, dB |",
        "|---|---|---|---|---|",
    ]
    for name, rows in table.items():
        base = table["a8" if name.startswith("a8") else "δ-GBS 6"]
        loss = [a - b for a, b in zip(_of(rows, "psnr"), _of(base, "psnr"))]
        lines.append(
            f"| {name} | {_mean(rows, 'skipped'):.1f} | {_mean(rows, 'relative_cost'):.3f} | "
            f"{_interval(_of(rows, 'psnr'), '.2f')} | {'' if rows is base else _interval(loss, '+.2f')} |"
        )
    _replace(folder / "README.md", "cache", "\n".join(lines))


def _setting(
    table: dict[str, list[Row]], arguments: argparse.Namespace, deltas: dict[str, float], seconds: float
) -> str:
    import onnxruntime
    import torch

    rows = [row for name in table for row in table[name]]
    work = sum(_of(rows, "seconds"))
    per_step = sum(_of(rows, "controller_seconds")) / (len(rows) * arguments.steps)
    command = " ".join(["python", "benchmarks/switching/measure.py", *sys.argv[1:]])
    lines = [
        f"{len(next(iter(table.values())))} clips of tiny-wan (every prompt with its own seed), {arguments.steps} steps, "
        f"guidance 3; δ {', '.join(f'{v:.4g} for {k} bits' for k, v in deltas.items())}, planned on four others.",
        "PSNR and SSIM of uint8 frames against the fp32 PyTorch model; mean and 95 % bootstrap interval over the clips.",
        "Relative cost: 8 bit 1, 4 bit 1.75 / 2.12 (published for HunyuanVideo, an assumption here), skipped 0.",
        f"{datetime.now(UTC).date()}, {processor_name()}, {usable_cores()} cores, ONNX Runtime {onnxruntime.__version__}, "
        f"torch {torch.__version__}; {work / 60:.0f} minutes of generation in all, {seconds / 60:.0f} in the last run;",
        f"the controller took {1e3 * per_step:.2f} ms a step.",
        "",
        f"    {command}",
    ]
    return "\n".join(lines)


def _placements(table: dict[str, list[Row]], deltas: dict[str, float]) -> list[str]:
    """δ-GBS against as many 8-bit steps placed by a rule that looks at nothing, clip by clip."""
    lines = [
        "δ-GBS minus the same number of 8-bit steps placed otherwise on the same clip, PSNR in dB:",
        "",
        "| | first | last | evenly |",
        "|---|---|---|---|",
    ]
    for bits in deltas:
        for name in (f"δ-GBS {bits}", f"δ-GBS {bits}, last 2 high"):
            ours = _of(table[name], "psnr")
            others = [_of(table[f"{place}, as δ-GBS {bits}"], "psnr") for place in ("first", "last", "evenly")]
            cells = [_interval([a - b for a, b in zip(ours, other)], "+.2f") for other in others]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _of(rows: list[Row], field: str) -> list[float]:
    return [float(row[field]) for row in rows]


def _mean(rows: list[Row], field: str) -> float:
    return sum(_of(rows, field)) / len(rows)


def _interval(values: list[float], form: str) -> str:
    mean, low, high = bootstrap(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _line(table: dict[str, list[Row]], rows: list[Row]) -> list[float]:
    """PSNR on the straight line between a4 and a8 of each clip, at the bits it had."""
    ends = zip(_of(table["a4"], "psnr"), _of(table["a8"], "psnr"), _of(rows, "average_bits"))
    return [a4 + (bits - 4) / 4 * (a8 - a4) for a4, a8, bits in ends]


def _replace(path: Path, section: str, text: str) -> None:
    """Put ``text`` between the section's marks."""
    path.write_text(replace_block(path.read_text(), MARK.format(section), MARK.format(f"end of {section}"), text))


def _draw(path: Path, table: dict[str, list[Row]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.2), constrained_layout=True)
    kinds = {
        "a8": ("s", "#1f2937", "a4, a8"), "a4": ("s", "#1f2937", ""), "δ-GBS": ("o", "#1f5fa8", "δ-GBS"),
        "high": ("P", "#0f766e", "δ-GBS, last 2 steps high"), "cache": ("v", "#9ca3af", "with step cache"),
        "first": ("<", "#c1121f", "as many 8-bit steps, first"), "last,": (">", "#e07a00", "… last"),
        "evenly": ("D", "#7c3aed", "… evenly"),
    }  # fmt: skip
    seen = set()
    for name, rows in table.items():
        kind = next(k for k in ("cache", "high", "first", "last,", "evenly", "δ-GBS", "a8", "a4") if k in name)
        marker, colour, label = kinds[kind]
        mean, low, high = bootstrap(_of(rows, "psnr"))
        axis.errorbar(
            _mean(rows, "average_bits"), mean, [[mean - low], [high - mean]], fmt=marker, color=colour, ms=6, capsize=2,
            lw=1, label=label if label and kind not in seen else None,
        )  # fmt: skip
        seen.add(kind)
    ends = [bootstrap(_of(table[name], "psnr"))[0] for name in ("a4", "a8")]
    axis.plot([4, 8], ends, color="#9ca3af", lw=1, ls="--", zorder=0, label="straight line a4 – a8")
    axis.set_xlabel("average activation bits of the computed steps")
    axis.set_ylabel("PSNR to fp32, dB")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=4)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
