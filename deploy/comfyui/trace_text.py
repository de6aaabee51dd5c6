"""The trace of a sampling run for people: a table, JSON values, and a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvdquant.deploy.comfyui.sampling import Trace
from dvdquant.deploy.generation.run_report import average_bits_text, bit_strip, bits_name, steps_of
from dvdquant.text import shown

__all__ = ["trace_json", "trace_picture", "trace_table"]

_NONE = "no sampler has run this model yet"
_COLOURS = {8: "#1f5fa8", 4: "#e07a00", None: "#c3c8d0"}
SIZE = (7.2, 2.6)  # inches
DPI = 120


def trace_table(trace: Trace) -> str:
    """Return a line for every step, below a line for the whole run.

    Args:
        trace: The trace.
    """
    if not trace.records:
        return _NONE
    steps, facts = steps_of(trace.records), trace.facts
    calls = len(trace.records)
    seconds = sum(record.seconds for record in trace.records)
    lines = [
        f"{shown(facts.get('export', ''), 60)} on {facts.get('backend')} ({facts.get('device')}), {facts.get('mode')}: "
        f"{average_bits_text(steps)} bits on average, {calls} calls, {seconds:.2f} s",
        bit_strip(trace.records),
        "step  bits  seconds  reason",
    ]
    for step in steps:
        spent = sum(record.seconds for record in trace.records if record.step == step.step)
        lines.append(f"{step.step:4}  {bits_name(step.bits):>4}  {spent:7.3f}  {shown(step.reason)}")
    return "\n".join(lines)


def trace_json(trace: Trace) -> dict[str, Any]:
    """Return the trace as JSON values.

    Args:
        trace: The trace.
    """
    return {**trace.facts, "calls": [record.to_json() for record in trace.records]}


def trace_picture(trace: Trace) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a picture of the bits of every step, and of the changes that they follow from.

    Args:
        trace: The trace.

    Returns:
        float32 [H, W, 3] from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure without pyplot: ComfyUI's threads share that module's state.
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps = steps_of(trace.records)
    for record in steps:
        axis.bar(record.step, record.bits or 1, width=0.8, color=_COLOURS.get(record.bits, "#6b7280"))
    axis.set(xlabel="step", ylabel="activation bits", ylim=(0, 9), yticks=(0, 4, 8))
    changes = [(record.step, record.change) for record in steps if record.change is not None]
    if changes:
        right = axis.twinx()
        right.plot(*zip(*changes), color="#c1121f", marker=".", linewidth=1)
        right.set_ylabel("change of the output", color="#c1121f")
        right.set_ylim(bottom=0)
    axis.set_title(f"{average_bits_text(steps)} bits on average" if steps else _NONE, fontsize=10)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return np.ascontiguousarray(pixels.astype(np.float32) / 255)
