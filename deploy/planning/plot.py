"""The picture of a plan: δ against average bits and time, and against quality where a reference was made."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvdquant.system.whole_file import write_whole

if TYPE_CHECKING:
    from dvdquant.deploy.planning.planner import Plan

__all__ = ["draw_plan"]

_BITS, _CHOSEN, _MEASURED, _QUALITY, _GREY = "#1f5fa8", "#c1121f", "#e07a00", "#2a7f62", "#6b7280"


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a plan as a PNG.

    It shows the staircase of average bits over δ with predicted seconds on the right, the chosen δ and what one real run
    measured there; below it PSNR to the 16-bit model, if there is any.

    Args:
        plan: The plan that is drawn.
        path: The path of the file.

    Raises:
        OutputError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = 2 if plan.quality else 1
    figure, axes = plt.subplots(
        rows, 1, sharex=True, squeeze=False, figsize=(7.2, 3.1 + 2.2 * (rows - 1)), height_ratios=[3, 2][:rows],
        constrained_layout=True,
    )  # fmt: skip
    left, right = _edges(plan)
    _draw_bits(axes[0][0], plan, left, right)
    if plan.quality:
        _draw_quality(axes[1][0], plan, left, right)
    axes[-1][0].set_xlabel("δ")
    axes[-1][0].set_xscale("log")
    axes[-1][0].set_xlim(left, right)
    axes[-1][0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[-1][0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[-1][0].xaxis.set_minor_formatter(NullFormatter())
    clips = len({(clip.prompt, clip.seed) for clip in plan.clips})
    figure.suptitle(
        f"δ-GBS on {plan.backend}: {plan.schedule.steps} steps, {clips} recorded clip{'s' * (clips != 1)}", fontsize=10
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def _edges(plan: Plan) -> tuple[float, float]:
    """Return limits a little beyond both ends of the staircase; the chosen δ is always inside."""
    edges = [s.upto for s in plan.stairs if 0 < s.upto < math.inf] + [plan.delta] * (plan.delta > 0) or [1.0]
    return min(edges) / 1.5, max(edges) * 1.5


def _draw_bits(axis: Any, plan: Plan, left: float, right: float) -> None:
    deltas = [left, *(s.upto for s in plan.stairs if math.isfinite(s.upto)), right]
    axis.stairs([s.average_bits for s in plan.stairs], deltas, baseline=None, color=_BITS, lw=1.8, label="predicted")
    chosen = max(plan.delta, left)
    axis.axvline(chosen, color=_CHOSEN, lw=1, ls="--")
    axis.plot([chosen], [plan.predicted_bits], "o", color=_CHOSEN, ms=6, zorder=3, label="chosen")
    axis.plot(
        [plan.delta], [plan.measured_bits], "D", mfc="none", color=_MEASURED, ms=7, mew=1.6, zorder=4,
        label="measured, one clip",
    )  # fmt: skip
    axis.annotate(
        f"δ = {plan.delta:.4g}\n{plan.predicted_bits:.3g} bits predicted\n{plan.measured_bits:.3g} bits measured",
        (plan.delta, plan.predicted_bits), xytext=(12, 10), textcoords="offset points", fontsize=8, color=_CHOSEN,
    )  # fmt: skip
    margin = 0.06 * (plan.high - plan.low)
    axis.set_ylim(plan.low - margin, plan.high + margin)
    axis.set_ylabel("average activation bits")
    axis.legend(loc="upper right", fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    fast, slow = plan.seconds_at(plan.low), plan.seconds_at(plan.high)
    if slow - fast > 0.05 * slow:
        slope = (slow - fast) / (plan.high - plan.low)
        second = axis.secondary_yaxis(
            "right", functions=(lambda b: fast + (b - plan.low) * slope, lambda s: plan.low + (s - fast) / slope)
        )
        second.set_ylabel("transformer, s per clip")
    else:
        # On a backend that emulates both bit-widths alike, the axis would only show noise. Above the curves: whatever δ is
        # chosen, its line crosses no words there.
        note = f"{slow:.2g} s per clip at every δ: the {plan.low}-bit engine is not faster here"
        axis.set_title(note, loc="left", fontsize=8, color=_GREY)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_quality(axis: Any, plan: Plan, left: float, right: float) -> None:
    """Points from all high (δ = 0, drawn as a line) to all low."""
    points = [(min(q.delta, right), q.psnr, q.average_bits) for q in plan.quality if math.isfinite(q.psnr)]
    switched = [point for point in points if point[0] > 0]
    for _, value, bits in (point for point in points if point[0] == 0):
        axis.axhline(value, color=_GREY, lw=1, ls=":")
        axis.annotate(
            f"δ = 0, {bits:.3g} bits", (left, value), xytext=(4, 4), textcoords="offset points", fontsize=7.5,
            color=_GREY,
        )  # fmt: skip
    axis.plot([p[0] for p in switched], [p[1] for p in switched], "o-", color=_QUALITY, lw=1.4, ms=4)
    for delta, value, bits in switched:
        axis.annotate(
            f"{bits:.3g} bits", (delta, value), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7.5,
            color=_GREY, bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )  # fmt: skip
    axis.axvline(max(plan.delta, left), color=_CHOSEN, lw=1, ls="--")
    axis.margins(y=0.3)
    axis.set_ylabel("PSNR to 16 bit, dB")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
