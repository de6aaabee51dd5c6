"""The name of the processor, from what Linux lists, and the cores that a process may run on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from dvdquant.system.processor import processor_name, usable_cores
from tests.support.children import in_child


def test_the_name_of_the_first_processor(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: A 9000 @ 2: GHz \nprocessor\t: 1\nmodel name\t: another\n")
    assert processor_name(listed) == "A 9000 @ 2: GHz"


def test_a_machine_without_a_name(tmp_path: Path) -> None:
    """ARM lists no model name; other systems have no such file."""
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd42\n")
    for path in (tmp_path / "arm", tmp_path / "none"):
        assert processor_name(path) == (platform.processor() or platform.machine())


def test_cores_that_are_kept_from_a_process_do_not_count() -> None:
    def on_one() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert usable_cores() == 1

    assert usable_cores() == len(os.sched_getaffinity(0))
    assert in_child(on_one) == 0
