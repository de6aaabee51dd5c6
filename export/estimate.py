"""What an export will take, before it starts: disk, peak memory and time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dvdquant.errors import ResourceError
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.report import BUILD_MEMORY_FACTOR, INT8_MEMORY_FACTOR
from dvdquant.export.options import ExportOptions
from dvdquant.model.plan import ModelPlan
from dvdquant.quantize.checkpoint import CHUNK_WEIGHTS
from dvdquant.quantize.hessian import hessian_bytes
from dvdquant.quantize.layer_inputs import ITEM_TOKENS, noise_levels
from dvdquant.recipe import WeightSpec
from dvdquant.system.memory import memory_limit

__all__ = ["Estimate", "engine_weight_bytes", "estimate_export", "require_memory"]

# Measured on two cores (AMD EPYC, AVX-512) with `dvdq-export` on Wan2.1-1.3B and HunyuanVideo-13B; see benchmarks/README.md.
IMPORT_BYTES = 650 << 20
TRACE_BYTES_PER_LAYER = 1000 << 10
# Everything of a weight but the search of its grid: reading, rotating, packing, hashing, errors; with feedback, that too.
HANDLED_WEIGHTS_PER_SECOND, REFINED_WEIGHTS_PER_SECOND, REFINED_SECONDS_PER_LAYER = 108e6, 74e6, 0.045
# Of the search, by benchmarks/quantize.py on rotated weights: (real zero-point, group size) -> million weights a second.
_SEARCHED = {(True, 0): 33, (True, 128): 40, (True, 64): 32, (True, 32): 19, (True, 16): 11}
_SEARCHED |= {(False, 0): 130, (False, 128): 94, (False, 64): 78, (False, 32): 52, (False, 16): 36}
_SOLVED = {"paper": 157e6, "minmax": 640e6}
INPUTS_FLOPS_PER_SECOND, INPUTS_BYTES, READ_BYTES_PER_SECOND = 180e9, 400 << 20, 700e6
TRACE_SECONDS, TRACE_SECONDS_PER_LAYER = 2.0, 0.075
BUILDER_BYTES, BUILDER_BYTES_PER_LAYER = 450 << 20, 2600 << 10
ENGINE_BYTES = 11 << 20  # what an engine holds besides its weights
BUILD_SECONDS, BUILD_SECONDS_PER_LAYER, BUILD_BYTES_PER_SECOND = 4.0, 0.05, 57e6
DISK_BYTES_PER_SECOND = 800e6

BYTES_PER_WEIGHT = {"int8": 1.0, "int4-weight-only": 0.516, "nvfp4": 0.5625, "plugin": 0.0}


def search_rate(weight: WeightSpec) -> float:
    """Weights a second whose grid is found on two cores."""
    if weight.solver in _SOLVED:
        return _SOLVED[weight.solver]
    return 1e6 * _SEARCHED[weight.zero_point == "float", weight.group_size]


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; ``resident`` is the exporter's own peak, ``builder`` that of the engine builder's process, and
    ``waiting`` what the exporter holds while that runs.
    """

    source_bytes: int
    weight_file_bytes: int
    engine_bytes: int
    scratch_bytes: int
    resident_bytes: int
    builder_bytes: int
    waiting_bytes: int
    seconds: dict[str, float]

    @property
    def disk_bytes(self) -> int:
        """Free disk needed while the export runs."""
        return self.weight_file_bytes + self.engine_bytes + self.scratch_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak memory: the builder runs while the exporter waits."""
        return max(self.resident_bytes, self.waiting_bytes + self.builder_bytes if self.builder_bytes else 0)

    def to_json(self) -> dict[str, Any]:
        """For ``--log-format json``."""
        return {
            "source_bytes": self.source_bytes,
            "weight_file_bytes": self.weight_file_bytes,
            "engine_bytes": self.engine_bytes,
            "disk_bytes": self.disk_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def _kept_bytes(plan: ModelPlan) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.kept.values())


def packed_bytes(plan: ModelPlan) -> int:
    """Size of the weight files: codes, scales and what stays in 16 bit."""
    quantized = sum(
        dtype.itemsize * torch.Size(shape).numel() for spec in plan.layers for dtype, shape in spec.tensors().values()
    )
    return quantized + _kept_bytes(plan)


def engine_weight_bytes(plan: ModelPlan, engine: EnginePlan) -> int:
    """Bytes of constants in an engine."""
    return int(plan.quantized_weights * BYTES_PER_WEIGHT[engine.precision]) + _kept_bytes(plan)


def estimate_export(
    plans: Sequence[ModelPlan],
    engines: Sequence[EnginePlan],
    options: ExportOptions,
    source_bytes: int,
    largest: int,
) -> Estimate:
    """Predict one export.

    Args:
        plans: one per transformer. engines: those built for each of them.
        source_bytes: of the checkpoint. largest: its largest tensor, bytes.
    """
    weights = sum(p.quantized_weights for p in plans)
    layers = sum(len(p.layers) for p in plans)
    pairs = [(p, e, engine_weight_bytes(p, e)) for p in plans for e in engines]
    # A lowered graph keeps what is not in the weight file (INT8 or FP4 weights) in a scratch file.
    scratch = max((size for _, e, size in pairs if e.precision in ("int8", "nvfp4")), default=0)
    waiting = IMPORT_BYTES + layers * TRACE_BYTES_PER_LAYER
    builders = [
        BUILDER_BYTES + len(p.layers) * BUILDER_BYTES_PER_LAYER + int(size * _memory_factor(e)) for p, e, size in pairs
    ]
    cores = min(os.cpu_count() or 1, torch.get_num_threads())
    looking = [p for p in plans if p.recipe.inputs == "synthetic"]
    flops = sum(2.0 * p.all_weights * noise_levels(p) * ITEM_TOKENS for p in looking)
    rate, each = (
        (REFINED_WEIGHTS_PER_SECOND, REFINED_SECONDS_PER_LAYER) if looking else (HANDLED_WEIGHTS_PER_SECOND, 0.0)
    )
    rate = 1 / (1 / rate + 1 / search_rate(plans[0].recipe.weight))
    seconds = {
        "inputs": (source_bytes / READ_BYTES_PER_SECOND + flops / INPUTS_FLOPS_PER_SECOND * 2 / cores)
        if looking
        else 0.0,
        "quantize": source_bytes / DISK_BYTES_PER_SECOND + (weights / rate + each * layers) * 2 / cores,
        "trace": TRACE_SECONDS * len(plans) + TRACE_SECONDS_PER_LAYER * layers,
        "engines": sum(
            BUILD_SECONDS + BUILD_SECONDS_PER_LAYER * len(p.layers) + size / BUILD_BYTES_PER_SECOND
            for p, _, size in pairs
        ),
    }
    hessian = max((hessian_bytes(p) for p in looking), default=0)
    running = hessian + INPUTS_BYTES + 4 * largest if looking else 0
    return Estimate(
        source_bytes=source_bytes,
        weight_file_bytes=sum(packed_bytes(p) for p in plans),
        engine_bytes=sum(ENGINE_BYTES + size for _, _, size in pairs),
        scratch_bytes=scratch + hessian,
        resident_bytes=waiting + max(running, largest + 14 * CHUNK_WEIGHTS),
        builder_bytes=max(builders, default=0),
        waiting_bytes=waiting,
        seconds=seconds,
    )


def _memory_factor(engine: EnginePlan) -> float:
    return INT8_MEMORY_FACTOR if engine.precision == "int8" else BUILD_MEMORY_FACTOR


def require_memory(estimate: Estimate, plans: Sequence[ModelPlan], engines: Sequence[EnginePlan]) -> None:
    """ResourceError, with what would fit, when the engine builder or the exporter would not fit into memory.

    Better now than after the weights were quantized, by a killed process.
    """
    limit = memory_limit()
    if estimate.peak_bytes <= limit:
        return
    options = [f"--target onnx needs {_gib(estimate.resident_bytes)}"]
    if engines and plans:
        packed = max(int(p.quantized_weights * BYTES_PER_WEIGHT["int4-weight-only"]) + _kept_bytes(p) for p in plans)
        needed = estimate.waiting_bytes + BUILDER_BYTES + int(packed * BUILD_MEMORY_FACTOR)
        if any(e.precision not in ("int4-weight-only", "plugin") for e in engines):
            options.append(f"--precision int4-weight-only needs {_gib(needed)}")
    raise ResourceError(
        f"the export needs about {_gib(estimate.peak_bytes)} of memory (the engine builder takes up to "
        f"{BUILD_MEMORY_FACTOR} times the bytes of the weights it is given)",
        available=f"{_gib(limit)}; " + "; ".join(options),
        fix="build on a machine with more memory: a later dvdq-export into the same folder builds the engines alone",
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
