"""The table of gpu_check: on the terminal as it grows, and as Markdown with the hardware that made it."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from check_kernels import Outcome
from report import free_path

from benchmarks.commit import commit

_QUERY = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def line(outcome: Outcome) -> str:
    """Return one row for the terminal.

    Args:
        outcome: The row.
    """
    state = "FAILED " if not outcome.passed else "ok     " if outcome.cases else "not run"
    figures = f"{outcome.cases:5d} cases  worst {outcome.worst:8.3g}  ties {outcome.ties:6d}" if outcome.cases else ""
    return f"{state} {outcome.name:44s} {figures}  {outcome.note}".rstrip()


def markdown(title: str, hardware: dict[str, str], outcomes: Iterable[Outcome], extra: str = "") -> str:
    """Return the report: hardware first, then one row per check.

    Args:
        title: The title.
        hardware: The facts of :func:`hardware`.
        outcomes: The rows.
        extra: More Markdown for the end.
    """
    rows = [f"# {title}", "", *(f"- {name}: {value}" for name, value in hardware.items()), ""]
    rows += [
        "`worst` is the largest error as a share of its bound; `ties` counts codes that float64 rounds the other way",
        "because they lie at a tie.",
        "",
        "| check | result | cases | worst | ties | note |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        state = "**failed**" if not o.passed else "ok" if o.cases else "not run"
        note = o.note.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {o.name} | {state} | {o.cases} | {o.worst:.3g} | {o.ties} | {note} |")
    return "\n".join(rows) + "\n" + (f"\n{extra.strip()}\n" if extra else "")


def hardware() -> dict[str, str]:
    """Return GPU, driver, clocks as they are now, and versions, by name."""
    import torch

    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts["host"] = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts["GPU"] = (
            f"{p.name}, SM {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB"
        )
        facts["CUDA"] = str(torch.version.cuda)
    revision = commit()
    return facts | ({"commit": revision} if revision else {}) | smi()


def smi() -> dict[str, str]:
    """Return nvidia-smi's driver, clocks, power limit and temperature by name, or the reason why it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"not available ({type(error).__name__})"}
    return dict(zip(_QUERY[1:], (v.strip() for v in text.strip().split(",")[1:])))


def report_path(folder: Path, facts: dict[str, str]) -> Path:
    """Return ``<date>-<gpu>-gpu-check.md`` in a folder, with a number where that file is there: no run replaces another's.

    Args:
        folder: The folder.
        facts: The facts of :func:`hardware`.
    """
    gpu = facts.get("GPU", "cpu").split(",")[0]
    return free_path(folder, facts["date"][:10], gpu, "gpu-check")
