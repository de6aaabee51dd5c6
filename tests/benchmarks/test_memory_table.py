"""The table of docs/memory.md: whole pipelines of published models on devices that are sold."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory_table import CASES, fits, table, words
from dvdquant.deploy.generation.device_fit import DEVICES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def test_the_small_model_on_every_device() -> None:
    """By hand: UMT5-XXL is 10.6 GiB in 16 bit; more memory never fits less; the page holds these cells."""
    (case,) = (case for case in CASES if case.name == "Wan2.1-1.3B")
    found = fits(case, DEVICES)
    assert {each.plan.stages[0].parts["text encoder"] for each in found if each.plan.arrangement.text_bits == 16} == {
        2 * 5_680_910_336
    }
    for series in ("Orin", "RTX"):
        answers = [each.fits for each in found if each.device.name == series]
        assert answers == sorted(answers)
    page = PAGE.read_text()
    for each in found:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {each.device} |"))
        assert words(each) in row


@pytest.mark.stress
def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text()
