"""``dvdq doctor``: what this machine has, what is missing, and what would run."""

from __future__ import annotations

from pathlib import Path

import click

from dvdquant import __version__
from dvdquant.cli.shared.common import ExamplesCommand, echo, loading, paragraphs, setup_logging
from dvdquant.cli.shared.paths import PATH
from dvdquant.system.progress import count_text
from dvdquant.text import json_text

EXAMPLES = """
# GPU, driver, PyTorch, kernels, attention, TensorRT, disk, and what would run
dvdq doctor

# for a report of a fault, or for a script
dvdq doctor --json
"""

MARKS = {"ok": "ok       ", "missing": "missing  ", "problem": "PROBLEM  "}


@click.command(cls=ExamplesCommand, examples=EXAMPLES)
@click.option(
    "--folder", type=PATH, default=".", show_default=True, metavar="PATH", help="The folder whose disk is looked at."
)
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
@click.option("-v", "--verbose", count=True, help="More log; twice for the libraries' too.")
@click.version_option(__version__, prog_name="dvdq doctor")
def main(folder: Path, as_json: bool, verbose: int) -> None:
    """Look at this machine: GPU, driver, PyTorch, kernels, attention libraries, TensorRT, disk, and what would run.

    It changes nothing and downloads nothing. "missing" is what some uses do without, "PROBLEM" what is there and cannot be used.
    """
    setup_logging(verbose, "text")
    from dvdquant.cli.diagnosis import diagnose

    findings = []
    if not as_json:
        loading("PyTorch to ask it")
    for finding in diagnose(folder):
        findings.append(finding)
        if not as_json:
            fix = [("        fix", finding.fix)] if finding.fix else []
            echo(paragraphs([(f"{MARKS[finding.state]}{finding.name}", finding.found), *fix]))
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if as_json:
        echo(json_text({"findings": [finding.to_json() for finding in findings], "problems": problems}, indent=1))
        return
    echo(f"\n{count_text(len(problems), 'problem')}: {', '.join(problems)}" if problems else "\nno problems")


if __name__ == "__main__":
    main()
