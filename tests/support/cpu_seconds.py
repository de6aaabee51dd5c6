"""A pytest plugin that counts processor seconds a test file takes, its child processes included, in one process or in many.

Wall time on a busy machine says little about a test; processor time says what it costs. ``--cpu-seconds 20`` lists the
20 files and the 20 tests that cost most, ``--cpu-seconds-file PATH`` writes every test's seconds, a line each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_SENT = "dvdquant_cpu_seconds"


def cpu_seconds() -> float:
    """Return user and system seconds of this process and of its children that have ended and were waited for."""
    return sum(os.times()[:4])


class CpuSeconds:
    """Measure every test where it runs, collect where the summary is printed."""

    def __init__(self, config: pytest.Config):
        self.listed = int(config.getoption("cpu_seconds"))
        self.file = config.getoption("cpu_seconds_file")
        self.worker_output: dict[str, Any] | None = getattr(config, "workeroutput", None)
        self.last = 0.0
        self.tests: Counter[str] = Counter()
        self.processes = 0.0
        """Seconds of the test processes from start to end: tests, and what lies around them."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Begin to count a test."""
        self.last = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Write a phase's seconds into its report, which a test process sends to the first process."""
        report = yield
        now = cpu_seconds()
        report.dvdquant_cpu_seconds = now - self.last
        self.last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase to its test."""
        self.tests[report.nodeid] += getattr(report, _SENT, 0.0)

    def pytest_sessionfinish(self) -> None:
        """Say what the whole process took."""
        if self.worker_output is not None:
            self.worker_output[_SENT] = cpu_seconds()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add a test process that has ended."""
        self.processes += getattr(node, "workeroutput", {}).get(_SENT, 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the sum, and the dearest files and tests."""
        # A first process with workers waits for them when it ends: what they took is not in its own seconds yet.
        total = self.processes or cpu_seconds()
        within = sum(self.tests.values())
        if self.file:
            lines = [f"{seconds:.2f}\t{name}\n" for name, seconds in self.tests.most_common()]
            Path(self.file).write_text("".join([*lines, f"{total - within:.2f}\timports, collection, end\n"]))
        if not self.listed:
            return
        files: Counter[str] = Counter()
        for name, seconds in self.tests.items():
            files[name.partition("::")[0]] += seconds
        terminalreporter.section(f"{total:.0f} CPU seconds, {within:.0f} in tests")
        for costs in (files, self.tests):
            for name, seconds in costs.most_common(self.listed):
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
