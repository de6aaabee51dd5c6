"""Everything about the kernels that needs a GPU, in one command: ``make gpu-check``.

    python kernels/check/gpu_check.py [--out FOLDER] [--seconds 480]

It builds the library if there is none, runs every check, prints one row each, writes ``FOLDER/<date>-<gpu>-gpu-check.md``
as it goes, and exits 1 if anything failed. Libraries of 8-bit attention run in a process of their own, before anything else
is on the GPU. It needs torch with CUDA and numpy. Anything else that is missing (diffusers, pytest,
compute-sanitizer) is a row that says "not run".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in (REPOSITORY, Path(__file__).resolve().parent, REPOSITORY / "kernels" / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from check_attention import check_attention  # noqa: E402
from check_cases import FEATURES  # noqa: E402
from check_fused import check_fused  # noqa: E402
from check_kernels import (  # noqa: E402
    Bench,
    GuardedKernels,
    Outcome,
    check_dispatch,
    check_exact_sums,
    check_extremes,
    check_large,
    check_shapes,
    run_all,
)
from check_ops import check_graph, check_model, check_op, check_pre_quant, check_streams  # noqa: E402
from check_quantizer import check_quantizer  # noqa: E402
from check_report import hardware, line, markdown, report_path, smi  # noqa: E402
from check_rope import check_rope  # noqa: E402

from benchmarks.apart import Apart  # noqa: E402
from dvdquant.errors import DvdquantError  # noqa: E402
from dvdquant.ops.cuda.find import find_library, load_library  # noqa: E402
from dvdquant.ops.cuda.library import KernelLibrary  # noqa: E402
from dvdquant.system.devices import cuda_sm  # noqa: E402

# Shapes for the sanitizer, under which everything takes a hundred times as long.
SMALL = ((7, 8), (33, 136), (129, 136))
SMALL_FEATURES = (256, 1920)
# racecheck takes some ten times as long as memcheck.
SMALLEST = ((33, 136),)
_ERROR_EXIT = 9
# This time is not part of --seconds, as that of the benchmark is not.
_QUANTIZER_SECONDS = 120.0
# The lines that pytest and the sanitizers print of a failure.
_FOUND = re.compile(r"^(?:=+ (?:Invalid|Error|Race|Uninitialized).*|.*\bFAILED\b.*|[.sx]*F[.sxFE]*)$", re.MULTILINE)
# Tests marked slow run if there are at least so many seconds.
_SLOW_SECONDS = 300
# One library of 8-bit attention takes some seconds, and a minute where it compiles.
_LIBRARY_SECONDS = 150.0
# What runs beside the checks ends so many seconds behind them, also where this process was killed and cannot end it.
_BEYOND_SECONDS = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, and return the exit status: 0 all passed, 1 some failed.

    Args:
        arguments: The command line; None means that of the process.
    """
    # 1. Find or build the library.
    options = _options(arguments)
    if not torch.cuda.is_available():
        print(f"gpu_check needs a CUDA device, and torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    try:
        library = load_library() if find_library() or build() else None
    except DvdquantError as error:
        print(error, file=sys.stderr)
        return 1
    if library is None:
        print("the kernel library could not be built", file=sys.stderr)
        return 1
    kernels = GuardedKernels(library, cuda_sm())
    # 2. Under a sanitizer, check the small shapes only.
    if options.small:
        least = options.small == "race"
        bench = Bench(
            kernels, torch.device("cuda"), SMALL_FEATURES[:1] if least else SMALL_FEATURES, SMALLEST if least else SMALL
        )
        checks = [
            check_shapes(bench),
            check_pre_quant(bench, 3),
            *([] if least else [check_extremes(bench, 7)]),
            check_quantizer(bench, 33, (256,)),
        ]
        return report(run_all(checks), [])
    bench = Bench(kernels, torch.device("cuda"), FEATURES)
    built = library.path.relative_to(REPOSITORY) if library.path.is_relative_to(REPOSITORY) else library.path
    # 3. Run every check and the benchmarks; the report is written after each. What runs beside ends with this process, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    facts = hardware() | {"library": f"{built} for {';'.join(library.architectures)}"}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    outcomes: list[Outcome] = []
    bench_text = ""
    path = report_path(options.out, facts)
    status = 0
    for outcome in attention(bench):
        status |= report(iter([outcome]), outcomes)
        write(path, facts, outcomes, bench_text)
    # Neither the build nor the time of libraries is part of --seconds.
    started = time.monotonic()
    bench.deadline = started + 0.7 * options.seconds
    with contextlib.closing(every_check(bench, options, started)) as found:
        for outcome in found:
            status |= report(iter([outcome]), outcomes, started)
            write(path, facts, outcomes, bench_text)
    if not options.no_bench:
        outcome, bench_text = run_bench(
            library, bench.device, options.bench_seconds, lambda text: write(path, facts, outcomes, text)
        )
        status |= report(iter([outcome]), outcomes, started)
        write(path, facts, outcomes, bench_text)
        outcome, quantizer_text = run_quantizer(_QUANTIZER_SECONDS)
        status |= report(iter([outcome]), outcomes, started)
        bench_text += quantizer_text
    facts |= {f"{name} at the end": value for name, value in smi().items() if name.startswith(("clocks", "temp"))}
    facts["seconds"] = f"{time.monotonic() - started:.0f}"
    write(path, facts, outcomes, bench_text)
    failed = sum(not o.passed for o in outcomes)
    print(f"{len(outcomes) - failed} rows passed, {failed} failed; report {path}")
    return status


def write(path: Path, facts: dict[str, str], outcomes: list[Outcome], text: str) -> None:
    """Write the report as far as it is: a run that is cut off later keeps its rows.

    Args:
        path: The file.
        facts: The facts about the hardware.
        outcomes: The rows.
        text: More Markdown for the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown("gpu-check", facts, outcomes, text))


def every_check(bench: Bench, options: argparse.Namespace, started: float) -> Generator[Outcome, None, None]:
    """Yield all rows but the benchmark's, the cheap and telling ones first; the sanitizers and pytest run beside them.

    Args:
        bench: The kernels, the device and the sizes.
        options: The command line.
        started: The time of ``time.monotonic()`` at the start.
    """
    most = options.seconds + _BEYOND_SECONDS
    beside = [
        start_pytest(slow=options.seconds >= _SLOW_SECONDS, seconds=most),
        start_sanitizer("memcheck", most),
        start_sanitizer("racecheck", most),
    ]
    try:
        yield from run_all(
            [
                check_dispatch(bench),
                check_extremes(bench),
                check_exact_sums(bench),
                check_op(bench),
                check_pre_quant(bench),
                check_fused(bench),
                check_rope(bench),
                check_graph(bench),
                check_streams(bench),
                check_shapes(bench),
                check_large(bench, 118800, 21504, 21504),
                check_quantizer(bench),
                check_model(bench),
            ]
        )
        with contextlib.suppress(RuntimeError):  # a device whose context is broken: the rows say so
            torch.cuda.empty_cache()
        for tool in beside:
            yield tool if isinstance(tool, Outcome) else tool.finish(options.seconds - (time.monotonic() - started))
    finally:
        for tool in beside:
            if isinstance(tool, Running):
                tool.stop()


def attention(bench: Bench) -> Iterator[Outcome]:
    """Yield the rows of the libraries of 8-bit attention, each timed while nothing else runs on the GPU.

    Args:
        bench: The device and its SM.
    """
    apart = Apart(_LIBRARY_SECONDS)
    try:
        yield from run_all([check_attention(bench, apart=apart)])
    finally:
        apart.close()


def report(rows: Iterator[Outcome], outcomes: list[Outcome], started: float | None = None) -> int:
    """Print and collect rows, and return 1 if one failed, else 0.

    Args:
        rows: The rows.
        outcomes: Gets the rows.
        started: The start, to print the seconds since then; None prints none.
    """
    status = 0
    for outcome in rows:
        clock = "" if started is None else f"{time.monotonic() - started:4.0f} s  "
        print(clock + line(outcome), flush=True)
        outcomes.append(outcome)
        status |= not outcome.passed
    return status


def build() -> bool:
    """Build the library with kernels/build.py, and return whether there is one now."""
    subprocess.run([sys.executable, str(REPOSITORY / "kernels" / "build.py")], cwd=REPOSITORY, check=False)
    return find_library() is not None


class Running:
    """A command that runs beside the checks until :meth:`stop`.

    Args:
        name: The name of its row.
        command: The command and its arguments.
        judge: A function of (name, exit status, output) that makes its row.
        may_be_late: True if running out of time is no failure.
        seconds: It ends after this time even where nobody ends it; None for no limit.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        judge: Callable[[str, int, str], Outcome],
        may_be_late: bool = True,
        seconds: float | None = None,
    ) -> None:
        self.name, self.judge, self.may_be_late = name, judge, may_be_late
        timeout = shutil.which("timeout")
        if seconds is not None and timeout is not None:
            command = [timeout, "--signal=KILL", f"{seconds:.0f}", *command]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # A group of its own: the sanitizer's child would live on and disturb the benchmark.
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def finish(self, seconds: float) -> Outcome:
        """Return the row, after waiting for at most ``seconds``; a command out of time fails if it had found something.

        Args:
            seconds: The time to wait.
        """
        try:
            status: int | None = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        self.stop()
        output = self.said().strip()
        if status is not None:
            return self.judge(self.name, status, output)
        found = _FOUND.search(output)
        note = "not run to its end: the time was used up"
        passed = self.may_be_late and found is None
        return Outcome(self.name, passed, 0, note=f"{note}, after: {found[0]}" if found else note)

    def said(self) -> str:
        """Return what the command has written so far."""
        self._output.seek(0)
        return self._output.read()

    def stop(self) -> None:
        """End the command and its children, if they still run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def gpu_tests() -> list[str]:
    """Return the files of the test suite that hold tests marked gpu."""
    return [str(p) for p in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]


def start_pytest(slow: bool = True, seconds: float | None = None) -> Running | Outcome:
    """Start the tests marked gpu, of the files that have some.

    Files that need a package this machine lacks are counted.

    Args:
        slow: Run those marked slow, too.
        seconds: See :class:`Running`.

    Returns:
        The running command, or the row if there is nothing to run.
    """
    marks = "gpu" if slow else "gpu and not slow"
    name = f"pytest -m '{marks}'"
    files = gpu_tests()
    if not files:
        return Outcome(name, False, 0, note="not run: the checkout holds no such tests")
    if importlib.util.find_spec("pytest") is None:
        return Outcome(name, True, 0, note="not run: no pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", "-rfE",
               "--continue-on-collection-errors", *files]  # fmt: skip
    return Running(name, command, judge_pytest, may_be_late=False, seconds=seconds)


def judge_pytest(name: str, status: int, output: str) -> Outcome:
    """Return the row of pytest.

    It passed if nothing failed and every file that could not be imported lacks an installed package.

    Args:
        name: The name of the row.
        status: The exit status.
        output: The output.
    """
    errors = [row for row in output.splitlines() if row.startswith("ERROR ")]
    missing = [row for row in errors if "No module named" in row and "dvdquant" not in row.partition(" - ")[2]]
    failed = [row for row in output.splitlines() if row.startswith("FAILED ")]
    passed = status in (0, 5) or (bool(missing) and not failed and len(missing) == len(errors))
    if not passed:
        print(output[-6000:])
    note = output.strip().splitlines()[-1].strip("= ") if output.strip() else "no output"
    if missing:
        modules = {row.rpartition("No module named ")[2].strip("'\" .") for row in missing}
        note += f"; {len(missing)} files not run, missing: {', '.join(sorted(modules))}"
    ran = re.search(r"(\d+) passed", output)
    return Outcome(name, passed, int(ran.group(1)) if ran else 0, note=note)


def start_sanitizer(tool: str, seconds: float | None = None) -> Running | Outcome:
    """Start compute-sanitizer over the small shapes.

    Args:
        tool: ``memcheck`` or ``racecheck``.
        seconds: See :class:`Running`.

    Returns:
        The running command, or the row if the program is missing.
    """
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        return Outcome(tool, True, 0, note="not run: compute-sanitizer was not found")
    command = [found, "--tool", tool, "--error-exitcode", str(_ERROR_EXIT), sys.executable, __file__,
               "--small", "race" if tool == "racecheck" else "memory"]  # fmt: skip
    return Running(tool, command, judge_tool, seconds=seconds)


def judge_tool(name: str, status: int, output: str) -> Outcome:
    """Return a command as one row: its last line, or "not run" if the device refuses the tool.

    Args:
        name: The name of the row.
        status: The exit status.
        output: The output.
    """
    if "Device not supported" in output:
        return Outcome(name, True, 0, note="not run: the machine's runtime does not let it see the device")
    if status:
        print(output[-6000:])
    return Outcome(name, status == 0, note=output.splitlines()[-1] if output else "no output")


def run_command(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command, and return its exit status and output; the status is None if there was too little time.

    Args:
        command: The command and its arguments.
        seconds: The time that it may take; with less than 20 it is not run.
    """
    if seconds < 20:
        return None, ""
    try:
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, ""
    return run.returncode, (run.stdout + run.stderr).strip()


def run_bench(
    library: KernelLibrary, device: torch.device, seconds: float, so_far: Callable[[str], None] = lambda text: None
) -> tuple[Outcome, str]:
    """Run the benchmark of ``kernels/bench``, and return its row, and its table for the report.

    Args:
        library: The kernels.
        device: The GPU.
        seconds: The time after which no further peers start.
        so_far: A function that gets the table after every layer.
    """
    rows: list[Any] = []
    facts: list[str] = []

    def table() -> str:
        return "#" + bench.to_markdown(rows, "Speed", facts)

    def note(measured: list[Any]) -> None:
        rows[:] = measured
        so_far(table())

    try:
        import bench
        from timing import record_clocks

        facts += bench.describe(device, library)
        with record_clocks(device.index or 0) as clocks:
            rows[:] = bench.run(library, device, seconds=seconds, progress=print, so_far=note)
        facts.append(str(clocks))
    except Exception as error:  # noqa: BLE001 - what was measured before it stays
        return Outcome("bench", False, len(rows), note=f"{type(error).__name__}: {error}"), table() if rows else ""
    print(table())
    failed = [row for row in rows if row.ours and row.note.startswith("failed")]
    words = f"{failed[0].name}, {failed[0].shape}: {failed[0].note}" if failed else "see the table below"
    return Outcome("bench", bool(rows) and not failed, len(rows), note=words), table()


def run_quantizer(seconds: float) -> tuple[Outcome, str]:
    """Quantize weights on the GPU, and return the row, and the table of ``benchmarks/quantize.py`` for the report.

    It should take no longer than reading the weights, two bytes each, from a disk.

    Args:
        seconds: The time that it may take.
    """
    script = REPOSITORY / "benchmarks" / "quantize.py"
    command = [sys.executable, str(script), *"--device cuda --rows 8192 --kinds rotated --groups 0 64 32".split()]  # noqa: SIM905
    status, output = run_command(command, seconds)
    if status is None:
        return Outcome("quantizer", True, 0, note=f"not run to its end within {seconds:.0f} s"), ""
    print(output[-6000:])
    text = f"\n\n## Quantizing weights\n\n```text\n{output}\n```\n" if status == 0 else ""
    return Outcome("quantizer", status == 0, note="see the table below"), text


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="correctness and speed of the CUDA kernels on this machine's GPU")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "kernels" / "bench" / "results", help="report folder")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time for everything but the build and the benchmarks"
    )
    parser.add_argument("--bench-seconds", type=float, default=230, help="start no further peers after this")
    parser.add_argument("--no-bench", action="store_true", help="correctness only")
    parser.add_argument("--small", choices=("memory", "race"), help="a few small shapes, as under compute-sanitizer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
