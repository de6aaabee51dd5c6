"""The prediction of what an export takes, before it starts: disk, peak memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dvdquant.errors import ResourceError
from dvdquant.export.engines.precision import EnginePlan
from dvdquant.export.engines.report import BUILD_MEMORY_FACTOR, INT8_MEMORY_FACTOR
from dvdquant.export.options import ExportOptions
from dvdquant.hardware.capabilities import sm_number
from dvdquant.model.held_weights import held_weights
from dvdquant.model.kept_inputs import kept_inputs_bytes
from dvdquant.model.lora_inputs import reserved_bytes
from dvdquant.model.plan import ModelPlan
from dvdquant.quantize.hessian import hessian_bytes
from dvdquant.quantize.layer import CHUNK_WEIGHTS
from dvdquant.quantize.layer_inputs import ITEM_TOKENS, noise_levels
from dvdquant.recipe import WeightSpec
from dvdquant.system.memory import memory_limit
from dvdquant.system.processor import usable_cores
from dvdquant.text import amount

__all__ = [
    "Estimate",
    "builder_bytes",
    "engine_weight_bytes",
    "estimate_export",
    "held_bytes",
    "lowered_bytes",
    "require_memory",
]

# Measured on two cores (AMD EPYC, AVX-512) with `dvdq-export` on Wan2.1-1.3B and HunyuanVideo-13B; see benchmarks/README.md.
IMPORT_BYTES = 650 << 20
TRACE_BYTES_PER_LAYER = 1000 << 10
# Weights a second on two cores, for everything but the search of the grid: reading, rotating, packing, hashing and
# errors. The refined rate includes GPTQ.
HANDLED_WEIGHTS_PER_SECOND, REFINED_WEIGHTS_PER_SECOND, REFINED_SECONDS_PER_LAYER = 108e6, 74e6, 0.045
# The rate of the search in million weights a second, by (float zero-point, group size). It was measured by
# benchmarks/quantize.py on rotated weights.
_SEARCHED = {(True, 0): 33, (True, 128): 40, (True, 64): 32, (True, 32): 19, (True, 16): 11}
_SEARCHED |= {(False, 0): 130, (False, 128): 94, (False, 64): 78, (False, 32): 52, (False, 16): 36}
_SOLVED = {"paper": 157e6, "minmax": 640e6}
INPUTS_FLOPS_PER_SECOND, INPUTS_BYTES, READ_BYTES_PER_SECOND = 180e9, 400 << 20, 700e6
TRACE_SECONDS, TRACE_SECONDS_PER_LAYER = 2.0, 0.075
BUILDER_BYTES, BUILDER_BYTES_PER_LAYER = 450 << 20, 2600 << 10
ENGINE_BYTES = 11 << 20  # an engine holds this much besides its weights
BUILD_SECONDS, BUILD_SECONDS_PER_LAYER, BUILD_BYTES_PER_SECOND = 4.0, 0.05, 57e6
DISK_BYTES_PER_SECOND = 800e6

BYTES_PER_WEIGHT = {"int8": 1.0, "int4-weight-only": 0.516, "nvfp4": 0.5625, "plugin": 0.0}


def search_rate(weight: WeightSpec) -> float:
    """Return the number of weights whose grid two cores find in a second.

    Args:
        weight: The weight grid of the recipe.
    """
    if weight.solver in _SOLVED:
        return _SOLVED[weight.solver]
    return 1e6 * _SEARCHED[weight.zero_point == "float", weight.group_size]


@dataclass(frozen=True)
class Estimate:
    """The predicted needs of an export, in bytes and seconds.

    Args:
        source_bytes: The size of the checkpoint.
        weight_file_bytes: The size of the weight files.
        engine_bytes: The size of all engines.
        scratch_bytes: The size of the scratch files.
        resident_bytes: The exporter's own peak memory.
        builder_bytes: The peak memory of the engine builder's process; 0 if no engine is built.
        waiting_bytes: The memory that the exporter holds while the builder runs.
        held_bytes: The tensors of the checkpoint that the exporter keeps in memory, because a later stage reads them again
            and there is room; an export without that room reads them twice instead.
        seconds: Stage -> time in seconds: ``inputs``, ``quantize``, ``trace`` and ``engines``.
    """

    source_bytes: int
    weight_file_bytes: int
    engine_bytes: int
    scratch_bytes: int
    resident_bytes: int
    builder_bytes: int
    waiting_bytes: int
    seconds: dict[str, float]
    held_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        """Return the free disk space that the export needs while it runs."""
        return self.weight_file_bytes + self.engine_bytes + self.scratch_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory with what is kept only because there is room for it."""
        return self.needed_bytes + self.held_bytes

    @property
    def needed_bytes(self) -> int:
        """Return the memory without which the export cannot be made; the builder runs while the exporter waits."""
        return max(self.resident_bytes, self.waiting_bytes + self.builder_bytes if self.builder_bytes else 0)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as a plain dict for ``--log-format json``."""
        return {
            "source_bytes": self.source_bytes,
            "weight_file_bytes": self.weight_file_bytes,
            "engine_bytes": self.engine_bytes,
            "disk_bytes": self.disk_bytes,
            "peak_bytes": self.peak_bytes,
            "held_bytes": self.held_bytes,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def _kept_bytes(plan: ModelPlan) -> int:
    """Return the size of the tensors that stay in 16 bit."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.kept.values())


def packed_bytes(plan: ModelPlan) -> int:
    """Return the size of the weight files in bytes: codes, scales and what stays in 16 bit.

    Args:
        plan: The plan of the model.
    """
    quantized = sum(
        dtype.itemsize * torch.Size(shape).numel() for spec in plan.layers for dtype, shape in spec.tensors().values()
    )
    return quantized + _kept_bytes(plan)


def engine_weight_bytes(plan: ModelPlan, engine: EnginePlan) -> int:
    """Return the size of the constants in an engine, in bytes.

    Args:
        plan: The plan of the model.
        engine: The engine to build.
    """
    kept = _kept_bytes(plan) - kept_inputs_bytes(plan, engine.precision == "plugin")
    return int(plan.quantized_weights * BYTES_PER_WEIGHT[engine.precision]) + kept


def lowered_bytes(plan: ModelPlan, engine: EnginePlan) -> int:
    """Return the size of the weights in a graph for an engine builder that the weight files do not hold, in bytes.

    Args:
        plan: The plan of the model.
        engine: The engine to build.
    """
    return engine_weight_bytes(plan, engine) if engine.precision in ("int8", "nvfp4") else 0


def builder_bytes(plan: ModelPlan, engine: EnginePlan) -> int:
    """Return the peak memory of an engine builder's process, in bytes.

    Args:
        plan: The plan of the model.
        engine: The engine to build.
    """
    weights = int(engine_weight_bytes(plan, engine) * _memory_factor(engine))
    return BUILDER_BYTES + len(plan.layers) * BUILDER_BYTES_PER_LAYER + weights


def held_bytes(plan: ModelPlan, engine: EnginePlan) -> int:
    """Return the memory that the weights of one transformer take in a session with an engine, in bytes.

    The plugin's packed weights are inputs of the engine, and their rows lie beside them. A session that expands them,
    which takes room that is free, holds more.

    Args:
        plan: The plan of the model.
        engine: The engine.
    """
    if engine.precision != "plugin":
        weights = engine_weight_bytes(plan, engine) + kept_inputs_bytes(plan, plugin=False)
        return ENGINE_BYTES + weights + reserved_bytes(plan, plan.lora_rank)
    held = held_weights(plan, sm_number(engine.sms[0]), [engine.act_bits])
    return ENGINE_BYTES + held.nbytes("packed", plugin=True) + reserved_bytes(plan, plan.lora_rank)


def estimate_export(
    plans: Sequence[ModelPlan],
    engines: Sequence[EnginePlan],
    options: ExportOptions,
    source_bytes: int,
    largest: int,
    again: int = 0,
) -> Estimate:
    """Predict what one export takes.

    Args:
        plans: The plans, one per transformer.
        engines: The engines that are built for each of them.
        options: The options of the export, which the estimate does not use.
        source_bytes: The size of the checkpoints in bytes.
        largest: The memory that their largest tensor takes while it is read, in bytes.
        again: The memory that the tensors of one checkpoint take, as they are read, where a stage reads them again; 0
            where each is read once.
    """
    # 1. Sizes of weights and engines.
    weights = sum(p.quantized_weights for p in plans)
    layers = sum(len(p.layers) for p in plans)
    traced = [p for i, p in enumerate(plans) if not any(p.same_graph(other) for other in plans[:i])]
    pairs = [(p, e, engine_weight_bytes(p, e)) for p in plans for e in engines]
    # A lowered graph keeps what is not in the weight file (INT8 or FP4 weights) in a scratch file.
    scratch = max((lowered_bytes(p, e) for p, e, _ in pairs), default=0)
    # 2. Memory of the waiting exporter and of each builder.
    waiting = IMPORT_BYTES + layers * TRACE_BYTES_PER_LAYER
    builders = [builder_bytes(p, e) for p, e, _ in pairs]
    # 3. Time: measured rates on two cores, scaled to the cores that are used.
    cores = min(usable_cores(), torch.get_num_threads())
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
        "trace": sum(TRACE_SECONDS + TRACE_SECONDS_PER_LAYER * len(p.layers) for p in traced),
        "engines": sum(
            BUILD_SECONDS + BUILD_SECONDS_PER_LAYER * len(p.layers) + size / BUILD_BYTES_PER_SECOND
            for p, _, size in pairs
        ),
    }
    # 4. Memory while weights are quantized: the Hessians and the model's run if the recipe looks at inputs.
    hessian = max((hessian_bytes(p) for p in looking), default=0)
    running = hessian + INPUTS_BYTES + 4 * largest if looking else 0
    found = Estimate(
        source_bytes=source_bytes,
        weight_file_bytes=sum(packed_bytes(p) for p in plans),
        engine_bytes=sum(ENGINE_BYTES + size for _, _, size in pairs),
        scratch_bytes=scratch + hessian,
        resident_bytes=waiting + max(running, largest + 14 * CHUNK_WEIGHTS),
        builder_bytes=max(builders, default=0),
        waiting_bytes=waiting,
        seconds=seconds,
    )
    # 5. Of the memory that is free beside that, half is for what was missed here and for other processes.
    return replace(found, held_bytes=min(again, max(0, memory_limit() - found.needed_bytes) // 2))


def _memory_factor(engine: EnginePlan) -> float:
    """Return the builder's peak memory over the bytes of the weights that it is given."""
    return INT8_MEMORY_FACTOR if engine.precision == "int8" else BUILD_MEMORY_FACTOR


def require_memory(estimate: Estimate, plans: Sequence[ModelPlan], engines: Sequence[EnginePlan]) -> None:
    """Refuse an export that does not fit into memory, now and not by a killed process after the weights were quantized.

    Args:
        estimate: The estimate of the export.
        plans: The plans, one per transformer.
        engines: The engines that are built for each of them.

    Raises:
        ResourceError: The exporter or the engine builder needs more memory than there is; the error names what would
            fit.
    """
    limit = memory_limit()
    if estimate.needed_bytes <= limit:
        return
    options = [f"--target onnx needs {amount(estimate.resident_bytes)}"]
    if engines and plans:
        packed = max(int(p.quantized_weights * BYTES_PER_WEIGHT["int4-weight-only"]) + _kept_bytes(p) for p in plans)
        needed = estimate.waiting_bytes + BUILDER_BYTES + int(packed * BUILD_MEMORY_FACTOR)
        if any(e.precision not in ("int4-weight-only", "plugin") for e in engines):
            options.append(f"--precision int4-weight-only needs {amount(needed)}")
    raise ResourceError(
        f"the export needs about {amount(estimate.needed_bytes)} of memory (the engine builder is estimated to take up to "
        f"{BUILD_MEMORY_FACTOR} times the bytes of the weights it is given)",
        available=f"{amount(limit)}; " + "; ".join(options),
        fix="build on a machine with more memory: a later dvdq-export into the same folder builds the engines alone",
    )
