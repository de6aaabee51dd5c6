"""The tables of δ settings in benchmarks/quality/report.py."""

from __future__ import annotations

from pathlib import Path

from tests.support.quality_rows import cells, clip, delta, figure, made_up, read, report


def test_delta_table(tmp_path: Path) -> None:
    table = cells(report.delta_block(read(tmp_path, made_up())))
    assert [row[:2] for row in table] == [
        ["δ-GBS", "0.05"], ["+ cache", "0.05"], ["δ-GBS", "0.2"], ["+ cache", "0.2"], ["last", "–"],
    ]  # fmt: skip
    assert table[1][2:] == ["7.00", "31.00 ± 0.00", "75", "100", "8"]
    assert table[4][2:] == ["6.00", "30.50 ± 0.00", "75", "100", "8"]
    assert 7 < figure(table[0][2]) < 7.1


def test_settings_against_a8_throughout(tmp_path: Path) -> None:
    """Over the clips both have: here the first four of eight."""
    base = [30.0 + c for c in range(8)]
    rows = [clip("ours", width, c, base[c] - less) for c in range(8) for width, less in (("A8", 0.0), ("A4", 4.0))]
    rows += [{**delta("δ-GBS", 0.1, c, 6.0, base[c] - 1.5), "method": "ours"} for c in range(4)]
    assert cells(report.throughout_block(read(tmp_path, rows))) == [
        ["A8 throughout", "", "31.50 ± 1.00"],
        ["A4 throughout", "", "27.50 ± 1.00"],
        ["δ-GBS", "δ 0.1", "-1.50 [-1.50, -1.50], 4 clips"],
    ]
