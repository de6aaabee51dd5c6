"""Quality of every method on tiny-wan and on tiny-wan with outliers: clips, errors step by step, studies, the switch.

    python -m benchmarks.quality run                         everything, hours on two cores; then the tables and plots
    python -m benchmarks.quality run --parts studies         minutes
    python -m benchmarks.quality run --prompts 16 --seeds 1  fewer clips

Finished parts are lines in ``WORK/results.jsonl``: killed and started again, it goes on; asked for more clips, it adds them.
With ``--add-to benchmarks/quality/results.jsonl.xz`` it goes on from the rows that are kept here, if nothing changed since.
Rivals that are packages take part where they are installed (``--list`` says what is missing).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run by its path
from benchmarks.commit import commit
from benchmarks.quality.jobs import one_thread, processes, runner
from benchmarks.quality.page import MODEL, hardware
from benchmarks.rows import append_rows, read_rows
from dvdquant.system.processor import usable_cores

HERE = Path(__file__).resolve().parent
CHUNK = 16
PARTS = ("studies", "methods", "delta")
OURS_FOR_DELTA = "dvdquant w4a4"
DELTAS = (0.02, 0.06, 0.1, 0.14, 0.18, 0.25, 0.4)
HIGH_SHARES = (0.25, 0.5, 0.75)

Job = tuple[str, tuple[Any, ...], str]  # Worker's method, its arguments, the key of what it finishes


def method_jobs(options: argparse.Namespace, chunks: list[list[Any]]) -> Iterator[Job]:
    """Yield the jobs of every method at every width: errors by step, then the first clips of all, then the others row by row.

    Args:
        options: The options of the command.
        chunks: (prompt, seed) of the clips of every chunk.
    """
    from benchmarks.quality.compared.methods import METHODS
    from benchmarks.quality.compared.peers import available_peers

    names = {name: method.widths for name, method in METHODS.items()}
    names |= {name: widths for name, (_, widths) in available_peers().items()}
    rows = [("bf16", "A16")] + [(n, f"A{w}") for w in (4, 8, 6) for n, widths in names.items() if w in widths]
    rows = [(n, w) for n, w in rows if not options.only or any(part in f"{n} {w}" for part in options.only)]
    for model in options.models:
        for name, width in rows:
            if width != "A6" or name not in METHODS or not METHODS[name].switched:
                yield "steps", (model, name, width), f"steps/{model}/{name}/{width}"
    first = [(row, model, 0) for model in options.models for row in rows]
    # A process keeps the models it built last: all clips of one before the next.
    others = [(row, model, index) for row in rows for model in options.models for index in range(1, len(chunks))]
    for (name, width), model, index in first + others:
        yield "clips", (model, name, width, index, chunks[index]), f"clips/{model}/{name}/{width}/{index}"


def study_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the jobs of every entry of every study, at 4 and 8 bits.

    Args:
        options: The options of the command.
    """
    from benchmarks.quality.compared.studies import STUDIES

    for model in options.models:
        for study, entries in STUDIES.items():
            if options.only and study not in options.only:
                continue
            for name in entries:
                for width in ("A4", "A8"):
                    yield "study", (model, study, name, width), f"study/{model}/{study}/{name}/{width}"


def delta_jobs(options: argparse.Namespace, chunks: list[list[Any]], steps: int) -> Iterator[Job]:
    """Yield the jobs of the switch: δ from .02 to .4, and fixed placements of the 8-bit steps.

    Each δ is run as published, with the last two steps high, weighed with the length of the steps, and with the step cache.

    Args:
        options: The options of the command.
        chunks: (prompt, seed) of the clips of every chunk.
        steps: The denoising steps of a clip.
    """
    variants: list[dict[str, Any]] = []
    for delta in DELTAS:
        variants += [
            {"name": "δ-GBS", "delta": delta},
            {"name": "δ-GBS, last 2 high", "delta": delta, "last_high": 2},
            {"name": "δ-GBS + cache", "delta": delta, "last_high": 2, "cache": True},
            {"name": "δ-GBS, weighted", "delta": delta, "weighted": True},
            {"name": "δ-GBS, weighted, last 2 high", "delta": delta, "last_high": 2, "weighted": True},
        ]
    for place in ("first", "last", "evenly"):
        variants += [{"name": place, "place": place, "high": round(share * steps)} for share in HIGH_SHARES]
    for index, chunk in enumerate(chunks[: options.delta_chunks]):
        for variant in variants:
            key = json.dumps(variant, sort_keys=True, ensure_ascii=False)
            model = options.models[0]
            yield (
                "delta_clips", (model, OURS_FOR_DELTA, variant, index, chunk),
                f"delta/{model}/{OURS_FOR_DELTA}/{key}/{index}",
            )  # fmt: skip


def do(job: Job) -> tuple[str, list[dict[str, Any]], float]:
    """Run a job in a worker process.

    Args:
        job: Worker's method, its arguments, and the key of what it finishes.

    Returns:
        The key, the rows, and the seconds that it took.
    """
    started = time.perf_counter()
    rows = getattr(runner(), job[0])(*job[1]) or []
    return job[2], rows, time.perf_counter() - started


def finished(results: Path) -> set[str]:
    """Return the keys of the jobs whose rows are in a file; a line torn by a kill is cut off.

    Args:
        results: The file; it need not exist.
    """
    from benchmarks.quality.results.results_file import name_of_today

    keys: set[str] = {row["job"] for row in read_rows(results) if "job" in row}
    return {name_of_today(key) if key.startswith("study/") else key for key in keys}


def run_jobs(pool: Any, jobs: list[Job], results: Path, what: str) -> None:
    """Run all jobs that are not in the file yet, and write each job's rows at once.

    Args:
        pool: The processes.
        jobs: The jobs.
        results: The file of rows.
        what: What stands before the bar.
    """
    from tqdm import tqdm

    done = finished(results)
    todo = [job for job in jobs if job[2] not in done]
    bar = tqdm(total=len(todo), desc=what, unit=" jobs")
    for key, rows, seconds in pool.imap_unordered(do, todo):
        if not rows:  # leaves a file of its own behind
            bar.update()
            continue
        # The last row carries the key: a torn write leaves the job to be done again.
        last = {**rows[-1], "part": key, "job": key, "job_seconds": round(seconds, 1)}
        append_rows(results, [*({**row, "part": key} for row in rows[:-1]), last])
        bar.update()
        bar.set_postfix_str(key)
    bar.close()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a folder with transformer, scheduler and prompt table"
    )
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="results and what they were made from")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=["plain", "outliers"], default=["plain", "outliers"])
    parser.add_argument("--only", nargs="+", default=[], help="methods by part of 'name width', studies by name")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--chunks", type=int, help=f"only so many chunks of {CHUNK} clips, of the same clips")
    parser.add_argument("--steps", type=int, help="denoising steps; those the model was trained for if not given")
    parser.add_argument("--delta-chunks", type=int, default=1, help=f"chunks of {CHUNK} clips for the δ part")
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--eager", action="store_true", help="do not compile the model: for a few clips")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="rows of an earlier run, into an empty WORK")
    parser.add_argument("--no-report", action="store_true", help="only measure")
    parser.add_argument("--list", action="store_true", help="what takes part, and exit")
    options = parser.parse_args()
    # 1. Which packages take part.
    one_thread()
    from benchmarks.quality.compared.peers import missing_peers, versions

    print("packages:", ", ".join(f"{k} {v}" for k, v in versions().items()))
    for name, how in missing_peers().items():
        print(f"left out: {name} ({how})")
    if options.list:
        return 0
    from benchmarks.quality.outliers import KINDS, toy_folders
    from benchmarks.quality.toy.clips import Bench
    from benchmarks.quality.work import Worker, plan

    # 2. The models, the clips, and the rows to go on from.
    options.work.mkdir(parents=True, exist_ok=True)
    folders = toy_folders(options.model, options.work)
    options.models = [name for name, kind in zip(folders, KINDS) if kind in options.models]
    bench = Bench.open(options.model)
    steps = options.steps or bench.steps
    every = plan(bench, options.prompts, options.seeds)
    chunks = [every[i : i + CHUNK] for i in range(0, len(every), CHUNK)][: options.chunks]
    results, started = options.work / "results.jsonl", time.time()
    if options.add_to is not None:
        if results.exists():
            parser.error(f"{results} is there already: leave --add-to out to go on from it, or name another --work")
        from benchmarks.quality.results.results_file import read_lines

        results.write_text(read_lines(options.add_to), encoding="utf-8")
    # 3. The jobs, part by part: what later parts compare with comes first.
    with processes(options.processes, Worker, (folders, options.work, steps, options.eager)) as pool:
        run_jobs(pool, [("held_out", (m,), f"held-out/{m}") for m in options.models], results, "held-out clips")
        if "studies" in options.parts:
            run_jobs(pool, list(study_jobs(options)), results, "studies")
        if set(options.parts) & {"methods", "delta"}:
            jobs: list[Job] = [
                ("reference", (m, i, c), f"clips/{m}/fp32/{i}") for i, c in enumerate(chunks) for m in options.models
            ]
            run_jobs(pool, jobs, results, "fp32 clips")
        if "methods" in options.parts:
            run_jobs(pool, list(method_jobs(options, chunks)), results, "methods")
        if "delta" in options.parts:
            run_jobs(pool, list(delta_jobs(options, chunks, steps)), results, "δ")
    # 4. What made the rows, and the tables.
    record = {
        "kind": "run", "hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - started),
        "command": "python -m benchmarks.quality run " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "packages": versions(),
    }  # fmt: skip
    append_rows(results, [record])
    if options.no_report:
        return 0
    return subprocess.run([sys.executable, str(HERE / "report.py"), str(results)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
