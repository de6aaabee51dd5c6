"""What is asked of a generation and what comes back; the sizes an export can make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dvdquant.clashes import Clash, refuse_clashes
from dvdquant.deploy.generation.images import ImageSource, image_text
from dvdquant.deploy.number_checks import is_number, is_whole
from dvdquant.deploy.switching.defaults import CACHE_POLICIES, LAST_HIGH, WEIGHTINGS, CachePolicy
from dvdquant.deploy.switching.gbs import Stair, Weighting, delta_of_stair
from dvdquant.errors import OutputError, ShapeError, UnsupportedError
from dvdquant.model.families import Axis, Sizes
from dvdquant.system.records import brief

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dvdquant.deploy.artifact import Artifact
    from dvdquant.deploy.switching.controller import StepRecord
    from dvdquant.deploy.switching.schedule import Schedule

__all__ = [
    "DISTILLED",
    "MAX_PROMPT",
    "GenerateRequest",
    "GenerateResult",
    "VideoSize",
    "check_request",
    "default_fps",
    "delta_for_average",
    "resolve_size",
]

MAX_PROMPT = 4096  # characters
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
# Guidance-distilled: the scale is an input of the transformer, and there is no unconditional branch.
DISTILLED = ("hunyuan-video",)


@dataclass(frozen=True)
class GenerateRequest:
    """One clip.

    Args:
        prompt: Text, or the words of a prompt table.
        negative_prompt: What the clip shall not show. None is the model's own, which is mostly empty.
        steps: The denoising steps. None is the schedule's count, or the model's own.
        seed: The seed of the first noise, which is drawn on the CPU, so that it does not depend on the device.
        guidance: The scale of classifier-free guidance, or the embedded one of a distilled model. None is the model's own.
        mode: ``switch`` (4 or 8 activation bits by δ-GBS, step by step), ``planned`` (the bits of ``schedule``), ``a4``,
            ``a8`` (fixed), or ``16`` (the original checkpoint in PyTorch).
        delta: The δ of ``switch``. None is :data:`DEFAULT_DELTA`.
        last_high: How many last steps of ``switch`` run on the high engine, whatever δ says. None is the commands' default; 0
            is the published rule.
        weighting: ``step`` weighs the changes of ``switch`` by the length of the steps, ``none`` is the published rule. None is
            the commands' default.
        schedule: The schedule of ``planned``.
        cache: The threshold of the step cache. None computes every step, unless ``cache_policy`` is given.
        cache_policy: What predicts which steps can be skipped, see :mod:`dvdquant.deploy.switching.forecasts`; it brings a
            threshold of its own. None is the family's.
        height: The height in pixels. None is what the export was tuned for.
        width: The width in pixels, as ``height``.
        num_frames: The number of frames, as ``height``.
        image: The first frame, of models that draw from images: a path, the bytes of a file, or an image of Pillow.
        last_image: The last frame, as ``image``.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    mode: str = "switch"
    delta: float | None = None
    last_high: int = LAST_HIGH
    weighting: Weighting = WEIGHTINGS[0]
    schedule: Schedule | None = None
    cache: float | None = None
    cache_policy: CachePolicy | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    image: ImageSource | None = None
    last_image: ImageSource | None = None

    @property
    def guided(self) -> bool:
        """Return whether the guidance takes a second branch, of a model that is not distilled."""
        return (self.guidance or 0) > 1

    def to_json(self) -> dict[str, Any]:
        """Return the request for the trace, with the schedule as its own JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "schedule"}
        images = {name: image_text(fields[name]) for name in ("image", "last_image")}
        return {**fields, **images, "schedule": None if self.schedule is None else dataclasses.asdict(self.schedule)}


@dataclass
class GenerateResult:
    """One clip and how it was made.

    Args:
        request: The request, with steps, guidance and size filled in.
        frames: uint8 [F, H, W, 3].
        latents: The last latents, fp32 on the CPU, in the model's own layout.
        trace: A record for every call of the transformer, in order.
        summary: What the StepRunner sums up of them.
        executed: Backend, device, dtype and what runs at each bit-width, in words.
        seconds: The time of the whole clip, text encoder and VAE included, loading not.
        components: The records by transformer, of a model with two.
    """

    request: GenerateRequest
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    trace: list[StepRecord]
    summary: dict[str, Any]
    executed: dict[str, Any]
    seconds: float
    components: dict[str, list[StepRecord]] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSize:
    """The size of one clip.

    Args:
        frames: The number of frames.
        height: The height in pixels.
        width: The width in pixels.
        latent: Frames, height and width in latent units.
    """

    frames: int
    height: int
    width: int
    latent: tuple[int, int, int]


def check_request(request: GenerateRequest, artifact: Artifact) -> None:
    """Refuse a request that no export, or not this one, can make.

    Args:
        request: The request of a clip.
        artifact: The opened export.

    Raises:
        ShapeError: A number is out of range, or a prompt is empty or too long.
        UnsupportedError: The export has no graph for the mode.
    """
    prompts: list[tuple[str, Any]] = [("prompt", request.prompt)]
    if request.negative_prompt is not None:
        prompts.append(("negative prompt", request.negative_prompt))
    for name, text in prompts:
        if not isinstance(text, str):
            raise ShapeError(f"the {name} is {brief(text)}", available="text")
        if name == "prompt" and not text.strip():
            raise ShapeError("the prompt is empty", fix='describe the clip: --prompt "..."')
        if len(text) > MAX_PROMPT or "\0" in text:
            raise ShapeError(f"the {name} has {len(text)} characters", available=f"up to {MAX_PROMPT}, no NUL")
    ranges: tuple[tuple[str, float | None, float, float], ...] = (
        ("--steps", request.steps, 1, MAX_STEPS),
        ("--seed", request.seed, 0, MAX_SEED),
        ("--guidance", request.guidance, 0, 1000),
        ("--delta", request.delta, 0, math.inf),
        ("--last-high", request.last_high, 0, MAX_STEPS),
        ("--cache", request.cache, 0, 1e6),
        ("--height", request.height, 1, 1 << 15),
        ("--width", request.width, 1, 1 << 15),
        ("--num-frames", request.num_frames, 1, 1 << 15),
    )
    for name, value, low, high in ranges:
        if value is None:
            continue
        real = name in ("--guidance", "--delta", "--cache")
        if not (is_number(value) if real else is_whole(value)):
            what = "a number" if real else "a whole number"
            raise ShapeError(f"{name} is {brief(value)}", available=f"{what} from {low} up")
        if not low <= value <= high:
            raise ShapeError(
                f"{name} is {value}", available=f"{low} to {high}" if high < math.inf else f"{low} or more"
            )
    if request.weighting not in WEIGHTINGS:
        raise ShapeError(f"--weighting is {brief(request.weighting)}", available=WEIGHTINGS)
    if request.cache_policy is not None and request.cache_policy not in CACHE_POLICIES:
        raise ShapeError(f"--cache-policy is {brief(request.cache_policy)}", available=CACHE_POLICIES)
    _check_options(request)
    for component in artifact.components:
        _check_mode(request, artifact, component)


def _check_options(request: GenerateRequest) -> None:
    """UnsupportedError for fields that contradict each other, naming the one to leave out."""
    mode = request.mode
    clashes = [
        Clash(
            request.delta is not None and mode != "switch",
            f"delta switches engines, and mode {mode!r:.40} does not",
        ),
        Clash(
            request.schedule is not None and mode != "planned",
            f"schedule says the bits of each step, and mode {mode!r:.40} does not follow it",
        ),
    ]
    for name in ("cache", "cache_policy"):
        given = getattr(request, name) is not None
        clashes += [
            Clash(given and mode == "planned", f"schedule says which steps are skipped, so {name} does not apply"),
            Clash(
                given and mode == "16",
                f"{name} skips steps of the engines, and mode '16' runs the original checkpoint",
            ),
        ]
    refuse_clashes(clashes)


def _check_mode(request: GenerateRequest, artifact: Artifact, component: str) -> None:
    bits = artifact.bits(component)
    modes = [*(f"a{b}" for b in bits), *(("switch", "planned") if len(bits) > 1 else ()), "16"]
    if request.mode not in modes:
        made = " and ".join(f"a{b}" for b in bits) or "no graph"
        raise UnsupportedError(
            f"mode {request.mode!r} needs a graph this export lacks: {component} has {made}",
            available=modes,
            fix=f"pick one of these, or export with a recipe that has both: {artifact.rebuild_command(recipe='w4a4')}",
        )
    if request.mode == "planned":
        if request.schedule is None:
            raise UnsupportedError("mode 'planned' without a schedule", fix="give --schedule, made by dvdq-plan")
        if request.steps not in (None, request.schedule.steps):
            raise UnsupportedError(
                f"the schedule is for {request.schedule.steps} steps, {request.steps} were asked for",
                fix=f"use --steps {request.schedule.steps}, or plan again: dvdq-plan {artifact.root} --steps {request.steps}",
            )


def default_fps(frames: int) -> int:
    """Return the frames per second at which a clip lasts about five seconds, 4 at least and 24 at most.

    Args:
        frames: The number of frames.
    """
    return min(24, max(4, round(frames / 5)))


def delta_for_average(schedule: Schedule, bits: float) -> float:
    """Return the δ whose average over the planned prompts was ``bits``, or the nearest to it.

    Args:
        schedule: A schedule that holds the staircase of δ.
        bits: The average of bits that is asked for.

    Raises:
        ShapeError: The average is outside the range.
        OutputError: The schedule does not say which δ gives which average.
    """
    try:
        stairs = [
            Stair(float(above), math.inf if upto is None else float(upto), float(average))
            for above, upto, average in schedule.details["stairs"]
        ]
        least, most = min(s.average_bits for s in stairs), max(s.average_bits for s in stairs)
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(
            "the schedule does not say which δ gives which average", fix="plan again with dvdq-plan"
        ) from error
    if not least <= bits <= most:
        raise ShapeError(
            f"no δ gives {bits:g} bits on average", available=f"{least:.2f} to {most:.2f} in this schedule"
        )
    return delta_of_stair(min(stairs, key=lambda s: (abs(s.average_bits - bits), s.above - s.upto)))


def resolve_size(
    request: GenerateRequest,
    sizes: Sizes,
    scale: tuple[int, int, int],
    patch: tuple[int, int, int],
    *,
    causal: bool,
) -> VideoSize:
    """Return the size of the clip in pixels, checked against the profile of the export.

    Args:
        request: The request, whose ``num_frames``, ``height`` and ``width`` are pixels, or None for the sizes that the export was
            tuned for.
        sizes: The sizes of the graphs, in latents.
        scale: The pixels of a latent unit (time, height, width).
        patch: The latent units that the transformer takes at once (time, height, width).
        causal: Whether the VAE makes one latent of the first frame and one of every ``scale[0]`` more, so
            frames = (latent − 1)·scale + 1.

    Raises:
        ShapeError: A size is outside the profile, or no multiple of scale and patch. The error names the profile in pixels, and
            how to widen it.
    """
    names = ("--num-frames", "--height", "--width")
    asked = (request.num_frames, request.height, request.width)
    pixels, latent = [], []
    for name, value, axis, step, units in zip(names, asked, (sizes.frames, sizes.height, sizes.width), scale, patch):
        offset = 1 if causal and name == "--num-frames" else 0
        size, unit = _resolve_axis(name, value, axis, step, units, offset)
        pixels.append(size)
        latent.append(unit)
    return VideoSize(pixels[0], pixels[1], pixels[2], (latent[0], latent[1], latent[2]))


def _near(value: int, axis: Axis, patch: int, to_pixels: Callable[[int], int]) -> str:
    """Return the nearest sizes below and above that the export serves, in the unit of the option."""
    served = [to_pixels(size) for size in range(-(-axis.min // patch) * patch, axis.max + 1, patch)]
    served = served or [to_pixels(axis.opt)]
    below = [size for size in served if size < value][-1:]
    return " or ".join(str(size) for size in [*below, *[size for size in served if size > value][:1]])


def _resolve_axis(name: str, value: int | None, axis: Axis, step: int, patch: int, offset: int) -> tuple[int, int]:
    def to_pixels(size: int) -> int:
        return (size - offset) * step + offset

    if value is None:
        return to_pixels(axis.opt), axis.opt
    profile = f"{to_pixels(axis.min)} to {to_pixels(axis.max)}" if axis.dynamic else str(to_pixels(axis.opt))
    profile += f" in steps of {step * patch}" if axis.dynamic and step * patch > 1 else ""
    if (value - offset) % step:
        near = _near(value, axis, patch, to_pixels)
        raise ShapeError(
            f"{name} is {value}, which the VAE does not divide",
            available=f"{near}; the export's profile is {profile}",
            fix="use one of these sizes",
        )
    unit = (value - offset) // step + offset
    if not axis.min <= unit <= axis.max:
        # dvdq-export takes multiples of the patch only.
        wider = ":".join(str(to_pixels(end)) for end in axis.covering(unit, patch))
        option = f"{name} {wider}" if offset or step > 1 else f"a --latent that covers it ({wider} for this axis)"
        raise ShapeError(
            f"{name} is {value}, outside the profile this export was made for",
            available=profile,
            fix=f"pick a size within it, or export again with {option}",
        )
    if unit % patch:
        near = _near(value, axis, patch, to_pixels)
        raise ShapeError(
            f"{name} is {value}, no multiple of the {step * patch} that the transformer's patch takes",
            available=f"{near}; the export's profile is {profile}",
            fix="use one of these sizes",
        )
    return value, unit
