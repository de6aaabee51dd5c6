"""The manifest of an export: one frozen value, written last, without which a folder is no export."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from . import __version__
from .errors import OutputError, RecipeError
from .files import FileEntry, hash_file, open_regular, read_limited, strict_json
from .recipe import Recipe
from .text import json_text

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "LayerEntry",
    "Manifest",
    "Source",
    "check_relpath",
    "hash_file",
    "load_manifest",
    "read_verified",
    "verify_files",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESERVED = re.compile(r"\.(tmp-.*|lock|commit)|manifest\.json")


class Source(TypedDict):
    """Where the weights came from: the MODEL argument, the diffusers class and ``Checkpoint.fingerprint()``."""

    model: str
    class_name: str
    fingerprint: str


class LayerEntry(TypedDict):
    """One quantized layer. ``members`` are the checkpoint's layers merged into it, ``rotation_block`` the Hadamard
    block (1 = none). The errors are relative mean squares, null for an all-zero weight: of the rotated weight, or of the
    outputs on predicted inputs where the recipe looks at inputs (:func:`dvdquant.recipe.error_name`)."""

    name: str
    members: list[str]
    features_in: int
    features_out: int
    rotation_block: int
    relative_mse: float | None
    relative_mse_minmax: float | None


class GraphEntry(TypedDict):
    """One ONNX graph: its path in the export, the target it is for and its activation bits."""

    path: str
    target: str
    act_bits: int


class EngineEntry(TypedDict):
    """One engine: ``sm`` as ``["8.9", "12.0"]``, ``realization`` a short name and ``executes`` words for what really
    runs, ``versions`` of the builder, ``shapes`` its profile."""

    path: str
    backend: str
    sm: list[str]
    act_bits: int
    realization: str
    executes: str
    onnx_sha256: str
    versions: dict[str, str]
    shapes: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What an export holds. ``Manifest.from_json(m.to_json()) == m`` for every valid one.

    Args:
        config_sha256: hash of the transformer's own config.json.
        recipe: ``Recipe.to_json()``.
        shapes: the sizes the graphs were exported for (frames, height, width, dynamic ranges).
        files: relative POSIX path to hash and size; filled in by the transaction, together with ``export_key``.
        kept: names of the layers left in 16 bit. nonfinite: tensors whose NaN and infinities were accepted, and stored
            as 0. components: the pipeline folders exported.
        tools: versions of torch, onnx and so on. created: UTC, ISO 8601.
    """

    source: Source
    family: str
    config_sha256: str
    recipe: dict[str, Any]
    shapes: dict[str, Any] = field(default_factory=dict)
    layers: tuple[LayerEntry, ...] = ()
    kept: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    graphs: tuple[GraphEntry, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    components: tuple[str, ...] = ("transformer",)
    files: dict[str, FileEntry] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    dvdquant_version: str = __version__
    export_key: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("layers", "kept", "nonfinite", "graphs", "engines", "components"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def to_json(self) -> str:
        """The manifest as JSON text; OutputError names the field that is out of form."""
        data = dataclasses.asdict(self)
        _check(data)
        try:
            return json_text(data, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise OutputError(f"the manifest holds a value JSON cannot carry: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Inverse of :meth:`to_json`; OutputError names the field, or the version needed for a newer format."""
        try:
            data = strict_json(text.encode() if isinstance(text, str) else text)
        except ValueError as error:
            raise OutputError(f"the manifest is not valid JSON: {error}", fix="export again") from error
        if not isinstance(data, dict) or not _is_int(data.get("format_version")):
            raise OutputError(
                "the manifest is not one of dvdquant: it has no format_version", fix="pick another folder"
            )
        if data["format_version"] > FORMAT_VERSION:
            raise OutputError(
                f"manifest format {data['format_version']} is newer than this dvdquant {__version__} can read",
                available=f"format {FORMAT_VERSION}",
                fix=f"install dvdquant {data.get('dvdquant_version', 'that wrote it')!s:.40} or newer",
            )
        _check(data)
        return cls(**data)


# -------------------------------------------------------------------------------------------------------- validation

Check = Callable[[Any], bool]


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_error(value: Any) -> bool:
    return value is None or ((_is_int(value) or isinstance(value, float)) and value >= 0)


def _is_bits(value: Any) -> bool:
    return _is_int(value) and value in (4, 6, 8)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_versions(value: Any) -> bool:
    return _is_dict(value) and all(map(_is_str, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_str, value))


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None
    except ValueError:
        return False


def _is_dicts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_dict, value))


_FIELDS: dict[str, Check] = {
    "source": _is_dict,
    "family": _is_str,
    "config_sha256": _is_hash,
    "recipe": _is_dict,
    "shapes": _is_dict,
    "layers": _is_dicts,
    "kept": _is_names,
    "nonfinite": _is_names,
    "graphs": _is_dicts,
    "engines": _is_dicts,
    "components": _is_names,
    "files": _is_dict,
    "tools": _is_versions,
    "created": _is_time,
    "dvdquant_version": _is_str,
    "export_key": lambda value: value == "" or _is_hash(value),
    "format_version": lambda value: value == FORMAT_VERSION,
}
_SOURCE: dict[str, Check] = {"model": _is_str, "class_name": _is_str, "fingerprint": _is_str}
_LAYER: dict[str, Check] = {
    "name": _is_str,
    "members": _is_names,
    "features_in": _is_count,
    "features_out": _is_count,
    "rotation_block": _is_count,
    "relative_mse": _is_error,
    "relative_mse_minmax": _is_error,
}
_GRAPH: dict[str, Check] = {"path": _is_str, "target": _is_str, "act_bits": _is_bits}
_ENGINE: dict[str, Check] = {
    "path": _is_str,
    "backend": _is_str,
    "sm": _is_names,
    "act_bits": _is_bits,
    "realization": _is_str,
    "executes": _is_str,
    "onnx_sha256": _is_hash,
    "versions": _is_versions,
    "shapes": _is_dict,
}
_FILE: dict[str, Check] = {"sha256": _is_hash, "bytes": lambda value: _is_int(value) and value >= 0}


def _check(data: dict[str, Any]) -> None:
    """OutputError on the first field that is missing, unknown (entries may carry more) or out of form."""
    _check_fields("", data, _FIELDS)
    if unknown := sorted(data.keys() - _FIELDS.keys()):
        raise OutputError(f"the manifest has an unknown field {unknown[0]!r:.100}", available=_FIELDS)
    _check_fields("source.", data["source"], _SOURCE)
    for table, checks in (("layers", _LAYER), ("graphs", _GRAPH), ("engines", _ENGINE)):
        for index, entry in enumerate(data[table]):
            _check_fields(f"{table}[{index}].", entry, checks)
    for path, entry in data["files"].items():
        check_relpath(path)
        if not isinstance(entry, dict) or entry.keys() != _FILE.keys():
            raise OutputError(f"manifest field files[{path!r:.200}] is {entry!r:.80}", available=_FILE)
        _check_fields(f"files[{path!r:.200}].", entry, _FILE)
    for table in ("graphs", "engines"):
        for index, entry in enumerate(data[table]):
            if entry["path"] not in data["files"]:
                raise OutputError(
                    f"manifest field {table}[{index}].path is {entry['path']!r:.200}, which files does not list",
                    available=sorted(data["files"])[:8],
                )
    try:
        Recipe.from_json(data["recipe"])
    except RecipeError as error:
        raise OutputError(f"manifest field recipe: {error.what}", available=error.available, fix=error.fix) from error


def _check_fields(prefix: str, entry: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for name, check in checks.items():
        if name not in entry:
            raise OutputError(f"manifest field {prefix}{name} is missing", fix="export again")
        if not check(entry[name]):
            raise OutputError(f"manifest field {prefix}{name} is {entry[name]!r:.80}", fix="export again")


def check_relpath(path: str) -> str:
    """``path`` if it is a plain relative POSIX path in an export and none of its own bookkeeping; else OutputError."""
    parts = path.split("/") if isinstance(path, str) else []
    bad = (
        not parts
        or any(part in ("", ".", "..") for part in parts)
        or re.search(r"[\x00-\x1f\x7f\\:\ud800-\udfff]", path)
    )
    if bad or len(path) > 1024 or _RESERVED.fullmatch(parts[0]):
        raise OutputError(f"{path!r:.200} is no path of a file in an export", fix="export again")
    return path


# ------------------------------------------------------------------------------------------------- loading, verifying


def load_manifest(out: str | Path) -> Manifest:
    """The manifest of an export folder; first completes a commit that was killed half-way.

    Raises:
        OutputError: no folder, no manifest (then it is no export), or one that is out of form, naming the field.
    """
    folder = Path(out)
    path = folder / MANIFEST
    if not path.is_file() and (folder / ".commit").exists():
        from .transaction import recover  # it imports this module

        recover(folder)
    try:
        raw = read_limited(path, MAX_MANIFEST)
    except FileNotFoundError:
        from .unfinished import unfinished_export  # likewise

        raise unfinished_export(folder) or OutputError(
            f"{folder} is not a dvdquant export: it has no {MANIFEST}",
            available=_listing(folder),
            fix="give the folder that dvdq-export wrote, or run dvdq-export first",
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(raw)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) or "an empty folder"


def verify_files(
    out: str | Path,
    manifest: Manifest,
    only: Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compare the files of an export, or those of ``only``, with the SHA-256 of the manifest.

    Raises:
        OutputError: naming up to five files that are missing, of another size, changed, or reached through a link.
    """
    names = list(manifest.files) if only is None else list(only)
    problems = []
    for name in names:
        if problem := _problem(Path(out), manifest, name, progress):
            problems.append(problem)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise OutputError(f"{out} does not match its manifest: {'; '.join(problems[:5])}{more}", fix="export again")


def _entry(manifest: Manifest, name: str) -> FileEntry:
    if name not in manifest.files:
        raise OutputError(f"the manifest does not list {name!r:.200}", available=sorted(manifest.files)[:8])
    return manifest.files[name]


def _problem(out: Path, manifest: Manifest, name: str, progress: Callable[[int], None] | None) -> str | None:
    entry, path = _entry(manifest, name), out / check_relpath(name)
    try:
        if os.path.realpath(path) != os.path.join(os.path.realpath(out), name):
            return f"{name} is reached through a symbolic link"
        fd, size = open_regular(path)
        os.close(fd)
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if hash_file(path, progress)["sha256"] != entry["sha256"]:
            return f"{name} was changed (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, OutputError) as error:
        return f"{name} cannot be read ({error})"
    return None


def read_verified(out: str | Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file, hashed *as read*: what is returned is what the manifest vouches for, with no second open
    in which the file could be swapped. For engines, whose deserialization runs code.

    Raises:
        OutputError: as :func:`verify_files`.
    """
    entry, path = _entry(manifest, name), Path(out) / check_relpath(name)
    try:
        linked = os.path.realpath(path) != os.path.join(os.path.realpath(out), name)
        raw = b"" if linked else read_limited(path, entry["bytes"])
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} does not match its manifest: {error}", fix="export again") from error
    if linked or hashlib.sha256(raw).hexdigest() != entry["sha256"]:
        how = "is reached through a symbolic link" if linked else "was changed (its SHA-256 differs)"
        raise OutputError(f"{path} {how}: refusing to use it", fix="export again")
    return raw
