"""The figures of docs/hardware.md are those that the command counts now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.held_weights import main, models, rows
from dvdquant.ops.cuda.library import KernelLibrary
from tests.support.emulated_kernels import library as library

DOCS = Path(__file__).parents[2] / "docs" / "hardware.md"


@pytest.mark.parametrize(
    "name", ["wan2.1-1.3b", *(pytest.param(name, marks=pytest.mark.stress) for name in ("wan2.1-14b", "hunyuan-video"))]
)
def test_the_tables_of_the_documentation(name: str, library: KernelLibrary, capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text()
    main(["--before", "--model", name])
    for line in (*rows(name, "w4a4-g64", (4, 8), library), *capsys.readouterr().out.splitlines()):
        assert f"\n{line}\n" in text, line


def test_every_published_config_has_its_row() -> None:
    text = DOCS.read_text()
    assert [name for name in models() if f"\n| {name} | " not in text] == []
