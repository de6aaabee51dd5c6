"""benchmarks/quality/report.py: its figures against other arithmetic, its marks, broken input, README's blocks, the plots."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.page import PageError
from tests.support.quality_rows import OURS, RIGHT, WIDTHS, cells, clip, figure, made_up, read, report, study
from tests.support.quality_scripts import QUALITY, script

README = QUALITY.parents[1] / "docs" / "quality" / "index.md"


def test_methods_table_against_other_arithmetic(tmp_path: Path) -> None:
    rows = made_up()
    odd = {**dict.fromkeys(RIGHT, True), "motion": False}
    for row in rows:
        if (row.get("method"), row.get("width")) == ("RTN", "A4") and row.get("seed") in (1, 4):
            row |= {"right": odd, "ssim": 0.5, "smoothness": 0.4, "dynamic": 0.3}
    table = {(row[0], row[1]): row for row in cells(report.methods_block(read(tmp_path, rows)))}
    assert [key for key in table if key[0] == "A16"] == [("A16", "fp32"), ("A16", "bf16")]
    assert [key for key in table if key[0] != "A16"] == [(w, m) for w in WIDTHS for m in (OURS, "QuaRot", "RTN")]
    for (width, method), row in table.items():
        mine = [r for r in rows if r.get("method") == method and r.get("width") == width]
        clips, steps = [r for r in mine if r["kind"] == "clip"], [r for r in mine if r["kind"] == "step"]
        assert figure(row[2]) == float(width[1:])
        if method == "fp32":
            assert row[3:6] == ["–", "–", "–"]
        else:
            assert figure(row[3]) == pytest.approx(statistics.mean(r["psnr"] for r in clips), abs=0.0051)
            assert figure(row[4]) == pytest.approx(statistics.mean(r["ssim"] for r in clips), abs=0.00051)
            assert figure(row[5]) == pytest.approx(statistics.mean(r["error"] for r in steps), abs=0.000051)
            assert row[10] == "8 (8)"
        assert figure(row[9]) == pytest.approx(statistics.mean(r["dynamic"] for r in clips) / 0.2, abs=0.0051)
    assert [figure(cell) for cell in table["A4", "RTN"][6:9]] == [75, 75, 0.7]
    assert [figure(cell) for cell in table["A8", "RTN"][6:9]] == [100, 100, 0.8]


def test_interval_is_the_percentile_bootstrap() -> None:
    """For many values it is the normal approximation; for two, every mean there can be is known."""
    values = dict(enumerate(np.random.default_rng(3).normal(5, 2, 400).tolist()))
    mean, low, high = report.interval(values)
    half = 1.96 * statistics.stdev(values.values()) / math.sqrt(400)
    assert mean == pytest.approx(statistics.mean(values.values()))
    assert (low, high) == (pytest.approx(mean - half, abs=0.1 * half), pytest.approx(mean + half, abs=0.1 * half))
    assert report.interval({"a": 0.0, "b": 1.0}) == (0.5, 0.0, 1.0)
    assert report.interval(dict(reversed(values.items()))) == (mean, low, high), "the file's order does not matter"


def test_half_width_stands_in_the_table(tmp_path: Path) -> None:
    rows = [clip(OURS, "A4", c, p) for c, p in enumerate([20.0, 22.0, 25.0, 31.0, 24.0, 20.5])]
    _, low, high = report.bootstrap([20.0, 22.0, 25.0, 31.0, 24.0, 20.5])
    (row,) = cells(report.methods_block(read(tmp_path, rows)))
    assert row[3] == f"23.75 ± {(high - low) / 2:.2f}"
    (one,) = cells(report.methods_block(read(tmp_path, rows[:1])))
    assert one[3] == "20.00", "one clip has no interval"


def test_marks_follow_the_paired_difference(tmp_path: Path) -> None:
    """B lies 0.5 dB below A on every clip, far less than the clips differ; C is as good on average. D has few clips:
    those it has are easy ones, so that its own mean is the highest."""
    base = [18.0, 30.0, 22.0, 27.0, 35.0, 20.0, 24.0, 31.0]
    noise = [1.0, -1.0, 1.0, -1.0, -0.9, 0.9, 1.0, -1.1]
    rows = []
    for c, value in enumerate(base):
        rows += [clip("A", "A4", c, value), clip("B", "A4", c, value - 0.5 + 0.01 * (-1) ** c)]
        rows.append(clip("C", "A4", c, value - 0.1 + noise[c]))
        rows += [clip("D", "A4", c, value - 0.5)] if c < 5 else []
    table = {row[1]: row for row in cells(report.methods_block(read(tmp_path, rows)))}
    assert table["A"][3].startswith("**25.88 ± ")
    assert table["B"][3].startswith("25.38 ± ")
    assert not table["B"][3].endswith("≈"), "surely worse, though its interval overlaps"
    assert table["C"][3].endswith("≈")
    assert table["D"][3].endswith("≈"), "5 pairs decide nothing"
    assert (table["A"][10], table["D"][10]) == ("8 (0)", "5 (0)")


def test_identical_clips_are_counted_apart(tmp_path: Path) -> None:
    rows = [clip(OURS, "A8", c, None if c < 2 else 30.0, ssim=1.0) for c in range(4)]
    (row,) = cells(report.methods_block(read(tmp_path, rows)))
    assert row[3] == "30.00 ± 0.00 (2 identical)"
    assert row[10] == "4 (0)"


def test_a_later_row_replaces_the_same_earlier_one(tmp_path: Path) -> None:
    rows = [clip(OURS, "A8", 0, 10.0), clip(OURS, "A8", 0, 20.0), study("x", "A4", 0, 0.5), study("x", "A4", 0, 0.25)]
    results = read(tmp_path, rows)
    assert cells(report.methods_block(results))[0][3] == "20.00"
    assert cells(report.study_block(results.studies["ablation"]))[0][1] == "0.2500"


def test_study_table(tmp_path: Path) -> None:
    rows = made_up() + [study("neither", "A8", c, 0.1) for c in range(3)]
    text = report.study_block(read(tmp_path, rows).studies["ablation"])
    assert text.splitlines()[0] == "|  | A8 tiny (3 clips) | A4 tiny (8 clips) |"
    table = {row[0]: row[1:] for row in cells(text)}
    assert list(table) == ["neither", "BGR", "ARQ", "BGR + ARQ"]
    for name, (_, value) in table.items():
        errors = [r["error"] for r in rows if r["kind"] == "study" and r["name"] == name and r["width"] == "A4"]
        assert figure(value) == pytest.approx(statistics.mean(errors), abs=0.000051)
    assert table["BGR"][0] == "–"
    assert {name for name, (_, v) in table.items() if "**" in v or v.endswith("≈")} == {"ARQ", "BGR + ARQ"}
    assert sum("**" in v for _, v in table.values()) == 1


def test_run_block(tmp_path: Path) -> None:
    run = {"kind": "run", "commit": "c1", "hardware": "H", "date": "2026-01-03", "seconds": 7200, "command": "python a"}
    other = {**run, "date": "2026-01-01", "seconds": 3600, "command": "python b"}
    text = report.run_block(read(tmp_path, [run, other]))
    assert text == "H; 2026-01-01 to 2026-01-03; 3.0 hours in all.\n\n    python a  # at c1\n    python b  # at c1"


def _verdicts(results: Any) -> dict[tuple[str, str], tuple[str, str]]:
    return {(row[0], row[2]): (row[3], row[4]) for row in cells(report.expected_block(results))}


def test_expected_statements(tmp_path: Path) -> None:
    found = _verdicts(read(tmp_path, made_up()))
    for width in ("W4A4", "W4A6"):
        verdict, said = found[f"{OURS} best of all at {width}", "PSNR, dB"]
        assert verdict == "holds"
        assert said.startswith("to QuaRot: +"), "the hardest rival is named"
        assert figure(said.partition(":")[2]) == pytest.approx(1.0, abs=0.02)
    assert found[f"{OURS} best of all at W4A4", "relative L2"][0] == "holds"
    assert found["dvdquant w4a4-g64 best of all at W4A4", "PSNR, dB"] == ("not measured", "–")
    # 27 dB against QuaRot's 29 and RTN's 26: worse than one is enough.
    verdict, said = found[f"{OURS} at W4A6 ≥ every other method's W4A8", "PSNR, dB"]
    assert (verdict, figure(said.partition(":")[2])) == ("fails", pytest.approx(-2.0, abs=0.02))
    assert found["BGR helps, without ARQ", "relative L2 at W4A4"][0] == "holds"
    assert found["ARQ helps, without BGR", "relative L2 at W4A4"][0] == "holds"
    assert found["ARQ helps, with BGR", "relative L2 at W4A4"][0] == "holds"
    assert found["BGR helps, with ARQ", "relative L2 at W4A4"][0] == "not decided"


def test_our_variants_are_no_rivals_of_each_other(tmp_path: Path) -> None:
    mine = [row for row in made_up() if row.get("method") == OURS and "psnr" in row]
    better = [{**row, "method": f"{OURS}-g64", "psnr": row["psnr"] + 2} for row in mine]
    found = _verdicts(read(tmp_path, made_up() + better))
    assert found[f"{OURS} best of all at W4A4", "PSNR, dB"][0] == "holds"
    verdict, said = found[f"{OURS}-g64 best of all at W4A4", "PSNR, dB"]
    assert (verdict, figure(said.partition(":")[2])) == ("holds", pytest.approx(3.0, abs=0.02))


def test_expected_statements_turn_round(tmp_path: Path) -> None:
    """The same figures with the names exchanged give the opposite verdicts."""
    names = {OURS: "RTN", "RTN": OURS}
    rows = [r | {"method": names.get(r["method"], r["method"])} if "method" in r else r for r in made_up()]
    swap = {"neither": "BGR", "BGR": "neither"}
    rows = [r | {"name": swap.get(r["name"], r["name"])} if r["kind"] == "study" else r for r in rows]
    found = _verdicts(read(tmp_path, rows))
    for width in ("W4A4", "W4A6"):
        assert found[f"{OURS} best of all at {width}", "PSNR, dB"][0] == "fails"
    assert found[f"{OURS} best of all at W4A4", "relative L2"][0] == "fails"
    assert found["BGR helps, without ARQ", "relative L2 at W4A4"][0] == "fails"


@pytest.mark.parametrize(
    ("pair", "said"),
    [((1.0, 0.5, 1.5, 6), "holds"), ((-1.0, -1.5, -0.5, 6), "fails"), ((1.0, -0.1, 2.0, 60), "not decided"),
     ((1.0, 0.5, 1.5, 5), "not decided"), ((0.0, 0.0, 0.0, 60), "not decided"), (None, "not decided")],
)  # fmt: skip
def test_verdict(pair: tuple[float, float, float, int] | None, said: str) -> None:
    assert report.verdict(pair) == said


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    rows = [r for r in made_up() if r.get("method") != OURS and r.get("name") != "ARQ"]
    found = _verdicts(read(tmp_path, rows))
    assert found[f"{OURS} best of all at W4A4", "PSNR, dB"] == ("not measured", "–")
    assert found["BGR helps, with ARQ", "relative L2 at W4A4"] == ("not measured", "–")
    assert found["BGR helps, without ARQ", "relative L2 at W4A4"][0] == "holds"
    assert set(report.blocks(read(tmp_path, [{"kind": "none", "job": "held-out"}])).values()) == {""}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "not JSON"), ('{"kind": "clip"', "not JSON"), ("[1, 2]", "unknown kind"), ("{}", "unknown kind None"),
        ('{"kind": "clips"}', "unknown kind 'clips'"), ('{"kind": []}', "unknown kind []"),
        ('{"kind": "run", "commit": "c"}', "run row without 'hardware'"),
        (json.dumps(clip("m", "A4", 0, 1.0, bits="4")), "bits is '4'\n  available: int, float"),
        (json.dumps(clip("m", "A4", 0, 1.0, ssim=True)), "ssim is True"),
        (json.dumps(clip("m", "A4", 0, math.nan)), "psnr is nan"),
        (json.dumps(clip("m", "A4", 0, math.inf)), "psnr is inf"),
        (json.dumps(clip("m", "W4", 0, 1.0)), "width is 'W4'"),
        (json.dumps(clip("m", "A4", 0, 1.0, right={"shape": True})), "right is {'shape': True}"),
        (json.dumps(clip("m", "A4", 0, 1.0, right=dict.fromkeys(RIGHT, 1))), "right is {'shape': 1"),
        (json.dumps(study("n", "A4", 0, None)), "error is None"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_broken_lines_name_the_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(clip("m", "A4", 0, 1.0)) + "\n\n" + line + "\n")
    with pytest.raises(report.ResultsError) as caught:
        report.read_results(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert said in str(caught.value)


def test_command_ends_with_2_and_one_message(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"kind": "nonsense"}\n')
    (readme := tmp_path / "README.md").write_text(README.read_text())
    command = [sys.executable, str(QUALITY / "report.py"), str(tmp_path / "r.jsonl"), "--readme", str(readme)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tmp_path / 'r.jsonl'}, line 1: unknown kind 'nonsense'\n  available: clip, step")
    assert "Traceback" not in done.stderr
    assert readme.read_text() == README.read_text()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(report.ResultsError, match="cannot be read"):
        report.read_results(tmp_path / "none.jsonl")
    with pytest.raises(report.ResultsError, match="cannot be read"):
        report.write_report(read(tmp_path, made_up()), tmp_path / "none.md")


def test_readme_of_the_repository_has_every_block() -> None:
    texts = {name: f"text of {name}" for name in report.blocks(report.Results())}
    replaced = report.replace_blocks(README.read_text(), texts)
    assert all(f"<!-- {n}:begin -->\n{text}\n<!-- {n}:end -->" in replaced for n, text in texts.items())


def test_report_is_rewritten_in_place_and_the_same_each_time(tmp_path: Path) -> None:
    names = list(report.blocks(report.Results()))
    prose = [f"## {name}\n\nProse *about* {name}, é | δ.\n" for name in names]
    parts = [f"{p}<!-- {n}:begin -->\nold figures\n<!-- {n}:end -->\n\nAfter {n}.\n" for n, p in zip(names, prose)]
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n" + "\n".join(parts) + "\nend without newline")
    written = report.write_report(read(tmp_path, made_up()), readme)
    assert [path.name for path in written] == ["README.md", "methods.png", "steps.png", "delta.png"]
    first = {path.name: path.read_bytes() for path in written}
    text = first["README.md"].decode()
    assert "old figures" not in text
    assert text.count("Not measured.") == 5, "the five studies that these rows lack"
    bare = re.sub(r"<!-- [\w-]+:begin -->\n.*?\n<!-- [\w-]+:end -->", "", text, flags=re.DOTALL)
    plain = "# Title\n\n" + "\n".join(f"{p}\n\nAfter {n}.\n" for n, p in zip(names, prose)) + "\nend without newline"
    assert bare == plain
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (tmp_path / path).is_file()
    report.write_report(read(tmp_path, made_up()), readme)
    assert {path.name: path.read_bytes() for path in written} == first


@pytest.mark.parametrize("broken", ["", "<!-- delta:end --> <!-- delta:begin -->", "<!-- delta:begin -->" * 2])
def test_a_readme_without_a_block_is_left_alone(tmp_path: Path, broken: str) -> None:
    text = re.sub(r"<!-- delta:begin -->.*<!-- delta:end -->", broken, README.read_text(), flags=re.DOTALL)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(PageError, match="no block between <!-- delta:begin"):
        report.write_report(read(tmp_path, made_up()), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text
    assert list(tmp_path.glob("*.png")) == []


def test_a_study_without_a_block_is_not_dropped_in_silence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README.read_text())
    results = read(tmp_path, [study("a", "A4", 0, 0.1, study="novel")])
    with pytest.raises(PageError, match="no block between <!-- novel:begin"):
        report.write_report(results, tmp_path / "README.md")


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _near(pixels: np.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=2) < 24).sum())


def test_plots_show_what_they_are_given(tmp_path: Path) -> None:
    plots = report.plots
    (tmp_path / "README.md").write_text(README.read_text())
    report.write_report(read(tmp_path, made_up()), tmp_path / "README.md")
    for name in ("methods", "steps", "delta"):
        pixels = _pixels(tmp_path / f"{name}.png")
        assert pixels.shape[1] == 1440
        assert pixels[:3].min() == pixels[:, :3].min() == 255, "white at the edges"
    methods = _pixels(tmp_path / "methods.png")
    for colour, _ in (plots.WIDTHS[width] for width in WIDTHS):
        assert _near(methods, colour) > 300
    assert _near(_pixels(tmp_path / "steps.png"), plots.VERMILION) > 1000
    assert _near(_pixels(tmp_path / "delta.png"), plots.BLUE) > 500
    few = [row for row in made_up() if row.get("width") != "A6"]
    report.write_report(read(tmp_path, few), tmp_path / "README.md")
    assert _near(_pixels(tmp_path / "methods.png"), plots.WIDTHS["A6"][0]) == 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([0.5], [0.5]), ([0.2, 0.8], [0.2, 0.8]), ([0.5, 0.5], [0.45, 0.55]), ([0.55, 0.45], [0.55, 0.45]),
     ([0.99, 0.99], [0.9, 1.0]), ([0.0, 0.0, 0.02], [0.0, 0.1, 0.2]), ([0.4, 0.5, 0.52], [0.3733, 0.4733, 0.5733])],
)  # fmt: skip
def test_labels_keep_their_distance(wanted: list[float], expected: list[float]) -> None:
    assert report.plots.spread(wanted, 0.1, 0.0, 1.0) == pytest.approx(expected, abs=1e-4)


def test_archive_gives_the_same_report(tmp_path: Path) -> None:
    """Compressed and rounded to six digits, and small changes of numbers do not show in a table."""
    results = read(tmp_path, made_up())
    report.write_archive(tmp_path / "results.jsonl", tmp_path / "kept.jsonl.xz")
    again = report.read_results(tmp_path / "kept.jsonl.xz")
    assert {name: sorted(text.splitlines()) for name, text in report.blocks(again).items()} == {
        name: sorted(text.splitlines()) for name, text in report.blocks(results).items()
    }
    (tmp_path / "torn.jsonl.xz").write_bytes((tmp_path / "kept.jsonl.xz").read_bytes()[:-40])
    with pytest.raises(report.ResultsError, match="cannot be read"):
        report.read_results(tmp_path / "torn.jsonl.xz")


def test_entries_of_the_kept_rows_have_todays_names(tmp_path: Path) -> None:
    """What was measured under former words stands in the tables, and is finished, under those of the studies."""
    kept = script("results_file").read_lines(QUALITY / "results.jsonl.xz").splitlines()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(line + "\n" for line in kept if '"kind":"study"' in line))
    entries = {(study, name) for study, names in script("studies").STUDIES.items() for name in names}
    assert {(s, name) for s, places in report.read_results(rows).studies.items() for name, _, _ in places} == entries
    keys = [key.split("/") for key in script("run").finished(rows) - {None}]
    assert {(key[2], "/".join(key[3:-1])) for key in keys} == entries
