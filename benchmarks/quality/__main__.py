"""Run a command of the quality benchmark: ``python -m benchmarks.quality COMMAND``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "measure what is missing, then write the tables and plots",
    "report": "write the tables and plots of docs/quality from the rows of a run",
    "attention": "measure what 8-bit attention costs",
    "value_scales": "measure what the scale of v is worth in engines' FP8 attention",
    "caches": "measure what step caches cost",
    "strips": "draw one prompt by seven methods, frame by frame",
    "outliers": "write the toy model with outlier channels, which computes the same",
    "train": "train the toy model on",
}


def main() -> int:
    """Run the command that the first argument names; return its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:<14}{text}" for command, text in COMMANDS.items()]
        print("python -m benchmarks.quality COMMAND [--help]", *lines, sep="\n", file=sys.stderr)
        return 0 if name in ("--help", "-h") else 2
    sys.argv[:2] = [f"python -m benchmarks.quality {name}"]
    return importlib.import_module(f"benchmarks.quality.{name}").main() or 0


if __name__ == "__main__":
    sys.exit(main())
