"""Progress of long stages, for people (a bar with rate, remaining time and memory) and for programs (JSON lines)."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Literal, TextIO

import psutil
from tqdm import tqdm

from dvdquant.text import amount, json_text, shown

__all__ = ["LogFormat", "Pace", "Progress", "Stage", "count_text", "seconds_text"]

LogFormat = Literal["text", "json", "quiet"]
JSON_INTERVAL = 1.0
"""The seconds between two JSON lines of one stage."""
_LINE_INTERVAL = 60.0  # seconds between two lines where no bar can be drawn
_WORTH_A_LINE = 5.0  # seconds of a stage that is told where no bar can be drawn
# A remaining time is told when this much of the work is done, so that it is never more than 19 times what went by.
_KNOWN_AFTER = 0.05
_COUNTED_AFTER = 60.0, 0.01  # seconds and share of the work: hours of work are estimated earlier


class Pace:
    """The rate of a stage over the latter half of its time, in which what came before the first result has no part.

    A stage begins with a compilation, a first read from a cold disk, a warm-up. An average over all of its time, or one that
    weighs its first items, would announce hours for what takes a minute.

    Args:
        started: The time of the start in seconds, of the clock of all other times here.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._points: deque[tuple[float, int]] = deque([(started, 0)])

    def add(self, now: float, count: int) -> None:
        """Take note of the amount of work that is done at a time.

        Args:
            now: The time in seconds.
            count: The work that is done.
        """
        points = self._points
        points.append((now, count))
        while len(points) > 2 and points[1][0] <= (self._started + now) / 2:
            points.popleft()

    def rate(self, now: float, count: int) -> float:
        """Return the amount of work per second; 0 if nothing was done in the latter half.

        Args:
            now: The time in seconds.
            count: The work that is done.
        """
        then, before = self._points[0]
        return (count - before) / (now - then) if now > then else 0.0

    def remaining(self, now: float, count: int, total: int) -> float | None:
        """Return the seconds that are left, or None while they are not known.

        Args:
            now: The time in seconds.
            count: The work that is done.
            total: All of the work.
        """
        elapsed = now - self._started
        share = count / total if total else 1.0
        long, least = _COUNTED_AFTER
        if not (share >= _KNOWN_AFTER or (elapsed >= long and share >= least)):
            return None
        rate = self.rate(now, count)
        # A pause, such as of one large engine, must not make it endless: the average of all of the time bounds it.
        bound = (total - count) * elapsed / count if count else None
        left = (total - count) / rate if rate > 0 else bound
        return left if bound is None or left is None else min(left, bound)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar whose rate and remaining time are those of :class:`Pace`, and whose amounts have the units of all our texts."""

    words = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the format of the bar may name."""
        return {**super().format_dict, "words": self.words}


def _is_for_people(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that somebody looks at: no pipe, no file, no log of a CI system."""
    try:
        return stream.isatty() and os.environ.get("CI", "") in ("", "0", "false")
    except (AttributeError, ValueError):
        return False


def count_text(count: float, unit: str) -> str:
    """Return an amount of work for people: ``1.4 GiB``, ``45.6 M weights``, ``3 engines``.

    Args:
        count: The amount.
        unit: ``B``, or the name of what is counted.
    """
    if unit == "B":
        return amount(count)
    name = unit if unit.endswith("s") or count == 1 else f"{unit}s"
    for least, factor, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if count >= least:
            return f"{count / factor:.1f} {prefix} {name}"
    return f"{count:.0f} {name}" if count == int(count) else f"{count:.1f} {name}"


def seconds_text(seconds: float) -> str:
    """Return a time for people: ``8 s``, ``2 min 05 s``, ``3 h 10 min``.

    Args:
        seconds: The time in seconds.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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
        self._pace = Pace(self._started)
        self._bar: _Bar | None = None
        if owner.draws_bars:
            self._bar = _Bar(
                total=total,
                desc=f"{shown(name):<9}",
                file=owner.stream,
                dynamic_ncols=True,
                mininterval=0.2,
                leave=True,
                bar_format="{desc} {percentage:3.0f} %|{bar:20}| {words} {postfix}",
            )
            self._bar.words = self._words()
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
        now = time.monotonic()
        self._pace.add(now, self.count)
        if self._bar is not None:
            self._bar.words = self._words()
            self._bar.set_postfix_str(f"{_memory_text()} {shown(self.label)}", refresh=False)
            self._bar.update(amount)
        elif self._owner.log_format == "text":
            if now - self._printed >= _LINE_INTERVAL:
                self._printed = now
                self._owner.say(f"{self.name}: {self._words()}")
        elif now - self._printed >= JSON_INTERVAL:
            self._emit("progress")

    def _words(self) -> str:
        """Return how far the work is, how fast it goes, and what is left, in words."""
        now = time.monotonic()
        done, total = count_text(self.count, self.unit).split(" ")[0:-1], count_text(self.total, self.unit)
        words = f"{' '.join(done) if self.unit != 'B' else count_text(self.count, 'B')} of {total}"
        elapsed, rate = now - self._started, self._pace.rate(now, self.count)
        if rate and self.count < self.total:
            words += f", {count_text(rate, self.unit)}/s" if rate >= 1 else f", {seconds_text(1 / rate)} each"
        words += f", {seconds_text(elapsed)}"
        left = self._pace.remaining(now, self.count, self.total)
        return words + (f", {seconds_text(left)} left" if left is not None and self.count < self.total else "")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.words = self._words()
            if kind is None:
                self._bar.set_postfix_str(_memory_text())
            self._bar.close()
        elif self._owner.log_format == "text":
            seconds = time.monotonic() - self._started
            if kind is None and seconds >= _WORTH_A_LINE:
                self._owner.say(f"{self.name}: {count_text(self.count, self.unit)} in {seconds_text(seconds)}")
        self._emit("end" if kind is None else "failed")
        if kind is None:
            self._owner.seconds[self.name] = self._owner.seconds.get(self.name, 0.0) + time.monotonic() - self._started

    def _emit(self, event: str) -> None:
        """Report ``event`` with the amount of work, the rate and the memory of the process."""
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        rate = self._pace.rate(self._printed, self.count)
        left = self._pace.remaining(self._printed, self.count, self.total)
        self._owner.event(
            event,
            stage=self.name,
            label=self.label,
            done=self.count,
            total=self.total,
            unit=self.unit,
            seconds=round(elapsed, 3),
            rate=round(rate, 1),
            remaining_seconds=None if left is None else round(left, 1),
            rss_bytes=psutil.Process().memory_info().rss,
        )


class Progress:
    """The place that stages report to.

    Args:
        log_format: ``text`` draws bars on a terminal, and elsewhere (a pipe, a file, a CI log) writes a line for a long
            stage, and one a minute while it lasts. ``json`` writes one object a line, ``quiet`` writes nothing.
        stream: The stream to write to. The default is stderr, so that stdout stays free for results.

    Attributes:
        seconds: The time in seconds of every stage that ended well, by its name.
    """

    def __init__(self, log_format: LogFormat = "quiet", stream: TextIO | None = None) -> None:
        self.log_format = log_format
        self.stream = stream or sys.stderr
        self.seconds: dict[str, float] = {}
        self._worked = -math.inf  # when the last line of `working` was written

    @property
    def draws_bars(self) -> bool:
        """Return whether somebody looks at the stream."""
        return self.log_format == "text" and _is_for_people(self.stream)

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

    def working(self, stage: str, label: str, seconds: float, silent: float) -> None:
        """Report that one long item of a stage goes on: an event for programs, and a line a minute where no bar can be drawn.

        Args:
            stage: The stage.
            label: The name of the item.
            seconds: The seconds that it has taken so far.
            silent: The seconds since it was heard of last.
        """
        self.event("working", stage=stage, label=label, seconds=round(seconds, 1), silent=round(silent, 1))
        now = time.monotonic()
        if self.log_format == "text" and not self.draws_bars and min(seconds, now - self._worked) >= _LINE_INTERVAL:
            self._worked = now
            self.say(f"{stage}: {label}, {seconds_text(seconds)}, silent for {seconds_text(silent)}")

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
    return amount(psutil.Process().memory_info().rss)
