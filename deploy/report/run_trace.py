"""The trace of ``dvdq-run --trace``, read again: what each step ran, and what a step cache left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvdquant.deploy.generation.run_report import TRACE_VERSION, bits_name, block
from dvdquant.errors import OutputError
from dvdquant.system.files import read_limited, strict_json
from dvdquant.system.records import first_problem
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest

__all__ = ["RunClip", "RunStep", "read_trace", "trace_lines"]

MAX_BYTES = 64 << 20
MAX_CLIPS, MAX_RECORDS = 64, 1_000_000
_Count = Annotated[int, Field(ge=0, le=MAX_RECORDS)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Lenient(BaseModel):
    """A record of which some fields are read."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Record(_Lenient):
    """A call of the transformer."""

    step: _Count
    bits: Annotated[int, Field(ge=1, le=16)] | None
    reason: str
    seconds: _Number


class _Cache(_Lenient):
    """The settings of a step cache."""

    policy: str
    threshold: _Number
    max_skips: _Count


class _Summary(_Lenient):
    """The figures of a clip."""

    mode: str = "16"
    average_bits: _Number | None = None
    cache: _Cache | None = None


class _Request(_Lenient):
    """The request, as the trace of its run has it."""

    prompt: str
    seed: Annotated[int, Field(ge=0)]


class _Clip(_Lenient):
    """A clip."""

    request: _Request
    summary: _Summary
    records: Annotated[list[_Record], Field(max_length=MAX_RECORDS)]


class _Export(_Lenient):
    """The export that ran."""

    folder: str
    key: str


class _Trace(_Lenient):
    """A trace file."""

    format_version: int
    export: _Export
    clips: Annotated[list[_Clip], Field(max_length=MAX_CLIPS)]


@dataclass(frozen=True)
class RunStep:
    """A step of a clip.

    Args:
        step: Its number.
        bits: The bits of its activations; None if the step cache left it out.
        seconds: The time of all its calls.
        reason: Why it ran so.
    """

    step: int
    bits: int | None
    seconds: float
    reason: str

    @property
    def name(self) -> str:
        """Return a4, a8, skip or 16 bit."""
        return bits_name(self.bits)


@dataclass(frozen=True)
class RunClip:
    """A clip that was drawn; its texts are safe to print.

    Args:
        prompt: Its prompt.
        seed: Its seed.
        mode: How its bits were decided.
        average_bits: The mean over the computed steps, or None.
        cache: The step cache in words; "" without one.
        steps: Its steps, in order.
    """

    prompt: str
    seed: int
    mode: str
    average_bits: float | None
    cache: str
    steps: tuple[RunStep, ...]

    @property
    def skipped(self) -> int:
        """Return how many steps were left out."""
        return sum(step.bits is None for step in self.steps)

    @property
    def strip(self) -> str:
        """Return a block for every step."""
        return "".join(block(step.bits) for step in self.steps)

    @property
    def cache_text(self) -> str:
        """Return the step cache and what it left out, in words."""
        if not self.cache:
            return "no step cache"
        return f"step cache {self.cache}: {self.skipped} of {len(self.steps)} steps skipped"


def read_trace(path: Path, manifest: Manifest) -> list[RunClip]:
    """Return the clips of a trace.

    Args:
        path: The file that ``dvdq-run --trace`` wrote.
        manifest: The manifest of the export that ran.

    Raises:
        OutputError: The file cannot be read, is no trace, or is that of another export.
    """
    write = "write one with dvdq-run OUT --prompt … --trace PATH"
    try:
        data: Any = strict_json(read_limited(path, MAX_BYTES))
    except OSError as error:
        raise OutputError(f"trace {path} cannot be read: {error.strerror or error}", fix=write) from error
    except ValueError as error:
        raise OutputError(f"trace {path} is not valid JSON: {error}", fix=write) from error
    try:
        trace = _Trace.model_validate(data)
    except ValidationError as error:
        problem = first_problem(error, data)
        raise OutputError(
            f"{path} is no trace of dvdq-run: {problem.field} {problem.state}", available=problem.allowed, fix=write
        ) from error
    if trace.format_version != TRACE_VERSION:
        raise OutputError(
            f"trace {path} has format {trace.format_version}",
            available=str(TRACE_VERSION),
            fix=f"{write} with this version",
        )
    if trace.export.key != manifest.export_key:
        raise OutputError(
            f"trace {path} is of another export: {shown(trace.export.folder)}",
            fix="give the export that drew the clip, or draw it again with this one",
        )
    return [_clip(each) for each in trace.clips]


def _clip(clip: _Clip) -> RunClip:
    seconds: dict[int, float] = {}
    first: dict[int, _Record] = {}
    for record in clip.records:
        first.setdefault(record.step, record)
        seconds[record.step] = seconds.get(record.step, 0.0) + record.seconds
    cache = clip.summary.cache
    words = (
        "" if cache is None else f"{cache.policy}, threshold {cache.threshold:g}, at most {cache.max_skips} in a row"
    )
    steps = tuple(
        RunStep(step, record.bits, seconds[step], shown(record.reason, 300)) for step, record in sorted(first.items())
    )
    request, summary = clip.request, clip.summary
    mode = shown(summary.mode, 20)
    return RunClip(shown(request.prompt, 200), request.seed, mode, summary.average_bits, shown(words, 120), steps)


def trace_lines(clips: Sequence[RunClip]) -> Iterator[str]:
    """Return the clips as lines for a terminal.

    Args:
        clips: The clips of a trace.
    """
    for clip in clips:
        bits = "" if clip.average_bits is None else f", {clip.average_bits:.2f} bits on average over the computed steps"
        yield f"“{clip.prompt}”, seed {clip.seed}, {clip.mode}{bits}"
        yield clip.cache_text
        yield clip.strip
        yield "step    bits  seconds  reason"
        for step in clip.steps:
            yield f"{step.step:4}  {step.name:>6}  {step.seconds:7.3f}  {step.reason}"
        yield ""
