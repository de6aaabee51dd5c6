"""What a generation says about itself: a block for every step, and the trace as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from dvdquant import __version__
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.request import GenerateResult
from dvdquant.deploy.switching.controller import StepRecord
from dvdquant.deploy.switching.schedule import average_bits
from dvdquant.errors import OutputError
from dvdquant.system.processor import processor_name, usable_cores
from dvdquant.system.versions import installed_versions
from dvdquant.system.whole_file import write_whole
from dvdquant.text import json_text

__all__ = ["average_bits_text", "bit_strip", "bits_name", "block", "clip_json", "machine", "steps_of", "write_trace"]

TRACE_VERSION = 1
_BLOCKS = {None: "·", 4: "▄", 6: "▆", 8: "█", 16: "█"}
_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "numpy",
)


def block(bits: int | None) -> str:
    """Return one character for a step: ``█`` 8 bits, ``▄`` 4 bits, ``·`` skipped.

    Args:
        bits: The bits of the step; None for a skipped one.
    """
    return _BLOCKS.get(bits, "?")


def bits_name(bits: int | None) -> str:
    """Return the name of bits: ``a4``, ``a8``, ``skip``, or ``16 bit`` for the original checkpoint.

    Args:
        bits: The bits of the step; None for a skipped one.
    """
    return "skip" if bits is None else "16 bit" if bits == 16 else f"a{bits}"


def steps_of(trace: Sequence[StepRecord]) -> list[StepRecord]:
    """Return the first record of every step: that of the branch that decided it.

    Args:
        trace: The records of every call, in order.
    """
    seen: dict[int, StepRecord] = {}
    for record in trace:
        seen.setdefault(record.step, record)
    return [seen[step] for step in sorted(seen)]


def bit_strip(trace: Sequence[StepRecord]) -> str:
    """Return a block for every step, in order.

    Args:
        trace: The records of every call, in order.
    """
    return "".join(block(record.bits) for record in steps_of(trace))


def average_bits_text(steps: Sequence[StepRecord]) -> str:
    """Return the mean bits over the computed steps, as text; ``-`` where none was computed.

    Args:
        steps: One record per step.
    """
    bits = [record.bits for record in steps]
    return f"{average_bits(bits):.2f}" if any(b is not None for b in bits) else "-"


@cache
def machine() -> str:
    """Return the processor, the number of usable cores, and the GPU if PyTorch sees one, in words."""
    import torch

    parts = [f"{processor_name()}, {usable_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return "; ".join(parts)


def clip_json(result: GenerateResult, outputs: dict[str, str], psnr: float | None) -> dict[str, Any]:
    """Return one clip of the trace: request, what executed, summary, and every record.

    ``psnr`` is in dB against 16 bit, None where it was not measured or is infinite (equal clips).

    Args:
        result: The clip and its records.
        outputs: The paths of the files by kind.
        psnr: PSNR against the clip in 16 bit in dB; None where it was not measured or is infinite.
    """
    return {
        "request": result.request.to_json(),
        "outputs": outputs,
        "executed": result.executed,
        "summary": result.summary,
        "blocks": bit_strip(result.trace),
        "psnr_to_16_bit": psnr if psnr is not None and math.isfinite(psnr) else None,
        "seconds": result.seconds,
        "records": [record.to_json() for record in result.trace],
    }


def write_trace(path: Path, artifact: Artifact, clips: Sequence[dict[str, Any]]) -> None:
    """Write the trace of a run as JSON: the export, versions, machine, and what :func:`clip_json` made of every clip.

    Args:
        path: The path of the file.
        artifact: The opened export.
        clips: The clips as :func:`clip_json` returns them.

    Raises:
        OutputError: A value has no form in JSON, or the file cannot be written.
    """
    manifest = artifact.manifest
    data = {
        "format_version": TRACE_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dvdquant_version": __version__,
        "versions": installed_versions(*_PACKAGES),
        "machine": machine(),
        "export": {
            "folder": str(artifact.root),
            "source": dict(manifest.source),
            "recipe": manifest.recipe["name"],
            "shapes": manifest.shapes,
            "key": manifest.export_key,
            "engines": [
                {k: engine[k] for k in ("path", "backend", "sm", "act_bits", "executes")} for engine in manifest.engines
            ],
        },
        "clips": list(clips),
    }
    try:
        text = json_text(_plain(data), indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise OutputError(
            f"the trace holds a value JSON cannot carry: {error}",
            fix="leave --trace out, and report the value with the line you ran",
        ) from error
    write_whole(path, text.encode())


def _plain(value: Any) -> Any:
    """Infinities and NaN as null, tuples as lists, dataclasses as dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
