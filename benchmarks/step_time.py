"""Time one DiT step at real sizes: bf16 against W4A8 and W4A4 on the CUDA kernels, through PyTorch.

    make kernels
    python benchmarks/step_time.py                        # every case and flavour, a table on stdout and --out
    python benchmarks/step_time.py --case wan2.1-1.3b --steps 20 --budget
    python benchmarks/step_time.py --flavour "bf16 compiled" --flavour "a8 compiled"

A 14-billion-parameter transformer need not be built to know its step: two shallow models of the real width give the time of
a block and of what is not a block, and the step is extrapolated to the real depth. Weights are random, token counts real.

A flavour is a way of running: eager bf16, compiled bf16 (what a user could have without quantizing: every ratio is to it),
and a8 and a4 with the compiler and with 8-bit attention switched on one by one. One that this machine cannot run is a row
that says why. ``--budget`` adds, for every flavour, the time of its classes of operations by torch.profiler beside the
prediction of step_budget.py.

``--engine FILE`` also tries whether this GPU runs a TensorRT-RTX engine, and prints the result.
``--device cpu --scale 32`` runs the whole script on toy sizes without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import config_of
from benchmarks.step_budget import ATTENTION, TEXT_ATTENTION, predict, rates_for, work_of_block
from benchmarks.step_cases import CASES, FLAVOURS, Case, Flavour, inputs_of, select_cases, shallow
from benchmarks.step_profile import MEASURED, profile_classes
from dvdquant.deploy.sessions.attention import install_attention
from dvdquant.deploy.sessions.compiled import compile_blocks
from dvdquant.deploy.sessions.pytorch import wanted_attention
from dvdquant.deploy.switching.gbs import change_sums
from dvdquant.errors import DvdquantError, UnsupportedError
from dvdquant.model.layers import QuantLinear, prepare_layers, set_activation
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan, build_skeleton, plan_model, quantized_skeleton
from dvdquant.ops.cuda_linear import usable_kernels
from dvdquant.recipe import get_recipe
from dvdquant.system.devices import resolve_device

BASELINE = "bf16 compiled"


@dataclass
class Times:
    """The measurements of one flavour at one depth.

    Args:
        ms: Milliseconds of a forward pass.
        peak: Peak memory in bytes; 0 on a CPU.
        classes: Class of operations -> milliseconds, where profiled.
        attention: What computed attention, in words.
    """

    ms: float
    peak: int
    classes: dict[str, float] = field(default_factory=dict)
    attention: str = "16 bit"


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Put random parameters and packed weights into a model, of sizes that keep activations near 1.

    Args:
        model: The skeleton, which is changed in place and returned.
        device: The device of the tensors.
    """
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            for name, (dtype, shape) in module.spec.tensors().items():
                setattr(module, name.removeprefix(module.spec.name + "."), _random(name, dtype, shape, module, device))
        for name, parameter in list(module.named_parameters(recurse=False)):
            std = 0.02 if parameter.ndim > 1 else 1.0
            value = torch.randn(parameter.shape, device=device).mul_(std).to(parameter.dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()


def _random(name: str, dtype: torch.dtype, shape: tuple[int, ...], layer: QuantLinear, device: torch.device) -> Tensor:
    """Return a random packed tensor of a layer.

    Args:
        name: The full name of the tensor.
        dtype: Its dtype.
        shape: Its shape.
        layer: The layer.
        device: Its device.
    """
    kind = name.rpartition(".")[2]
    if kind == "weight":
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    if kind == "weight_group_scale":
        return torch.full(shape, 255, dtype=dtype, device=device)
    if kind == "weight_zero":
        return torch.full(shape, -0.5, dtype=dtype, device=device)
    if kind == "weight_scale":
        return torch.full(shape, 0.2 * layer.spec.features**-0.5, dtype=dtype, device=device)
    if kind == "pre_quant_scale":
        return torch.randint(0, 2, shape, device=device).mul_(2).sub_(1).to(dtype)
    if kind == "pre_quant_shift":
        return torch.randn(shape, dtype=dtype, device=device).mul_(0.1)
    return torch.zeros(shape, dtype=dtype, device=device)


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after two calls that warm up.

    Args:
        work: The call.
        device: The device that it runs on.
        repeats: The number of timed calls.
    """
    for _ in range(2):
        work()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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


def build(plan: ModelPlan, flavour: Flavour, device: torch.device) -> tuple[nn.Module, Any]:
    """Return a model with random weights that runs as the flavour says, and its 8-bit attention or None.

    Args:
        plan: The plan of the model.
        flavour: What runs.
        device: The device.

    Raises:
        UnsupportedError: The attention or the compilation is not possible here.
    """
    quantized = flavour.bits != 16
    skeleton = (
        quantized_skeleton(plan, flavour.bits) if quantized else build_skeleton(plan.family.config, torch.bfloat16)
    )
    kernels = usable_kernels(device) if quantized else None
    # The packed weights stay on the CPU, as in a session.
    model = fill(skeleton, device if kernels is None else torch.device("cpu"))
    if kernels is not None:
        prepare_layers(model, kernels, [plan.recipe.activation(flavour.bits)], plan.dtype, device, flavour.weights)
    elif flavour.weights == "packed":
        raise UnsupportedError("packed weights are a form of the kernels", fix="a GPU that they are built for")
    model = model.to(device)
    backend = "reference" if flavour.attention != "16" and device.type == "cpu" else None
    attention = wanted_attention(flavour.attention, backend, device, flavour.name)
    if attention is not None:
        install_attention(model, attention)
    if flavour.compiled or flavour.fused:
        compile_blocks(model, dynamic=False, fuse=flavour.fused, compile=flavour.compiled)
    return GraphWrapper(model, plan.family), attention


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
    device = resolve_device(options.device)
    plan = plan_model(shallow(config_of(case.config), depth, options.scale), get_recipe(options.recipe), torch.bfloat16)
    inputs = inputs_of(plan.family, case, options.scale, device)
    model, attention = build(plan, flavour, device)
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(lambda: model(inputs), device, options.steps)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        classes = profile_classes(lambda: model(inputs), device) if options.budget else {}
    return Times(ms, peak, classes, "16 bit" if attention is None else attention.words())


def switching_cost(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds that a switch adds to a step: setting the grid, and the reduction that δ-GBS reads.

    Args:
        case: The case.
        options: The command line.
    """
    device = resolve_device(options.device)
    plan = plan_model(shallow(config_of(case.config), 1, options.scale), get_recipe(options.recipe), torch.bfloat16)
    model, _ = build(plan, Flavour(8), device)
    with torch.inference_mode():
        first = model(inputs_of(plan.family, case, options.scale, device))
        second = torch.roll(first, 1)

        def decide() -> list[float]:
            """Compute the sums that δ-GBS reads."""
            sums: list[float] = change_sums(second, first).tolist()
            return sums

        # Setting a grid costs the same whether or not its weights are prepared.
        grid = plan.recipe.activation(8)
        return {
            "δ-GBS reduction": milliseconds(decide, device, options.steps),
            "set grid": milliseconds(lambda: set_activation(model, grid), device, options.steps),
        }


def release() -> None:
    """Free the memory of the model that was measured last, and what was compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Row:
    """One flavour of one case, measured.

    Args:
        flavour: What ran.
        block: Milliseconds of a block.
        step: Milliseconds of a step at the real depth.
        peak: Peak memory of the deeper model in bytes.
        classes: Class of operations -> milliseconds of a block, where profiled.
        attention: What computed attention, in words.
        refused: Why nothing ran; empty where it did.
    """

    flavour: Flavour
    block: float = 0.0
    step: float = 0.0
    peak: int = 0
    classes: dict[str, float] = field(default_factory=dict)
    attention: str = ""
    refused: str = ""


def row_of(case: Case, flavour: Flavour, options: argparse.Namespace) -> Row:
    """Measure one flavour of one case at two depths, and extrapolate to the real depth.

    Args:
        case: The case.
        flavour: What runs.
        options: The command line.
    """
    found = []
    try:
        for depth in case.depths:
            found.append(measure(case, depth, flavour, options))
            release()
    except (DvdquantError, torch.OutOfMemoryError) as error:
        return Row(flavour, refused=str(error).splitlines()[0])
    finally:
        release()
    low, high = found
    shallower, deeper = case.depths
    blocks = deeper - shallower
    block = (high.ms - low.ms) / blocks
    step = high.ms + block * (config_of(case.config)["num_layers"] - deeper)
    classes = {name: (high.classes[name] - low.classes[name]) / blocks for name in high.classes}
    return Row(flavour, block, step, high.peak, classes, high.attention)


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
            lines.append([case.name, row.flavour.name, f"did not run: {row.refused}", "", "", "", ""])
            continue
        gain = "" if baseline is None else f"{baseline.block / row.block:.2f}"
        cells = [f"{row.block:.2f}", gain, f"{row.step:.0f}", f"{row.peak / 2**30:.1f}", row.attention]
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
            cells.append(f"{row.classes[name]:.2f} / {guess}")
        guess = "–" if predicted is None else f"{sum(predicted.values()):.2f}"
        lines.append([case.name, row.flavour.name, *cells, f"{row.block:.2f} / {guess}"])
    return lines


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def try_engine(path: Path) -> str:
    """Return in words whether this GPU deserializes a TensorRT-RTX engine and makes a context of it.

    Args:
        path: The engine.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        return f"not tried: {error}"
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return "refused: the engine does not deserialize"
    return "deserializes" + ("" if engine.create_execution_context() is None else " and makes an execution context")


def main() -> int:
    """Print the tables; return 0, or 2 with a message if nothing can be measured."""
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
    parser.add_argument("--budget", action="store_true", help="also the time by class, measured and predicted")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--steps", type=int, default=10, help="timed runs of each flavour")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--engine", type=Path, help="a TensorRT-RTX engine to try on this GPU")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
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

    # 2. Measure. What is done is printed at once: a run that is cut off keeps its rows.
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toy sizes: the times mean nothing"
    times: list[list[str]] = []
    budget: list[list[str]] = []
    switching: list[str] = []
    for case in tqdm(cases, desc="cases"):
        rows = []
        for flavour in flavours:
            rows.append(row_of(case, flavour, options))
            tqdm.write(" | ".join(time_table(case, rows)[-1]), file=sys.stderr)
        times += time_table(case, rows)
        if options.budget:
            budget += budget_table(case, rows, gpu)
        cost = switching_cost(case, options)
        switching.append(f"{case.name}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in cost.items()))

    # 3. Print.
    header = ["case", "runs", "block, ms", f"times {BASELINE}", "step, ms", "peak, GiB", "self-attention"]
    lines = [f"{gpu}, torch {torch.__version__}, recipe {options.recipe}", "", *markdown(header, times)]
    if budget:
        header = ["case", "runs", *(f"{name}, ms" for name in MEASURED), "block, ms"]
        lines += ["", "Measured / predicted, a block:", "", *markdown(header, budget)]
    lines += ["", "A switch adds to a step:", *(f"- {line}" for line in switching)]
    if options.engine:
        lines += ["", f"{options.engine.name}: {try_engine(options.engine)}"]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
