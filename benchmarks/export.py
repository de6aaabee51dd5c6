"""Measure an export: wall time, peak memory of all its processes and output size, beside the dry run's estimate.

    python benchmarks/export.py out/wan-1.3b --sm 8.9
    python benchmarks/export.py out/hunyuan --target graphs --modulation a8 --limit-gib 8

Every option after the checkpoint but ``--limit-gib`` and ``--keep-output`` goes to ``dvdq-export``.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psutil

from dvdquant.system.processor import usable_cores

INTERVAL = 0.1  # seconds between two looks at the memory of the process tree


class MemoryWatch(threading.Thread):
    """A thread that watches the peak resident memory of a process and its children.

    Args:
        pid: The id of the process.

    Attributes:
        peak: The peak with mapped file pages, in bytes.
        peak_private: The peak of own pages, in bytes.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        self.peak = self.peak_private = 0

    def run(self) -> None:
        """Look until told to stop."""
        while not self._over.wait(INTERVAL):
            total = private = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    info = process.memory_info()
                    total += info.rss
                    private += info.rss - info.shared
            except psutil.Error:
                continue
            self.peak, self.peak_private = max(self.peak, total), max(self.peak_private, private)

    def stop(self) -> None:
        """End the watch."""
        self._over.set()
        self.join()


def command(checkpoint: Path, out: Path, options: tuple[str, ...]) -> list[str]:
    """Return the export's command line.

    Args:
        checkpoint: The folder of the checkpoint.
        out: The output folder.
        options: More options of dvdq-export.
    """
    return [
        sys.executable,
        "-m",
        "dvdquant.cli.export",
        str(checkpoint),
        "-o",
        str(out),
        "--log-format",
        "json",
        *options,
    ]


def estimate(checkpoint: Path, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Return the estimate of ``--dry-run``.

    Args:
        checkpoint: The folder of the checkpoint.
        out: The output folder.
        options: More options of dvdq-export.
    """
    run = subprocess.run([*command(checkpoint, out, options), "--dry-run"], capture_output=True, text=True, check=True)
    plan: dict[str, Any] = json.loads(run.stdout)
    found: dict[str, Any] = plan["estimate"]
    return found


def limited(limit_gib: float | None) -> Any:
    """Return a function for the child that sets a hard limit on its heap; the builder processes inherit it.

    Args:
        limit_gib: The limit (RLIMIT_DATA) in GiB; None sets none.
    """

    def apply() -> None:
        """Set the limit."""
        if limit_gib is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)

    return apply


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--limit-gib", type=float, help="Hard limit on the heap of each process of the export.")
@click.option("--keep-output", type=click.Path(path_type=Path), help="Export into this folder and keep it.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(checkpoint: Path, limit_gib: float | None, keep_output: Path | None, options: tuple[str, ...]) -> None:
    """Export CHECKPOINT with OPTIONS of dvdq-export and print a table of measured and estimated figures."""
    folder = Path(tempfile.mkdtemp(prefix="dvdq-benchmark-", dir=checkpoint.parent))
    out = keep_output or folder / "out"
    try:
        predicted = estimate(checkpoint, out, options)
        load = os.getloadavg()[0]
        started = time.monotonic()
        process = subprocess.Popen(
            command(checkpoint, out, options), stderr=subprocess.PIPE, text=True, preexec_fn=limited(limit_gib)
        )
        watch = MemoryWatch(process.pid)
        watch.start()
        events = [json.loads(line) for line in process.stderr or () if line.startswith("{")]
        code = process.wait()
        seconds = time.monotonic() - started
        watch.stop()
        if code:
            raise click.ClickException(f"dvdq-export ended with {code}: {events[-1] if events else ''}")
        stored = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        done = next(event for event in events if event["event"] == "done")
        click.echo(report(checkpoint, options, predicted, done["seconds"], seconds, watch, stored, load, limit_gib))
    finally:
        shutil.rmtree(folder)


def report(
    checkpoint: Path,
    options: tuple[str, ...],
    predicted: dict[str, Any],
    stages: dict[str, float],
    seconds: float,
    watch: MemoryWatch,
    stored: int,
    load: float,
    limit_gib: float | None,
) -> str:
    """Return a Markdown table.

    Args:
        checkpoint: The folder of the checkpoint.
        options: The options of dvdq-export.
        predicted: The estimate of the dry run.
        stages: The time of each stage in seconds.
        seconds: The time of the whole export.
        watch: The memory of its processes.
        stored: The size of the output in bytes.
        load: The load of the machine before.
        limit_gib: The limit of the heap in GiB, or None.
    """
    source = predicted["source_bytes"]
    rows = [
        ("time, s", f"{seconds:.0f}", f"{sum(predicted['seconds'].values()):.0f}"),
        ("peak memory, GiB", f"{watch.peak / 2**30:.2f}", f"{predicted['peak_bytes'] / 2**30:.2f}"),
        ("  without mapped files, GiB", f"{watch.peak_private / 2**30:.2f}", ""),
        (
            "output, GiB",
            f"{stored / 2**30:.2f}",
            f"{(predicted['weight_file_bytes'] + predicted['engine_bytes']) / 2**30:.2f}",
        ),
        ("output / checkpoint", f"{stored / source:.3f}", ""),
    ]
    rows += [
        (f"  {name}, s", f"{value:.1f}", f"{predicted['seconds'].get(name, '')}") for name, value in stages.items()
    ]
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {usable_cores()} cores ({platform.machine()}), load {load:.1f} before; "
        f"`dvdq-export {checkpoint.name} {' '.join(options)}`"
        + (f", RLIMIT_DATA {limit_gib} GiB" if limit_gib else ""),
        "",
        "| | measured | estimated |",
        "|---|---|---|",
        *(f"| {name} | {value} | {guess} |" for name, value, guess in rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
