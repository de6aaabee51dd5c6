"""Find δ: record a few clips, predict average bits and time for every δ, invert, and check the answer by a real run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dvdquant.checkpoint.lora.spec import parse_loras
from dvdquant.deploy.artifact import Artifact
from dvdquant.deploy.generation.generate import Generator, open_generator
from dvdquant.deploy.generation.psnr import psnr
from dvdquant.deploy.generation.request import GenerateRequest, GenerateResult
from dvdquant.deploy.number_checks import is_number, is_whole
from dvdquant.deploy.planning.recording import ClipRecording, Recorder, median_seconds
from dvdquant.deploy.switching.controller import StepRecord
from dvdquant.deploy.switching.defaults import LAST_HIGH, WEIGHTINGS
from dvdquant.deploy.switching.gbs import (
    PairChanges,
    Stair,
    Weighting,
    delta_for_average_bits,
    delta_of_stair,
    free_steps,
    staircase,
    switch_pairs,
    weighted_changes,
)
from dvdquant.deploy.switching.schedule import Schedule, average_bits
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.plugin_file import plugin_paths
from dvdquant.system.progress import Progress
from dvdquant.system.records import brief
from dvdquant.system.several import one_or_several

__all__ = ["CLIP", "OPENING", "Goal", "Plan", "Quality", "delta_for_seconds", "plan"]

CLIP = ("negative_prompt", "guidance", "height", "width", "num_frames", "image", "last_image")
"""What a plan passes on to the request of every clip."""
OPENING = (
    "pipeline", "backend", "device", "lora", "text_embeds", "offload", "vae_tiling", "text_encoder_bits", "compile", "attention",
    "attention_backend", "plugins", "weights", "fuse", "cuda_graphs",
)  # fmt: skip
"""What a plan passes on to :func:`.generate.open_generator`."""


@dataclass(frozen=True)
class Goal:
    """The goal of a plan: exactly one of three.

    Args:
        average_bits: The activation bits of a step, on average over a clip.
        seconds: The time of the transformer in one clip; text encoder and VAE are not planned.
        delta: A δ of the user's own, to be evaluated.
    """

    average_bits: float | None = None
    seconds: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.average_bits, self.seconds, self.delta) if v is not None]
        if len(given) != 1:
            raise UnsupportedError(
                "more than one goal" if given else "no goal",
                available=[each.name for each in fields(self)],
                fix="give one of them",
            )
        if not (is_number(given[0]) and math.isfinite(given[0]) and given[0] >= 0):
            name = next(each.name for each in fields(self) if getattr(self, each.name) is not None)
            raise UnsupportedError(
                f"the goal {name} is {brief(given[0])}", available="a finite number from 0 up", fix="give such a number"
            )


@dataclass(frozen=True)
class Quality:
    """The distance of the frames from those of the 16-bit model at one δ.

    Args:
        delta: The δ.
        average_bits: The activation bits of a step, on average.
        psnr: PSNR in dB, mean over the clips.
        clips: How many clips were recorded.
    """

    delta: float
    average_bits: float
    psnr: float
    clips: int


@dataclass
class Plan:
    """The answer and what it rests on.

    Args:
        schedule: The bits of each step, as the runtime reads them.
        delta: The δ that was chosen.
        predicted_bits: The average activation bits at this δ, mean over the recorded clips.
        predicted_seconds: The seconds of the transformer in a clip at this δ, mean over the recorded clips.
        predicted_clip_bits: The average bits predicted for the clip of the real run.
        stairs: The average bits for every δ.
        calls: The calls of the transformer in a clip, mean over the recorded clips.
        seconds_per_call: The seconds of a call, by activation bits.
        low: The activation bits of the low engine.
        high: The activation bits of the high engine.
        clips: The recorded clips.
        backend: The backend that ran.
        measured_bits: The average bits of one real switched run, NaN without one.
        measured_seconds: The seconds of the transformer in that run, NaN without one.
        measured_retries: The steps of that run that were done again on the high engine.
        quality: PSNR at a few δ from all high to all low, where a reference was asked for.
    """

    schedule: Schedule
    delta: float
    predicted_bits: float
    predicted_seconds: float
    predicted_clip_bits: float
    stairs: list[Stair]
    calls: float
    seconds_per_call: dict[int, float]
    low: int
    high: int
    clips: list[ClipRecording]
    backend: str
    measured_bits: float = math.nan
    measured_seconds: float = math.nan
    measured_retries: int = 0
    quality: list[Quality] = field(default_factory=list)

    def seconds_at(self, bits: float) -> float:
        """Return the predicted seconds of the transformer per clip at an average of bits.

        Args:
            bits: The average of bits.
        """
        return _seconds(bits, self.calls, self.seconds_per_call, self.low, self.high)


def plan(
    artifact: Artifact,
    prompts: str | Sequence[str],
    goal: Goal,
    *,
    seeds: int | Sequence[int] = (0,),
    steps: int | None = None,
    reference: bool = False,
    last_high: int = LAST_HIGH,
    weighting: Weighting = WEIGHTINGS[0],
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Record every prompt with every seed, find δ for ``goal``, and validate it on the first clip.

    Args:
        artifact: The export.
        prompts: Clips to record, two to eight. One text is one prompt.
        goal: Average bits, seconds, or a δ of one's own.
        seeds: Each prompt is recorded with each. One number is one seed.
        steps: The number of steps of a clip; the default is the model's own.
        reference: Compare with the original 16-bit checkpoint too.
        last_high: The number of steps at the end that run on the high engine; the default is the commands'.
        weighting: ``step`` counts a change by how far its step moves, ``none`` is the published rule.
        progress: The receiver of the progress; the default is none.
        **options: What a clip shows, as the fields of :class:`.request.GenerateRequest` in :data:`CLIP`, and how the model is
            opened, as the arguments of :func:`.generate.open_generator` in :data:`OPENING`. With ``text_embeds`` and no
            prompt, all prompts of the file are recorded.

    Raises:
        ShapeError: There is no prompt or no seed, or one is of another kind.
        UnsupportedError: A LoRA is out of form, a plugin library is not there, the export has one bit-width only, or no δ
            reaches the goal (saying the range).
        DvdquantError: A clip cannot be drawn, see :meth:`Generator.generate`.
    """
    if unknown := sorted(options.keys() - {*CLIP, *OPENING}):
        raise UnsupportedError(f"plan has no option {unknown[0]}", available=[*CLIP, *OPENING])
    clip = {name: value for name, value in options.items() if name in CLIP}
    opening = {name: value for name, value in options.items() if name in OPENING}
    opening["lora"] = parse_loras(opening.get("lora", ()))
    opening["plugins"] = plugin_paths(opening.get("plugins", ()))
    prompts, seeds = _prompts(prompts, may_be_none=opening.get("text_embeds") is not None), _seeds(seeds)
    low, high = _two_engines(artifact)
    progress = progress or Progress()
    recorder = Recorder(low, high)
    with open_generator(artifact, wrap_session=recorder.wrap, **opening) as generator:
        prompts = prompts or generator.prompts()
        base = GenerateRequest(prompts[0], steps=steps, seed=seeds[0], mode=f"a{high}", **clip)
        base = replace(base, last_high=last_high, weighting=weighting)
        requests = [replace(base, prompt=p, seed=s) for p in prompts for s in seeds]
        checked = [generator.check(request) for request in requests]
        for words in generator.notes(checked[0]):
            progress.say(words)
        _check_goal(goal, checked[0].steps or 0, low, high, last_high)
        clips, highs = _record(generator, recorder, checked, progress)
        found = _choose(artifact, goal, clips, len(requests), recorder, (last_high, weighting), (prompts, seeds))
        delta = found.delta
        result = _generate(generator, replace(checked[0], mode="switch", delta=delta), progress, "validate")
        found.measured_bits = average_bits([record.bits for record in result.trace])
        found.measured_seconds = sum(record.seconds for record in result.trace)
        found.measured_retries = sum(record.retried for record in result.trace)
        if reference:
            found.quality = _qualities(generator, checked, highs, delta, found.stairs, (low, high), progress)
    found.schedule.details.update(_details(found, last_high, weighting))
    return found


def _prompts(prompts: str | Sequence[str], may_be_none: bool = False) -> list[str]:
    """Return the prompts as a list. ShapeError if there is none where there must be one, or if one is no text."""
    several = list(one_or_several(prompts, (str, bytes)))
    for prompt in several:
        if not isinstance(prompt, str):
            raise ShapeError(f"a prompt is {brief(prompt)}", available="text, or several texts")
    if not several and not may_be_none:
        raise ShapeError("there is no prompt", fix='give one or several: ["a cat walks on grass", "rain on a window"]')
    return several


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return the seeds as a list. ShapeError if there is none, or if one is no whole number."""
    several = one_or_several(seeds, ())
    for seed in several:
        if not is_whole(seed):
            raise ShapeError(f"a seed is {brief(seed)}", available="a whole number from 0, or several")
    if not several:
        raise ShapeError("there is no seed", fix="give one or several, or leave seeds out")
    return [int(seed) for seed in several]


def _choose(
    artifact: Artifact,
    goal: Goal,
    clips: list[ClipRecording],
    requests: int,
    recorder: Recorder,
    rule: tuple[int, Weighting],
    recorded: tuple[Sequence[str], Sequence[int]],
) -> Plan:
    """δ for the goal and everything predicted of it; nothing measured yet. ``rule``: last_high and weighting."""
    low, high = recorder.low, recorder.high
    last_high, weighting = rule
    # Two transformers share the steps of a request.
    per_request = sum({clip.component: len(clip.timesteps) for clip in clips}.values())
    pairs = [weighted_changes(c.changes, c.timesteps, per_request, weighting) for c in clips]
    per_call = median_seconds(clips)
    calls = sum(clip.calls for clip in clips) / requests
    stairs = staircase(pairs, low, high, last_high=last_high)
    if goal.seconds is not None:
        delta, bits = delta_for_seconds(stairs, goal.seconds, lambda b: _seconds(b, calls, per_call, low, high))
    elif goal.average_bits is not None:
        delta, bits = delta_for_average_bits(pairs, goal.average_bits, low, high, last_high=last_high)
    else:
        delta = goal.delta or 0.0
        bits = next((s.average_bits for s in stairs if s.above < delta <= s.upto), float(high))
    first = [p for p, c in zip(pairs, clips) if (c.prompt, c.seed) == (clips[0].prompt, clips[0].seed)]
    predicted = [b for changes in first for b in switch_pairs(changes, delta, low, high, last_high=last_high)[0]]
    return Plan(
        schedule=_schedule(artifact, list(zip(clips, pairs)), bits, delta, (low, high), last_high, *recorded),
        delta=delta,
        predicted_bits=bits,
        predicted_seconds=_seconds(bits, calls, per_call, low, high),
        predicted_clip_bits=sum(predicted) / len(predicted),
        stairs=stairs,
        calls=calls,
        seconds_per_call=per_call,
        low=low,
        high=high,
        clips=clips,
        backend=recorder.sessions[0].backend,
    )


def _two_engines(artifact: Artifact) -> tuple[int, int]:
    bits = artifact.bits(artifact.components[0])
    if len(bits) < 2:
        raise UnsupportedError(
            f"the export has {bits[0]}-bit activations only: there is nothing to switch between",
            available=[f"{b} bits" for b in bits],
            fix=f"export with a recipe that has two, such as w4a4: {artifact.rebuild_command(recipe='w4a4')}",
        )
    return bits[0], bits[-1]


def _check_goal(goal: Goal, steps: int, low: int, high: int, last_high: int) -> None:
    """UnsupportedError, before minutes of recording, for what no recording can reach."""
    if steps < 3:
        raise UnsupportedError(
            f"{steps} steps: δ-GBS runs the first two on the high engine and has nothing left to decide",
            fix="plan with more --steps",
        )

    def least_bits(last: int) -> float:
        return high - free_steps(steps, last) * (high - low) / steps

    least = least_bits(last_high)
    if goal.average_bits is not None and not least <= goal.average_bits <= high:
        fewer = [last for last in range(last_high - 1, -1, -1) if least_bits(last) <= goal.average_bits <= high]
        raise UnsupportedError(
            f"no δ gives {goal.average_bits:g} bits on average",
            available=f"{least:.4g} to {high} with {steps} steps, of which the first two and the last {last_high} are always "
            f"at {high}",
            fix="ask for an average in this range"
            + (f", or give --last-high {fewer[0]}: then {least_bits(fewer[0]):.4g} is the least" if fewer else ""),
        )


def delta_for_seconds(stairs: Sequence[Stair], budget: float, seconds: Callable[[float], float]) -> tuple[float, float]:
    """Return the smallest δ, and so the best quality, that keeps within ``budget`` seconds, and its average bits.

    Args:
        stairs: The averages of bits over δ.
        budget: The seconds of a clip that are allowed.
        seconds: A function that returns the seconds of a clip at an average of bits.

    Raises:
        UnsupportedError: None does; the error says the fastest and the slowest.
    """
    for stair in stairs:
        if seconds(stair.average_bits) <= budget:
            return delta_of_stair(stair), stair.average_bits
    ends = sorted(seconds(stair.average_bits) for stair in (stairs[0], stairs[-1]))
    raise UnsupportedError(
        f"no δ brings the transformer down to {budget:g} s a clip",
        available=f"{ends[0]:.3g} s to {ends[1]:.3g} s on this machine, by the engines' times during the recording",
        fix="allow more time, or use fewer steps, a smaller size, or the step cache",
    )


def _seconds(bits: float, calls: float, per_call: dict[int, float], low: int, high: int) -> float:
    share = (bits - low) / (high - low)
    return calls * (share * per_call[high] + (1 - share) * per_call[low])


def _record(
    generator: Generator, recorder: Recorder, requests: Sequence[GenerateRequest], progress: Progress
) -> tuple[list[ClipRecording], list[GenerateResult]]:
    """Return the recordings, clip by clip and transformer by transformer, and the clips themselves."""
    clips: list[ClipRecording] = []
    results: list[GenerateResult] = []
    steps = sum(request.steps or 0 for request in requests)
    with progress.stage("record", steps, "steps") as stage:
        seen: set[tuple[int, int]] = set()

        def note(record: StepRecord) -> None:
            if (len(results), record.step) not in seen:
                seen.add((len(results), record.step))
                stage.update(1, requests[len(results)].prompt[:40])

        for request in requests:
            recorder.begin(request.prompt, request.seed)
            results.append(generator.generate(request, note))
            clips += recorder.end()
    if short := [clip for clip in clips if len(clip.timesteps) < 3]:
        raise UnsupportedError(
            f"{short[0].component} ran {len(short[0].timesteps)} steps: δ-GBS decides nothing before step 2",
            fix="plan with more --steps",
        )
    return clips, results


def _generate(generator: Generator, request: GenerateRequest, progress: Progress, name: str) -> GenerateResult:
    seen: set[int] = set()
    with progress.stage(name, request.steps or 0, "steps") as stage:

        def note(record: StepRecord) -> None:
            if record.step not in seen:
                seen.add(record.step)
                stage.update(1)

        return generator.generate(request, note)


def _qualities(
    generator: Generator,
    requests: Sequence[GenerateRequest],
    highs: Sequence[GenerateResult],
    delta: float,
    stairs: Sequence[Stair],
    engines: tuple[int, int],
    progress: Progress,
) -> list[Quality]:
    """PSNR of a few δ: all high, a quarter, half and three quarters of the way down, the chosen one, all low."""
    low, high = engines
    wanted = [low + (high - low) * part / 4 for part in (3, 2, 1)]
    nearest = [min(stairs, key=lambda s: abs(s.average_bits - bits)) for bits in wanted]
    deltas = sorted({delta, *(delta_of_stair(s) for s in nearest), delta_of_stair(stairs[-1])} - {0.0})
    references = [
        _generate(generator, replace(request, mode="16"), progress, f"16 bit {number}")
        for number, request in enumerate(requests, 1)
    ]
    scores = [psnr(result.frames, reference.frames) for result, reference in zip(highs, references)]
    points = [Quality(0.0, float(high), sum(scores) / len(scores), len(scores))]
    for number, value in enumerate(deltas, 1):
        scores, bits = [], []
        for request, reference in zip(requests, references):
            name = f"δ {number}/{len(deltas)}"
            result = _generate(generator, replace(request, mode="switch", delta=value), progress, name)
            scores.append(psnr(result.frames, reference.frames))
            bits.append(average_bits([record.bits for record in result.trace]))
        points.append(Quality(value, sum(bits) / len(bits), sum(scores) / len(scores), len(scores)))
    return points


def _schedule(
    artifact: Artifact,
    clips: Sequence[tuple[ClipRecording, PairChanges]],
    bits: float,
    delta: float,
    engines: tuple[int, int],
    last_high: int,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Schedule:
    """Return one schedule for all prompts.

    It is the rule on the mean of the recorded changes, with the δ that gives it the chosen average. The mean is smoother than
    its parts, so that δ differs a little.
    """
    low, high = engines
    chosen: list[int | None] = []
    for component in dict.fromkeys(clip.component for clip, _ in clips):
        own = [changes for clip, changes in clips if clip.component == component]
        mean = {pair: [sum(values) / len(values) for values in zip(*(c[pair] for c in own))] for pair in own[0]}
        stairs = staircase([mean], low, high, last_high=last_high)
        nearest = min(stairs, key=lambda s: (abs(s.average_bits - bits), s.above - s.upto))
        chosen += switch_pairs(mean, delta_of_stair(nearest), low, high, last_high=last_high)[0]
    return Schedule(
        fingerprint=artifact.manifest.source["fingerprint"],
        recipe=artifact.manifest.recipe["name"],
        steps=len(chosen),
        delta=delta,
        bits=tuple(chosen),
        average_bits=average_bits(chosen),
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        components=artifact.components,
    )


def _details(found: Plan, last_high: int, weighting: Weighting) -> dict[str, Any]:
    """Return what was predicted and measured, and the whole staircase, for people and for other averages."""
    return {
        "predicted": {"average_bits": found.predicted_bits, "seconds": found.predicted_seconds},
        "measured": {
            "prompt": found.clips[0].prompt,
            "seed": found.clips[0].seed,
            "average_bits": found.measured_bits,
            "predicted_average_bits": found.predicted_clip_bits,
            "seconds": found.measured_seconds,
            "retries": found.measured_retries,
        },
        "seconds_per_call": {str(bits): seconds for bits, seconds in found.seconds_per_call.items()},
        "calls_per_clip": found.calls,
        "backend": found.backend,
        "last_high": last_high,
        "weighting": weighting,
        "stairs": [[s.above, None if math.isinf(s.upto) else s.upto, s.average_bits] for s in found.stairs],
        "quality": [
            {"delta": q.delta, "average_bits": q.average_bits, "psnr": q.psnr if math.isfinite(q.psnr) else None}
            for q in found.quality
        ],
    }
