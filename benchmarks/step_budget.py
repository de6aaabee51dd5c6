"""Predict the time of one transformer block from its arithmetic, its memory traffic and a GPU's rates.

    python benchmarks/step_budget.py                         # every case of step_time.py on every GPU of the table
    python benchmarks/step_budget.py --gpu H100 --case wan2.1-14b

Every operation of one full-size block runs on meta tensors, which have shapes and no data. FLOPs of linears and attention
are exact. The bytes of eager pointwise operations are what each of them reads and writes; broadcast axes count once. Those
of a compiled block are inductor's own count (``compiled_launches.py``), for Wan only. The time of a class of operations is
its work over the GPU's rate, and the classes add up: a GPU runs them one after the other.

``step_time.py --budget`` prints this prediction beside what it measured.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import config_of
from benchmarks.step_cases import CASES, Case, Flavour, inputs_of, select_cases, shallow
from dvdquant.model.held_weights import held_weights
from dvdquant.model.layers import QuantLinear
from dvdquant.model.loading import GraphWrapper
from dvdquant.model.plan import build_skeleton, plan_model, quantized_skeleton
from dvdquant.recipe import get_recipe

LINEARS, ATTENTION, TEXT_ATTENTION, POINTWISE, QUANTIZING = (
    "linears", "self-attention", "text attention", "pointwise", "quantizing",
)  # fmt: skip
CLASSES = (LINEARS, ATTENTION, TEXT_ATTENTION, POINTWISE, QUANTIZING)


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Args:
        linear: Activation bits -> TFLOP/s of a linear; 16 is bf16.
        attention: Attention format -> TFLOP/s.
        bandwidth: TB/s of an operation that only moves memory.
        source: Where the figures are from.
        sm: The compute capability, major · 10 + minor.
        device: The name that CUDA gives the card. Its kin of a similar name (PCIe, laptop) have other rates.
    """

    linear: dict[int, float]
    attention: dict[str, float]
    bandwidth: float
    source: str
    sm: int
    device: str


RATES = {
    "H100": Rates(
        {16: 705, 8: 1440, 4: 1440},
        {"16": 585, "int8": 900, "fp8": 900},
        2.73,
        "linears and bandwidth: kernels/bench/results; attention in 16 bit: fitted to the blocks of results/; "
        "8 bit: from memory, unverified",
        90,
        "NVIDIA H100 80GB HBM3",
    ),
    "RTX 4090": Rates(
        {16: 150, 8: 520, 4: 900},
        {"16": 160, "int8": 480, "fp8": 480},
        0.90,
        "from memory of public figures, unverified",
        89,
        "NVIDIA GeForce RTX 4090",
    ),
    "RTX 5090": Rates(
        {16: 200, 8: 650, 4: 650},
        {"16": 210, "int8": 620, "fp8": 620},
        1.60,
        "from memory of public figures, unverified",
        120,
        "NVIDIA GeForce RTX 5090",
    ),
}
RATES["H200"] = replace(
    RATES["H100"],
    bandwidth=3.91,
    source="those of the H100, which has the same chip, with its bandwidth times 4.8 / 3.35, the ratio of the memories by their "
    "data sheets, from memory, unverified",
    device="NVIDIA H200",
)
# Bytes that a compiled Wan block moves between its opaque operations: 40.6 a token and channel, 4 a token and channel of the
# feed-forward network. Both are fitted to inductor's counts of two widths (compiled_launches.py).
COMPILED_WAN = (40.6, 4.0)
# Bytes that a compiled block does not move any more when its layers are fused with what comes before them. Norm and modulation:
# 4 a token and channel at each of three places, what they write and the quantizer reads. GELU: one pass over its input less.
# Inductor's counts of the same two widths (compiled_launches.py --fuse), with what the fused kernels read and write more at the
# two gated sums (8 a token and channel), agree to 1 %.
FUSED_WAN = (12.0, 4.0)
# Of these 8 bytes at the gated sums, which fused kernels move and so count as quantizing.
FUSED_SUMS = 8.0
# Bytes a token and channel that a compiled block does not move any more when norm and rope of q and k are in the kernel before
# 8-bit attention (compiled_launches.py --fuse --rope), and what this kernel moves: it reads and writes both in 16 bits.
FUSED_ROPE = (10.2, 8.0)


@dataclass
class Work:
    """The work of one block.

    Args:
        flops: Class -> floating-point operations.
        moved: Class -> bytes read and written.
    """

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    moved: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))

    def __sub__(self, other: Work) -> Work:
        """Return the work that ``other`` does not have."""
        return Work(
            {name: self.flops[name] - other.flops[name] for name in CLASSES},
            {name: self.moved[name] - other.moved[name] for name in CLASSES},
        )


def touched(tensor: Tensor) -> int:
    """Return the bytes of memory that reading or writing a tensor touches.

    Args:
        tensor: Any tensor. An expanded axis counts once; a gap of one element between neighbours is read with them.
    """
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else 1
    step = tensor.stride(-1) if tensor.ndim and tensor.shape[-1] > 1 else 1
    return elements * min(max(step, 1), 2) * tensor.element_size()


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations read and write. Linears, attention and quantized layers are counted by their own hooks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._opaque = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._opaque:
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm", "bmm", "linear"):
            a, b = [t for t in read if t.ndim >= 2][-2:]
            self.work.flops[LINEARS] += 2.0 * a.numel() * b.shape[0 if name == "linear" else -1]
        elif name in ("copy_", "fill_", "zero_"):
            # The old values are not read, but where a cache line keeps some of them.
            target = read[0]
            strided = target.ndim > 0 and target.stride(-1) > 1
            self.work.moved[POINTWISE] += sum(map(touched, read[1:])) + touched(target) * (2 if strided else 1)
        elif not self._is_view(name, read, written):
            self.work.moved[POINTWISE] += sum(map(touched, read)) + sum(map(touched, written))
        return out

    @staticmethod
    def _is_view(name: str, read: list[Tensor], written: list[Tensor]) -> bool:
        if name.startswith(("empty", "new_empty")) or not written:
            return True
        storages = {t.untyped_storage()._cdata for t in read}
        return not name.endswith("_") and all(t.untyped_storage()._cdata in storages for t in written)

    @contextmanager
    def opaque(self) -> Iterator[None]:
        """Count nothing inside."""
        self._opaque += 1
        try:
            yield
        finally:
            self._opaque -= 1

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Count PyTorch's attention; q is [B, H, S, d], k and v [B, H, T, d]."""
        kind = ATTENTION if key.shape[2] == query.shape[2] else TEXT_ATTENTION
        self.work.flops[kind] += 4.0 * query.numel() * key.shape[2]
        with self.opaque():
            return torch.empty_like(query)

    def rms_norm(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """Count PyTorch's RMSNorm, which is one kernel on a GPU and several operations on meta tensors."""
        with self.opaque():
            y = torch.empty_like(x)
        self.work.moved[POINTWISE] += touched(x) + touched(y)
        return y

    def quantized(self, bits: int) -> Callable[[QuantLinear, Tensor], Tensor]:
        """Return what counts a quantized layer: its input is read in 16 bit, and its codes are written and read again."""

        def forward(layer: QuantLinear, x: Tensor) -> Tensor:
            with self.opaque():
                y = x.new_empty((*x.shape[:-1], layer.spec.out_features))
            self.work.flops[LINEARS] += 2.0 * x.numel() * layer.spec.out_features
            self.work.moved[QUANTIZING] += touched(x) + x.numel() * bits / 8
            return y

        return forward


@functools.cache
def work_of_block(case: Case, bits: int, recipe: str = "w4a4") -> Work:
    """Return the work of one block in eager mode: that of a model with two blocks less that of one with one.

    It takes about a second, and tables ask for it again with every row: it is counted once, and not to be changed.

    Args:
        case: The case.
        bits: 16 for the model in bf16; else the bits of the activations' codes in memory.
        recipe: The name of the recipe.
    """
    works = []
    for depth in (1, 2):
        plan = plan_model(shallow(config_of(case.config), depth, 1), get_recipe(recipe), torch.bfloat16)
        skeleton = build_skeleton(plan.family.config, torch.bfloat16) if bits == 16 else quantized_skeleton(plan, bits)
        model = GraphWrapper(skeleton, plan.family).to("meta")
        inputs = inputs_of(plan.family, case, 1, torch.device("meta"))
        counter = Counter()
        with (
            torch.inference_mode(),
            mock.patch.object(F, "scaled_dot_product_attention", counter.attention),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", counter.attention),
            mock.patch.object(nn.RMSNorm, "forward", lambda norm, x, c=counter: c.rms_norm(norm, x)),
            mock.patch.object(QuantLinear, "forward", counter.quantized(bits)),
            counter,
        ):
            model(inputs)
        works.append(counter.work)
    return works[1] - works[0]


def predict(case: Case, flavour: Flavour, rates: Rates, work: Work) -> dict[str, float] | None:
    """Return the milliseconds of each class of operations of one block, or None where there is no model of the flavour.

    None is what the traffic was not counted of: compiled blocks but those of Wan, attention with a mask, several samples, and
    CUDA graphs, which save launches that nothing here counts.

    Args:
        case: The case.
        flavour: What runs.
        rates: The GPU's.
        work: The block's work in eager mode; see :func:`work_of_block`.
    """
    if flavour.masked or flavour.batch != 1 or flavour.graphs:
        return None
    pointwise, quantizing = work.moved[POINTWISE], work.moved[QUANTIZING]
    if flavour.compiled:
        config = config_of(case.config)
        if config["_class_name"] != "WanTransformer3DModel":
            return None
        plan = plan_model(shallow(config, 1, 1), get_recipe("w4a4"), torch.bfloat16)
        tokens = plan.family.tokens(*case.latent)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        a, b = (moved - flavour.fused * less for moved, less in zip(COMPILED_WAN, FUSED_WAN))
        sums = flavour.fused * FUSED_SUMS * tokens * width
        pointwise = tokens * (a * width + b * config["ffn_dim"]) - sums
        quantizing += sums
        if flavour.fused and flavour.attention != "16":
            less, more = FUSED_ROPE
            pointwise -= less * tokens * width
            quantizing += more * tokens * width
    attention = rates.attention[flavour.attention]
    if flavour.weights == "packed":
        quantizing += expanded_bytes(case, flavour.bits, rates.sm)
    return {
        LINEARS: work.flops[LINEARS] / rates.linear[flavour.bits] / 1e9,
        ATTENTION: work.flops[ATTENTION] / attention / 1e9,
        TEXT_ATTENTION: work.flops[TEXT_ATTENTION] / rates.attention["16"] / 1e9,
        POINTWISE: pointwise / rates.bandwidth / 1e9,
        QUANTIZING: quantizing / rates.bandwidth / 1e9,
    }


def expanded_bytes(case: Case, bits: int, sm: int) -> int:
    """Return the bytes that one block reads and writes to expand packed weights.

    Args:
        case: The case.
        bits: The activation bits.
        sm: The compute capability, major · 10 + minor.
    """
    traffic = []
    for depth in (1, 2):
        plan = plan_model(shallow(config_of(case.config), depth, 1), get_recipe("w4a4"), torch.bfloat16)
        traffic.append(dict(held_weights(plan, sm, [bits]).traffic)[bits])
    return traffic[1] - traffic[0]


def rates_for(device_name: str) -> tuple[str, Rates] | None:
    """Return the rates of a GPU by the name that CUDA gives it, or None if they are not in the table."""
    return next(((name, rates) for name, rates in RATES.items() if rates.device == device_name), None)


def table(cases: list[Case], gpus: list[str], flavours: tuple[Flavour, ...]) -> list[str]:
    """Return the lines of a table: a row for every case, GPU and flavour.

    Args:
        cases: The cases.
        gpus: Names of :data:`RATES`.
        flavours: What runs.
    """
    header = ["GPU", "case", "runs", *(f"{name}, ms" for name in CLASSES), "block, ms", "times compiled bf16"]
    lines = [header, ["---"] * len(header)]
    for case in cases:
        works = {bits: work_of_block(case, bits) for bits in {flavour.bits for flavour in flavours}}
        for gpu in gpus:
            rows = [(f, predict(case, f, RATES[gpu], works[f.bits])) for f in flavours]
            honest = next((sum(ms.values()) for f, ms in rows if ms and f.name == "bf16 compiled"), None)
            for flavour, ms in rows:
                if ms is None:
                    lines.append([gpu, case.name, flavour.name, *(["not counted"] * len(CLASSES)), "", ""])
                    continue
                total = sum(ms.values())
                gain = "" if honest is None else f"{honest / total:.2f}"
                cells = [f"{ms[name]:.1f}" for name in CLASSES]
                lines.append([gpu, case.name, flavour.name, *cells, f"{total:.1f}", gain])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> int:
    """Print the table; return 0, or 2 with a message where nothing fits."""
    from benchmarks.step_cases import FLAVOURS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--gpu", action="append", choices=tuple(RATES), help="default: all")
    options = parser.parse_args()
    cases = select_cases(options.case)
    if not cases:
        print(f"no case contains {options.case}; there are: {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    print("\n".join(table(cases, options.gpu or list(RATES), FLAVOURS)))
    print("\nNothing ran: these are predictions.")
    for name in options.gpu or RATES:
        print(f"{name}: {RATES[name].source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
