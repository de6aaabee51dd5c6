"""The figures of dvdq-serve as they were measured last, each with its day and machine, and their table in the documentation."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.page import replace_block
from dvdquant.system.processor import processor_name, usable_cores
from dvdquant.text import markdown_table

__all__ = ["machine", "save"]

FILE = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def machine() -> dict[str, Any]:
    """Return the day and what the machine is, with the load that others made before."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": processor_name(),
        "cores": usable_cores(),
        "load": round(os.getloadavg()[0], 1),
    }


def save(name: str, where: dict[str, Any], command: str, rows: list[tuple[str, str, str]]) -> None:
    """Keep the figures of one measure, and write the table of all of them anew.

    Args:
        name: The measure.
        where: From :func:`machine`.
        command: What was run.
        rows: What was measured, the figure, and what is wanted.
    """
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    kept[name] = {**where, "command": command, "rows": rows}
    FILE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_block(page, BEGIN, END, f"\n{table(kept)}"), encoding="utf-8")


def table(kept: dict[str, Any]) -> str:
    """Return the figures as a table.

    Args:
        kept: The measures by name.
    """
    rows = []
    for each in kept.values():
        for i, (what, figure, wanted) in enumerate(each["rows"]):
            source = f"`{each['command']}`, {each['date']}, {each['load']}" if i == 0 else ""
            rows.append((what, figure, wanted, source))
    cpus = sorted({f"{each['cores']} cores of an {each['cpu']}" for each in kept.values()})
    figures = markdown_table(("what", "figure", "wanted", "command, day, load before"), rows)
    return f"Machine: {'; '.join(cpus)}, no GPU.\n\n{figures}\n"
