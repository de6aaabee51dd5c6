"""The manifest of an export: one frozen value, written last. A folder without it is no export."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    FailFast,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict  # typing's own from Python 3.12 on

from dvdquant import __version__
from dvdquant.artifact.folder import Folder
from dvdquant.artifact.layout import MANIFEST
from dvdquant.artifact.listed_file import LINKED, NO_LINKS, ListedFileError, open_listed, require_digest
from dvdquant.artifact.unfinished import unfinished_export
from dvdquant.errors import OutputError, RecipeError, ResourceError
from dvdquant.recipe import Recipe
from dvdquant.system.files import FileEntry, hash_descriptor, hash_file, read_all, strict_json
from dvdquant.system.memory import memory_limit
from dvdquant.system.records import brief, first_problem
from dvdquant.text import json_text, shown

__all__ = [
    "FORMAT_VERSION",
    "BuildEntry",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "LayerEntry",
    "LoraEntry",
    "Manifest",
    "Measured",
    "Sampling",
    "Source",
    "Verified",
    "check_relpath",
    "hash_file",
    "load_manifest",
    "model_name",
    "read_verified",
    "source_of",
    "verify_files",
]

FORMAT_VERSION: Literal[2] = 2
_NAME = re.compile(r"[a-z0-9-]{1,40}")
MAX_MANIFEST = 64 << 20
_SHOWN_PATH = 400  # characters
_RESERVED = re.compile(r"\.(tmp-.*|lock|commit)|manifest\.json")
# An export holds some tens of files and some hundreds of layers, together some thousand values. A hostile manifest must
# not cost its reader minutes and gigabytes: this many values cost about two seconds and 300 MB.
MAX_VALUES = 200_000
MAX_STEPS = 1000
MAX_LORAS = 64
MAX_LORA_RANK = 1024
MAX_BUILDS = 256
MAX_GUIDANCE = 1000
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


def _check_model(text: str) -> str:
    """Return the text if it holds no NUL.

    Raises:
        ValueError: It holds one.
    """
    if "\0" in text:
        raise ValueError("a text without NUL")
    return text


def _check_order(sizes: list[int]) -> list[int]:
    """Return [MIN, OPT, MAX] if they are in ascending order.

    Raises:
        ValueError: They are not.
    """
    if sorted(sizes) != sizes:
        raise ValueError("[MIN, OPT, MAX] with MIN ≤ OPT ≤ MAX")
    return sizes


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


_STRICT: ConfigDict = {"extra": "forbid", "strict": True}
_OPEN: ConfigDict = {"extra": "allow", "strict": True}  # an entry may have more fields than this version reads

Text = Annotated[str, Field(max_length=4096)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Bits = Annotated[int, Field(ge=4, le=8, multiple_of=2)]
ErrorShare = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
ComputeCapability = Annotated[str, Field(pattern="^[0-9]{1,2}[.][0-9]$")]
# The same names that the exporter's --subfolder takes.
ComponentName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
AxisSizes = Annotated[
    list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=3, max_length=3), AfterValidator(_check_order)
]


ProfileShapes = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=8)]],
    Field(min_length=3, max_length=3),
]


@with_config(_OPEN)
class _Shapes(TypedDict):
    """The sizes of the graphs, ``families.Sizes.to_json()``, and the dtype of activations.

    Attributes:
        frames: [MIN, OPT, MAX] of frames, in latent units.
        height: [MIN, OPT, MAX] of the height, in latent units.
        width: [MIN, OPT, MAX] of the width, in latent units.
        text_tokens: The length of the text embedding in tokens.
        batch: The number of samples in one call.
        dtype: The dtype of activations.
    """

    frames: AxisSizes
    height: AxisSizes
    width: AxisSizes
    text_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    batch: Annotated[int, Field(ge=1, le=1 << 16)]
    dtype: Literal["bf16", "fp16"]


@with_config(_STRICT)
class _File(TypedDict):
    """The checked form of :class:`dvdquant.system.files.FileEntry`.

    Attributes:
        sha256: The SHA-256 as 64 lower-case hex digits.
        bytes: The size in bytes.
    """

    sha256: Digest
    bytes: Size


@with_config(_OPEN)
class Source(TypedDict):
    """The origin of the weights.

    Attributes:
        model: The MODEL argument of the export.
        class_name: The diffusers class.
        fingerprint: ``Checkpoint.fingerprint()``.
        pipeline: The folder or hub id that text encoder, VAE and scheduler come from, where it is not ``model``.
    """

    model: Annotated[Text, AfterValidator(_check_model)]
    class_name: Text
    fingerprint: Text
    pipeline: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    transformer_2: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    config: NotRequired[Annotated[Text, AfterValidator(_check_model)]]
    format: NotRequired[Text]
    precision: NotRequired[Text]
    notes: NotRequired[Annotated[list[Text], Field(max_length=100)]]


@with_config(_OPEN)
class LoraEntry(TypedDict):
    """One LoRA that was fused into the weights.

    Attributes:
        component: The transformer that it went to.
        path: The file as it was then.
        sha256: The digest of the file.
        scale: Its strength.
        format: The format of its keys.
        layers: The number of its layers that were found in the transformer, which is all of them.
    """

    component: ComponentName
    path: Annotated[Text, AfterValidator(_check_model)]
    sha256: Digest
    scale: Annotated[float, Field(allow_inf_nan=False)]
    format: Text
    layers: Count


@with_config(_STRICT)
class Sampling(TypedDict):
    """The sampling that the model was distilled for, where the exporter was told: the defaults of the runtime.

    Attributes:
        steps: The number of denoising steps.
        guidance: The guidance scale.
    """

    steps: NotRequired[Annotated[int, Field(ge=1, le=MAX_STEPS)]]
    guidance: NotRequired[Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]]


@with_config(_OPEN)
class LayerEntry(TypedDict):
    """One quantized layer.

    The errors are relative mean squares, null for an all-zero weight. They are errors of the rotated weight, or errors
    of the outputs on predicted inputs if the recipe looks at inputs (:func:`dvdquant.recipe.error_name`).

    Attributes:
        name: The dotted name of the layer.
        members: The checkpoint's layers that are merged into it.
        features_in: K, the number of input channels.
        features_out: N, the number of output channels.
        rotation_block: The size of the Hadamard block in channels; 1 means no rotation.
        relative_mse: The error of the stored weight.
        relative_mse_minmax: The same error of the solver ``minmax`` (clip range at the extremes), for comparison.
        weight_mse: The error of the rotated weight over all rows, which ``--verify`` computes again. It is recorded if
            the recipe looks at inputs; older manifests lack it.
    """

    name: Text
    members: list[Text]
    features_in: Count
    features_out: Count
    rotation_block: Count
    relative_mse: ErrorShare | None
    relative_mse_minmax: ErrorShare | None
    weight_mse: NotRequired[ErrorShare | None]


@with_config(_STRICT)
class Verified(TypedDict):
    """The extent of the last ``--verify``.

    Attributes:
        dvdquant: The version of dvdquant that verified.
        layers: The number of quantized layers that were compared with the checkpoint.
        rows: The number of their rows.
        kept: The number of tensors in 16 bit that were compared with the checkpoint.
        graphs: The graphs that ran and were judged.
    """

    dvdquant: Text
    layers: Count
    rows: Count
    kept: Size
    graphs: list[Text]


@with_config(_OPEN)
class GraphEntry(TypedDict):
    """One ONNX graph.

    Attributes:
        path: The path of the file in the export.
        target: The target that it is for.
        act_bits: The bits of its activations: 4, 6 or 8.
    """

    path: Text
    target: Text
    act_bits: Bits


@with_config(_STRICT)
class Measured(TypedDict):
    """What the machine that built an engine found when it ran it.

    Attributes:
        gpu: The name of its GPU.
        milliseconds: The median time of one pass at the sizes that the engine is tuned for.
        passes: The number of passes that were timed.
        relative_error: The distance of its output from that of the PyTorch session, relative to the norm of the latter;
            null if that session did not fit into memory.
    """

    gpu: Text
    milliseconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    passes: Count
    relative_error: ErrorShare | None


@with_config(_OPEN)
class EngineEntry(TypedDict):
    """One engine.

    Attributes:
        path: The path of the file in the export.
        backend: The library that built it.
        sm: The compute capabilities that it runs on, as ``["8.9", "12.0"]``.
        act_bits: The bits of the graph's activations: 4, 6 or 8.
        precision: A short name for the way in which the quantized layers run.
        executes: The same in words: the arithmetic that really runs.
        onnx_sha256: The SHA-256 of the graph that it was built from.
        versions: The versions of the builder.
        shapes: Its profile of sizes.
        attention: The number of attentions that run as one kernel, by the type of their queries; older manifests lack it.
        fused_layers: The number of quantized layers that one node computes with the residual, norm and modulation, or GELU,
            before them; older manifests lack it.
        measured: What ``dvdq-build`` found when it ran the engine; only where it could.
    """

    path: Text
    backend: Text
    sm: Annotated[list[ComputeCapability], Field(max_length=100)]
    act_bits: Bits
    precision: Text
    executes: Text
    onnx_sha256: Digest
    versions: dict[Text, Text]
    shapes: dict[str, Any]
    attention: NotRequired[dict[Text, Annotated[int, Field(ge=0, lt=2**31)]]]
    fused_layers: NotRequired[Annotated[int, Field(ge=0, lt=2**20)]]
    measured: NotRequired[Measured]


@with_config(_OPEN)
class BuildEntry(TypedDict):
    """One engine that is to be built on another machine, by ``dvdq-build``.

    Attributes:
        engine: The path that the engine gets in the export.
        component: The transformer that it is of.
        graph: The path of the graph that its builder reads.
        backend: The library that builds it.
        sm: The compute capabilities that it is for.
        act_bits: The bits of the graph's activations: 4, 6 or 8.
        precision: A short name for the way in which the quantized layers run.
        executes: The same in words.
        onnx_sha256: The SHA-256 of the QuantLinear graph that ``graph`` was made from.
        profile: The [MIN, OPT, MAX] shapes of every input; null if all sizes are fixed.
        fp8_attentions: The number of attentions in the graph that have to become one FP8 kernel each.
        fused_layers: The number of layers in the graph that are fused with what comes before them; older manifests lack it.
        builder_bytes: The memory that the builder is estimated to take.
        held_bytes: The memory for weights that a session with this engine is estimated to hold.
        optimization_level: The builder's effort, 0 to 5; null means the builder's own.
        workspace_gib: The builder's workspace limit; null means the builder's own.
        command: The line that builds it by NVIDIA's own tool; empty if there is none.
    """

    engine: Text
    component: ComponentName
    graph: Text
    backend: Literal["tensorrt", "tensorrt_rtx"]
    sm: Annotated[list[ComputeCapability], Field(min_length=1, max_length=100)]
    act_bits: Bits
    precision: Literal["int8", "int4-weight-only", "nvfp4", "plugin"]
    executes: Text
    onnx_sha256: Digest
    profile: Annotated[dict[Text, ProfileShapes], Field(max_length=100)] | None
    fp8_attentions: Annotated[int, Field(ge=0, lt=2**20)]
    fused_layers: NotRequired[Annotated[int, Field(ge=0, lt=2**20)]]
    builder_bytes: Size
    held_bytes: Size
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None
    workspace_gib: Annotated[float, Field(gt=0, le=1024)] | None
    command: Annotated[str, Field(max_length=16384)]


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

    __pydantic_config__ = _STRICT

    source: Source
    family: Text
    config_sha256: Digest
    recipe: dict[str, Any]
    shapes: Annotated[dict[str, Any], GetPydanticSchema(lambda _, schema_of: schema_of(_Shapes))] = field(
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
    files: dict[str, Annotated[FileEntry, GetPydanticSchema(lambda _, schema_of: schema_of(_File))]] = field(
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


# ------------------------------------------------------------------------------------------------- loading, verifying


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


def source_of(source: Source, component: str) -> tuple[str, str]:
    """Return (MODEL, the component to open in it) of a transformer of an export.

    Args:
        source: What the manifest records of the source.
        component: The name of the transformer.
    """
    if component == "transformer_2" and "transformer_2" in source:
        return source["transformer_2"], "transformer"
    return source["model"], component


def model_name(model: str) -> str:
    """Return the last two parts of a hub id or path.

    Args:
        model: The hub id or path, with "/" or backslashes.
    """
    parts = [part for part in model.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts[-2:]) or model


def verify_files(
    out: str | Path,
    manifest: Manifest,
    only: Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compare the files of an export with the SHA-256 of the manifest.

    Args:
        out: The export folder.
        manifest: Its manifest.
        only: The paths of the files to compare; None means all of them.
        progress: A function that gets the size in bytes of every block read.

    Raises:
        OutputError: Files are missing, of another size, changed, or reached through a link. The error names up to five.
    """
    names = list(manifest.files) if only is None else list(only)
    problems = []
    for name in names:
        entry = _entry(manifest, name)
        try:
            with open_listed(Path(out), check_relpath(name), entry) as descriptor:
                require_digest(hash_descriptor(descriptor, progress)["sha256"], entry)
        except ListedFileError as error:
            problems.append(f"{name} {error.reason}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        linked = all(problem.endswith(LINKED) for problem in problems)
        raise OutputError(
            f"{out} does not match its manifest: {'; '.join(problems[:5])}{more}",
            fix=NO_LINKS if linked else "export again",
        )


def _entry(manifest: Manifest, name: str) -> FileEntry:
    """Return the manifest's entry of a file.

    Raises:
        OutputError: The manifest does not list it.
    """
    if name not in manifest.files:
        raise OutputError(f"the manifest does not list {name!r:.200}", available=sorted(manifest.files)[:8])
    return manifest.files[name]


def read_verified(out: str | Path, manifest: Manifest, name: str) -> bytes:
    """Return the content of one file, hashed *as read*.

    The manifest vouches for exactly the bytes that are returned: there is no second open before which the file could be
    swapped. It is for engines, whose deserialization runs code.

    Args:
        out: The export folder.
        manifest: Its manifest.
        name: The path of the file in the export.

    Raises:
        OutputError: The file is missing, of another size, changed, or reached through a link.
        ResourceError: The file is larger than the free memory.
    """
    entry, path = _entry(manifest, name), Path(out) / check_relpath(name)
    if entry["bytes"] > (free := memory_limit()):
        raise ResourceError(
            f"{path} is to be read into memory: {entry['bytes'] / 1e9:.2f} GB",
            available=f"{free / 1e9:.2f} GB are free",
            fix="free memory, or use a machine with more",
        )
    with open_listed(Path(out), name, entry) as descriptor:
        raw = read_all(os.dup(descriptor), entry["bytes"])
        require_digest(hashlib.sha256(raw).hexdigest(), entry)
    return raw
