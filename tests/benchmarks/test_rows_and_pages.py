"""What benchmarks keep as they go, and the blocks of pages that they write."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from benchmarks.page import PageError, replace_block
from benchmarks.quality.run import finished
from benchmarks.rows import append_rows, read_rows
from benchmarks.serving import results
from benchmarks.switching.measure import load_rows
from dvdquant.text import markdown_table
from tests.support.children import in_child


def test_rows_survive_kills(tmp_path: Path) -> None:
    """A torn end is cut off, so that the next row has its own line; a torn line that was written on is left out."""
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    kept = [{"key": "k", "name": "a\u2028b", "job": "one"}, {"key": "k", "name": "c", "job": "two"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    path.write_text(f'{lines[0]}\n{{"key": "k", "na{lines[1]}\n{lines[1]}\n{{"key": "to', encoding="utf-8")
    assert read_rows(path) == kept
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "k", "name": "d", "job": "three"}\n')
    assert finished(path) == {"one", "two", "three"}
    assert list(load_rows(path)["k"]) == ["a\u2028b", "c", "d"]


def test_rows_that_do_not_fit_leave_none(tmp_path: Path) -> None:
    """Half of a job's rows would count as the job."""
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"job": "one"}])

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="File too large"):
            append_rows(path, [{"job": "two", "row": number} for number in range(100)])

    assert in_child(fill_the_disk) == 0
    assert read_rows(path) == [{"job": "one"}]


def test_a_block_is_written_between_its_marks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replace_block("a\n<b>\nold\n<e>\nz\n", "<b>", "<e>", "new") == "a\n<b>\nnew\n<e>\nz\n"
    page = tmp_path / "page.md"
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    where = {"date": "2026-11-30", "cpu": "a processor", "cores": 2, "load": 0.1}
    for text in ("no marks\n", f"{results.END}\n{results.BEGIN}\n", f"{results.BEGIN}\n{results.END}\n{results.END}\n"):
        page.write_text(text)
        with pytest.raises(PageError, match="no block between") as caught:
            results.save("one", where, "a command", [("what", "1", "2")])
        assert caught.value.fix
        assert page.read_text() == text
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.save("one", where, "a command", [("what", "1", "2")])
    assert "| what | 1 | 2 | `a command`, 2026-11-30, 0.1 |" in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith(f"{results.END}\nafter\n")


def test_cells_of_a_table_keep_their_bars() -> None:
    assert markdown_table(["a", "b"], [["1|2", "3"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
