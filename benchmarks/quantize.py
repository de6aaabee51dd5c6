"""Compare weight quantizers: relative MSE and weights per second on this machine.

    python benchmarks/quantize.py                       one table, about a minute
    python benchmarks/quantize.py --rows 4096 --features 5120 --repeat 5
    python benchmarks/quantize.py --device cuda --rows 8192 --kinds rotated    the same on a GPU
    python benchmarks/quantize.py --traffic             bytes that the tensor operations for a GPU move, counted on the CPU

Weights: ``gauss`` N(0, 1); ``heavy`` Student-t(4) with 1 % of the input channels ×10; ``rotated`` is ``heavy`` after
the Hadamard rotation of the ``auto`` recipes, quantized there (the error is the same in either space). The baseline is
modelopt's INT4 with the group maximum; HQQ takes part where it is installed. ``+ feedback`` rounds for inputs of a
falling spectrum: it gives up weight error for output error, so what is of interest here is what it takes. Every time
is the best of ``--repeat``, after one call that is not counted (compilation); a time includes everything from the
weight to its codes and scales.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dvdquant.errors import UnsupportedError
from dvdquant.numerics.hadamard import Rotation, rotate
from dvdquant.quantize.backends.torch_grid import quantize_rows
from dvdquant.quantize.bgr import quantize_weight, relative_mse
from dvdquant.quantize.gptq import ErrorFeedback
from dvdquant.recipe import WeightSpec
from dvdquant.system.devices import DEVICE_WORDS, resolve_device
from dvdquant.system.processor import processor_name, usable_cores

# A function that quantizes a weight and returns a function that gives it back; only the first part is timed.
Quantizer = Callable[[Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        name: The name of the quantizer.
        group: The channels per scale; 0 means the row.
        bits: A function from K to the bits per weight: codes, scales and zero-points.
        run: The quantizer.
    """

    name: str
    group: int
    bits: Callable[[int], float]
    run: Quantizer


def ours(solver: str, zero_point: str, group: int) -> Entry:
    """Return the row of dvdquant's own quantizer.

    Args:
        solver: The solver, as in a recipe.
        zero_point: The kind of the zero-points, as in a recipe.
        group: The channels per scale; 0 means the row.
    """
    spec = WeightSpec(group, zero_point, solver)  # type: ignore[arg-type]

    def run(w: Tensor) -> Callable[[], Tensor]:
        """Quantize a weight [N, K], and return a function that gives it back."""
        return quantize_weight(w, spec).dequantize

    def bits(features: int) -> float:
        """Return the bits per weight at K = ``features``."""
        per_group = 8 * bool(group) + 8 * (zero_point == "float")
        return 4 + (32 if zero_point == "float" else 64) / features + per_group / (group or features)

    return Entry(f"dvdquant {solver}, {zero_point}", group, bits, run)


def with_gptq(features: int, zero_point: str, group: int, device: torch.device) -> Entry:
    """Return the row of the default recipes: the search, then codes rounded with feedback.

    The inputs have moments in blocks of 256.

    Args:
        features: K, the number of input channels.
        zero_point: The kind of the zero-points, as in a recipe.
        group: The channels per scale; 0 means the row.
        device: The device of the weights.
    """
    plain, size = ours("search", zero_point, group), math.gcd(features, 256)
    falling = torch.randn(2048, size, generator=torch.Generator().manual_seed(0)) * torch.arange(1, size + 1) ** -0.5
    x = rotate(falling, Rotation.for_features(size, "auto"))
    hessian = (x.T @ x / len(x)).to(device).expand(features // size, size, size)

    def run(w: Tensor) -> Callable[[], Tensor]:
        """Quantize a weight [N, K], and return a function that gives it back."""
        gptq = ErrorFeedback(hessian)
        return gptq.round(w, quantize_weight(w, WeightSpec(group, zero_point))).dequantize  # type: ignore[arg-type]

    return Entry(f"dvdquant + feedback, {zero_point}", group, plain.bits, run)


def modelopt_max(group: int) -> Entry:
    """Return the row of modelopt's ``INT4_BLOCKWISE_WEIGHT_ONLY_CFG``: calibration and the fake-quantized weight.

    Args:
        group: The channels per scale.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": 4, "block_sizes": {-1: group, "type": "static"}},
            },
        ],
        "algorithm": "max",
    }

    def run(w: Tensor) -> Callable[[], Tensor]:
        """Quantize a weight [N, K], and return a function that gives it back."""
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it counts its quantizers aloud
            layer = mtq.quantize(layer, config)
        result = layer.weight_quantizer(layer.weight)
        return lambda: result

    return Entry("modelopt INT4 max", group, lambda features: 4 + 16 / group, run)


def hqq(group: int, device: torch.device) -> Entry:
    """Return the row of HQQ with a real-valued zero-point and fp16 scales, and its own defaults otherwise.

    Args:
        group: The channels per scale; 0 means the row.
        device: The device of the weights.
    """
    from hqq.core.quantize import Quantizer as HQQ  # type: ignore[import-not-found]

    def run(w: Tensor) -> Callable[[], Tensor]:
        """Quantize a weight [N, K], and return a function that gives it back."""
        codes, meta = HQQ.quantize(
            w, nbits=4, group_size=group or w.shape[1], axis=1, device=str(device), compute_dtype=torch.float32
        )
        return lambda: HQQ.dequantize(codes, meta)

    return Entry("HQQ, real zero", group, lambda features: 4 + 32 / (group or features), run)


def weights(kind: str, rows: int, features: int, seed: int) -> Tensor:
    """Return a random weight, fp32 [rows, features].

    Args:
        kind: ``gauss``, ``heavy`` or ``rotated``; see the module.
        rows: N, the number of output channels.
        features: K, the number of input channels.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, features, generator=generator)
    if kind == "gauss":
        return w
    chi = torch.zeros(rows, features)
    for _ in range(4):
        chi += torch.randn(rows, features, generator=generator).square_()
    w /= (chi / 4).sqrt_()
    w[:, torch.randperm(features, generator=generator)[: features // 100]] *= 10
    return w if kind == "heavy" else rotate(w, Rotation.for_features(features, "auto"))


def entries(groups: list[int], features: int, device: torch.device) -> list[Entry]:
    """Return the rows of the table.

    Args:
        groups: The group sizes; 0 means the row.
        features: K, the number of input channels.
        device: The device of the weights.
    """
    table = []
    for group in groups:
        for zero_point in ("float", "midrise", "symmetric") if group else ("float", "paper", "midrise", "symmetric"):
            table += [ours(solver, zero_point, group) for solver in ("minmax", "paper", "search")]
        table.append(with_gptq(features, "midrise", group, device))
        if importlib.util.find_spec("hqq"):
            table.append(hqq(group, device))
    if importlib.util.find_spec("modelopt"):
        table.append(modelopt_max(128))
    return table


def measure(entry: Entry, w: Tensor, repeat: int) -> tuple[float, float]:
    """Return the relative MSE of a quantizer, and its best time in seconds.

    Args:
        entry: The row.
        w: The weight, fp32 [N, K].
        repeat: The number of timed calls, after one that is not counted.
    """
    best = float("inf")
    for attempt in range(repeat + 1):
        start = time.perf_counter()
        restore = entry.run(w)
        if w.is_cuda:
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return relative_mse(w, restore()), best


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that counts operations that start a kernel, and the bytes of their operands; an expanded axis counts once.

    Attributes:
        bytes: The bytes of the operands so far.
        operations: The operations so far.
    """

    VIEWS = ("view", "slice", "expand", "transpose", "t", "unsqueeze", "squeeze", "select", "split", "detach", "permute",
             "alias", "unbind", "empty", "empty_like", "diagonal", "as_strided")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.strip("_") not in self.VIEWS:
            operands = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
            self.bytes += sum(
                t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride()) if s) for t in operands
            )
            self.operations += 1
        return result


def print_traffic(w: Tensor, groups: list[int]) -> None:
    """Print the traffic of the search in tensor operations, beside that of the CUDA kernel of the same search.

    Args:
        w: The weight, fp32 [N, K], on the CPU.
        groups: The group sizes; 0 means the row.
    """
    print(
        f"{w.shape[0]} x {w.shape[1]}\n{'search':<12}{'group':>6}{'bytes a weight':>16}{'operations':>12}{'kernel':>8}"
    )
    for zero_point in ("midrise", "float"):
        for group in groups:
            count = w.shape[1] // group if group else 1
            with Traffic() as seen:
                quantize_rows(w, count, zero_point, "search")
            own = 5 + 2 * count / w.shape[1]
            moved = seen.bytes / w.numel()
            print(f"{zero_point:<12}{group or 'row':>6}{moved:>16.0f}{seen.operations:>12}{own:>8.1f}")


def main() -> int:
    """Print the table, and return the exit status, 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 128, 64, 32, 16], help="0 is one scale per row")
    parser.add_argument(
        "--kinds", nargs="+", default=["gauss", "heavy", "rotated"], choices=["gauss", "heavy", "rotated"]
    )
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of each, the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", metavar="|".join(DEVICE_WORDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traffic", action="store_true", help="only count what the tensor operations for a GPU move")
    args = parser.parse_args()
    try:
        device = resolve_device(args.device)
    except UnsupportedError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    if args.traffic:
        print_traffic(weights("rotated", min(args.rows, 512), args.features, args.seed), args.groups)
        return 0
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    print(f"{args.rows} x {args.features}, {args.threads} threads, {where}")
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {usable_cores()} cores")
    if not importlib.util.find_spec("hqq"):
        print("HQQ is not installed: left out (pip install hqq)")
    data = {kind: weights(kind, args.rows, args.features, args.seed).to(device) for kind in args.kinds}
    print(f"\n{'quantizer':<30}{'group':>6}{'bits':>7}" + "".join(f"{kind + ' MSE':>14}{'M/s':>8}" for kind in data))
    for entry in entries(args.groups, args.features, device):
        print(f"{entry.name:<30}{entry.group or 'row':>6}{entry.bits(args.features):>7.3f}", end="", flush=True)
        for w in data.values():
            mse, seconds = measure(entry, w, args.repeat)
            print(f"{mse:>14.5f}{w.numel() / seconds / 1e6:>8.1f}", end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
