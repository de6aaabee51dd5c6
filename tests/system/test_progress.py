"""Progress for people and for programs."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest

import dvdquant.system.progress as progress_module
from dvdquant.system.progress import Progress
from dvdquant.text import unsafe


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_JSON_INTERVAL", 0.0)
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
    monkeypatch.setattr(progress_module, "_JSON_INTERVAL", 1000.0)
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


def test_text_has_rate_remaining_time_and_memory() -> None:
    stream = io.StringIO()
    progress = Progress("text", stream)
    with progress.stage("quantize", 50_000, "weights") as stage:
        stage.update(20_000, "blocks.0.ffn")
        time.sleep(0.25)
        stage.update(20_000, "blocks.1.ffn")
    progress.say("a message")
    text = stream.getvalue()
    for part in ("quantize", "blocks.1.ffn", "GiB", "weights/s", "a message", "40.0k/50.0k"):
        assert part in text, part
    assert "{" not in text


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
    stream = io.StringIO()
    with Progress(log_format, stream).stage("hash", 0, "B"):
        pass
    assert "hash" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_names_of_strangers_are_shown_not_sent(log_format: Any) -> None:
    evil = "layer\x1b[31m\u202e\x7f\x9b\r\nx"
    stream = io.StringIO()
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
