"""benchmarks/quality/jobs.py and commit.py: jobs that go on where a run was killed, and the commit of a figure."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.commit import commit
from benchmarks.quality import jobs
from benchmarks.quality.jobs import Job, Row, run_jobs
from benchmarks.rows import read_rows

JOBS: list[Job] = [("w4a4", f"δ {name}", chunk) for chunk in (0, 1) for name in ("a", "b")]


class Lengths:
    """Gives two rows for each job, and names the process that did it."""

    def __init__(self, word: str) -> None:
        self.word, self.done = word, 0

    def do(self, job: Job) -> list[Row]:
        self.done += 1
        return [{"word": self.word, "job_of": job[1], "half": half, "process": os.getpid()} for half in (0, 1)]


def _places(rows: list[Row]) -> set[tuple[object, ...]]:
    return {(*row["job"], row["half"]) for row in rows}


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Also from the file of an earlier version, which wrote letters as escapes, and whose last line is torn."""
    results = tmp_path / "rows.jsonl"
    old = [{"word": "old", "half": half, "job": JOBS[1]} for half in (0, 1)]
    results.write_text("".join(json.dumps(row) + "\n" for row in old) + '{"word": "to')
    runner = jobs.start(Lengths, ("new",))
    assert jobs.runner() is runner
    rows = run_jobs(Lengths, ("new",), JOBS, results, 1)
    assert runner.done == len(JOBS) - 1
    assert rows == read_rows(results)
    assert _places(rows) == {(*job, half) for job in JOBS for half in (0, 1)}
    assert [row["word"] for row in rows] == ["old"] * 2 + ["new"] * 6
    assert run_jobs(Lengths, ("new",), JOBS, results, 1) == rows
    assert runner.done == len(JOBS) - 1


def test_it_stops_in_time(tmp_path: Path) -> None:
    runner = jobs.start(Lengths, ("new",))
    for turn in (1, 2):
        rows = run_jobs(Lengths, ("new",), JOBS, tmp_path / "rows.jsonl", 1, seconds=0)
        assert (runner.done, len(rows)) == (turn, 2 * turn)


@pytest.mark.slow
def test_several_processes_do_them(tmp_path: Path) -> None:
    rows = run_jobs(Lengths, ("new",), JOBS, tmp_path / "rows.jsonl", 2)
    assert _places(rows) == {(*job, half) for job in JOBS for half in (0, 1)}
    assert os.getpid() not in {row["process"] for row in rows}
    assert _places(read_rows(tmp_path / "rows.jsonl")) == _places(rows)


def test_the_commit_says_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) == commit(tmp_path / "missing") == ""
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    git("tag", "--annotate", "v1", "--message", "one")
    assert commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"
