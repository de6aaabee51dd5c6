"""The body of a request for a clip: its fields, read from JSON or a form, and what they mean for the generator.

Nothing here imports torch, except :func:`generate_request`, which the workers call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dvdquant.clashes import Clash, refuse_clashes
from dvdquant.deploy.serve.request.pictures import PICTURES
from dvdquant.deploy.switching.defaults import CachePolicy
from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.records import brief
from dvdquant.text import shown

if TYPE_CHECKING:
    from dvdquant.artifact.manifest import Manifest
    from dvdquant.deploy.generation.images import ImageSource
    from dvdquant.deploy.generation.request import GenerateRequest
    from dvdquant.deploy.serve.settings import ModelSource

__all__ = ["VideoRequest", "frames_of_seconds", "generate_request", "read_request"]

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def _no_surrogates(value: Any) -> Any:
    """Refuse text that no file and no database takes."""
    if isinstance(value, str) and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise ValueError("half a surrogate pair is no character")
    return value


_Text = Annotated[str, BeforeValidator(_no_surrogates)]


# Fields of a request that ask for a way to choose the width of a step.
_ABOUT_SWITCHING = {"mode", "delta", "last_high", "weighting", "schedule", "average_bits"}


class VideoRequest(BaseModel):
    """Describe a clip. A field that is missing or null takes the model's own value."""

    model_config = ConfigDict(extra="forbid", strict=True, title="VideoRequest")

    prompt: _Text = Field(min_length=1, description="What to draw.")
    model: _Text | None = Field(
        None, max_length=256, description="A model of `/v1/models`; needed if there are several."
    )
    size: _Text | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="`WIDTHxHEIGHT` in pixels.")
    seconds: Annotated[str, Field(max_length=16)] | float | None = Field(
        None, description="Length of the clip. The nearest number of frames that the model takes is drawn."
    )
    negative_prompt: _Text | None = Field(None, description="What guidance leads away from.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=1000, description="Scale of classifier-free guidance.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Seed of the first noise; 0 if missing.")
    num_frames: int | None = Field(None, ge=1, le=1 << 15, description="Frames; instead of `seconds`.")
    fps: float | None = Field(None, ge=0.1, le=240, description="Frames per second of the file.")
    width: int | None = Field(None, ge=1, le=1 << 15, description="Pixels; instead of `size`.")
    height: int | None = Field(None, ge=1, le=1 << 15, description="Pixels; instead of `size`.")
    mode: Literal["switch", "a4", "a8"] | None = Field(
        None,
        description="`switch`: 4 or 8 activation bits, chosen at each step, the default where the export has both. "
        "`a4`, `a8`: always that.",
    )
    delta: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="A step runs on 4 bits while the output has changed by less; 0 is always 8 bits.",
    )
    last_high: int | None = Field(
        None, ge=0, le=1000, description="The last steps that run on 8 bits, whatever delta says."
    )
    weighting: Literal["step", "none"] | None = Field(None, description="How a change counts for `delta`.")
    schedule: _Text | None = Field(
        None, max_length=128, description="A schedule of `/v1/models`; its steps are followed."
    )
    average_bits: float | None = Field(
        None, ge=0, le=16, description="Switch with the delta that had this average in the schedule."
    )
    cache: float | None = Field(
        None, ge=0, le=1e6, description="Skip a step if the predicted error since the last computed one is below this."
    )
    cache_policy: CachePolicy | None = Field(
        None, description="What predicts that error; without `cache` it brings a threshold of its own."
    )


def read_request(fields: Mapping[str, Any], *, form: bool) -> dict[str, Any]:
    """Return the fields of a request, checked one by one; ``size`` has become width and height.

    Args:
        fields: The fields as they came, without :mod:`.pictures`. Null stands for a missing one.
        form: True if they came as a form, where numbers are text.

    Raises:
        ShapeError: A field is out of form or range.
        UnsupportedError: A field is unknown, or two contradict each other.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if form:
        given = {name: value for name, value in given.items() if value != ""}
    known = VideoRequest.model_fields
    if unknown := sorted(set(given) - set(known)):
        raise UnsupportedError(
            f"the field {shown(unknown[0], 80)!r} is unknown",
            available=sorted({*known, *PICTURES}),
            fix="leave it out; it would have no effect",
        )
    if bad := next((name for name, value in given.items() if isinstance(value, bool)), None):
        raise ShapeError(f"{bad} is {given[bad]}", available=known[bad].description)
    try:
        checked = VideoRequest.model_validate(given, strict=not form)
    except ValidationError as error:
        raise _problem(error) from None
    values = checked.model_dump(exclude_none=True)
    _take_size(values)
    _check_pairs(values)
    return values


def _problem(error: ValidationError) -> ShapeError:
    """Return the first problem of a body in words."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "the body"
    if first["type"] == "missing":
        return ShapeError(f"{name} is missing", available="text", fix='describe the clip: {"prompt": "..."}')
    known = VideoRequest.model_fields.get(name)
    about = "" if known is None else f"; {known.description}"
    return ShapeError(
        f"{name} is {brief(first['input'])}: {first['msg'].lower()}{about}",
        fix=f"correct {name}; /docs lists every field",
    )


def _take_size(values: dict[str, Any]) -> None:
    if (size := values.pop("size", None)) is None:
        return
    match = _SIZE.fullmatch(size)
    assert match is not None  # the pattern of the field
    width, height = int(match[1]), int(match[2])
    for name, value in (("width", width), ("height", height)):
        if values.setdefault(name, value) != value:
            raise UnsupportedError(f"size is {size} and {name} is {values[name]}", fix="give one of the two")
        if not 1 <= value <= 1 << 15:
            raise ShapeError(f"size is {size}", available="1x1 to 32768x32768")


def _check_pairs(values: dict[str, Any]) -> None:
    fixed = values.get("mode", "switch") != "switch"
    refuse_clashes(
        [
            Clash(
                "num_frames" in values and "seconds" in values, "num_frames and seconds both say how long the clip is"
            ),
            Clash(
                "average_bits" in values and "delta" in values,
                "average_bits says which delta to switch with, so delta does not apply",
            ),
            Clash(
                "schedule" in values and "delta" in values,
                "schedule says the bits of each step, so delta does not apply",
            ),
            Clash("schedule" in values and fixed, "schedule says the bits of each step, and mode does not apply"),
            Clash("average_bits" in values and fixed, "average_bits switches engines, and mode does not"),
        ]
    )


def frames_of_seconds(seconds: str | float, fps: float, frames: Mapping[str, int]) -> int:
    """Return the number of frames that is nearest to a length.

    Args:
        seconds: The length.
        fps: Frames per second.
        frames: ``min``, ``max`` and ``step`` of what the model takes.

    Raises:
        ShapeError: It is no length, or none that the model can make: more than a step of frames outside of its range.
    """
    try:
        length = float(seconds)
    except ValueError:
        length = math.nan
    low, high, step = frames["min"], frames["max"], frames["step"]
    available = f"{low / fps:g}" + (f" to {high / fps:g}" if high > low else "") + f" s at {fps:g} frames per second"
    if not math.isfinite(length) or not 0 < length <= 1e4:
        raise ShapeError(f"seconds is {brief(seconds)}", available=available)
    wanted = length * fps
    nearest = low + step * round((min(max(wanted, low), high) - low) / step)
    if abs(nearest - wanted) > max(step, fps / 2):
        raise ShapeError(f"seconds is {length:g}", available=available, fix="ask for such a length, or change fps")
    return nearest


def generate_request(
    values: Mapping[str, Any],
    manifest: Manifest,
    source: ModelSource,
    pictures: Mapping[str, ImageSource] | None = None,
) -> GenerateRequest:
    """Return the request for the generator.

    Args:
        values: From :func:`read_request`, with ``seconds`` already turned into ``num_frames``.
        manifest: The manifest of the export.
        source: The model, with its schedules.
        pictures: The pictures, by their names in requests.

    Raises:
        ShapeError: No delta gives the average that was asked for.
        UnsupportedError: The schedule is unknown.
        OutputError: The schedule cannot be read or is for another model.
    """
    from dvdquant.deploy.generation.request import GenerateRequest, delta_for_average
    from dvdquant.deploy.switching.schedule import Schedule

    names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    same = (
        "negative_prompt",
        "seed",
        "num_frames",
        "height",
        "width",
        "mode",
        "delta",
        "last_high",
        "weighting",
        "cache",
        "cache_policy",
    )
    fields = {names.get(name, name): values[name] for name in (*names, *same) if name in values}
    fields |= {PICTURES[name]: source_of for name, source_of in (pictures or {}).items()}
    widths = {graph["act_bits"] for graph in manifest.graphs}
    if len(widths) == 1 and not values.keys() & _ABOUT_SWITCHING:
        fields["mode"] = f"a{min(widths)}"  # an export of one width has nothing to switch between
    if "schedule" not in values and "average_bits" not in values:
        return GenerateRequest(values["prompt"], **fields)
    path = _schedule_file(values, source)
    schedule = Schedule.load(path, manifest, fields.get("steps"))
    fields.setdefault("steps", schedule.steps)
    if "average_bits" not in values:
        return GenerateRequest(values["prompt"], **{**fields, "mode": "planned"}, schedule=schedule)
    fields["delta"] = delta_for_average(schedule, values["average_bits"])
    fields.setdefault("last_high", schedule.details.get("last_high", 0))
    fields.setdefault("weighting", schedule.details.get("weighting", "none"))
    return GenerateRequest(values["prompt"], **{**fields, "mode": "switch"})


def _schedule_file(values: Mapping[str, Any], source: ModelSource) -> Path:
    name = values.get("schedule", "schedule")
    if name not in source.schedules:
        raise UnsupportedError(
            f"{source.name} has no schedule {shown(name, 80)!r}",
            available=sorted(source.schedules) or "none",
            fix="make one with dvdq-plan, and start the server with --schedule FILE",
        )
    return Path(source.schedules[name])
