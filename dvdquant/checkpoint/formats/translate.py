"""From what a file holds to a checkpoint of diffusers: prefixes off, scales to their weights, names, and the config.

No weight is read. Every step takes tensors by name and gives tensors by name; what a tensor is made of goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dvdquant.checkpoint.formats.blocks import FEW_BITS
from dvdquant.checkpoint.formats.hunyuan_video import HUNYUAN_VIDEO
from dvdquant.checkpoint.formats.ltx import LTX
from dvdquant.checkpoint.formats.scaled_fp8 import pair_scales
from dvdquant.checkpoint.formats.scheme import Piece, Scheme
from dvdquant.checkpoint.formats.shapes import NEED_CONFIG, Shapes
from dvdquant.checkpoint.formats.stored import ShardTensor, Stored, rows
from dvdquant.checkpoint.formats.wan import WAN, is_original_config
from dvdquant.checkpoint.untrusted import MAX_JSON
from dvdquant.errors import CheckpointError
from dvdquant.system.files import strict_json
from dvdquant.system.recognize import PREFIXES, recognize_tensors
from dvdquant.text import shown

__all__ = [
    "DIFFUSERS_FOLDER",
    "SCHEMES",
    "SourceFormat",
    "Translated",
    "is_transformer",
    "precision_text",
    "translate",
]

SCHEMES: tuple[Scheme, ...] = (WAN, HUNYUAN_VIDEO, LTX)
OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "vocoder.")
"""Parts of files that hold a whole pipeline."""
_PRECISIONS = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8 (e4m3)",
    "F8_E5M2": "fp8 (e5m2)",
}


DIFFUSERS_FOLDER = "diffusers folder"


@dataclass(frozen=True)
class SourceFormat:
    """The format of a checkpoint's source, as it was recognised.

    Args:
        layout: The kind of file or folder, and whose names it has.
        precision: What the weights are stored as, the most bytes first.
        notes: What was left out, assumed or applied, a sentence each.
        file: Name of the single file, "" for a folder.
        is_diffusers: Whether diffusers reads the same source by itself.
        diffusers_folder: Whether it is a folder whose tensors have the names of diffusers, as that of a pipeline has.
        few_bits: The block types of 4 and 5 bits that its weights are stored in.
    """

    layout: str = DIFFUSERS_FOLDER
    precision: str = ""
    notes: tuple[str, ...] = ()
    file: str = ""
    is_diffusers: bool = True
    diffusers_folder: bool = True
    few_bits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Translated:
    """A checkpoint by the names of diffusers.

    Args:
        config: The transformer's config.
        tensors: Where each tensor lies, by the name of diffusers.
        source: What was recognised.
    """

    config: dict[str, Any]
    tensors: dict[str, ShardTensor]
    source: SourceFormat


def is_transformer(names: Mapping[str, Any] | list[str]) -> bool:
    """Return whether these names are those of a transformer that is supported, by anybody's naming.

    Args:
        names: The names of the tensors.
    """
    bare = _without_prefix(dict.fromkeys(names))[0]
    return any(scheme.has_original(bare) or scheme.has_diffusers(bare) for scheme in SCHEMES)


def translate(
    tensors: Mapping[str, ShardTensor],
    config: Mapping[str, Any] | None,
    *,
    place: str,
    read: Callable[[ShardTensor], bytes],
    metadata: Mapping[str, str] | None = None,
    layout: str = DIFFUSERS_FOLDER,
    file: str = "",
) -> Translated:
    """Return the checkpoint of diffusers that a file or a folder holds.

    Args:
        tensors: The tensors by their names in the file.
        config: The config.json beside it or given with it, of diffusers or of the authors; None where there is none.
        place: The file or folder, for errors.
        read: A function that returns the bytes of a small tensor.
        metadata: The metadata of the file's header.
        layout: The layout, as :class:`SourceFormat` has it.
        file: The file, as :class:`SourceFormat` has it.

    Raises:
        CheckpointError: It is no transformer that is supported, is quantized in a way that is not read, or its config cannot
            be told.
    """
    metadata = metadata or {}
    # 1. What cannot be read is told by the names in the file.
    _refuse_foreign(tensors, place)
    # 2. The transformer alone, each weight with its scale.
    bare, prefix, left_out = _without_prefix(tensors)
    notes = []
    if left_out:
        parts = sorted({name.partition(".")[0] for name in left_out})
        notes.append(f"{len(left_out)} tensors of other parts ({', '.join(parts)}) are left out")
    scaled = pair_scales(bare, metadata, place, read)
    # 3. Whose names, and of which family.
    scheme, original = _scheme(scaled, place, config)
    renamed: Mapping[str, ShardTensor] = scaled
    in_folder = not file
    if scheme is not None and original:
        renamed = _renamed(scaled, scheme, place)
        layout = f"{'folder' if in_folder else layout} with the names of {scheme.title}'s authors"
    elif file:
        layout += " with the names of diffusers"
    if prefix:
        layout += f", prefix {prefix}"
    # 4. The config.
    found = dict(config or {})
    if scheme is not None and original and config is not None and not is_original_config(found):
        if found.get("_class_name") != scheme.class_name:
            raise CheckpointError(
                f"{place} holds a {scheme.title} transformer, and the config.json is of {shown(found.get('_class_name'))}",
                available=scheme.class_name,
                fix=f"{NEED_CONFIG}, or move the file away from another's config.json",
            )
        notes.append("the config comes from config.json")
    if scheme is not None and (config is None or is_original_config(found)):
        shapes = Shapes({name: info.shape for name, info in renamed.items()}, place, f"a {scheme.title} transformer")
        found, assumed = scheme.config(shapes, found if config is not None else _metadata_config(metadata, place))
        notes += [f"assumed: {text}" for text in assumed]
    found.pop("quantization_config", None)
    precision = precision_text(renamed.values())
    has_scales = any(_has_scale(info) for info in renamed.values())
    if has_scales:
        notes.append("scales are applied in fp32")
    elif any(info.dtype.startswith("F8") for info in renamed.values()):
        notes.append(
            "the fp8 weights have no scales: they are taken as they are, and 8-bit weights are quantized again"
        )
    few = _few_bits(renamed.values())
    if few:
        notes.append(
            f"warning: {', '.join(few)} keep 4 or 5 bits of a weight, and these are quantized again: expect more loss than "
            "from a file of 8 or 16 bits"
        )
    source = SourceFormat(
        layout,
        precision,
        tuple(notes),
        file,
        is_diffusers=in_folder and not original and not prefix and not has_scales,
        diffusers_folder=in_folder and not original,
        few_bits=few,
    )
    return Translated(found, dict(renamed), source)


def _few_bits(tensors: Iterable[ShardTensor]) -> tuple[str, ...]:
    """Return the block types of 4 and 5 bits among tensors, each once."""
    kinds = {info.stored.blocks for info in tensors if info.stored is not None}
    return tuple(kind for kind in FEW_BITS if kind in kinds)


def precision_text(tensors: Any) -> str:
    """Return what the bytes of tensors are, such as ``fp8 (e4m3) with scales, bf16``; the most bytes first.

    Args:
        tensors: The tensors.
    """
    sizes: dict[str, int] = {}
    for info in tensors:
        stored = info.stored
        code = info.dtype if stored is None else stored.blocks or stored.dtype
        words = _PRECISIONS.get(code, code) + (" with scales" if _has_scale(info) else "")
        sizes[words] = sizes.get(words, 0) + info.nbytes
    return ", ".join(sorted(sizes, key=lambda words: -sizes[words])[:6])


def _has_scale(info: ShardTensor) -> bool:
    """Return whether a tensor is stored in few bits with a scale beside it."""
    return info.stored is not None and info.stored.scale is not None


def _refuse_foreign(names: Mapping[str, Any], place: str) -> None:
    if foreign := recognize_tensors(names):
        first = [shown(name, 100) for _, name in zip(range(3), names)]
        raise CheckpointError(f"{place} holds {foreign.what}", available=first, fix=foreign.fix)


def _without_prefix(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """(tensors of the transformer, the prefix that they had, names of other parts)."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            break
    else:
        return dict(tensors), "", []
    mine = {name.removeprefix(prefix): info for name, info in tensors.items() if not name.startswith(OTHER_PARTS)}
    if len(mine) + sum(name.startswith(OTHER_PARTS) for name in tensors) != len(tensors):
        return dict(tensors), "", []  # one name with and without the prefix: what is unexpected is said later
    return mine, prefix, [name for name in tensors if name.startswith(OTHER_PARTS)]


def _scheme(
    tensors: Mapping[str, ShardTensor], place: str, config: Mapping[str, Any] | None
) -> tuple[Scheme | None, bool]:
    """Return (the family, whether the names are its authors'); None for a folder of diffusers of another family."""
    for scheme in SCHEMES:
        original = scheme.has_original(tensors)
        if not original and not scheme.has_diffusers(tensors):
            continue
        if (config is None or original) and (what := scheme.relative(tensors)):
            raise CheckpointError(
                f"{place} is a {what} transformer, which is not supported",
                available=[each.title for each in SCHEMES],
                fix="give a model of one of these families",
            )
        return scheme, original
    if config is None or is_original_config(config):
        raise CheckpointError(
            f"{place} holds no transformer of a family whose config its shapes tell",
            available=[scheme.title for scheme in SCHEMES],
            fix=f"give one of these; if it has the names of diffusers, {NEED_CONFIG}",
        )
    return None, False


def _renamed(tensors: Mapping[str, ShardTensor], scheme: Scheme, place: str) -> dict[str, ShardTensor]:
    pieces = scheme.pieces({name: info.shape for name, info in tensors.items()})
    renamed: dict[str, ShardTensor] = {}
    for name, info in tensors.items():
        for piece in pieces[name]:
            if piece.name in renamed:
                raise CheckpointError(
                    f"{place} holds {shown(piece.name)!r} twice: {shown(renamed[piece.name].name)!r} and {shown(name)!r}",
                    fix="download the file again",
                )
            renamed[piece.name] = _piece(info, piece, place)
    return renamed


def _piece(info: ShardTensor, piece: Piece, place: str) -> ShardTensor:
    try:
        made = rows(info, *piece.rows) if piece.rows else info
        if piece.swapped:
            if not made.shape or made.shape[0] % 2:
                raise ValueError(f"has no halves: its shape is {list(made.shape)}")
            made = replace(made, stored=replace(made.stored or Stored(made.dtype), swapped=True))
    except ValueError as error:
        raise CheckpointError(f"{place}: {shown(info.name)!r} {error!s:.300}", fix="download the file again") from error
    return made


def _metadata_config(metadata: Mapping[str, str], place: str) -> dict[str, Any]:
    """Return the config in the header of a file, {} where there is none."""
    text = metadata.get("config")
    if text is None:
        return {}
    try:
        if len(text) > MAX_JSON:
            raise ValueError(f"{len(text)} characters")
        value = strict_json(text.encode())
    except ValueError as error:
        raise CheckpointError(
            f"{place}: the config in its header cannot be read: {error!s:.200}", fix=NEED_CONFIG
        ) from error
    return value if isinstance(value, dict) else {}
