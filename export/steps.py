"""The form that a finished step of an export must have in the journal, so that a resumed run can go on from it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from dvdquant.artifact.entries import EngineEntry, LayerEntry
from dvdquant.export.engines import BuildReport

__all__ = ["is_step"]


class _Kept(TypedDict):
    """A batch of tensors stored in 16 bit.

    Attributes:
        nonfinite: The names of the tensors that held NaN or infinities.
        crc: Name -> CRC-32 of the stored tensor.
    """

    nonfinite: list[str]
    crc: dict[str, int]


class _Layer(_Kept):
    """A quantized layer; the fields of :class:`_Kept` are about its packed tensors.

    Attributes:
        entry: Its line of the error table.
    """

    entry: LayerEntry


class _Engine(TypedDict):
    """A built engine.

    Attributes:
        entry: Its entry in the manifest.
        report: ``BuildReport.to_json()``.
    """

    entry: EngineEntry
    report: dict[str, Any]


_KINDS: dict[str, TypeAdapter[Any]] = {
    "layer": TypeAdapter(_Layer),
    "kept": TypeAdapter(_Kept),
    "hessian": TypeAdapter(None),
}
_ENGINE, _REPORT = TypeAdapter(_Engine), TypeAdapter(BuildReport)


def is_step(step: str, data: Any) -> bool:
    """Return whether ``data`` have the form of this step of this exporter.

    Args:
        step: The name of the step in the journal of an interrupted export.
        data: The data of the step, read from that journal.
    """
    owner, _, rest = step.partition(":")
    try:
        if owner == "engine":
            _REPORT.validate_python(_ENGINE.validate_python(data, strict=True)["report"])
        else:
            _KINDS[rest.partition(":")[0]].validate_python(data, strict=True)
    except (KeyError, ValidationError):
        return False
    return True
