"""Samples for the report: clips in 16 bit, a4 and switching, and the engines' distance from the original at every step.

They are made for models with a prompt table, whose clips cost seconds.

The distance is taken along the original's own trajectory: at each step all get the same latents and embeddings (in the
graphs' dtype), and the original's output leads on. Of step t it is

    e(t) = sqrt(Σ_branch ‖y_a(t) − y_16(t)‖²) / sqrt(Σ_branch ‖y_16(t)‖²).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvdquant.checkpoint.prompt_table import PromptTable
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.check import sampling_defaults
from dvdquant.deploy.generation.generate import Generator, open_generator
from dvdquant.deploy.generation.original import load_original
from dvdquant.deploy.generation.original_calls import OriginalRunner
from dvdquant.deploy.generation.psnr import psnr
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult
from dvdquant.deploy.generation.run_report import average_bits_text, steps_of
from dvdquant.deploy.generation.video import enlarge
from dvdquant.deploy.sessions.base import EngineSession, WrappedSession
from dvdquant.deploy.switching.defaults import DEFAULT_DELTA, LAST_HIGH, WEIGHTINGS
from dvdquant.deploy.switching.runner import TIMESTEP
from dvdquant.errors import UnsupportedError
from dvdquant.system.progress import Progress, Stage

if TYPE_CHECKING:
    from dvdquant.deploy.switching.schedule import Schedule

__all__ = ["Sample", "SampleRow", "has_prompt_table", "make_samples", "sample_prompts"]

FRAME_SIDE = 96  # pixels of an enlarged frame
MAX_FRAMES = 8
GAP = 4


@dataclass(frozen=True)
class SampleRow:
    """One clip of a prompt.

    Args:
        name: What ran, such as ``a8``.
        note: What the page says of it.
        picture: Its frames as one PNG, a data URI.
        width: The width of the picture in pixels.
        height: The height of the picture in pixels.
        bits: The activation bits of each step; None is 16 bit.
    """

    name: str
    note: str
    picture: str
    width: int
    height: int
    bits: tuple[int | None, ...]


@dataclass(frozen=True)
class Sample:
    """The clips of one prompt, and how far the engines are from the original.

    Args:
        prompt: The prompt.
        seed: The seed of the first noise.
        steps: The denoising steps.
        rows: The clips, the original first.
        errors: e(t) of every step, by ``a4`` and ``a8``.
        executed: Backend, device, dtype and resident bytes of the engines.
    """

    prompt: str
    seed: int
    steps: int
    rows: tuple[SampleRow, ...]
    errors: dict[str, list[float]]
    executed: dict[str, Any] = field(default_factory=dict)


def has_prompt_table(model: str) -> bool:
    """Return whether ``model`` is a local folder with a prompt table, so that a clip costs seconds.

    Args:
        model: The model as the manifest names it.
    """
    try:
        return PromptTable.is_at(model)
    except (OSError, ValueError):
        return False  # a name that no file can have


def sample_prompts(table: PromptTable, count: int) -> list[str]:
    """Return ``count`` prompts that ``table`` takes, its example first, then others with every slot moved on.

    Args:
        table: The prompt table.
        count: The number of prompts.
    """
    if not table.choices:
        return [table.example()] * min(count, 1)
    prompts = []
    for i in range(count):
        words = [
            table.choices[slot][-1 - (i * (1 + 2 * k)) % len(table.choices[slot])] for k, slot in enumerate(table.order)
        ]
        prompts.append(" ".join(words))
    return list(dict.fromkeys(prompts))


def make_samples(
    root: Path, model: str, count: int, schedule: Schedule | None, progress: Progress, *, steps: int | None = None
) -> list[Sample]:
    """Generate ``count`` samples with the export in ``root``.

    Args:
        root: The folder of the export.
        model: The folder of the source, with the prompt table.
        count: The number of samples.
        schedule: The schedule to follow instead of the default δ.
        progress: The receiver of the progress.
        steps: The number of denoising steps; None is the schedule's, or the model's.

    Raises:
        UnsupportedError: The source has no prompt table.
        DvdquantError: A clip cannot be drawn, see :meth:`Generator.generate`.
    """
    if not has_prompt_table(model):
        raise UnsupportedError(
            "samples of a report are made for models with a prompt table, whose clips cost seconds",
            available="examples/tiny-wan",
            fix="leave --samples out, and make clips with dvdq-run --compare",
        )
    artifact, table = Artifact.open(root), PromptTable.open(model)
    watch = _Watch(artifact, model)
    default_steps, guidance = sampling_defaults(artifact, table.steps, table.guidance_scale)
    steps = schedule.steps if schedule is not None else steps or default_steps
    with open_generator(artifact, pipeline=model, wrap_session=watch.wrap) as generator:
        names = _modes(artifact)
        calls = steps * (1 if guidance == 1 else 2) * (1 + len(names))
        prompts = sample_prompts(table, count)
        with progress.stage("samples", calls * len(prompts), "call") as stage:
            return [_sample(generator, watch, p, steps, names, schedule, stage) for p in prompts]


def _modes(artifact: Artifact) -> list[str]:
    """Return what is put beside each other: 16, the fewest bits, and switching between them where there are two."""
    bits = artifact.bits(artifact.components[0])
    return ["16", f"a{bits[0]}", *(["switch"] if len(bits) > 1 else [])]


def _sample(
    generator: Generator,
    watch: _Watch,
    prompt: str,
    steps: int,
    modes: list[str],
    schedule: Schedule | None,
    stage: Stage,
) -> Sample:
    results = []
    for mode in modes:
        planned = schedule is not None and mode == "switch"
        rule: dict[str, Any] = {"last_high": LAST_HIGH, "weighting": WEIGHTINGS[0]} if mode == "switch" else {}
        request = GenerateRequest(
            prompt, steps=steps, mode="planned" if planned else mode, schedule=schedule if planned else None, **rule
        )
        results.append(generator.generate(request, lambda record: stage.update(1, prompt)))
    high = generator.artifact.bits(generator.artifact.components[0])[-1]
    with watch.along_original():
        generator.generate(
            GenerateRequest(prompt, steps=steps, mode=f"a{high}"), lambda record: stage.update(1, prompt)
        )
    rows = tuple(_row(result, results[0]) for result in results)
    return Sample(prompt, results[0].request.seed, steps, rows, watch.errors(), results[1].executed)


def _row(result: GenerateResult, reference: GenerateResult) -> SampleRow:
    request, bits = result.request, [record.bits for record in steps_of(result.trace)]
    notes = [f"original, {result.executed['dtype']}"] if request.mode == "16" else []
    if request.mode == "switch":
        notes.append(f"δ {DEFAULT_DELTA:g}, {average_bits_text(steps_of(result.trace))} bits on average")
    if request.mode == "planned":
        notes.append(f"schedule.json, {average_bits_text(steps_of(result.trace))} bits on average")
    if result is not reference:
        value = psnr(result.frames, reference.frames)
        notes.append("equal to 16 bit" if math.isinf(value) else f"{value:.1f} dB to 16 bit")
    name = {"16": "16 bit", "planned": "switch"}.get(request.mode, request.mode)
    uri, width, height = frames_png(result)
    return SampleRow(name, ", ".join(notes), uri, width, height, tuple(bits))


def frames_png(result: GenerateResult) -> tuple[str, int, int]:
    """Return up to eight frames beside each other as (data URI of a PNG, width, height), enlarged with nearest neighbour.

    Args:
        result: The clip and its records.
    """
    from PIL import Image

    frames = result.frames
    count = min(len(frames), MAX_FRAMES)
    picks = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    large = enlarge(frames[picks], FRAME_SIDE)
    height, width = large.shape[1:3]
    total = count * width + (count - 1) * GAP
    image = Image.new("RGBA", (total, height))
    for i, frame in enumerate(large):
        image.paste(Image.fromarray(frame).convert("RGBA"), (i * (width + GAP), 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), total, height


# ---------------------------------------------------------------------------------------------- the original's trajectory


class _Watch:
    """Wraps the session of a generator.

    Inside :meth:`along_original` the original checkpoint answers, and the engines' distance from it is noted.
    """

    def __init__(self, artifact: Artifact, model: str) -> None:
        self.artifact, self.model = artifact, model
        self.session: _Compared | None = None

    def wrap(self, session: EngineSession) -> EngineSession:
        self.session = _Compared(session)
        return self.session

    @contextmanager
    def along_original(self) -> Iterator[None]:
        assert self.session is not None  # a generation before has opened it
        if self.session.original is None:
            device = self.session.device
            dtype = torch.float32 if device.type == "cpu" else self.artifact.dtype
            component = self.artifact.components[0]
            model = load_original(self.artifact, self.model, component, device, dtype)
            self.session.original = OriginalRunner(model, self.session.family)
        self.session.comparing, self.session.steps = True, []
        try:
            yield
        finally:
            self.session.comparing = False

    def errors(self) -> dict[str, list[float]]:
        assert self.session is not None
        return self.session.errors()


class _Compared(WrappedSession):
    """The session itself, or while comparing the original checkpoint with the session beside it."""

    def __init__(self, inner: EngineSession) -> None:
        super().__init__(inner)
        self.original: OriginalRunner | None = None
        self.comparing = False
        self.steps: list[tuple[float, dict[str, float]]] = []  # timestep, sums of squares: "16" and per bit-width

    def run(self, inputs: Mapping[str, Tensor], bits: int) -> Tensor:
        if not self.comparing or self.original is None:
            return self.inner.run(inputs, bits)
        timestep = float(inputs[TIMESTEP].max())
        if not self.steps or self.steps[-1][0] != timestep:
            self.steps.append((timestep, dict.fromkeys(("16", *(f"a{b}" for b in self.bits)), 0.0)))
        sums = self.steps[-1][1]
        cast = {
            n: t.to(self.original.device, self.original.dtype) if t.dtype == self.dtype else t
            for n, t in inputs.items()
        }
        reference = self.original.run(cast).double()
        sums["16"] += float(reference.square().sum())
        for width in self.bits:
            output = self.inner.run(inputs, width).to(reference.device).double()
            sums[f"a{width}"] += float((output - reference).square().sum())
        return reference.float()

    def errors(self) -> dict[str, list[float]]:
        """Return e(t) of every step by ``a4``, ``a8``; infinite where the original gave zeros."""
        return {
            f"a{bits}": [math.sqrt(sums[f"a{bits}"] / sums["16"]) if sums["16"] else math.inf for _, sums in self.steps]
            for bits in self.bits
        }
