"""The plots of report.py, from numbers it has already averaged.

Colours are Okabe and Ito's, which stay apart in the usual forms of colour blindness, the light ones darkened to be read as
text; every line is named where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Curves", "Dots", "Drawing", "Lines", "draw_delta", "draw_methods", "draw_steps", "drawings", "spread"]

Interval = tuple[float, float, float]  # mean, lower, upper
Dots = dict[str, dict[str, dict[str, Interval]]]  # model -> method -> width -> PSNR
Lines = dict[tuple[str, str], dict[str, tuple[list[int], list[float]]]]  # (model, width) -> method -> (steps, errors)
Curves = dict[str, dict[str, list[tuple[float, float, float, float]]]]  # model -> name -> (bits, mean, lower, upper)
Ends = list[tuple[float, float, str, str]]  # x, y, name, colour of a line's last point
Drawing = tuple[str, str, str, Callable[[Path], None]]  # block of README, file, title, how to draw it

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#9C4F8B", "#A67C00", "#3A8DBF", "#1f2328", "#6b7280",
)  # fmt: skip
WIDTHS = {"A8": (BLUE, "o"), "A6": (GREEN, "s"), "A4": (VERMILION, "^")}
LINE_COLOURS = (ORANGE, GREEN, BLUE, PURPLE, SKY)
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.titlesize": 11, "axes.titleweight": "bold",
    "text.color": BLACK, "axes.labelcolor": BLACK, "xtick.color": BLACK, "ytick.color": BLACK, "axes.edgecolor": GREY,
}  # fmt: skip
INCHES = 9.0  # wide: 100 dots an inch where embedded at 900 px, written at 160


def drawings(
    psnr: Mapping[tuple[str, str, str], Interval],
    steps: Mapping[tuple[str, str, str], Mapping[Hashable, Mapping[int, float]]],
    points: Iterable[tuple[str, str, float, Interval]],
    ours: Sequence[str],
) -> list[Drawing]:
    """Return what there are numbers for.

    Args:
        psnr: (model, method, width) -> PSNR in dB: mean, lower, upper.
        steps: (model, method, width) -> clip -> step -> relative L2.
        points: (model, name, average bits, PSNR in dB) of every δ and every fixed schedule.
        ours: The methods that are set off, the first one most.
    """
    dots: Dots = {}
    for (model, method, width), value in psnr.items():
        dots.setdefault(model, {}).setdefault(method, {})[width] = value
    lines: Lines = {}
    for (model, method, width), clips in steps.items():
        numbers = sorted({step for errors in clips.values() for step in errors})
        means = [fmean(errors[step] for errors in clips.values() if step in errors) for step in numbers]
        for panel in [w for w in ("A8", "A4") if width in (w, "A16")]:  # bf16 stands beside both
            lines.setdefault((model, panel), {})[method] = (numbers, means)
    curves: Curves = {}
    for model, name, bits, value in points:
        curves.setdefault(model, {}).setdefault(name, []).append((bits, *value))
    found: list[Drawing] = []
    if any(width != "A16" for methods in dots.values() for widths in methods.values() for width in widths):
        found.append(("methods", "methods.png", "PSNR of every method", lambda p: draw_methods(p, dots, ours)))
    if lines:
        found.append(("methods", "steps.png", "relative L2 per step", lambda p: draw_steps(p, lines, ours)))
    if curves:
        found.append(("delta", "delta.png", "PSNR against average bits", lambda p: draw_delta(p, curves)))
    return found


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the heights nearest to those wanted that are ``gap`` apart, between two bounds where they fit.

    Args:
        wanted: The wanted heights, as shares of the axis.
        gap: The least distance of two.
        low: The lower bound.
        high: The upper bound.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    placed = [0.0] * len(wanted)
    # Runs of labels that would overlap are spaced evenly around the mean of what they want.
    runs: list[list[int]] = []
    for index in order:
        runs.append([index])
        while (
            len(runs) > 1 and _bottom(runs[-1], wanted, gap, low, high) < _top(runs[-2], wanted, gap, low, high) + gap
        ):
            last = runs.pop()
            runs[-1] += last
    for run in runs:
        first = _bottom(run, wanted, gap, low, high)
        for offset, index in enumerate(run):
            placed[index] = first + offset * gap
    return placed


def _bottom(run: list[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Return the height of the first label of a run that is centred on what its labels want."""
    length = (len(run) - 1) * gap
    middle = sum(wanted[i] for i in run) / len(run)
    return max(low, min(middle - length / 2, high - length))


def _top(run: list[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Return the height of the last label of such a run."""
    return _bottom(run, wanted, gap, low, high) + (len(run) - 1) * gap


def draw_methods(path: Path, dots: Dots, ours: Sequence[str]) -> None:
    """Draw PSNR with its interval: a row per method, a mark per width, a panel per model; 16 bit in words, being far off.

    Args:
        path: The picture that is written.
        dots: Model -> method -> width -> PSNR in dB.
        ours: The methods in bold.
    """
    models = list(dots)
    quantized = {m: {n: w for n, w in found.items() if "A16" not in w} for m, found in dots.items()}
    names = _by_distance(quantized)
    with plt.rc_context(STYLE):
        figure, axes = _panels(1, len(models), 1.5 + 0.36 * len(names), "row")
        for axis, model in zip(axes, models):
            for row, name in enumerate(names):
                if row % 2:
                    axis.axhspan(row - 0.5, row + 0.5, color="#f3f4f6", lw=0, zorder=0)
                for width, (mean, low, high) in quantized[model].get(name, {}).items():
                    colour, marker = WIDTHS.get(width, (PURPLE, "v"))
                    axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour, ms=6, lw=1.6)
            axis.set(xlabel="PSNR to fp32, dB", ylim=(len(names) - 0.5, -0.5))
            axis.set_title(model, pad=22, loc="left")
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", color="#d1d5db", lw=0.6)
            for label in axis.get_yticklabels():
                label.set_fontweight("bold" if label.get_text() in ours else "normal")
            plain = [f"{n}: {w['A16'][0]:.1f} dB" for n, w in dots[model].items() if "A16" in w]
            axis.annotate(", ".join(plain), (1, -0.5), (0, 20), textcoords="offset points", color=GREY, size=9, ha="right",
                          xycoords=("axes fraction", "data"))  # fmt: skip
        for axis in axes[1:]:
            axis.tick_params(axis="y", labelleft=False)
        for axis, model in zip(axes, models):
            _name_widths(axis, names, quantized[model])
        _save(figure, path)


def _by_distance(dots: Dots) -> list[str]:
    """Return the methods by mean distance to the best of the same model and width: missing widths do not count."""
    best: dict[tuple[str, str], float] = {}
    lost: dict[str, list[float]] = {}
    for model, methods in dots.items():
        for widths in methods.values():
            for width, value in widths.items():
                best[model, width] = max(best.get((model, width), value[0]), value[0])
    for model, methods in dots.items():
        for name, widths in methods.items():
            lost.setdefault(name, []).extend(best[model, width] - value[0] for width, value in widths.items())
    return sorted(lost, key=lambda name: (fmean(lost[name]), name))


def _name_widths(axis: Axes, names: list[str], methods: dict[str, dict[str, Interval]]) -> None:
    """Write the names of the widths above a panel, each over the first mark of its kind as far as there is room.

    Args:
        axis: The panel.
        names: The methods, from top to bottom.
        methods: Method -> width -> PSNR in dB.
    """
    first: dict[str, float] = {}
    for name in names:
        for width, value in methods.get(name, {}).items():
            first.setdefault(width, value[0])
    places, points = _places(axis, [(x, 0.0) for x in first.values()], 0)
    for (width, x), place in zip(first.items(), spread(places, 36 / points, 0.06, 0.94)):
        colour = WIDTHS.get(width, (PURPLE, "v"))[0]
        axis.annotate(
            f"W4{width}", (x, -0.5), (place, 1.015), textcoords="axes fraction", color=colour, size=9, weight="bold",
            ha="center", annotation_clip=False,
        )  # fmt: skip


def draw_steps(path: Path, lines: Lines, ours: Sequence[str]) -> None:
    """Draw the relative L2 of every step on a logarithmic axis: a row of panels per model, a panel per width.

    Args:
        path: The picture that is written.
        lines: (model, width) -> method -> (steps, errors).
        ours: The methods in bold; the first one is the thickest line.
    """
    models = list(dict.fromkeys(model for model, _ in lines))
    widths = sorted({width for _, width in lines}, key=lambda w: -int(w[1:]))
    names = list(dict.fromkeys(name for panel in lines.values() for name in panel))
    others = [name for name in names if name not in (ours[0], "bf16")]
    colours = dict(zip(others, LINE_COLOURS)) | {ours[0]: VERMILION, "bf16": GREY}
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(models), len(widths), 0.6 + 3.1 * len(models), "row")
        ends: list[Ends] = []
        for axis, (model, width) in zip(axes, [(m, w) for m in models for w in widths]):
            found: Ends = []
            named = lines.get((model, widths[-1]), {}) if width != widths[-1] else {}
            for name, (steps, errors) in lines.get((model, width), {}).items():
                style = "--" if name == "bf16" else "-"
                axis.plot(steps, errors, style, color=colours[name], lw=2.4 if name == ours[0] else 1.5)
                if name not in named:  # the panel at the right end of the row names the rest
                    found.append((steps[-1], errors[-1], name, colours[name]))
            axis.set(yscale="log", title=f"{model}, W4{width}", ylabel="relative L2 of the output", xlabel="step")
            axis.grid(color="#e5e7eb", lw=0.6, which="major")
            ends.append(found)
        for axis, found in zip(axes, ends):  # once every panel has its limits
            _name_ends(axis, found, ours)
        _save(figure, path)


def draw_delta(path: Path, curves: Curves) -> None:
    """Draw PSNR against average bits: a line through every δ, a mark for what has one setting; a panel per model.

    Args:
        path: The picture that is written.
        curves: Model -> name -> (average bits, mean PSNR in dB, lower, upper).
    """
    names = list(dict.fromkeys(name for model in curves.values() for name in model))
    colours = dict(zip(names, (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK)))
    markers = dict(zip(names, "osD^v<>P"))
    with plt.rc_context(STYLE):
        figure, axes = _panels(1, len(curves), 4.4, False)
        for axis, (model, variants) in zip(axes, curves.items()):
            ends: Ends = []
            for name, found in variants.items():
                bits, mean, low, high = (list(column) for column in zip(*sorted(found)))
                colour, marker = colours.get(name, GREY), markers.get(name, "o")
                axis.plot(bits, mean, marker=marker, color=colour, ms=5, lw=1.5)
                if len(bits) > 1:
                    axis.fill_between(bits, low, high, color=colour, alpha=0.12, lw=0)
                else:
                    axis.vlines(bits, low, high, color=colour, lw=1)
                ends.append((bits[-1], mean[-1], name, colour))
            axis.set(title=model, xlabel="average activation bits", ylabel="PSNR to fp32, dB")
            axis.grid(color="#e5e7eb", lw=0.6)
            _name_ends(axis, ends, ())
        _save(figure, path)


def _panels(rows: int, columns: int, height: float, share: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(INCHES, height), layout="constrained", squeeze=False, dpi=160, sharey=share
    )  # fmt: skip
    return figure, list(axes.flat)


def _name_ends(axis: Axes, ends: Ends, strong: Sequence[str]) -> None:
    """Write names at the right edge in the order of the ends, not on each other, tied to them by a thin line.

    Args:
        axis: The panel.
        ends: (x, y, name, colour) of the last point of every line.
        strong: The names in bold.
    """
    if not ends:
        return
    heights, points = _places(axis, [(x, y) for x, y, _, _ in ends], 1)
    placed = spread(heights, 13 / points, 0.02, 0.98)
    for (x, y, name, colour), height in zip(ends, placed):
        axis.annotate(
            name, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", color=colour, va="center", size=9,
            weight="bold" if name in strong else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)},
        )  # fmt: skip


def _places(axis: Axes, data: list[tuple[float, float]], along: int) -> tuple[list[float], float]:
    """Return where points lie along an axis, as shares of its length, and that length in points of type.

    Args:
        axis: The panel.
        data: (x, y) of every point, in units of the data.
        along: 0 for the horizontal axis, 1 for the vertical one.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    inverse = axis.transAxes.inverted()
    box = axis.get_window_extent()
    length = (box.height if along else box.width) / figure.dpi * 72
    return [float(inverse.transform(axis.transData.transform(place))[along]) for place in data], length


def _save(figure: Figure, path: Path) -> None:
    """Write a figure without a date or a version, so that the same numbers give the same bytes."""
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
