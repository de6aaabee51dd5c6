"""Progress for people and for programs."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest

import dvdquant.system.progress as progress_module
from dvdquant.system.progress import Pace, Progress, count_text, seconds_text
from dvdquant.text import unsafe


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "JSON_INTERVAL", 0.0)
    stream = io.StringIO()
    progress = Progress("json", stream)
    with progress.stage("quantize", 100, "weights") as stage:
        stage.update(0, "first")
        time.sleep(0.05)
        stage.update(25)
        stage.update(75, 'last "quoted" layer\n')
    events = lines(stream)
    assert [e["event"] for e in events] == ["start", "progress", "progress", "progress", "end"]
    assert [e["done"] for e in events] == [0, 0, 25, 100, 100]
    assert {e["total"] for e in events} == {100}
    assert {e["unit"] for e in events} == {"weights"}
    assert [e["label"] for e in events] == ["", "first", "first", 'last "quoted" layer\n', 'last "quoted" layer\n']
    middle = events[2]
    # 25 of 100 done: three quarters remain, at the rate so far.
    assert middle["remaining_seconds"] == pytest.approx(75 / (25 / middle["seconds"]), abs=0.11)
    assert middle["rate"] == pytest.approx(25 / middle["seconds"], rel=0.05)
    assert events[0]["remaining_seconds"] is None
    assert events[-1]["remaining_seconds"] == 0.0
    assert all(e["rss_bytes"] > 10 << 20 for e in events)
    assert events == sorted(events, key=lambda e: e["time"])


def test_json_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "JSON_INTERVAL", 1000.0)
    stream = io.StringIO()
    with Progress("json", stream).stage("hash", 10_000, "B") as stage:
        for _ in range(10_000):
            stage.update(1)
    assert [e["event"] for e in lines(stream)] == ["start", "end"]


def test_failed_stage() -> None:
    stream = io.StringIO()
    progress = Progress("json", stream)
    with pytest.raises(ZeroDivisionError), progress.stage("trace", 1, "graph"):
        raise ZeroDivisionError
    assert [e["event"] for e in lines(stream)] == ["start", "failed"]
    assert progress.seconds == {}


def test_seconds_add_up_over_stages_of_one_name() -> None:
    progress = Progress("quiet")
    for _ in range(2):
        with progress.stage("trace", 1, "graph"):
            time.sleep(0.02)
    assert progress.seconds["trace"] >= 0.04


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def test_text_has_rate_remaining_time_and_memory() -> None:
    stream = Terminal()
    progress = Progress("text", stream)
    with progress.stage("quantize", 50_000, "weights") as stage:
        stage.update(20_000, "blocks.0.ffn")
        time.sleep(0.25)
        stage.update(20_000, "blocks.1.ffn")
    progress.say("a message")
    text = stream.getvalue()
    for part in ("quantize", "blocks.1.ffn", "iB", "weights/s", "s left", "a message", "40.0 k of 50.0 k weights"):
        assert part in text, part
    assert "{" not in text


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize("ci", ["", "true"])
def test_where_nobody_looks_a_line_a_minute_is_enough(ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, a file and the log of a CI system, whose terminal nobody looks at, get no bar and no control characters."""
    monkeypatch.setenv("CI", ci)
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    stream = Terminal() if ci else io.StringIO()
    progress = Progress("text", stream)
    with progress.stage("quantize", 1000 << 20, "B") as stage:
        for _ in range(1000):
            clock.now += 0.2
            stage.update(1 << 20, "a layer")
    with progress.stage("graphs", 2, "graph") as stage:
        stage.update(2)
    told = stream.getvalue().splitlines()
    assert told == [
        "quantize: 300.0 MiB of 1000.0 MiB, 5.0 MiB/s, 1 min 00 s, 2 min 20 s left",
        "quantize: 600.0 MiB of 1000.0 MiB, 5.0 MiB/s, 2 min 00 s, 1 min 20 s left",
        "quantize: 900.0 MiB of 1000.0 MiB, 5.0 MiB/s, 3 min 00 s, 20 s left",
        "quantize: 1000.0 MiB in 3 min 20 s",
    ]


def test_a_long_item_is_told_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two items that are alike is not told earlier because the first one took long."""
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    stream = io.StringIO()
    progress = Progress("text", stream)
    for _ in range(2):
        for beat in range(5, 130, 5):
            clock.now += 5
            progress.working("engines", "a4.engine", beat, beat % 60)
    minute, two = "engines: a4.engine, 1 min 00 s, silent for 0 s", "engines: a4.engine, 2 min 00 s, silent for 0 s"
    assert stream.getvalue().splitlines() == [minute, two] * 2


def announced(updates: list[tuple[float, int]], total: int) -> list[tuple[float, float]]:
    """(time, remaining seconds) of a stage whose work comes at these times."""
    pace, count, told = Pace(0.0), 0, []
    for now, work in updates:
        count += work
        pace.add(now, count)
        if (left := pace.remaining(now, count, total)) is not None:
            told.append((now, left))
    return told


def test_ninety_seconds_are_never_hours() -> None:
    """Twenty seconds of compilation, then a first small layer, then all the rest at an even rate."""
    updates = [(20.0, 10), *((20.0 + 0.7 * i, 1000) for i in range(1, 101))]
    told = announced(updates, 100_010)
    assert told[0][0] < 30
    assert max(left for _, left in told) < 10 * 60
    for now, left in told:
        if now >= 45:  # what came before the first result has no part in it any more
            assert left == pytest.approx(90.0 - now, rel=0.1, abs=1.0)


def test_a_pause_makes_no_hours_either() -> None:
    """Nothing for a minute in the middle, as one large engine does."""
    updates = [(float(i), 1) for i in range(1, 51)] + [(110.0 + i, 1) for i in range(1, 51)]
    told = announced(updates, 100)
    assert max(left for now, left in told if now > 10) < 180


def test_amounts_are_named_one_way() -> None:
    assert [count_text(n, "weights") for n in (1, 9_999, 12_345, 1.5e6, 2.5e9)] == [
        "1 weights", "9999 weights", "12.3 k weights", "1.5 M weights", "2.5 G weights",
    ]  # fmt: skip
    assert [count_text(n, "engine") for n in (1, 2)] == ["1 engine", "2 engines"]
    assert count_text(3 << 30, "B") == "3.0 GiB"
    assert [seconds_text(s) for s in (0.4, 59.4, 60, 125, 11_400)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "2 min 05 s",
        "3 h 10 min",
    ]


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress = Progress("quiet", stream)
    with progress.stage("quantize", 10, "weights") as stage:
        stage.update(10, "x")
    progress.say("nothing")
    progress.event("nothing")
    assert stream.getvalue() == ""


def test_messages_are_events_in_json() -> None:
    stream = io.StringIO()
    Progress("json", stream).say("two\nlines")
    (event,) = lines(stream)
    assert (event["event"], event["text"]) == ("message", "two\nlines")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_empty_stage(log_format: Any) -> None:
    """A model without kept tensors, an export without engines: no work is no division by zero."""
    stream = io.StringIO() if log_format == "json" else Terminal()
    with Progress(log_format, stream).stage("hash", 0, "B"):
        pass
    assert "hash" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_names_of_strangers_are_shown_not_sent(log_format: Any) -> None:
    evil = "layer\x1b[31m\u202e\x7f\x9b\r\nx"
    stream = io.StringIO() if log_format == "json" else Terminal()
    progress = Progress(log_format, stream)
    with progress.stage(evil, 20_000, "weights") as stage:
        stage.update(10_000, evil)
    progress.say(evil)
    progress.event("any", value=evil, infinite=float("inf"), deep=[(float("nan"), 1.5)])
    text = stream.getvalue()
    assert not {c for c in text if unsafe(c)} - {"\n", "\r"}
    if log_format == "json":
        events = lines(stream)
        assert {event["label"] for event in events if "label" in event} == {"", evil}
        assert (events[-1]["value"], events[-1]["infinite"], events[-1]["deep"]) == (evil, None, [[None, 1.5]])
    else:
        assert "layer\\x1b[31m\\u202e\\x7f\\x9b\\x0d" in text
