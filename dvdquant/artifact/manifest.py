"""The manifest of an export: one frozen value, written last. A folder without it is no export."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast, Field, GetPydanticSchema, TypeAdapter, ValidationError

from dvdquant import __version__
from dvdquant.artifact.entries import (
    STRICT,
    BuildEntry,
    CheckedFile,
    ComponentName,
    Digest,
    EngineEntry,
    GraphEntry,
    LayerEntry,
    LoraEntry,
    Sampling,
    Shapes,
    Source,
    Text,
    Verified,
)
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.listed_file import NO_LINKS
from dvdquant.artifact.unfinished import unfinished_export
from dvdquant.errors import OutputError, RecipeError
from dvdquant.recipe import Recipe
from dvdquant.system.files import FileEntry, strict_json
from dvdquant.system.records import brief, first_problem
from dvdquant.text import json_text, shown

__all__ = ["FORMAT_VERSION", "MAX_MANIFEST", "Manifest", "check_relpath", "load_manifest"]

FORMAT_VERSION: Literal[2] = 2
_NAME = re.compile(r"[a-z0-9-]{1,40}")
MAX_MANIFEST = 64 << 20
_SHOWN_PATH = 400  # characters
_RESERVED = re.compile(r"\.(tmp-.*|lock|commit)|manifest\.json")
# An export holds some tens of files and some hundreds of layers, together some thousand values. A hostile manifest must
# not cost its reader minutes and gigabytes: this many values cost about two seconds and 300 MB.
MAX_VALUES = 200_000
MAX_LORAS = 64
MAX_LORA_RANK = 1024
MAX_BUILDS = 256
# Fields that an export has only where there is something to say, so that others stay as they were.
_OPTIONAL = frozenset({"lora", "lora_rank", "sampling", "builds"})


def _check_time(text: str) -> str:
    """Return the text if it is a time in ISO 8601 with its offset from UTC.

    Raises:
        ValueError: It is no such time.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.utcoffset() is None:
        raise ValueError("a time in ISO 8601 with its offset from UTC")
    return text


def _check_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names if there is at least one and none occurs twice.

    Raises:
        ValueError: There is no name, or one occurs twice.
    """
    if not names:
        raise ValueError("the name of one transformer or more")
    if len(set(names)) != len(names):
        raise ValueError("every name once")
    return names


@dataclass(frozen=True)
class Manifest:
    """The content of an export. ``Manifest.from_json(m.to_json()) == m`` holds for every valid manifest.

    Args:
        source: The origin of the weights.
        family: The name of the model family.
        config_sha256: The hash of the transformer's own config.json.
        recipe: ``Recipe.to_json()``.
        shapes: The sizes that the graphs were exported for (frames, height, width, dynamic ranges).
        layers: The quantized layers.
        kept: The names of the layers left in 16 bit.
        nonfinite: The tensors whose NaN and infinities were accepted and stored as 0.
        graphs: The ONNX graphs.
        engines: The engines.
        components: The pipeline folders that were exported.
        files: Relative POSIX path -> hash and size. The transaction fills it in, together with ``export_key``.
        tools: The versions of torch, onnx and so on, and the device that quantized.
        created: The time of the export, in UTC and ISO 8601.
        dvdquant_version: The version of dvdquant that exported.
        export_key: The hash of everything that the export depends on, or an empty text.
        verified: The part that ``--verify`` compared with the checkpoint; None if it did not run.
        lora: The LoRAs in the weights, in the order they were added.
        lora_rank: The rank that graphs and engines reserve for LoRAs which are loaded at run time; 0 where they have no place.
        sampling: The defaults of the runtime; None takes the model's own.
        builds: The engines that are left to be built on the machine that they are for.
        format_version: The version of this format.
    """

    __pydantic_config__ = STRICT

    source: Source
    family: Text
    config_sha256: Digest
    recipe: dict[str, Any]
    shapes: Annotated[dict[str, Any], GetPydanticSchema(lambda _, schema_of: schema_of(Shapes))] = field(
        default_factory=dict
    )
    layers: Annotated[tuple[LayerEntry, ...], FailFast()] = ()
    kept: Annotated[tuple[Text, ...], FailFast()] = ()
    nonfinite: Annotated[tuple[Text, ...], FailFast()] = ()
    graphs: Annotated[tuple[GraphEntry, ...], FailFast()] = ()
    engines: Annotated[tuple[EngineEntry, ...], FailFast()] = ()
    components: Annotated[tuple[ComponentName, ...], Field(max_length=8), AfterValidator(_check_once)] = (
        "transformer",
    )
    files: dict[str, Annotated[FileEntry, GetPydanticSchema(lambda _, schema_of: schema_of(CheckedFile))]] = field(
        default_factory=dict
    )
    tools: dict[Text, Text] = field(default_factory=dict)
    created: Annotated[str, AfterValidator(_check_time)] = field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )
    dvdquant_version: Text = __version__
    export_key: Digest | Literal[""] = ""
    verified: Verified | None = None
    lora: Annotated[tuple[LoraEntry, ...], FailFast(), Field(max_length=MAX_LORAS)] = ()
    lora_rank: Annotated[int, Field(ge=0, le=MAX_LORA_RANK)] = 0
    sampling: Sampling | None = None
    builds: Annotated[tuple[BuildEntry, ...], FailFast(), Field(max_length=MAX_BUILDS)] = ()
    format_version: Literal[2] = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("layers", "kept", "nonfinite", "graphs", "engines", "components", "lora", "builds"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def to_json(self) -> str:
        """Return the manifest as JSON text.

        Raises:
            OutputError: A field is out of form; the error names it.
        """
        data = dataclasses.asdict(self)
        data = {name: value for name, value in data.items() if name not in _OPTIONAL or value}
        try:
            text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
            _check(json.loads(text), text.encode("utf-8", "surrogatepass"))
            return json_text(data, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise OutputError(
                f"the manifest holds a value JSON cannot carry: {error}",
                fix="leave out the option that holds it: numbers have to be finite",
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest from JSON text, the inverse of :meth:`to_json`.

        Args:
            text: The content of a ``manifest.json``, which may come from a stranger.

        Raises:
            OutputError: The text is no manifest. The error names the field, or the version that is needed for a newer
                format.
        """
        try:
            raw = text.encode() if isinstance(text, str) else text
            values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
            if values > MAX_VALUES:
                raise ValueError(f"about {values} values, more than {MAX_VALUES}")
            data = strict_json(raw)
        except ValueError as error:
            raise OutputError(f"the manifest is not valid JSON: {error}", fix="export again") from error
        if not isinstance(data, dict) or type(data.get("format_version")) is not int:
            raise OutputError(
                "the manifest is not one of dvdquant: it has no format_version", fix="pick another folder"
            )
        if data["format_version"] > FORMAT_VERSION:
            raise OutputError(
                f"manifest format {brief(data['format_version'])} is newer than this dvdquant {__version__} can read",
                available=f"format {FORMAT_VERSION}",
                fix=f"install dvdquant {data.get('dvdquant_version', 'that wrote it')!s:.40} or newer",
            )
        if data["format_version"] == 1:
            recipe_name = data["recipe"].get("name") if isinstance(data.get("recipe"), dict) else None
            option = f" --recipe {recipe_name}" if isinstance(recipe_name, str) and _NAME.fullmatch(recipe_name) else ""
            raise OutputError(
                "the export was written in manifest format 1, whose tensors and fields have other names",
                available=f"format {FORMAT_VERSION}",
                fix=f"export the model again, into a new folder: dvdq-export MODEL -o NEW_FOLDER{option}",
            )
        data.setdefault("verified", None)  # older manifests lack it
        recipe = _check(data, raw)
        # The recipe gets its defaults: an older manifest may lack fields that readers of this version look at.
        return cls(**{**data, "recipe": recipe.to_json()})


# -------------------------------------------------------------------------------------------------------- validation


@functools.cache
def _adapter() -> TypeAdapter[Manifest]:
    """Return pydantic's checker of manifests, built once."""
    return TypeAdapter(Manifest)


def _check(data: dict[str, Any], raw: bytes) -> Recipe:
    """Check a manifest and return its recipe.

    Args:
        data: The content of ``raw``.
        raw: The manifest as JSON.

    Raises:
        OutputError: A field is missing, unknown or out of form; the error names the first one.
    """
    names = [each.name for each in dataclasses.fields(Manifest)]
    for name in names:
        if name not in data and name not in _OPTIONAL:
            raise OutputError(f"manifest field {name} is missing", fix="export again")
    if unknown := data.keys() - set(names):
        raise OutputError(f"the manifest has an unknown field {brief(min(unknown))}", available=names)
    files = data["files"]
    if isinstance(files, dict):
        for path in files:
            check_relpath(path)
    try:
        _adapter().validate_json(raw)
    except ValidationError as error:
        problem = first_problem(error, data)
        raise OutputError(
            f"manifest field {problem.field} {problem.state}", available=problem.allowed, fix="export again"
        ) from error
    for table, key in (("graphs", "path"), ("engines", "path"), ("builds", "graph")):
        for index, entry in enumerate(data.get(table, ())):
            if entry[key] not in files:
                raise OutputError(
                    f"manifest field {table}[{index}].{key} is {brief(entry[key])}, which files does not list",
                    available=sorted(files)[:8],
                    fix="export again",
                )
    for entry in data.get("builds", ()):
        check_relpath(entry["engine"])
    try:
        return Recipe.from_json(data["recipe"])
    except RecipeError as error:
        raise OutputError(
            f"manifest field recipe: {error.what}",
            available=error.available,
            fix=error.fix if error.has_own_fix else "export again",
        ) from error


def check_relpath(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path in an export and none of its own bookkeeping.

    Args:
        path: The path, which may come from a stranger.

    Raises:
        OutputError: It is no such path.
    """
    parts = path.split("/") if isinstance(path, str) else []
    bad = (
        not parts
        or any(part in ("", ".", "..") for part in parts)
        or re.search(r"[\x00-\x1f\x7f\\:\ud800-\udfff]", path)
    )
    if bad or len(path) > 1024 or _RESERVED.fullmatch(parts[0]):
        raise OutputError(f"{path!r:.200} is no path of a file in an export", fix="export again")
    return path


# ----------------------------------------------------------------------------------------------------------- loading


def load_manifest(out: str | Path) -> Manifest:
    """Return the manifest of an export folder.

    The function writes nothing, whatever an interrupted export left there. The folder may come from a stranger, and
    only an export into it puts it in order.

    Args:
        out: The folder; links are followed.

    Raises:
        OutputError: There is no folder, no manifest (the folder is no export, or an unfinished one: the error says how
            to finish it), or one that is a link or out of form (the error names the field).
    """
    name = shown(out, _SHOWN_PATH)
    try:
        with Folder.open(Path(out), follow=True) as folder:
            raw = folder.read(MANIFEST, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise unfinished_export(Path(out)) or OutputError(
            f"{name} is not a dvdquant export: it has no {MANIFEST}",
            available=_listing(Path(out)),
            fix="give the folder that dvdq-export wrote, or run dvdq-export first",
        ) from None
    except OSError as error:
        raise OutputError(f"{name}/{MANIFEST} cannot be read: {error.strerror}", fix="give a folder to read") from error
    except ValueError as error:
        fix = NO_LINKS if os.path.islink(Path(out) / MANIFEST) else "give a folder of dvdq-export"
        raise OutputError(f"{name}/{MANIFEST} cannot be read: {error}", fix=fix) from error
    return Manifest.from_json(raw)


def _listing(folder: Path) -> str:
    """Return in words what is in a folder, for an error."""
    name = shown(folder, _SHOWN_PATH)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return f"{name} does not exist"
    except NotADirectoryError:
        return f"{name} is a file"
    except (OSError, ValueError) as error:
        return f"{name} cannot be listed: {error}"
    return ", ".join(names[:8]) or "an empty folder"
