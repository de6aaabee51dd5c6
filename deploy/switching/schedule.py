"""The file schedule.json: the bits of every step, planned once for one model and step count.

Every request with the schedule follows it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, GetPydanticSchema, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from dvdquant import __version__
from dvdquant.artifact.entries import Bits, Text
from dvdquant.artifact.manifest import Manifest
from dvdquant.checkpoint.reader import fingerprint_hint
from dvdquant.errors import OutputError
from dvdquant.system.files import read_limited, strict_json
from dvdquant.system.records import brief, first_problem
from dvdquant.system.whole_file import write_whole
from dvdquant.text import json_text

__all__ = ["FORMAT_VERSION", "Schedule", "average_bits"]

FORMAT_VERSION = 1
MAX_BYTES = 4 << 20  # of the file
MAX_STEPS = 100_000
_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def average_bits(bits: tuple[int | None, ...] | list[int | None] | list[int]) -> float:
    """Return the mean over the computed steps.

    Args:
        bits: The bits of each step. Skipped steps (None) are not counted; at least one step is computed.
    """
    computed = [b for b in bits if b is not None]
    return sum(computed) / len(computed)


@with_config({"extra": "allow", "strict": True})
class _Details(TypedDict, total=False):
    """The fields of ``details`` that later runs read. The rest is for people."""

    stairs: Annotated[
        list[tuple[_Finite, _Finite | None, Annotated[float, Field(ge=0, le=16)]]], Field(min_length=1), FailFast()
    ]
    last_high: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    weighting: Literal["step", "none"]


def default_place(name: str | Path, folder: Path) -> Path:
    """Return where a schedule goes when nobody says it: into the export, or, for one of the hub, into the current folder.

    Args:
        name: The folder, or the name on the hub, as it was given.
        folder: The folder where the export lies.
    """
    given = Path(name)
    return folder / "schedule.json" if folder == given else Path(f"{given.name}-schedule.json")


@dataclass(frozen=True)
class Schedule:
    """The result of dvdq-plan.

    Args:
        fingerprint: ``manifest.source["fingerprint"]`` of the model that it was recorded on.
        recipe: The name of the model's recipe.
        steps: The number of steps of a request, ``len(bits)``.
        delta: The δ that decides the same bits in the switch mode.
        bits: The bits of each step. None skips the step.
        average_bits: The mean over the computed steps.
        prompts: The prompts that were recorded.
        seeds: The seeds that were recorded.
        components: The transformers that it is for. Steps count through all of them.
        details: Predicted and measured figures, for people.
        created: The time of the plan, ISO 8601 in UTC.
        dvdquant_version: The version of dvdquant that planned.
        format_version: The version of the file's format.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    fingerprint: Text
    recipe: Text
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    delta: _Finite
    bits: Annotated[tuple[Bits | None, ...], Field(min_length=1, max_length=MAX_STEPS), FailFast()]
    average_bits: Annotated[float, Field(ge=0, le=16, allow_inf_nan=False)]
    prompts: Annotated[tuple[str, ...], FailFast()] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=-(2**63), lt=2**64)], ...], FailFast()] = ()
    components: Annotated[tuple[Text, ...], FailFast()] = ("transformer",)
    details: Annotated[dict[str, Any], GetPydanticSchema(lambda _, schema_of: schema_of(_Details))] = field(
        default_factory=dict
    )
    created: Text = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    dvdquant_version: Text = __version__
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: str | Path, manifest: Manifest | None = None, steps: int | None = None) -> Schedule:
        """Read a schedule from a file and :meth:`check` it.

        Args:
            path: The file.
            manifest: The manifest of the export that the schedule must be for, or None.
            steps: The number of steps that the schedule must have, or None.

        Raises:
            OutputError: The file does not exist, is no schedule (the error names the field), or is for another model,
                recipe or step count.
        """
        try:
            raw = read_limited(Path(path), MAX_BYTES)
            values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
            if values > 4 * MAX_STEPS:
                raise ValueError(f"about {values} values, more than {4 * MAX_STEPS}")
            data = strict_json(raw)
        except OSError as error:
            raise OutputError(
                f"schedule {path} cannot be read: {error.strerror or error}", fix="write one with dvdq-plan OUT -o PATH"
            ) from error
        except ValueError as error:
            raise OutputError(f"schedule {path} is not valid JSON: {error}", fix="plan again with dvdq-plan") from error
        schedule = cls._from_json(data, raw, path)
        if manifest is not None:
            schedule.check(manifest, steps, path)
        elif steps is not None:
            schedule._check_steps(steps, path)
        return schedule

    @classmethod
    def _from_json(cls, data: Any, raw: bytes, path: str | Path) -> Schedule:
        # 1. The format.
        if not isinstance(data, dict) or type(data.get("format_version")) is not int:
            raise OutputError(f"{path} is no schedule: it has no format_version", fix="write one with dvdq-plan")
        if data["format_version"] != FORMAT_VERSION:
            raise OutputError(
                f"{path} is a schedule of format {brief(data['format_version'])}",
                available=f"format {FORMAT_VERSION}",
                fix="plan again with dvdq-plan",
            )
        # 2. The names of the fields.
        names = [each.name for each in dataclasses.fields(cls)]
        for name in names:
            if name not in data:
                raise OutputError(f"{path}: field {name} is missing", fix="plan again with dvdq-plan")
        if unknown := data.keys() - set(names):
            raise OutputError(f"{path}: unknown field {brief(min(unknown))}", available=names)
        # 3. Their types and ranges.
        try:
            # Details stay as they are in the file. The validator would make tuples of their pairs.
            schedule = dataclasses.replace(_adapter().validate_json(raw), details=data["details"])
        except ValidationError as error:
            problem = first_problem(error, data)
            raise OutputError(
                f"{path}: field {problem.field} {problem.state}",
                available=problem.allowed,
                fix="plan again with dvdq-plan",
            ) from error
        # 4. Fields that must agree with each other.
        if schedule.bits[0] is None:
            raise OutputError(
                f"{path}: field bits begins with null",
                available="a first step that runs",
                fix="plan again with dvdq-plan",
            )
        if len(schedule.bits) != schedule.steps:
            raise OutputError(
                f"{path}: {schedule.steps} steps but bits for {len(schedule.bits)}", fix="plan again with dvdq-plan"
            )
        return schedule

    def check(self, manifest: Manifest, steps: int | None = None, path: str | Path = "the schedule") -> None:
        """Refuse the schedule unless it is for a given export and step count.

        Args:
            manifest: The manifest of the export. Fingerprint, recipe and components must match, and the bits must be
                exported.
            steps: The number of steps that the schedule must have, or None.
            path: The name of the schedule in error messages.

        Raises:
            OutputError: The schedule is for another model, recipe, components or step count, or its bits are not
                exported.
        """
        if self.fingerprint != manifest.source["fingerprint"]:
            older = fingerprint_hint(self.fingerprint, manifest.source["fingerprint"])
            raise OutputError(
                f"{path} was planned on another model (fingerprint {self.fingerprint[:12]}…)"
                + (f", or {older}" if older else ""),
                available=f"this export is of {manifest.source['model']} ({manifest.source['fingerprint'][:12]}…)",
                fix="plan again with dvdq-plan on this export",
            )
        if self.recipe != manifest.recipe["name"]:
            raise OutputError(
                f"{path} was planned with recipe {self.recipe}",
                available=f"this export has {manifest.recipe['name']}",
                fix="plan again with dvdq-plan on this export",
            )
        exported = {graph["act_bits"] for graph in manifest.graphs}
        if missing := sorted({b for b in self.bits if b is not None} - exported):
            raise OutputError(
                f"{path} wants {missing[0]}-bit activations, which the export lacks",
                available=[f"{b} bits" for b in sorted(exported)],
                fix="plan again with dvdq-plan on this export",
            )
        if self.components != manifest.components:
            raise OutputError(
                f"{path} was planned for {', '.join(self.components)!s:.200}",
                available=f"this export has {', '.join(manifest.components)}",
                fix="plan again with dvdq-plan on this export",
            )
        if steps is not None:
            self._check_steps(steps, path)

    def _check_steps(self, steps: int, path: str | Path) -> None:
        if steps != self.steps:
            raise OutputError(
                f"{path} was planned for {self.steps} steps, and {steps} were asked for",
                fix=f"generate with {self.steps} steps, or plan again with dvdq-plan --steps {steps}",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the schedule as JSON values."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the schedule to ``path``, whole or not at all.

        Args:
            path: The file to write.

        Raises:
            OutputError: The file cannot be written.
            ResourceError: There is no room for the file.
        """
        write_whole(Path(path), (json_text(self.to_json(), indent=1) + "\n").encode())


@functools.cache
def _adapter() -> TypeAdapter[Schedule]:
    return TypeAdapter(Schedule)
