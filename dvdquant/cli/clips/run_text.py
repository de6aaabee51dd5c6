"""What ``dvdq-run`` says of a clip when it is done, and of a run before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dvdquant.cli.shared.common import table
from dvdquant.system.devices import resolve_device
from dvdquant.text import amount

if TYPE_CHECKING:
    from dvdquant.deploy.generation.generator import Generator
    from dvdquant.deploy.generation.needs import Part
    from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult

__all__ = ["asked_text", "compare_text", "needs_text", "summary_text"]

T = TypeVar("T")
_LEGEND = "█ a8  ▄ a4  · skipped"


def summary_text(result: GenerateResult) -> str:
    """Return the closing lines for people: counts, blocks, retries and time, with machine, backend and device named.

    Args:
        result: A clip that was drawn.
    """
    from dvdquant.deploy.generation.run_report import average_bits_text, bit_strip, steps_of

    steps = steps_of(result.trace)
    if result.request.mode == "16":
        lines = [f"{len(steps)} steps by the original checkpoint, arithmetic in {result.executed['dtype']}"]
    else:
        counts = {bits: sum(step.bits == bits for step in steps) for bits in {step.bits for step in steps}}
        parts = [f"{count} skipped" if bits is None else f"{count} on a{bits}" for bits, count in _by_bits(counts)]
        retries = sum(record.retried for record in result.trace)
        lines = [
            f"{len(steps)} steps: {', '.join(parts)}; {average_bits_text(steps)} activation bits on average",
            f"  {bit_strip(result.trace)}   {_LEGEND}",
            f"  calls repeated on the high engine: {retries or 'none'}",
        ]
        if cache := cache_of(result.summary):
            lines.append(
                f"  step cache: {cache['policy']} below {cache['threshold']:g}, at most {cache['max_skips']} steps in a row"
            )
    calls = len(result.trace) / max(1, len(steps))
    lines += [
        f"  {call_times(result)} a call, {calls:g} calls a step, {result.seconds:.1f} s in all",
        f"  measured here: {_where([result])}",
    ]
    return "\n".join(lines)


def cache_of(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the step cache of a run, which two transformers share, or None.

    Args:
        summary: The summary of a clip.
    """
    parts = summary.get("components", {"transformer": summary})
    return next((part["cache"] for part in parts.values() if part.get("cache")), None)


def compare_text(results: Sequence[GenerateResult], values: Sequence[float | None]) -> str:
    """Return a table of several results of one prompt and seed; ``values`` are PSNRs to the first, None for itself.

    Args:
        results: Clips of one prompt and seed.
        values: PSNR of each in dB; None for the first.
    """
    from dvdquant.deploy.generation.run_report import average_bits_text, bit_strip, steps_of

    rows = []
    for result, value in zip(results, values):
        original = result.request.mode == "16"
        rows.append(
            (
                "16 bit" if original else result.request.mode,
                "-" if value is None else "equal" if math.isinf(value) else f"{value:.1f} dB",
                "16" if original else average_bits_text(steps_of(result.trace)),
                call_times(result),
                f"{result.seconds:.1f} s",
                "" if original else bit_strip(result.trace),
            )
        )
    header = ("", "PSNR", "bits", "a call", "in all", f"steps  {_LEGEND}")
    retries = sum(record.retried for result in results for record in result.trace)
    lines = [table(header, rows, right=(1, 2, 4))]
    if retries:
        lines.append(f"{retries} calls were repeated on the high engine")
    return "\n".join([*lines, f"measured here: {_where(results)}"])


def call_times(result: GenerateResult) -> str:
    """Return mean milliseconds of a call by what ran: ``a4 41.2 ms, a8 40.9 ms``.

    Args:
        result: A clip that was drawn.
    """
    from dvdquant.deploy.generation.run_report import bits_name

    times: dict[int | None, list[float]] = {}
    for record in result.trace:
        if record.bits is not None and not record.retried:
            times.setdefault(record.bits, []).append(record.seconds)
    return ", ".join(f"{bits_name(bits)} {1000 * sum(each) / len(each):.0f} ms" for bits, each in _by_bits(times))


def _by_bits(items: Mapping[int | None, T]) -> list[tuple[int | None, T]]:
    """Low bits first, skipped last."""
    return sorted(items.items(), key=lambda item: math.inf if item[0] is None else item[0])


def _where(results: Sequence[GenerateResult]) -> str:
    """Backend, device and machine."""
    from dvdquant.deploy.generation.run_report import machine

    places = dict.fromkeys(f"{r.executed['backend']} on {r.executed['device']}" for r in results)
    return f"{' and '.join(places)}; {machine()}"


def needs_text(
    parts: Sequence[Part], requests: Sequence[GenerateRequest], prompts: int, pipeline: str, memory: str
) -> str:
    """Return what a run would take, for ``--dry-run``.

    Args:
        parts: The parts of the run.
        requests: The checked requests of the first prompt.
        prompts: The number of prompts.
        pipeline: The pipeline class, or empty.
        memory: What is held when, in words.
    """
    request = requests[0]
    images = [name for name, given in (("a first", request.image), ("a last", request.last_image)) if given is not None]
    drawn = f"{prompts} prompt{'s' * (prompts > 1)}, {len(requests)} clip{'s' * (len(requests) > 1)} each: "
    drawn += f"{request.num_frames} frames of {request.height}×{request.width}, {request.steps} steps"
    drawn += f", guidance {request.guidance:g}"
    drawn += f", {' and '.join(images)} image" if images else ""
    rows = [(part.name, amount(part.stored), amount(part.loaded), part.resident) for part in parts]
    return "\n".join(
        [
            *([f"pipeline  {pipeline}"] if pipeline else []),
            drawn,
            "",
            table(("part", "on disk", "in memory", "on the device"), rows, right=(1, 2)),
            "",
            memory,
        ]
    )


def asked_text(generator: Generator, backend: str) -> list[str]:
    """Return in a line each what becomes of fusion, attention and CUDA graphs, where something asks for them.

    Args:
        generator: The generator as the run would use it.
        backend: The full name of the backend that runs.

    Raises:
        UnsupportedError: The library of attention is not possible here.
    """
    from dvdquant.deploy.sessions.fusion_check import fusion_text
    from dvdquant.deploy.sessions.options_text import attention_text, graphs_text

    how = generator.options
    device = resolve_device(how.device)
    lines = [
        fusion_text(device, how.compile, how.fuse),
        attention_text(generator.artifact, backend, device, how.attention, how.attention_backend),
        graphs_text(generator.artifact, backend, device) if how.cuda_graphs else None,
    ]
    return [line for line in lines if line is not None]
