"""What the cases of a fuzzer cost: how many there were, how many were refused, the longest, and the memory of all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from types import TracebackType

from dvdquant.errors import DvdquantError

__all__ = ["RECORD", "SECONDS", "Costs", "peak"]

SECONDS = 30.0  # a case that takes longer counts as hung, on a busy machine too
MEBIBYTES = 1024
RECORD = "DVDQUANT_CAMPAIGN"
"""The variable that names a file for the figures of every fuzzer (see tests/support/run_campaign.py)."""


class Costs:
    """A context manager around the cases of one parser; at its end it asserts that none hung and all were small.

    Args:
        parser: What reads the cases, as a table says it.
        bounded: False where the memory is that of other processes, or of a model that the cases run.
    """

    def __init__(self, parser: str, *, bounded: bool = True) -> None:
        self.parser, self.bounded = parser, bounded
        self.cases = self.refused = 0
        self.slowest = 0.0
        self._elsewhere = 0
        self._before = peak()

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """Measure one case; an error of ours counts as refused, and goes on to the caller."""
        started = time.monotonic()
        try:
            yield
        except DvdquantError:
            self.refused += 1
            raise
        finally:
            self.add(time.monotonic() - started)

    def add(self, seconds: float, refused: int = 0) -> None:
        """Count a case that was measured elsewhere."""
        self.add_all(1, refused, seconds, 0)

    def add_all(self, cases: int, refused: int, slowest: float, grown: int) -> None:
        """Count the cases of another process, which grew by so many KiB."""
        self.cases += cases
        self.refused += refused
        self.slowest = max(self.slowest, slowest)
        self._elsewhere = max(self._elsewhere, grown)

    def __enter__(self) -> Costs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        grown = max(peak() - self._before, self._elsewhere) >> 10
        if path := os.environ.get(RECORD):
            figures = {"parser": self.parser, "cases": self.cases, "refused": self.refused, "slowest": self.slowest}
            line = {**figures, "grown": grown if self.bounded else None, "failed": kind is not None}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if kind is None:
            assert self.slowest < SECONDS, f"a case of {self.parser} took {self.slowest:.1f} s"
            assert not self.bounded or grown < MEBIBYTES, f"{self.parser} took {grown} MiB"


def peak() -> int:
    """Return the largest memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
