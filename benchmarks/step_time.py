"""Time one DiT step at real sizes: bf16 against W4A8 and W4A4 on the CUDA kernels, through PyTorch.

    make kernels
    python benchmarks/step_time.py                        # every case and flavour, a table on stdout and --out
    python benchmarks/step_time.py --case wan2.1-1.3b --steps 20 --budget
    python benchmarks/step_time.py --flavour "bf16 compiled" --flavour "a8 compiled"

A 14-billion-parameter transformer need not be built to know its step: two shallow models of the real width give the time of
a block and of what is not a block, and the step is extrapolated to the real depth. Weights are random, token counts real.

A flavour is a way of running: eager bf16, compiled bf16 (what a user could have without quantizing: every ratio is to it), and
a8 and a4 with the compiler, fused kernels, 8-bit attention, CUDA graphs and both branches of guidance in one call switched on
one by one. ``--attention-backend`` measures 8-bit attention by each library that it names. HunyuanVideo runs without its padded
words and their mask, as in sessions, and once with them. One that this machine cannot run, or that fails, is a row that says
why, and ``--out`` holds the rows so far at any time. On a GPU a process of its own measures: one that crashes, hangs or breaks
the device's context is a row, too, and the next one goes on. ``--budget`` adds, for every flavour, the time of its classes of
operations by torch.profiler beside the prediction of step_budget.py, where that has a model of it.

A step is one call of the transformer. What is no property of one step is not measured here: ``python -m benchmarks.quality
caches`` counts the steps that a step cache leaves out, and guidance on two devices is in the time of a whole ``dvdq run``.

``--engine FILE`` also tries whether this GPU runs a TensorRT-RTX engine, and prints the result.
``--device cpu --scale 32`` runs the whole script on toy sizes without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import Apart, EndedError
from benchmarks.commit import commit
from benchmarks.published import config_of
from benchmarks.step_budget import ATTENTION, TEXT_ATTENTION, predict, rates_for, work_of_block
from benchmarks.step_cases import CASES, FLAVOURS, Case, Flavour, inputs_of, select_cases, shallow, with_libraries
from benchmarks.step_model import build
from benchmarks.step_profile import MEASURED, profile_classes
from dvdquant.deploy.switching.gbs import change_sums
from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.model.plan import plan_model
from dvdquant.model.quantized_model import set_activation
from dvdquant.ops.attention.libraries import LIBRARIES
from dvdquant.recipe import get_recipe
from dvdquant.system.devices import resolve_device
from dvdquant.system.whole_file import check_writable, write_whole
from dvdquant.text import markdown_table

BASELINE = "bf16 compiled"
# Makes a call here, or in a process of its own.
Runner = Callable[..., Any]
# The longest text of a failure in a table; its traceback is on stderr.
_LONGEST_REASON = 300
# What shells say of a command that Ctrl-C ended.
_INTERRUPTED = 130


@dataclass
class Times:
    """The measurements of one flavour at one depth.

    Args:
        ms: Milliseconds of a forward pass.
        peak: Peak memory in bytes; 0 on a CPU.
        classes: Class of operations -> milliseconds, where profiled.
        attention: What computed attention, in words.
        output: The last output, on the CPU.
    """

    ms: float
    peak: int
    classes: dict[str, float] = field(default_factory=dict)
    attention: str = "16 bit"
    output: Tensor | None = None


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after two calls that warm up.

    Args:
        work: The call.
        device: The device that it runs on.
        repeats: The number of timed calls.
    """
    for _ in range(2):
        work()
    taken: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(stop))
        else:
            begun = time.perf_counter()
            work()
            taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


def measure(case: Case, depth: int, flavour: Flavour, options: argparse.Namespace) -> Times:
    """Measure one flavour at one depth.

    Args:
        case: The case.
        depth: The number of blocks.
        flavour: What runs.
        options: The command line.

    Raises:
        UnsupportedError: See :func:`build`.
    """
    device = device_of(options)
    plan = plan_model(shallow(config_of(case.config), depth, options.scale), get_recipe(options.recipe), torch.bfloat16)
    inputs = inputs_of(plan.family, case, options.scale, device, flavour.batch)
    tokens = plan.family.tokens(*inputs["hidden_states"].shape[-3:]) * flavour.batch
    model = build(plan, flavour, device, inputs, tokens)
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(lambda: model(inputs), device, options.steps)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        classes = classes_of(lambda: model(inputs), device) if options.budget else {}
        # Before the words, which tell of the last step.
        output = model(inputs).cpu()
    return Times(ms, peak, classes, model.words(inputs), output)


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device of the command line; a GPU becomes the current one, which events and counts of memory are of.

    Args:
        options: The command line.
    """
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def classes_of(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of a call by class; nothing where the profiler fails, whose time is known all the same.

    Args:
        work: The call.
        device: The device that it runs on.
    """
    try:
        return profile_classes(work, device)
    except Exception as error:  # noqa: BLE001 - as in tried
        tqdm.write(f"the profiler failed: {reason_of(error)}", file=sys.stderr)
        return {}


def tried(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns, or in words why it did not run; its memory is free behind it.

    Args:
        work: The call.
        arguments: Its arguments.
    """
    try:
        return work(*arguments)
    except Exception as error:  # noqa: BLE001 - a compiler or a library may raise anything, and the other rows still count
        return reason_of(error)
    finally:
        release()


def call_here(work: Runner, *arguments: Any) -> Any:
    """Return what a call returns.

    Args:
        work: The call.
        arguments: Its arguments.
    """
    return work(*arguments)


def switching_cost(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds that a switch adds to a step: setting the grid, and the reduction that δ-GBS reads.

    Args:
        case: The case.
        options: The command line.
    """
    device = device_of(options)
    plan = plan_model(shallow(config_of(case.config), 1, options.scale), get_recipe(options.recipe), torch.bfloat16)
    inputs = inputs_of(plan.family, case, options.scale, device)
    model = build(plan, Flavour(8), device, inputs, 0)
    with torch.inference_mode():
        first = model(inputs)
        second = torch.roll(first, 1)

        def decide() -> list[float]:
            """Compute the sums that δ-GBS reads."""
            sums: list[float] = change_sums(second, first).tolist()
            return sums

        # Setting a grid costs the same whether or not its weights are prepared.
        grid = plan.recipe.activation(8)
        return {
            "δ-GBS reduction": milliseconds(decide, device, options.steps),
            "set grid": milliseconds(lambda: set_activation(model.model, grid), device, options.steps),
        }


def release() -> None:
    """Free the memory of the model that was measured last, and what was compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        # A kernel that broke the device's context makes this fail, too; the row of that kernel says so.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """Return in words why something did not run; print the traceback of what nobody foresaw.

    Args:
        error: What was raised.
    """
    if isinstance(error, DvdquantError):
        return error.what
    if not isinstance(error, torch.OutOfMemoryError):
        tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr)
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:_LONGEST_REASON]


@dataclass(frozen=True)
class Row:
    """One flavour of one case, measured.

    Args:
        flavour: What ran.
        block: Milliseconds of a block, of all samples of its call.
        step: Milliseconds of a step at the real depth, of all samples of its call.
        peak: Peak memory of the deeper model in bytes.
        classes: Class of operations -> milliseconds of a block, where profiled.
        attention: What computed attention, in words.
        apart: Relative L2 distance of the output to that of the plain flavour of the same width, if there is one.
        refused: Why nothing ran; empty where it did.
    """

    flavour: Flavour
    block: float = 0.0
    step: float = 0.0
    peak: int = 0
    classes: dict[str, float] = field(default_factory=dict)
    attention: str = ""
    apart: float | None = None
    refused: str = ""


def distance(flavour: Flavour, output: Tensor | None, plain: dict[int, Tensor]) -> float | None:
    """Return how far an output is from that of the plain flavour of the same width: relative L2, in float64.

    Weights and inputs are the same, so that what fusing, compiling, packing or 8-bit attention computes wrongly shows here.

    Args:
        flavour: What ran.
        output: Its output.
        plain: Bits -> the output of the flavour that has nothing else switched on; gets this one's if it is that.

    Returns:
        The distance, or None where the plain flavour was not measured before. Two samples have inputs of their own.
    """
    if output is None or flavour.batch != 1:
        return None
    if flavour == Flavour(flavour.bits):
        plain[flavour.bits] = output
        return None
    reference = plain.get(flavour.bits)
    if reference is None:
        return None
    reference = reference.double()
    return float((output.double() - reference).norm() / reference.norm())


def row_of(
    case: Case, flavour: Flavour, options: argparse.Namespace, plain: dict[int, Tensor], run: Runner = call_here
) -> Row:
    """Measure one flavour of one case at two depths, and extrapolate to the real depth.

    Args:
        case: The case.
        flavour: What runs.
        options: The command line.
        plain: See :func:`distance`.
        run: Makes the calls that measure.
    """
    found: list[Times] = []
    for depth in case.depths:
        try:
            times = run(tried, measure, case, depth, flavour, options)
        except EndedError as error:
            times = str(error)
        if isinstance(times, str):
            return Row(flavour, refused=times)
        found.append(times)
    low, high = found
    shallower, deeper = case.depths
    blocks = deeper - shallower
    block = (high.ms - low.ms) / blocks
    step = high.ms + block * (config_of(case.config)["num_layers"] - deeper)
    classes = {name: (high.classes[name] - low.classes[name]) / blocks for name in high.classes if name in low.classes}
    apart = distance(flavour, high.output, plain)
    return Row(flavour, block, step, high.peak, classes, high.attention, apart)


def time_table(case: Case, rows: list[Row]) -> list[list[str]]:
    """Return the cells of the table of times, a line for each flavour.

    Args:
        case: The case.
        rows: The flavours, measured.
    """
    baseline = next((row for row in rows if row.flavour.name == BASELINE and not row.refused), None)
    lines = []
    for row in rows:
        if row.refused:
            lines.append([case.name, row.flavour.name, f"did not run: {row.refused}", "", "", "", "", ""])
            continue
        gain = "" if baseline is None else f"{row.flavour.batch * baseline.block / row.block:.2f}"
        apart = "" if row.apart is None else f"{row.apart:.1e}"
        cells = [f"{row.block:.2f}", gain, f"{row.step:.0f}", f"{row.peak / 2**30:.1f}", row.attention, apart]
        lines.append([case.name, row.flavour.name, *cells])
    return lines


def budget_table(case: Case, rows: list[Row], gpu: str) -> list[list[str]]:
    """Return the cells of the table of classes: measured, and predicted where the GPU's rates are known.

    Args:
        case: The case.
        rows: The flavours, measured.
        gpu: The name of the GPU.
    """
    found = rates_for(gpu)
    lines = []
    for row in rows:
        if row.refused:
            continue
        predicted = None
        if found is not None:
            predicted = predict(case, row.flavour, found[1], work_of_block(case, row.flavour.bits))
        if predicted is not None:
            predicted[ATTENTION] += predicted.pop(TEXT_ATTENTION)
        cells = []
        for name in MEASURED:
            guess = "–" if predicted is None else f"{predicted[name]:.2f}"
            seen = f"{row.classes[name]:.2f}" if name in row.classes else "–"
            cells.append(f"{seen} / {guess}")
        guess = "–" if predicted is None else f"{sum(predicted.values()):.2f}"
        lines.append([case.name, row.flavour.name, *cells, f"{row.block:.2f} / {guess}"])
    return lines


def try_engine(path: Path) -> str:
    """Return in words whether this GPU deserializes a TensorRT-RTX engine and makes a context of it.

    Args:
        path: The engine.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        return f"not tried: {error}"
    try:
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            return "refused: the engine does not deserialize"
        made = engine.create_execution_context() is not None
    except Exception as error:  # noqa: BLE001 - the tables are there already, whatever the engine does
        return f"refused: {reason_of(error)}"
    return "deserializes" + " and makes an execution context" * made


def beginning() -> str:
    """Return the time, and the commit of the checkout if there is one, in words."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return ", ".join(filter(None, (now, commit())))


@dataclass
class Report:
    """What was measured so far.

    Args:
        gpu: The name of the GPU.
        options: The command line.
        measured: The cases and their rows.
        switching: What a switch costs, a line for each case.
        engine: What became of the engine, in words.
        begun: When, and what was run, in words.
    """

    gpu: str
    options: argparse.Namespace
    measured: list[tuple[Case, list[Row]]] = field(default_factory=list)
    switching: list[str] = field(default_factory=list)
    engine: str = ""
    begun: str = field(default_factory=lambda: beginning())

    def text(self) -> str:
        """Return the tables in Markdown."""
        times = [line for case, rows in self.measured for line in time_table(case, rows)]
        header = ["case", "runs", "block, ms", f"times {BASELINE}", "step, ms", "peak, GiB", "self-attention", "apart"]
        how = f"recipe {self.options.recipe}, {self.options.steps} runs of each; {self.begun}"
        lines = [
            f"{self.gpu}, torch {torch.__version__}, {how}",
            "",
            markdown_table(header, times),
            "",
            "Apart: relative L2 distance of the output to that of the eager flavour of the same width, of the same weights and "
            "inputs.",
        ]
        if any(row.flavour.batch > 1 for _, rows in self.measured for row in rows):
            lines += ["", "With guidance in one batch, block and step are both branches; the ratio is of one."]
        if self.options.budget:
            budget = [line for case, rows in self.measured for line in budget_table(case, rows, self.gpu)]
            header = ["case", "runs", *(f"{name}, ms" for name in MEASURED), "block, ms"]
            lines += ["", "Measured / predicted, a block:", "", markdown_table(header, budget)]
        if self.switching:
            lines += ["", "A switch adds to a step:", *(f"- {line}" for line in self.switching)]
        if self.engine:
            lines += ["", self.engine]
        return "\n".join(lines) + "\n"

    def save(self) -> bool:
        """Write the tables to ``--out``, whole or not at all; return whether that worked."""
        if self.options.out is None:
            return True
        try:
            write_whole(self.options.out, self.text().encode())
        except DvdquantError as error:
            tqdm.write(str(error), file=sys.stderr)
            return False
        return True


def measure_all(cases: Sequence[Case], flavours: Sequence[Flavour], report: Report, run: Runner = call_here) -> None:
    """Measure every flavour of every case. What is done is written at once: a run that is cut off keeps its rows.

    Args:
        cases: The cases.
        flavours: The flavours.
        report: Gets the rows.
        run: Makes the calls that measure.
    """
    for case in tqdm(cases, desc="cases"):
        rows: list[Row] = []
        plain: dict[int, Tensor] = {}
        report.measured.append((case, rows))
        for flavour in flavours:
            rows.append(row_of(case, flavour, report.options, plain, run))
            tqdm.write(" | ".join(time_table(case, rows)[-1]), file=sys.stderr)
            report.save()
        try:
            cost = run(tried, switching_cost, case, report.options)
        except EndedError as error:
            cost = str(error)
        if isinstance(cost, str):
            words = f"not measured: {cost}"
        else:
            words = ", ".join(f"{name} {ms:.3f} ms" for name, ms in cost.items())
        report.switching.append(f"{case.name}: {words}")
        report.save()


def main() -> int:
    """Print the tables; return 0, 130 after Ctrl-C, or 2 with a message if nothing could be measured or written."""
    # 1. Read the command line.
    names = [flavour.name for flavour in FLAVOURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose name contains TEXT: " + ", ".join(c.name for c in CASES),
    )
    parser.add_argument("--flavour", action="append", choices=names, help="only these; default: all")
    parser.add_argument(
        "--attention-backend",
        action="append",
        choices=[*LIBRARIES, "reference"],
        help="8-bit attention by this library, which may be slower than 16 bit; again for another row; default: the "
        "first of the GPU's that is right and faster",
    )
    parser.add_argument("--budget", action="store_true", help="also the time by class, measured and predicted")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--steps", type=int, default=10, help="timed runs of each flavour")
    parser.add_argument(
        "--row-seconds", type=float, default=300.0, help="on a GPU, the longest time of one depth of a flavour"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--engine", type=Path, help="a TensorRT-RTX engine to try on this GPU")
    parser.add_argument("--out", type=Path, help="also write the tables to this file, after every row")
    options = parser.parse_args()
    try:
        device = resolve_device(options.device)
    except UnsupportedError as error:
        print(f"{error}\n--device cpu --scale 32 tries the script without a GPU", file=sys.stderr)
        return 2
    cases = select_cases(options.case)
    if not cases:
        print(f"no case contains {options.case}; there are: {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    flavours = [flavour for flavour in FLAVOURS if not options.flavour or flavour.name in options.flavour]
    try:
        get_recipe(options.recipe)
        if options.out is not None:
            check_writable(options.out)
    except DvdquantError as error:
        print(error, file=sys.stderr)
        return 2

    # 2. Measure.
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toy sizes: the times mean nothing"
    report = Report(gpu, options)
    status = 0
    run = Apart(options.row_seconds) if device.type == "cuda" else call_here
    try:
        measure_all(cases, with_libraries(flavours, options.attention_backend or ()), report, run)
        if options.engine:
            report.engine = f"{options.engine.name}: {try_engine(options.engine)}"
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        if isinstance(run, Apart):
            run.close()

    # 3. Print.
    print(report.text())
    if not report.save():
        return 2
    if not status and all(row.refused for _, rows in report.measured for row in rows):
        print("nothing could be measured: the table says why", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    raise SystemExit(main())
