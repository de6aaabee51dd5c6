"""Time of one DiT step at real sizes: bf16 against W4A8 and W4A4 on the CUDA kernels, through PyTorch.

    make kernels
    python benchmarks/step_time.py                        # every case below, a table on stdout and --out
    python benchmarks/step_time.py --case wan2.1-1.3b --steps 20

A 14-billion-parameter transformer need not be built to know its step: two shallow models of the real width give the time of
a block and of what is not a block, and the step is extrapolated to the real depth. Weights are random, token counts real.
Linears, step and memory are given apart, because attention is not quantized and dominates long videos.
``--engine FILE`` also tries whether this GPU runs a TensorRT-RTX engine, and says what came of it.
``--device cpu --scale 32`` runs the whole script on toy sizes without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
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

from dvdquant.deploy.switching.gbs import change_sums
from dvdquant.errors import UnsupportedError
from dvdquant.model.families import Axis, Family, Sizes
from dvdquant.model.layers import QuantLinear, prepare_layers, set_activation
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import ModelPlan, build_skeleton, plan_model, quantized_skeleton
from dvdquant.ops.cuda_linear import usable_kernels
from dvdquant.recipe import get_recipe
from dvdquant.system.devices import resolve_device

CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Case:
    """A configuration at a video size: latent frames, height, width; text tokens; the depths that are built."""

    config: str
    latent: tuple[int, int, int]
    text_tokens: int
    depths: tuple[int, int] = (1, 3)

    @property
    def name(self) -> str:
        """``wan2.1-14b 21x90x160``."""
        return f"{self.config} {'x'.join(map(str, self.latent))}"


CASES = (
    Case("wan2.1-1.3b", (21, 60, 104), 512),
    Case("wan2.1-14b", (21, 60, 104), 512),
    Case("wan2.1-14b", (21, 90, 160), 512),
    Case("hunyuan-video", (33, 90, 160), 256),
)
# Single-stream blocks for every dual-stream one, as in the real model (20 and 40).
DEPTH_KEYS = {"num_layers": 1, "num_single_layers": 2}


@dataclass
class Times:
    """Milliseconds of a forward pass by flavour, and peak memory in bytes, at one depth."""

    ms: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


def shallow(config: dict[str, Any], depth: int, scale: int) -> dict[str, Any]:
    """``config`` with ``depth`` blocks (and as many of the other kind as keep the proportion), widths divided by ``scale``."""
    small = {**config, **{key: depth * times for key, times in DEPTH_KEYS.items() if key in config}}
    if scale > 1:
        small["num_attention_heads"] = max(1, config["num_attention_heads"] // scale)
        if "ffn_dim" in config:
            small["ffn_dim"] = max(64, config["ffn_dim"] // scale)
    return small


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Random parameters and packed weights on ``device``, of sizes that keep activations near 1."""
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
    """Median of ``repeats`` after two runs that warm up."""
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


def inputs_of(family: Family, case: Case, scale: int, device: torch.device) -> dict[str, Tensor]:
    """Random graph inputs at the case's size."""
    patch = family.patch()
    latent = [max(p, size // scale // p * p) for p, size in zip(patch, case.latent)]
    frames, height, width = (Axis.fixed(size) for size in latent)
    sizes = Sizes(frames, height, width, max(8, case.text_tokens // scale))
    return {name: tensor.to(device) for name, tensor in family.sample(sizes, torch.bfloat16).items()}


def measure(case: Case, depth: int, options: argparse.Namespace) -> tuple[Times, ModelPlan, dict[str, float]]:
    """One depth of one case: bf16, a8, a4; and what switching between a4 and a8 costs on top."""
    device = resolve_device(options.device)
    config = json.loads((CONFIGS / f"{case.config}.json").read_text())
    plan = plan_model(shallow(config, depth, options.scale), get_recipe(options.recipe), torch.bfloat16)
    inputs = inputs_of(plan.family, case, options.scale, device)
    times, extra = Times(), {}
    for flavour in ("bf16", "quantized"):
        quantized = flavour == "quantized"
        skeleton = quantized_skeleton(plan, 8) if quantized else build_skeleton(plan.family.config, torch.bfloat16)
        kernels = usable_kernels(device) if quantized else None
        # As a session does it: the packed weights stay on the CPU.
        model = GraphWrapper(fill(skeleton, device if kernels is None else torch.device("cpu")), plan.family)
        if kernels is not None:
            prepare_layers(model, kernels, [plan.recipe.activation(bits) for bits in (4, 8)], plan.dtype, device)
        model = model.to(device)
        with torch.inference_mode():
            for bits in (8, 4) if quantized else (16,):
                name = f"a{bits}" if quantized else "bf16"
                if quantized:
                    set_activation(model, plan.recipe.activation(bits))
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times.ms[name] = milliseconds(lambda m=model: m(inputs), device, options.steps)
                times.peak[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            if quantized:
                extra = _switching(model, plan, inputs, device, options.steps)
        del model, skeleton
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return times, plan, extra


def _switching(
    model: nn.Module, plan: ModelPlan, inputs: dict[str, Tensor], device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds a switch adds to a step: setting the grid, and the reduction that δ-GBS reads."""
    first = model(inputs)
    second = torch.roll(first, 1)

    def decide() -> list[float]:
        sums: list[float] = change_sums(second, first).tolist()
        return sums

    grids = [plan.recipe.activation(bits) for bits in (4, 8)]

    def switch() -> None:
        for grid in grids:
            set_activation(model, grid)

    return {
        "δ-GBS reduction": milliseconds(decide, device, repeats),
        "set grid": milliseconds(switch, device, repeats) / 2,
    }


def row_of(case: Case, options: argparse.Namespace) -> list[str]:
    """A line of the table."""
    depths = case.depths
    (low, _, _), (high, plan, extra) = (measure(case, depth, options) for depth in depths)
    real = json.loads((CONFIGS / f"{case.config}.json").read_text())["num_layers"]
    block = {name: (high.ms[name] - low.ms[name]) / (depths[1] - depths[0]) for name in high.ms}
    step = {name: high.ms[name] + block[name] * (real - depths[1]) for name in high.ms}
    tokens = plan.family.tokens(*case.latent)
    cells = [case.name, str(tokens), *(f"{block[name]:.2f}" for name in ("bf16", "a8", "a4"))]
    cells += [f"{block['bf16'] / block[name]:.2f}" for name in ("a8", "a4")]
    cells += [f"{step[name]:.0f}" for name in ("bf16", "a8", "a4")]
    cells += [f"{high.peak[name] / 2**30:.1f}" for name in ("bf16", "a4")]
    return [*cells, ", ".join(f"{name} {ms:.3f}" for name, ms in extra.items())]


def try_engine(path: Path) -> str:
    """Whether this GPU deserializes a TensorRT-RTX engine and makes a context of it, in words."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        return f"not tried: {error}"
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return "refused: the engine does not deserialize"
    return "deserializes" + ("" if engine.create_execution_context() is None else " and makes an execution context")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose name contains TEXT: " + ", ".join(c.name for c in CASES),
    )
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--steps", type=int, default=10, help="timed runs of each flavour")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--engine", type=Path, help="a TensorRT-RTX engine to try on this GPU")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    try:
        device = resolve_device(options.device)
    except UnsupportedError as error:
        print(f"{error}\n--device cpu --scale 32 tries the script without a GPU", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.case or any(text in case.name for text in options.case)]
    if not cases:
        print(f"no case contains {options.case}; there are: {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    header = ["case", "tokens", *(f"block {n}, ms" for n in ("bf16", "a8", "a4")), "bf16/a8", "bf16/a4"]
    header += [*(f"step {n}, ms" for n in ("bf16", "a8", "a4")), "peak bf16, GiB", "peak a4, GiB", "switching, ms"]
    rows = [row_of(case, options) for case in tqdm(cases, desc="cases")]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toy sizes: the times mean nothing"
    lines = [f"{where}, torch {torch.__version__}, recipe {options.recipe}", ""]
    lines += ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
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
