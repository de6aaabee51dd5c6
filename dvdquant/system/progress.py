"""Progress of long stages, for people (a bar with rate, remaining time and memory) and for programs (JSON lines)."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any, Literal, TextIO

import psutil
from tqdm import tqdm

from dvdquant.text import json_text, shown

__all__ = ["LogFormat", "Progress", "Stage"]

LogFormat = Literal["text", "json", "quiet"]
_JSON_INTERVAL = 1.0  # seconds between two lines of one stage


class Stage:
    """One stage with a known amount of work, used as a context manager.

    Args:
        owner: The progress that the stage reports to.
        name: The work as a verb ("quantize").
        total: The amount of work in ``unit``.
        unit: The unit of the work: ``weights``, ``B`` or ``steps``. Rates are in units per second.
    """

    def __init__(self, owner: Progress, name: str, total: int, unit: str) -> None:
        self._owner = owner
        self.name, self.total, self.unit = name, total, unit
        self.count = 0
        self.label = ""
        self._started = self._printed = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if owner.log_format == "text":
            self._bar = tqdm(
                total=total,
                desc=f"{shown(name):<9}",
                unit=unit if unit == "B" else f" {unit}",
                unit_scale=total > 10_000,
                unit_divisor=1024 if unit == "B" else 1000,
                file=owner.stream,
                dynamic_ncols=True,
                mininterval=0.2,
                leave=True,
            )
        self._emit("start")

    def update(self, amount: int, label: str | None = None) -> None:
        """Add an amount of finished work.

        Args:
            amount: The work in the unit of the stage.
            label: The name of the item that has just begun or ended; None keeps the last one.
        """
        self.count += amount
        if label is not None:
            self.label = label
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_memory_text()} {shown(self.label)}", refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._printed >= _JSON_INTERVAL:
            self._emit("progress")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.set_postfix_str(_memory_text())
            self._bar.close()
        self._emit("end" if kind is None else "failed")
        if kind is None:
            self._owner.seconds[self.name] = self._owner.seconds.get(self.name, 0.0) + time.monotonic() - self._started

    def _emit(self, event: str) -> None:
        """Report ``event`` with the amount of work, the rate and the memory of the process."""
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        rate = self.count / elapsed if elapsed > 0 else 0.0
        self._owner.event(
            event,
            stage=self.name,
            label=self.label,
            done=self.count,
            total=self.total,
            unit=self.unit,
            seconds=round(elapsed, 3),
            rate=round(rate, 1),
            remaining_seconds=round((self.total - self.count) / rate, 1) if rate else None,
            rss_bytes=psutil.Process().memory_info().rss,
        )


class Progress:
    """The place that stages report to.

    Args:
        log_format: ``text`` draws bars, ``json`` writes one object a line, ``quiet`` writes nothing.
        stream: The stream to write to. The default is stderr, so that stdout stays free for results.

    Attributes:
        seconds: The time in seconds of every stage that ended well, by its name.
    """

    def __init__(self, log_format: LogFormat = "quiet", stream: TextIO | None = None) -> None:
        self.log_format = log_format
        self.stream = stream or sys.stderr
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, total: int, unit: str) -> Stage:
        """Begin a stage, which is to be used as a context manager.

        Args:
            name: The work as a verb ("quantize").
            total: The amount of work in ``unit``.
            unit: The unit of the work: ``weights``, ``B`` or ``steps``.
        """
        return Stage(self, name, total, unit)

    def event(self, event: str, **fields: Any) -> None:
        """Write a JSON line if the log format is ``json``, else nothing.

        Args:
            event: The kind of the event.
            **fields: Values that JSON can hold. NaN and infinities become null.
        """
        if self.log_format == "json":
            line = json_text(_plain({"time": round(time.time(), 3), "event": event, **fields}))
            print(line, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """Write a line for people, or a ``message`` event if the log format is ``json``.

        Args:
            text: The text. Characters that act on a terminal are escaped.
        """
        if self.log_format == "text":
            tqdm.write(shown(text, 0, keep="\n"), file=self.stream)
        else:
            self.event("message", text=text)


def _plain(value: Any) -> Any:
    """Return ``value`` with null instead of infinities and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _memory_text() -> str:
    """Return the resident memory of this process, such as "1.4 GiB"."""
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
