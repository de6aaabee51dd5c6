"""``dvdq-inspect --trace``: it says what was written into the trace of a run, and refuses a stranger's file in words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dvdquant.cli.inspect import main as inspect
from tests.support.report_pages import Page
from tests.support.running import PROMPT, call, drawn, short_wan_export


@pytest.fixture(scope="module")
def out() -> Path:
    return short_wan_export()


@pytest.fixture(scope="module")
def trace(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of seven steps, with a threshold that skips whatever may be skipped."""
    folder = tmp_path_factory.mktemp("trace")
    skips = ("--steps", 7, "--cache", 1000, "--cache-policy", "forecast", "--last-high", 0)
    drawn(*call(out, "--prompt", PROMPT, "-o", folder / "c.mp4", "--trace", folder / "t.json"), *skips)
    return folder / "t.json"


def shown(out: Path, *words: object) -> Result:
    return CliRunner().invoke(inspect, [str(out), *map(str, words)])


def test_every_step_and_what_the_cache_left_out(out: Path, trace: Path, tmp_path: Path) -> None:
    (clip,) = json.loads(trace.read_text())["clips"]
    skipped = {record["step"] for record in clip["records"] if record["bits"] is None}
    assert skipped, "a threshold that large skips"
    said = shown(out, "--trace", trace)
    assert said.exit_code == 0, said.output
    cache = clip["summary"]["cache"]
    assert (
        f"step cache forecast, threshold 1000, at most {cache['max_skips']} in a row: {len(skipped)} of 7 steps"
        in said.output
    )
    assert clip["blocks"] in said.output
    lines = [line.split(maxsplit=3) for line in said.output.splitlines() if line[:4].strip().isdigit()]
    assert [int(line[0]) for line in lines] == list(range(7))
    assert {int(line[0]) for line in lines if line[1] == "skip"} == skipped
    reasons = {record["step"]: record["reason"] for record in reversed(clip["records"])}
    assert all(line[3] == reasons[int(line[0])] for line in lines)
    # The page has the same, as text.
    page = tmp_path / "page.html"
    assert shown(out, "--trace", trace, "--html", page).exit_code == 0
    text = Page(page.read_text(encoding="utf-8")).text
    assert f"{len(skipped)} of 7 steps skipped" in text
    assert clip["blocks"] in text


def edited(trace: Path, place: Path, *keys: str | int, value: Any) -> Path:
    data = copy.deepcopy(json.loads(trace.read_text()))
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    place.write_text(json.dumps(data))
    return place


BAD: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("format_version",), 7, "has format 7"),
    (("export", "key"), "0" * 64, "is of another export"),
    (("clips",), "none", "clips"),
    (("clips", 0, "records", 0, "bits"), 99, "bits"),
    (("clips", 0, "records", 0, "seconds"), -1, "seconds"),
    (("clips", 0, "records", 0, "step"), 10**9, "step"),
    (("clips", 0, "request", "prompt"), None, "prompt"),
    (("clips", 0, "summary", "cache"), {"policy": 3}, "cache"),
]


@pytest.mark.parametrize(("keys", "value", "named"), BAD, ids=["/".join(map(str, keys)) for keys, _, _ in BAD])
def test_a_file_that_is_no_trace_of_this_export_is_refused(
    out: Path, trace: Path, tmp_path: Path, keys: tuple[str | int, ...], value: Any, named: str
) -> None:
    said = shown(out, "--trace", edited(trace, tmp_path / "t.json", *keys, value=value))
    assert said.exit_code == 2, said.output
    assert named in said.output
    assert "fix:" in said.output


def test_hostile_words_are_escaped(out: Path, trace: Path, tmp_path: Path) -> None:
    bad = "\x1b[31m<script>alert(1)</script>\u202e"
    place = edited(trace, tmp_path / "t.json", "clips", 0, "request", "prompt", value=bad)
    place = edited(place, place, "clips", 0, "records", 0, "reason", value=bad)
    page = tmp_path / "page.html"
    for said in (shown(out, "--trace", place), shown(out, "--trace", place, "--html", page)):
        assert said.exit_code == 0, said.output
        assert "\x1b" not in said.output
        assert "\u202e" not in said.output
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["/no/such/file", "folder", "text"])
def test_a_file_that_cannot_be_read(out: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("{'step': 1}")
    said = shown(out, "--trace", tmp_path / name)
    assert said.exit_code == 2
    assert "dvdq-run" in said.output
