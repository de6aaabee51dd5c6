"""Tables in docs/quality/index.md, with what made them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.commit import commit
from dvdquant.system.processor import processor_name, usable_cores

__all__ = ["MODEL", "PAGE", "hardware", "write_table"]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-wan"
PAGE = ROOT / "docs" / "quality" / "index.md"


def hardware() -> str:
    """Return processor, cores and the version of torch, in words."""
    import torch

    return f"{usable_cores()} cores of {processor_name()}, no GPU used, torch {torch.__version__}"


def write_table(page: Path, block: str, table: str, drawn: str, command: str) -> None:
    """Put a table into its block of a page, with hardware, date, commit and the arguments of this process.

    Args:
        page: The page.
        block: The name of the block.
        table: The table.
        drawn: What was drawn, in words.
        command: The command of ``benchmarks.quality``.

    Raises:
        PageError: The marks of the block are missing, there twice or in the wrong order.
    """
    from benchmarks.quality.report import replace_blocks

    line = f"python -m benchmarks.quality {command} {' '.join(sys.argv[1:])}".rstrip()
    text = f"{table}\n\n{hardware()}, {time.strftime('%Y-%m-%d')}, {drawn}; at {commit()}:\n\n    {line}"
    page.write_text(replace_blocks(page.read_text(encoding="utf-8"), {block: text}), encoding="utf-8")
