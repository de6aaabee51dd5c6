"""The name of the processor, from what Linux lists."""

from __future__ import annotations

import platform
from pathlib import Path

from dvdquant.system.processor import processor_name


def test_the_name_of_the_first_processor(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: A 9000 @ 2: GHz \nprocessor\t: 1\nmodel name\t: another\n")
    assert processor_name(listed) == "A 9000 @ 2: GHz"


def test_a_machine_without_a_name(tmp_path: Path) -> None:
    """ARM lists no model name; other systems have no such file."""
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd42\n")
    for path in (tmp_path / "arm", tmp_path / "none"):
        assert processor_name(path) == (platform.processor() or platform.machine())
