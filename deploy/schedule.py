"""schedule.json: the bits of every step, planned once and followed by every request, tied to one model and step count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvdquant import __version__
from dvdquant.errors import OutputError
from dvdquant.files import read_limited, strict_json
from dvdquant.manifest import Manifest
from dvdquant.text import json_text
from dvdquant.whole_file import write_whole

__all__ = ["FORMAT_VERSION", "Schedule", "average_bits"]

FORMAT_VERSION = 1
MAX_BYTES = 4 << 20


def average_bits(bits: tuple[int | None, ...] | list[int | None] | list[int]) -> float:
    """Mean over the computed steps; skipped ones (None) are not counted."""
    computed = [b for b in bits if b is not None]
    return sum(computed) / len(computed)


@dataclass(frozen=True)
class Schedule:
    """What dvdq-plan found.

    Args:
        fingerprint: ``manifest.source["fingerprint"]`` of the model it was recorded on. recipe: name of its recipe.
        steps: of a request, ``len(bits)``. delta: the δ that decides so, for the switch mode.
        bits: per step; None skips it. average_bits: mean over the computed steps.
        prompts, seeds: what was recorded.
        components: the transformers it is for; steps count through all of them.
        details: predicted and measured figures, for people.
    """

    fingerprint: str
    recipe: str
    steps: int
    delta: float
    bits: tuple[int | None, ...]
    average_bits: float
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    components: tuple[str, ...] = ("transformer",)
    details: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    dvdquant_version: str = __version__
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: str | Path, manifest: Manifest | None = None, steps: int | None = None) -> Schedule:
        """Read ``path`` and :meth:`check` it.

        Raises:
            OutputError: no such file, not a schedule (naming the field), of another model, recipe or step count.
        """
        try:
            data = strict_json(read_limited(Path(path), MAX_BYTES))
        except OSError as error:
            raise OutputError(
                f"schedule {path} cannot be read: {error.strerror or error}", fix="write one with dvdq-plan OUT -o PATH"
            ) from error
        except ValueError as error:
            raise OutputError(f"schedule {path} is not valid JSON: {error}", fix="plan again with dvdq-plan") from error
        schedule = cls._from_json(data, path)
        if manifest is not None:
            schedule.check(manifest, steps, path)
        elif steps is not None:
            schedule._check_steps(steps, path)
        return schedule

    @classmethod
    def _from_json(cls, data: Any, path: str | Path) -> Schedule:
        if not isinstance(data, dict) or not isinstance(data.get("format_version"), int):
            raise OutputError(f"{path} is no schedule: it has no format_version", fix="write one with dvdq-plan")
        if data["format_version"] != FORMAT_VERSION:
            raise OutputError(
                f"{path} is a schedule of format {data['format_version']!r:.20}",
                available=f"format {FORMAT_VERSION}",
                fix="plan again with dvdq-plan",
            )
        for name, valid in _FIELDS.items():
            if name not in data or not valid(data[name]):
                found = f"is {data[name]!r:.80}" if name in data else "is missing"
                raise OutputError(f"{path}: field {name} {found}", fix="plan again with dvdq-plan")
        if unknown := sorted(data.keys() - _FIELDS.keys()):
            raise OutputError(f"{path}: unknown field {unknown[0]!r:.80}", available=_FIELDS)
        if len(data["bits"]) != data["steps"]:
            raise OutputError(
                f"{path}: {data['steps']} steps but bits for {len(data['bits'])}", fix="plan again with dvdq-plan"
            )
        lists = {name: tuple(data[name]) for name in ("bits", "prompts", "seeds", "components")}
        return cls(**{**data, **lists})

    def check(self, manifest: Manifest, steps: int | None = None, path: str | Path = "the schedule") -> None:
        """OutputError unless this is for ``manifest``'s model and recipe, its bits exported, and for ``steps`` steps."""
        if self.fingerprint != manifest.source["fingerprint"]:
            raise OutputError(
                f"{path} was planned on another model (fingerprint {self.fingerprint[:12]}…)",
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
        """As JSON values."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write to ``path``, whole or not at all. OutputError or ResourceError if that fails."""
        write_whole(Path(path), (json_text(self.to_json(), indent=1) + "\n").encode())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value) and value >= 0


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_bits(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) < 100_000 and value[0] is not None and all(map(_is_choice, value))


def _is_choice(value: Any) -> bool:
    return value is None or (_is_int(value) and value in (4, 6, 8))


_FIELDS: Mapping[str, Any] = {
    "fingerprint": _is_str,
    "recipe": _is_str,
    "steps": lambda value: _is_int(value) and value > 0,
    "delta": _is_number,
    "bits": _is_bits,
    "average_bits": _is_number,
    "prompts": lambda value: isinstance(value, list) and all(map(_is_str, value)),
    "components": lambda value: isinstance(value, list) and all(map(_is_str, value)),
    "seeds": lambda value: isinstance(value, list) and all(map(_is_int, value)),
    "details": lambda value: isinstance(value, dict),
    "created": _is_str,
    "dvdquant_version": _is_str,
    "format_version": _is_int,
}
