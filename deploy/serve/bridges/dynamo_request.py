"""A request of NVIDIA Dynamo's frontend in the names of ``/v1/videos``. Nothing here imports Dynamo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvdquant.errors import ShapeError, UnsupportedError
from dvdquant.system.records import brief

__all__ = ["fields_of"]


def fields_of(request: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the fields of a request in the names of :class:`.VideoRequest`, and whether it wants an address.

    Args:
        request: Dynamo's request. NVIDIA's extensions are in ``nvext``; what the frontend does not know, such as ``mode`` and
            ``delta``, is in ``extra_args.media_passthrough``.

    Raises:
        UnsupportedError: It asks for another container than MP4, or for a stream.
        ShapeError: A part of it is out of form.
    """
    fields = {name: value for name, value in request.items() if value is not None and not name.startswith("_")}
    for name in ("user", "model"):
        fields.pop(name, None)
    form = fields.pop("response_format", "url")
    if form not in ("url", "b64_json"):
        raise ShapeError(f"response_format is {brief(form)}", available="url, b64_json")
    if (container := fields.pop("output_format", "mp4")) != "mp4":
        raise UnsupportedError(f"output_format is {brief(container)}", available="mp4", fix="leave it out")
    if fields.pop("stream", False):
        raise UnsupportedError(
            "a clip is not streamed", fix="leave stream out; the answer comes when the clip is whole"
        )
    more = _part(fields.pop("extra_args", {}), "extra_args").get("media_passthrough", {})
    for name, part in (("nvext", fields.pop("nvext", {})), ("extra_args", more)):
        for key, value in _part(part, name).items():
            if value is None or key == "annotations":
                continue
            if key in fields and fields[key] != value:
                raise ShapeError(f"{brief(key)} is given twice, once in {name}", fix="give one of the two")
            fields[key] = value
    return fields, form == "url"


def _part(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ShapeError(f"{name} is {brief(value)}", available="an object")
    return value
