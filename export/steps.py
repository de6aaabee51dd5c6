"""What the journal of an export says of a finished step, in the form it must have to be gone on from."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from dvdquant.artifact.manifest import EngineEntry, LayerEntry
from dvdquant.export.engines import BuildReport

__all__ = ["is_step"]


class _Kept(TypedDict):
    """A batch of tensors stored in 16 bit: CRC-32 by name, and the names of those that held NaN or infinities."""

    nonfinite: list[str]
    crc: dict[str, int]


class _Layer(_Kept):
    """A quantized layer, with its line of the error table."""

    entry: LayerEntry


class _Engine(TypedDict):
    """A built engine, with ``BuildReport.to_json()``."""

    entry: EngineEntry
    report: dict[str, Any]


_KINDS: dict[str, TypeAdapter[Any]] = {
    "layer": TypeAdapter(_Layer),
    "kept": TypeAdapter(_Kept),
    "hessian": TypeAdapter(None),
}
_ENGINE, _REPORT = TypeAdapter(_Engine), TypeAdapter(BuildReport)


def is_step(step: str, data: Any) -> bool:
    """Return whether ``data``, read from the journal of an interrupted export, are those of a ``step`` of this exporter."""
    owner, _, rest = step.partition(":")
    try:
        if owner == "engine":
            _REPORT.validate_python(_ENGINE.validate_python(data, strict=True)["report"])
        else:
            _KINDS[rest.partition(":")[0]].validate_python(data, strict=True)
    except (KeyError, ValidationError):
        return False
    return True
