"""Jobs in one process or several, whose rows are kept as they come: a killed run goes on where it was."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.rows import append_rows, read_rows

__all__ = ["Job", "Row", "Runner", "one_thread", "processes", "run_jobs", "runner", "start"]

Job = tuple[str, str, int]  # two names, and the number of a chunk of clips
Row = dict[str, Any]
_R = TypeVar("_R")


class Runner(Protocol):
    """What does the jobs of one process, one after the other."""

    def do(self, job: Job) -> list[Row]:
        """Return the rows of one job.

        Args:
            job: The job.
        """


_runner: Any = None


def one_thread() -> None:
    """Have every process compute on one thread; call it before PyTorch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def start(make: Callable[..., _R], given: Sequence[Any]) -> _R:
    """Prepare a process, which computes on one thread, and return what does its jobs.

    Args:
        make: Makes what does the jobs of this process.
        given: The arguments of ``make``.
    """
    global _runner
    import torch

    torch.set_num_threads(1)
    made = make(*given)
    _runner = made
    return made


def runner() -> Any:
    """Return what does the jobs of this process, which was started."""
    return _runner


def processes(count: int, make: Callable[..., Any], given: Sequence[Any]) -> Pool:
    """Return new processes that each hold what does their jobs; as a context, it ends them.

    Args:
        count: The number of processes.
        make: As of :func:`start`.
        given: As of :func:`start`.
    """
    return multiprocessing.get_context("spawn").Pool(count, start, (make, given))


def _rows_of(job: Job) -> tuple[Job, list[Row]]:
    return job, _runner.do(job)


def run_jobs(
    make: Callable[..., Runner],
    given: Sequence[Any],
    jobs: Iterable[Job],
    results: Path,
    count: int,
    seconds: float | None = None,
) -> list[Row]:
    """Do the jobs that have no rows in the file yet, and write each job's rows there at once.

    Args:
        make: Makes the runner of a process.
        given: The arguments of ``make``.
        jobs: The jobs.
        results: The file of rows; each carries its ``job``.
        count: The number of processes; with one, the jobs are done in this process, which was started.
        seconds: The jobs that are left after so long are for a later run; None for no limit.

    Returns:
        The rows of earlier runs and of this one.
    """
    started = time.perf_counter()
    rows = read_rows(results)
    done = {tuple(row["job"]) for row in rows}
    todo = [job for job in jobs if job not in done]

    def keep(finished: Iterator[tuple[Job, list[Row]]]) -> None:
        for job, new in finished:
            new = [{**row, "job": list(job)} for row in new]
            append_rows(results, new)
            rows.extend(new)
            spent = time.perf_counter() - started
            print(f"{spent:.0f} s", *job, flush=True)
            if seconds is not None and spent > seconds:
                return

    if count > 1:
        with processes(count, make, given) as pool:
            keep(pool.imap_unordered(_rows_of, todo))
    else:
        keep(map(_rows_of, todo))
    return rows
