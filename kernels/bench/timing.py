"""Measuring: the time of a call on a device, and what the GPU's clocks and power did meanwhile."""

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
    """Median milliseconds of a call.

    Args:
        repeats: timed calls; the median is kept.
        warm_up: calls before them.
    """

    # More of them until so much time has passed.
    warm_up_seconds = 0.0

    def __init__(self, repeats: int = 20, warm_up: int = 3) -> None:
        self.repeats, self.warm_up = repeats, warm_up

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of ``call``."""
        start, calls = time.perf_counter(), 0
        while calls < self.warm_up or time.perf_counter() - start < self.warm_up_seconds:
            call()
            self._wait()
            calls += 1
        return statistics.median(self._samples(call))

    def _wait(self) -> None:
        """Until the call is done."""

    def _samples(self, call: Callable[[], object]) -> list[float]:
        raise NotImplementedError

    def brief(self) -> Timer:
        """A timer for choosing among candidates: fewer repeats."""
        return type(self)(repeats=5, warm_up=1)


class HostTimer(Timer):
    """For machines without a GPU: it shows that a benchmark runs, its times say nothing about a GPU."""

    def _samples(self, call: Callable[[], object]) -> list[float]:
        samples = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples


class CudaTimer(Timer):
    """CUDA events around every call, with the L2 emptied in between."""

    # A GPU that idled needs some for its clocks.
    warm_up_seconds = 0.03

    def __init__(self, repeats: int = 20, warm_up: int = 3) -> None:
        super().__init__(repeats, warm_up)
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def _wait(self) -> None:
        torch.cuda.synchronize()

    def _samples(self, call: Callable[[], object]) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(self.repeats)]
        for start, stop in pairs:
            self._flush.sum()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Clocks:
    """What nvidia-smi reported during a run: SM clock in MHz, power in W, temperature in °C.

    Args:
        sm, power, temperature: one value per sample. max_sm, limit: what the device allows.
        reason: why there are no samples, else empty.
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
    """Samples of ``nvidia-smi --query-gpu=… --format=csv,noheader,nounits``; a cut last line is left out."""
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
    """Samples clocks and power of GPU ``index`` every 200 ms while the block runs."""
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
    output.seek(0)
    return parse_clocks(output.read())
