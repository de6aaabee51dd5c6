"""Turn a file of results into the tables and plots of docs/quality.

    python -m benchmarks.quality report RESULTS.jsonl [--readme docs/quality/index.md] [--archive RESULTS.jsonl.xz]
    python -m benchmarks.quality report benchmarks/quality/results.jsonl.xz     from the rows that are kept here

RESULTS.jsonl holds one JSON object a line, compressed where it ends in .xz. ``results/results_file.py`` lists what is in it.
A line that is there twice (the same model, method, width and clip) counts once, the later. What stands between
``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` is written anew, the prose around it is left alone, and the same file gives
the same text and plots.

Intervals are 95 % percentile bootstrap intervals over clips; differences are paired, same prompt and seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.page import replace_block
from benchmarks.quality.results import plots
from benchmarks.quality.results.results_file import Results, ResultsError, Row, read_results, write_archive
from benchmarks.switching.metrics import bootstrap
from dvdquant.errors import DvdquantError
from dvdquant.text import markdown_table

# Names as they stand in the results file.
OURS, PUBLISHED = ("dvdquant w4a4", "dvdquant w4a4-g64"), "DVD-Quant as published"
FAMILY = "dvdquant"  # what our names begin with: none of them is a rival of another
NEITHER, BGR, ARQ, BOTH = "neither", "BGR", "ARQ", "BGR + ARQ"
STEP_METHODS = ("bf16", "RTN", "QuaRot-style", PUBLISHED, *OURS)
STUDIES = ("ablation", "granularity", "weight-groups", "rotation", "zero-point", "improvements")
# All of fewer differences than this can have one sign by chance oftener than one time in twenty (2 · 2⁻⁵ = 6 %).
MIN_PAIRS = 6

# The page that holds the blocks; plots lie beside it.
PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality" / "index.md"

Values = Mapping[Hashable, float]  # clip -> value


def interval(values: Values) -> tuple[float, float, float]:
    """Return (mean, lower, upper) of values over the clips, which are taken in an order of their own.

    Args:
        values: Clip -> value.
    """
    return bootstrap([values[key] for key in sorted(values, key=repr)])


def difference(a: Values, b: Values) -> tuple[float, float, float, int] | None:
    """Return (mean, lower, upper, pairs) of a − b over the clips that both have; None where they share none.

    Args:
        a: Clip -> value.
        b: Clip -> value.
    """
    shared = {key: a[key] - b[key] for key in a if key in b}
    return (*interval(shared), len(shared)) if shared else None


def verdict(found: tuple[float, float, float, int] | None) -> str:
    """Say whether a difference is above 0 ("holds"), below ("fails"), or neither can be said.

    Args:
        found: (mean, lower, upper, pairs), from :func:`difference`; None where nothing was measured.
    """
    if found is None or found[3] < MIN_PAIRS or found[1] <= 0 <= found[2]:
        return "not decided"
    return "holds" if found[1] > 0 else "fails"


@dataclass(frozen=True)
class Measure:
    """Describes one column of the tables.

    Args:
        title: The head of the column.
        sign: +1 where more is better, −1 where less is.
        form: The format of its numbers, such as ``.2f``.
        interval: Whether half of the interval stands behind the mean.
        scale: What the values are multiplied by.
    """

    title: str
    sign: int
    form: str
    interval: bool = False
    scale: float = 1.0


MEASURES = (
    Measure("PSNR, dB", 1, ".2f", True), Measure("SSIM", 1, ".3f"), Measure("relative L2 per step", -1, ".4f", True),
    Measure("all right, %", 1, ".0f", scale=100), Measure("motion right, %", 1, ".0f", scale=100),
    Measure("smoothness", 1, ".3f"),
)  # fmt: skip
PSNR, ERROR = 0, 2


def measured(results: Results, place: tuple[str, str, str]) -> list[Values]:
    """Return clip -> value for each of MEASURES. A clip that is identical to the fp32 one has no PSNR.

    Args:
        results: The checked rows of a run.
        place: (model, method, width).
    """
    rows = results.clips.get(place, {})
    of: list[Callable[[Row], float | None]] = [
        lambda r: r["psnr"], lambda r: r["ssim"], lambda r: float(all(r["right"].values())),
        lambda r: float(r["right"]["motion"]), lambda r: r["smoothness"],
    ]  # fmt: skip
    found: list[Values] = [{k: v for k, r in rows.items() if (v := get(r)) is not None} for get in of]
    errors = {clip: fmean(steps[s] for s in sorted(steps)) for clip, steps in results.steps.get(place, {}).items()}
    return [*found[:ERROR], errors, *found[ERROR:]]


def _cell(values: Values, measure: Measure) -> str:
    """Return the mean of values, with half of its interval where the measure has one; a dash where there are none."""
    if not values:
        return "–"
    scaled = {key: value * measure.scale for key, value in values.items()}
    mean, low, high = interval(scaled) if measure.interval else (fmean(scaled.values()), 0.0, 0.0)
    bar = f" ± {(high - low) / 2:{measure.form}}" if measure.interval and len(values) > 1 else ""
    return f"{mean:{measure.form}}{bar}"


def _lead(values: Values, group: list[Values], sign: int) -> float:
    """Return the least mean advantage over another, on shared clips: 0, to itself, for the best, whichever clips the others lack.

    Args:
        values: Clip -> value of one row.
        group: Those of all rows.
        sign: +1 where more is better, −1 where less is.
    """
    pairs = [[sign * (values[key] - other[key]) for key in values if key in other] for other in group]
    return min(fmean(pair) for pair in pairs if pair)


def marked(group: list[Values], measure: Measure, rivals: bool = True) -> list[str]:
    """Write the cells of one column and width: of rivals the best is bold, and what cannot be told from it has ≈.

    Args:
        group: Clip -> value of every row.
        measure: What the values are.
        rivals: Whether the rows are compared; False writes them plain.
    """
    cells = [_cell(values, measure) for values in group]
    filled = [i for i, values in enumerate(group) if values]
    if len(filled) < 2 or not rivals:  # fp32 and bf16 are what the others are measured against
        return cells
    best = max(filled, key=lambda i: (_lead(group[i], group, measure.sign), -i))
    for i in filled:
        if i == best:
            cells[i] = f"**{cells[i]}**"
        elif (found := difference(group[i], group[best])) is None or verdict(found) == "not decided":
            cells[i] += " ≈"
    return cells


def methods_block(results: Results) -> str:
    """Write one table per model: widths from wide to narrow, in each the methods by PSNR.

    Args:
        results: The checked rows of a run.
    """
    parts = []
    for model in dict.fromkeys(place[0] for place in results.places()):
        head = ["width", "method", "bits", *(m.title for m in MEASURES), "dynamic / fp32", "clips (for L2)"]
        rows: list[list[str]] = []
        places = [p for p in results.places() if p[0] == model]
        for width in sorted({p[2] for p in places}, key=lambda w: -int(w[1:])):
            group = [(p, measured(results, p)) for p in places if p[2] == width]
            group.sort(key=lambda item: -fmean(item[1][PSNR].values()) if item[1][PSNR] else -1e9)
            columns = [marked([v[i] for _, v in group], m, width != "A16") for i, m in enumerate(MEASURES)]
            for index, (place, values) in enumerate(group):
                clips = results.clips.get(place, {})
                same = sum(row["psnr"] is None and row["ssim"] == 1 for row in clips.values())
                cells = [column[index] for column in columns]
                cells[PSNR] += f" ({same} identical)" if same and place[1] != "fp32" else ""
                bits = f"{fmean(row['bits'] for row in clips.values()):.2f}" if clips else "–"
                cells += [_dynamic(results, place), f"{len(clips)} ({len(values[ERROR])})"]
                rows.append([width, place[1], bits, *cells])
        parts.append(f"**{model}**\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts)


def _dynamic(results: Results, place: tuple[str, str, str]) -> str:
    """Return the mean dynamic degree over that of the fp32 clips of the same prompts and seeds."""
    rows, exact = results.clips.get(place, {}), results.clips.get((place[0], "fp32", "A16"), {})
    shared = [key for key in rows if key in exact]
    below = sum(exact[key]["dynamic"] for key in shared)
    return f"{sum(rows[key]['dynamic'] for key in shared) / below:.2f}" if below else "–"


def study_block(cells: dict[tuple[str, str, str], dict[Hashable, float]]) -> str:
    """Write the relative L2 of the output, mean over steps, ± half its interval: names by widths and models.

    Args:
        cells: (model, name, width) -> clip -> relative L2.
    """
    names = list(dict.fromkeys(place[0] for place in cells))
    heads, columns = [""], [names]
    for width in sorted({place[2] for place in cells}, key=lambda w: -int(w[1:])):
        for model in dict.fromkeys(place[1] for place in cells):
            group: list[Values] = [cells.get((name, model, width), {}) for name in names]
            if any(group):
                counts = sorted({len(values) for values in group if values})
                heads.append(f"{width} {model} ({' or '.join(map(str, counts))} clips)")
                columns.append(marked(group, Measure("", -1, ".4f", True)))
    return markdown_table(heads, [list(row) for row in zip(*columns)]) if names else ""


def delta_block(results: Results) -> str:
    """Write one table per model: δ, bits, PSNR in dB, share of steps that are computed.

    Args:
        results: The checked rows of a run.
    """
    parts = []
    for model, variants in results.deltas.items():
        rows = []
        for (name, delta, _), clips in variants.items():
            right = {key: float(all(row["right"].values())) for key, row in clips.items()}
            bits, computed = (fmean(row[f] for row in clips.values()) for f in ("bits", "computed"))
            cells = [
                name,
                "–" if delta is None else f"{delta:.4g}",
                f"{bits:.2f}",
                _cell(_psnr(clips), MEASURES[PSNR]),
                f"{100 * computed:.0f}",
            ]
            rows.append([*cells, _cell(right, MEASURES[3]), str(len(clips))])
        head = ["", "δ", "bits", "PSNR, dB", "steps computed, %", "all right, %", "clips"]
        parts.append(f"**{model}**\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts)


def throughout_block(results: Results) -> str:
    """Write the clips of the δ settings with a8 and with a4 in every step, and how far each is from a8 in PSNR, dB.

    Args:
        results: The checked rows of a run.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for model, variants in results.deltas.items():
        first = next(iter(variants.values()))
        method = next(iter(first.values())).get("method", "")
        whole = {width: _psnr(results.clips.get((model, method, width), {})) for width in ("A8", "A4")}
        for width, values in whole.items():
            same = {key: value for key, value in values.items() if key in first}
            cells.setdefault((f"{width} throughout", ""), {})[model] = _cell(same, MEASURES[PSNR])
        for (name, delta, bits), clips in variants.items():
            found = difference(_psnr(clips), whole["A8"])
            setting = f"δ {delta:.4g}" if delta is not None else f"{bits:.2f} bits"
            cells.setdefault((name, setting), {})[model] = "–" if found is None else difference_text(found, ".2f")
    if not cells:
        return ""
    head = ["", "setting", *results.deltas]
    return markdown_table(
        head, [[*place, *(row.get(model, "–") for model in results.deltas)] for place, row in cells.items()]
    )


def _psnr(rows: Mapping[Hashable, Row]) -> Values:
    """Return clip -> PSNR in dB of the rows that have one."""
    return {key: row["psnr"] for key, row in rows.items() if row["psnr"] is not None}


def run_block(results: Results) -> str:
    """Write where, when, how long and by which commands the rows were measured.

    Args:
        results: The checked rows of a run.
    """
    hardware = "; ".join(dict.fromkeys(row["hardware"] for row in results.runs))
    dates = sorted({row["date"] for row in results.runs})
    span = " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))
    seconds = sum(row["seconds"] for row in results.runs)
    length = f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"
    commands = dict.fromkeys(f"    {row['command']}  # at {row['commit']}" for row in results.runs)
    return "\n".join([f"{hardware}; {span}; {length} in all.", "", *commands])


def expected_block(results: Results) -> str:
    """Write each expected statement with verdict, difference and interval (above 0 where the statement is right).

    Args:
        results: The checked rows of a run.
    """
    rows: list[list[str]] = []
    for model in dict.fromkeys(place[0] for place in results.places()):
        for title, width, others in (
            ("best of all at W4A4", "A4", "A4"), ("best of all at W4A6", "A6", "A6"),
            ("at W4A6 ≥ every other method's W4A8", "A6", "A8"),
        ):  # fmt: skip
            for ours, (index, by) in product(OURS, ((PSNR, "PSNR, dB"), (ERROR, "relative L2"))):
                if index == PSNR or width != "A6":  # a W4A6 that switches has no error of one step
                    said = against_all(results, model, ours, width, others, index)
                    rows.append([f"{ours} {title}", model, by, *said])
    cells = results.studies.get("ablation", {})
    for title, less, more in (
        ("BGR helps, without ARQ", NEITHER, BGR), ("BGR helps, with ARQ", ARQ, BOTH),
        ("ARQ helps, without BGR", NEITHER, ARQ), ("ARQ helps, with BGR", BGR, BOTH),
    ):  # fmt: skip
        for model, width in dict.fromkeys((p[1], p[2]) for p in cells):
            found = difference(cells.get((less, model, width), {}), cells.get((more, model, width), {}))
            text = ("not measured", "–") if found is None else (verdict(found), difference_text(found, ".4f"))
            rows.append([title, model, f"relative L2 at W4{width}", *text])
    return markdown_table(["expected", "model", "by", "verdict", "difference, 95 % interval"], rows) if rows else ""


def against_all(results: Results, model: str, ours: str, width: str, others: str, index: int) -> tuple[str, str]:
    """Return the verdict of "ours is better than every other", and the hardest difference.

    It holds where it holds against each, and fails where it fails against one.

    Args:
        results: The checked rows of a run.
        model: Name of the model.
        ours: Name of our method.
        width: Width of its activations.
        others: Width of the others' activations.
        index: Which of MEASURES decides.
    """
    measure, mine = MEASURES[index], measured(results, (model, ours, width))[index]
    rivals = [p for p in results.places() if p[0] == model and p[2] == others and not p[1].startswith(FAMILY)]
    pairs = [(p[1], difference(*(mine, measured(results, p)[index])[:: measure.sign])) for p in rivals]
    found = [(name, pair) for name, pair in pairs if pair]
    if not found:
        return "not measured", "–"
    overall = min((verdict(pair) for _, pair in found), key=("fails", "not decided", "holds").index)
    name, pair = min((item for item in found if verdict(item[1]) == overall), key=lambda item: item[1][0])
    return overall, f"to {name}: {difference_text(pair, measure.form)}"


def difference_text(found: tuple[float, float, float, int], form: str) -> str:
    """Return a difference with its interval and the number of clips, as the tables write it.

    Args:
        found: (mean, lower, upper, pairs), from :func:`difference`.
        form: Format of the numbers, such as ``.2f``.
    """
    return f"{found[0]:+{form}} [{found[1]:+{form}}, {found[2]:+{form}}], {found[3]} clips"


def blocks(results: Results) -> dict[str, str]:
    """Return name -> text of every block of the page.

    Args:
        results: The checked rows of a run.
    """
    return {
        "methods": methods_block(results), "expected": expected_block(results), "delta": delta_block(results),
        "throughout": throughout_block(results),
        "run": run_block(results) if results.runs else "",
        **{name: study_block(results.studies.get(name, {})) for name in (*STUDIES, *results.studies)},
    }  # fmt: skip


def replace_blocks(text: str, texts: Mapping[str, str]) -> str:
    """Return a text with each block between its marks written anew.

    Args:
        text: The text.
        texts: The name of a block -> what stands in it.

    Raises:
        PageError: The marks of a block are missing, there twice or in the wrong order.
    """
    for name, body in texts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = replace_block(text, begin, end, body or "Not measured.")
    return text


def write_report(results: Results, readme: Path) -> list[Path]:
    """Draw the plots beside a page and write its blocks; return the files written.

    Args:
        results: The checked rows of a run.
        readme: The page. Nothing is written where it lacks a block.

    Raises:
        ResultsError: The page cannot be read.
        PageError: It lacks a block.
    """
    texts = blocks(results)
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{readme} cannot be read: {error}", fix="name a README that holds the blocks") from error
    psnr = {place: interval(v[PSNR]) for place in results.places() if (v := measured(results, place))[PSNR]}
    steps = {place: clips for place, clips in results.steps.items() if place[1] in STEP_METHODS}
    points = [
        (model, name, fmean(row["bits"] for row in clips.values()), interval(_psnr(clips)))
        for model, variants in results.deltas.items() for (name, *_), clips in variants.items() if _psnr(clips)
    ]  # fmt: skip
    drawings = plots.drawings(psnr, steps, points, OURS)
    for block, name, title, _ in drawings:
        texts[block] += f"\n\n![{title}]({name})"
    text = replace_blocks(text, texts)
    for _, name, _, draw in drawings:
        draw(readme.parent / name)
    readme.write_text(text, encoding="utf-8")
    return [readme, *(readme.parent / name for _, name, _, _ in drawings)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, default=PAGE)
    parser.add_argument("--archive", type=Path, metavar="XZ", help="also keep the rows in this file")
    options = parser.parse_args()
    try:
        written = write_report(read_results(options.results), options.readme)
        if options.archive is not None:
            write_archive(options.results, options.archive)
            written.append(options.archive)
    except DvdquantError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    main()
