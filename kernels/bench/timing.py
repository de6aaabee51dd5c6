"""The time of a call on a device, and the GPU's clocks and power meanwhile."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import torch

__all__ = ["Clocks", "CudaTimer", "HostTimer", "Timer", "parse_clocks", "record_clocks"]

FLUSH_BYTES = 256 << 20  # more than any L2: it is read, so that no dirty line is left to be written during a timed call
QUERY = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


class Timer:
    """A timer that gives the median milliseconds of a call.

    Args:
        repeats: The number of timed calls.
        warm_up: The number of calls before them.
    """

    # There are more calls before them until so many seconds have passed.
    warm_up_seconds = 0.0

    def __init__(self, repeats: int = 20, warm_up: int = 3) -> None:
        self.repeats, self.warm_up = repeats, warm_up

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Return the median time of a call.

        Args:
            call: The call.
        """
        start, calls = time.perf_counter(), 0
        while calls < self.warm_up or time.perf_counter() - start < self.warm_up_seconds:
            call()
            self._wait()
            calls += 1
        return statistics.median(self._samples(call))

    def _wait(self) -> None:
        """Wait until the call is done."""

    def _samples(self, call: Callable[[], object]) -> list[float]:
        """Return the milliseconds of each timed call.

        Raises:
            NotImplementedError: A subclass must define it.
        """
        raise NotImplementedError

    def brief(self) -> Timer:
        """Return a timer for choosing among candidates, with fewer repeats."""
        return type(self)(repeats=5, warm_up=1)


class HostTimer(Timer):
    """A timer for machines without a GPU: it shows that a benchmark runs, but its times say nothing about a GPU."""

    def _samples(self, call: Callable[[], object]) -> list[float]:
        """Time the calls with the host's clock."""
        samples = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples


class CudaTimer(Timer):
    """A timer with CUDA events around every call, and with the L2 emptied in between.

    Args:
        repeats: The number of timed calls.
        warm_up: The number of calls before them.
    """

    # A GPU that idled needs some time for its clocks.
    warm_up_seconds = 0.03

    def __init__(self, repeats: int = 20, warm_up: int = 3) -> None:
        super().__init__(repeats, warm_up)
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def _wait(self) -> None:
        """Wait until the GPU is idle."""
        torch.cuda.synchronize()

    def _samples(self, call: Callable[[], object]) -> list[float]:
        """Time the calls with events."""
        pairs = [(_event(), _event()) for _ in range(self.repeats)]
        for start, stop in pairs:
            self._flush.sum()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]


def _event() -> torch.cuda.Event:
    """Return a CUDA event that takes time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Clocks:
    """The reports of nvidia-smi during a run.

    Args:
        sm: The SM clock of each sample in MHz.
        power: The power of each sample in W.
        temperature: The temperature of each sample in °C.
        max_sm: The highest SM clock that the device allows, in MHz.
        limit: The power limit in W.
        reason: The reason why there are no samples, else empty.
    """

    sm: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    max_sm: float = 0.0
    limit: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if not self.sm:
            return f"clocks and power not recorded: {self.reason}"
        return (
            f"SM clock {min(self.sm):.0f} to {max(self.sm):.0f} MHz, median {statistics.median(self.sm):.0f} "
            f"(of {self.max_sm:.0f}); power median {statistics.median(self.power):.0f} W, up to "
            f"{max(self.power):.0f} W (limit {self.limit:.0f}); up to {max(self.temperature):.0f} °C"
        )


def parse_clocks(text: str) -> Clocks:
    """Parse samples of ``nvidia-smi --query-gpu=… --format=csv,noheader,nounits``; a cut last line is left out.

    Args:
        text: The output of nvidia-smi.
    """
    clocks = Clocks()
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        try:
            sm, max_sm, power, limit, temperature = (float(value) for value in row)
        except ValueError:  # "[N/A]", or a line cut when the process ended
            continue
        clocks.sm.append(sm)
        clocks.power.append(power)
        clocks.temperature.append(temperature)
        clocks.max_sm, clocks.limit = max_sm, limit
    if not clocks.sm:
        clocks.reason = "nvidia-smi gave no samples"
    return clocks


@contextmanager
def record_clocks(index: int = 0) -> Iterator[Clocks]:
    """Yield clocks and power of a GPU, sampled every 200 ms while the block runs and filled in at its end.

    Args:
        index: The number of the GPU.
    """
    clocks = Clocks()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        clocks.reason = "no nvidia-smi"
        yield clocks
        return
    command = [tool, f"--id={index}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-lms", "200"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield clocks
        finally:
            process.terminate()
            process.wait(timeout=10)
            vars(clocks).update(vars(_read(output)))


def _read(output: IO[str]) -> Clocks:
    """Return the samples in a file."""
    output.seek(0)
    return parse_clocks(output.read())
