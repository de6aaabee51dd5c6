"""The charts of the report as inline SVG text: no script, colours by CSS classes, a title under the pointer for every mark.

Everything that is not a number goes through :func:`html.escape`. Widths are those of the viewBox; the page scales them.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from dvdquant.artifact.entries import LayerEntry

__all__ = ["error_chart", "line_chart", "schedule_chart"]

WIDTH = 960
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")
_LOG_FROM = 40  # a largest value this many times the smallest is drawn on a logarithmic axis


def tag(name: str, *content: str, **attributes: object) -> str:
    """Write one element of an SVG.

    Args:
        name: The name of the element.
        *content: What is inside of it, SVG text already.
        **attributes: Its attributes; they are escaped, and ``_`` in their names becomes ``-``.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(content)}</{name}>" if content else f"<{name}{given}/>"


def label(text: str, x: float, y: float, kind: str = "t", **more: object) -> str:
    """Return a text element.

    Args:
        text: The text.
        x: The place from the left.
        y: The place from the top, of the base line.
        kind: The class of the element.
        **more: Further attributes.
    """
    return tag("text", html.escape(text), x=x, y=y, class_=kind, **more)


def title(text: str) -> str:
    """Return what the pointer shows over the element around it.

    Args:
        text: The text.
    """
    return tag("title", html.escape(text))


def svg(width: float, height: float, name: str, *content: str) -> str:
    """Return the picture; ``name`` is read out by screen readers.

    Args:
        width: The width in units of the picture.
        height: The height in units of the picture.
        name: What screen readers read out.
        *content: The elements, SVG text already.
    """
    parts = (title(name), *content)
    return tag("svg", *parts, viewBox=f"0 0 {_number(width)} {_number(height)}", role="img", class_="chart")


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------- axes


class _Axis:
    """Values to y, from zero, or on a logarithmic scale where they differ by orders of magnitude."""

    def __init__(self, values: Sequence[float], top: float, bottom: float) -> None:
        good = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
        self.log = max(good) > _LOG_FROM * min(good)
        self.top, self.bottom = top, bottom
        self.ticks = _decades(min(good), max(good)) if self.log else _ticks(max(good))
        ends = self.ticks[0], self.ticks[-1]
        self.low, self.high = (math.log10(ends[0]), math.log10(ends[1])) if self.log else ends

    def y(self, value: float) -> float:
        place = math.log10(max(value, 10**self.low)) if self.log else value
        share = (place - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * min(1.0, max(0.0, share))

    def grid(self, left: float, right: float) -> Iterator[str]:
        for value in self.ticks:
            y = self.y(value)
            yield tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
            yield label(f"{value:.6g}", left - 8, y + 4, "t n", text_anchor="end")


def _ticks(largest: float) -> list[float]:
    """0 and up to six round numbers, the last at least ``largest``."""
    step = 10 ** math.floor(math.log10(largest / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step * 5 >= largest)
    return [i * step for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _decades(smallest: float, largest: float) -> list[float]:
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    return [10.0**e for e in range(low, max(high, low + 1) + 1)]


# ------------------------------------------------------------------------------------------------------- weight errors


def error_chart(layers: Sequence[LayerEntry], name: str = "weight error") -> str:
    """Return the chart of every layer's relative mean square error, in model order.

    A ring is min-max, a dot what was exported, both on one line. Bands are the blocks. The text is empty when no error is known.

    Args:
        layers: The layers as the manifest records them.
        name: The name of what is drawn.
    """
    known = [e for e in layers if e["relative_mse"] is not None]
    if not known:
        return ""
    left, right, top, bottom = 62.0, WIDTH - 12.0, 34.0, 286.0
    values = [v for e in known for v in (e["relative_mse"], e["relative_mse_minmax"]) if v is not None]
    axis = _Axis(values, top, bottom)
    step = (right - left) / len(known)
    marks = [_layer_mark(e, left + i * step, step, axis) for i, e in enumerate(known)]
    caption = "relative MSE, logarithmic" if axis.log else "relative MSE"
    legend = _legend(right, (("minmax", "min-max"), ("ours", "exported")))
    bands = _bands(known, left, step, top, bottom)
    parts = (*bands, *axis.grid(left, right), label(caption, left - 54, 16), legend, *marks)
    return svg(WIDTH, bottom + 42, f"{name.capitalize()} of every layer, min-max against the exported weights", *parts)


def _layer_mark(entry: LayerEntry, x: float, step: float, axis: _Axis) -> str:
    ours, minmax = entry["relative_mse"], entry["relative_mse_minmax"]
    assert ours is not None
    middle, radius = x + step / 2, max(1.2, min(4.0, 0.36 * step))
    parts, words = [], f"{entry['name']}  {entry['features_in']} → {entry['features_out']}: {ours:.3g}"
    if minmax is not None:
        parts += [tag("line", x1=middle, x2=middle, y1=axis.y(ours), y2=axis.y(minmax), class_="stem")]
        parts += [tag("circle", cx=middle, cy=axis.y(minmax), r=radius, class_="ring minmax")]
        words += f", min-max {minmax:.3g}" + (f" ({_less(ours, minmax)})" if minmax else "")
    parts += [tag("circle", cx=middle, cy=axis.y(ours), r=radius, class_="dot ours")]
    hit = tag("rect", x=x, y=axis.top, width=step, height=axis.bottom - axis.top, class_="hit")
    return tag("g", title(words), hit, *parts, class_="mark")


def _less(ours: float, minmax: float) -> str:
    share = 100 * (1 - ours / minmax)
    return f"{share:.0f} % less" if share >= 0 else f"{-share:.0f} % more"


def _bands(known: Sequence[LayerEntry], left: float, step: float, top: float, bottom: float) -> Iterator[str]:
    """Yield a tinted column for every second block, block numbers where there is room, and the names of the lists below."""
    place, spans, last = 0, [], -math.inf
    for i, (key, group) in enumerate(groupby(known, key=_block_of)):
        count = len(list(group))
        x, width = left + place * step, count * step
        if i % 2:
            yield tag("rect", x=x, y=top, width=width, height=bottom - top, class_="band")
        if key[1] and x + width / 2 - last > 22:
            last = x + width / 2
            yield label(key[1], last, bottom + 16, "t n", text_anchor="middle")
        spans.append((key[0], x, width))
        place += count
    for name, members in groupby(spans, key=lambda span: span[0]):
        inside = list(members)
        start, end = inside[0][1], inside[-1][1] + inside[-1][2]
        if name and end - start > 40:
            room = int((end - start) / 7)
            text = name if len(name) <= room else name[: max(1, room - 1)] + "…"
            yield label(text, (start + end) / 2, bottom + 34, "t", text_anchor="middle")


def _block_of(entry: LayerEntry) -> tuple[str, str]:
    """("blocks", "3") of ``blocks.3.attn1.to_q``; two empty texts for a layer outside the blocks."""
    found = _BLOCK.match(entry["name"])
    return (found[1], found[2][:6]) if found else ("", "")


def _legend(right: float, items: Sequence[tuple[str, str]]) -> str:
    parts, x = [], right
    for kind, text in reversed(items):
        x -= 7.2 * len(text)
        parts.append(label(text, x, 16))
        parts.append(tag("circle", cx=x - 10, cy=12, r=4.0, class_=f"{'ring' if kind == 'minmax' else 'dot'} {kind}"))
        x -= 34
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------ error per step


def line_chart(series: Mapping[str, Sequence[float]], unit: str, name: str) -> str:
    """Return a chart with one line for each of ``series`` over steps counted from 1, named at its end.

    a4 and a8 have colours of their own. Values that are not finite are left out.

    Args:
        series: Values by the name of a line.
        unit: The unit of the values.
        name: The name of what is drawn.
    """
    left, right, top, bottom = 62.0, WIDTH - 58.0, 34.0, 250.0
    count = max(map(len, series.values()))
    axis = _Axis([v for line in series.values() for v in line], top, bottom)

    def x(i: int) -> float:
        return left + 10 + (right - left - 20) * (i / (count - 1) if count > 1 else 0.5)

    parts = [*axis.grid(left, right), label(unit + (", logarithmic" if axis.log else ""), left - 54, 16)]
    every = max(1, math.ceil(count / 20))
    for i in range(0, count, every):
        parts.append(label(str(i + 1), x(i), bottom + 18, "t n", text_anchor="middle"))
    parts.append(label("step", (left + right) / 2, bottom + 36, "t", text_anchor="middle"))
    for key, line in series.items():
        points = [(i, value) for i, value in enumerate(line) if math.isfinite(value)]
        kind = key if key in ("a4", "a8") else "other"
        path = " ".join(f"{_number(float(x(i)))},{_number(axis.y(v))}" for i, v in points)
        parts.append(tag("polyline", points=path, class_=f"line {kind}"))
        for i, value in points:
            dot = tag("circle", cx=x(i), cy=axis.y(value), r=3.0, class_=f"dot {kind}")
            hit = tag("circle", cx=x(i), cy=axis.y(value), r=9.0, class_="hit")
            parts.append(tag("g", title(f"{key}, step {i + 1}: {value:.3g}"), hit, dot, class_="mark"))
        if points:
            parts.append(label(key, x(points[-1][0]) + 12, axis.y(points[-1][1]) + 4, f"t {kind} name"))
    return svg(WIDTH, bottom + 44, name, *parts)


# ------------------------------------------------------------------------------------------------------- bits per step


def schedule_chart(bits: Sequence[int | None]) -> str:
    """Return a block for every step: full height for 8 bits, half for 4, a dot for a skipped one.

    Args:
        bits: The bits of every step; None for a skipped one.
    """
    left, right, bottom, full = 28.0, WIDTH - 12.0, 70.0, 56.0
    step = min(44.0, (right - left) / len(bits))
    gap = 0.14 * step
    parts = [label(str(b), left - 8, bottom - full * b / 8 + 5, "t n", text_anchor="end") for b in (4, 8)]
    every = max(1, math.ceil(22 / step))
    for i, width in enumerate(bits):
        x = left + i * step
        words = f"step {i + 1}: {'skipped' if width is None else f'{width}-bit activations'}"
        if width is None:
            mark = tag("circle", cx=x + step / 2, cy=bottom - 3, r=2.0, class_="dot skip")
        else:
            height, kind = full * min(width, 8) / 8, "a4" if width == 4 else "a8" if width == 8 else "other"
            mark = tag(
                "rect", x=x + gap / 2, y=bottom - height, width=step - gap, height=height, rx=2, class_=f"fill {kind}"
            )
        parts.append(tag("g", title(words), mark, class_="mark"))
        if i % every == 0:
            parts.append(label(str(i + 1), x + step / 2, bottom + 16, "t n", text_anchor="middle"))
    return svg(WIDTH, bottom + 24, "Activation bits of every step", *parts)
