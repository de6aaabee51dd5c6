"""The rows of a run of the quality benchmark: read and checked, and kept in a small file.

One JSON object a line; ``FIELDS`` lists the kinds and what each must have.
"""

from __future__ import annotations

import json
import lzma
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvdquant.errors import DvdquantError

__all__ = ["FIELDS", "Results", "ResultsError", "Row", "name_of_today", "read_lines", "read_results", "write_archive"]

NUMBER, OPTIONAL, TEXT, WHOLE = (int, float), (int, float, type(None)), (str,), (int,)
RIGHT = ("shape", "colour", "motion", "size", "background", "speed")
_WHERE = {"model": TEXT, "method": TEXT, "width": TEXT}
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "clip": {**_WHERE, "prompt": TEXT, "seed": WHOLE, "psnr": OPTIONAL, "ssim": OPTIONAL, "bits": NUMBER,
             "right": (dict,), "visible": NUMBER, "smoothness": NUMBER, "dynamic": NUMBER},
    "step": {**_WHERE, "clip": WHOLE, "step": WHOLE, "sigma": NUMBER, "error": NUMBER},
    "study": {"study": TEXT, "model": TEXT, "name": TEXT, "width": TEXT, "clip": WHOLE, "error": NUMBER},
    "delta": {"model": TEXT, "name": TEXT, "delta": OPTIONAL, "bits": NUMBER, "computed": NUMBER, "psnr": OPTIONAL,
              "prompt": TEXT, "seed": WHOLE, "right": (dict,)},
    "none": {},  # a finished job without rows
    "run": {"commit": TEXT, "hardware": TEXT, "date": TEXT, "seconds": NUMBER, "command": TEXT},
}  # fmt: skip

# Words for parts of the method in names of studies that were measured before 2026-11-30, and those of today.
FORMER_WORDS = {
    "feedback": "GPTQ",
    "balance": "smoothing",
    ", signs": ", random signs",
    "real zero-points": "float zero-points",
    "real, search": "float, search",
}

Row = dict[str, Any]


class ResultsError(DvdquantError, ValueError):
    """A results file or a README that cannot be used."""


@dataclass
class Results:
    """Holds the rows by what they belong to, in the order of the file.

    Args:
        clips: (model, method, width) -> (prompt, seed) -> row.
        steps: (model, method, width) -> clip -> step -> relative L2.
        studies: Study -> (name, model, width) -> clip -> relative L2.
        deltas: Model -> (name, δ, bits if δ is None) -> (prompt, seed) -> row.
        runs: Where, when and by which commands the rows were measured.
    """

    clips: dict[tuple[str, str, str], dict[Hashable, Row]] = field(default_factory=dict)
    steps: dict[tuple[str, str, str], dict[Hashable, dict[int, float]]] = field(default_factory=dict)
    studies: dict[str, dict[tuple[str, str, str], dict[Hashable, float]]] = field(default_factory=dict)
    deltas: dict[str, dict[tuple[Any, ...], dict[Hashable, Row]]] = field(default_factory=dict)
    runs: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """File one checked row.

        Args:
            row: The row.
        """
        if row["kind"] == "run":
            self.runs.append(row)
        elif row["kind"] == "study":
            place = (name_of_today(row["name"]), row["model"], row["width"])
            self.studies.setdefault(row["study"], {}).setdefault(place, {})[row["clip"]] = row["error"]
        elif row["kind"] == "delta":
            variant = (row["name"], row["delta"], row["bits"] if row["delta"] is None else None)
            self.deltas.setdefault(row["model"], {}).setdefault(variant, {})[row["prompt"], row["seed"]] = row
        else:
            place = (row["model"], row["method"], row["width"])
            if row["kind"] == "clip":
                self.clips.setdefault(place, {})[row["prompt"], row["seed"]] = row
            else:
                self.steps.setdefault(place, {}).setdefault(row["clip"], {})[row["step"]] = row["error"]

    def places(self) -> list[tuple[str, str, str]]:
        """Return every (model, method, width) with clips or steps, in the order of the file."""
        return list(dict.fromkeys([*self.clips, *self.steps]))


def name_of_today(name: str) -> str:
    """Return the name of a study's entry, or the key of its job, in the words of today.

    Args:
        name: As it was recorded.
    """
    for former, word in FORMER_WORDS.items():
        name = name.replace(former, word)
    return name


def read_results(path: Path) -> Results:
    """Read and check a results file.

    Args:
        path: The file, one JSON object a line, compressed where it ends in .xz.

    Raises:
        ResultsError: The file cannot be read, or a line is broken, of an unknown kind or incomplete; the error names the line.
    """
    try:
        text = read_lines(path)
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ResultsError(f"{path} cannot be read: {error}", fix="name a file of JSON lines") from error
    results = Results()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and (row := _checked(line, f"{path}, line {number}"))["kind"] != "none":
            results.add(row)
    return results


def read_lines(path: Path) -> str:
    """Return the text of a results file, compressed or not.

    Args:
        path: The file.
    """
    content = path.read_bytes()
    return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")


def write_archive(source: Path, target: Path) -> None:
    """Write the rows of a results file as they are worth keeping: six digits of every number, compressed, sorted by job.

    Args:
        source: The results file.
        target: The file that is written, .jsonl.xz.
    """
    rows = [
        json.loads(line, parse_float=lambda text: float(f"{float(text):.6g}"))
        for line in read_lines(source).splitlines()
    ]
    rows.sort(key=lambda row: row.get("part", "~"))
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    target.write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def _checked(line: str, where: str) -> Row:
    """Return the row of a line.

    Args:
        line: The line.
        where: File and line, for errors.

    Raises:
        ResultsError: The line is broken, of an unknown kind or incomplete.
    """
    try:
        row: Row = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{where}: not JSON: {error}", fix="mend or remove the line") from error
    kind = row.get("kind") if isinstance(row, dict) else row
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ResultsError(f"{where}: unknown kind {kind!r}", available=FIELDS, fix="mend or remove the line")
    fields = FIELDS[kind]
    for name, types in fields.items():
        if name not in row:
            raise ResultsError(f"{where}: {kind} row without {name!r}", available=row, fix="add the field")
        value = row[name]
        if type(value) not in types or (type(value) is float and not math.isfinite(value)):
            raise ResultsError(f"{where}: {name} is {value!r}", available=[t.__name__ for t in types], fix="mend it")
    if "width" in fields and not re.fullmatch(r"A\d+", row["width"]):
        raise ResultsError(f"{where}: width is {row['width']!r}", available="A16, A8, A6, A4", fix="mend the field")
    if "right" in fields and (set(row["right"]) != set(RIGHT) or {type(v) for v in row["right"].values()} != {bool}):
        raise ResultsError(f"{where}: right is {row['right']!r}", available=f"true or false for {', '.join(RIGHT)}")
    return row
