"""The folder of a diffusers pipeline, checked before anything in it is loaded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvdquant.checkpoint import allowed_folders, locate_model, real_path
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.files import read_limited, strict_json
from dvdquant.safetensors_io import read_header

__all__ = ["PIPELINES", "PipelineFolder", "open_pipeline_folder"]

# Text-to-video pipelines, by the family they belong to.
PIPELINES = {
    "WanPipeline": "wan",
    "HunyuanVideoPipeline": "hunyuan-video",
    "CogVideoXPipeline": "cogvideox",
    "LTXPipeline": "ltx-video",
}
INDEX = "model_index.json"
MAX_JSON = 1 << 20
_TRANSFORMER = re.compile(r"transformer(_\d+)?")
_LIBRARIES = ("diffusers", "transformers")
# What a pipeline reads besides the transformers, which the engines replace.
_WANTED = (INDEX, *(f"{part}/*" for part in ("scheduler", "tokenizer*", "text_encoder*", "vae")))
_WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on this machine: its folder, its class, and the folders of its transformers."""

    root: Path
    class_name: str
    transformers: tuple[str, ...]


def open_pipeline_folder(source: str, family: str) -> PipelineFolder:
    """Find and check the pipeline of a model.

    Args:
        source: its folder, or a hub id ``org/name``, of which text encoder, tokenizer, VAE and scheduler are downloaded.
        family: of the export.

    Raises:
        CheckpointError: no pipeline there, parts missing (naming them), weights that are not safetensors, or damaged ones.
        UnsupportedError: a pipeline class without a place here, or of another family.
    """
    root = _find(source)
    index = _read_index(root, source)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise UnsupportedError(
            f"{root} is a pipeline of class {name!r:.100}",
            available=PIPELINES,
            fix="put DvdqTransformer into that pipeline yourself, see dvdquant.deploy.transformer",
        )
    if PIPELINES[name] != family:
        raise UnsupportedError(f"{root} is a {name}, and the export is of family {family}", fix="give its own pipeline")
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    for part, entry in parts.items():
        _check_entry(root, part, entry)
    missing = [
        problem
        for part in parts
        if not _TRANSFORMER.fullmatch(part) and (problem := _problem(root / part, part)) is not None
    ]
    if missing:
        raise CheckpointError(
            f"the pipeline {root} is not complete: {'; '.join(missing)}",
            available=sorted(entry.name for entry in root.iterdir()),
            fix=_how_to_fetch(source),
        )
    return PipelineFolder(root, name, tuple(part for part in parts if _TRANSFORMER.fullmatch(part)))


def _find(source: str) -> Path:
    try:
        return locate_model(source, None, list(_WANTED))
    except CheckpointError as error:
        raise CheckpointError(
            f"the model the export was made from is needed for text, VAE and scheduler, and is not here: {error.what}",
            available=error.available,
            fix="give its folder or hub id with --pipeline, or run where the export was made",
        ) from error


def _read_index(root: Path, source: str) -> dict[str, Any]:
    path = root / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{root} is no diffusers pipeline: it has no {INDEX}",
            available=sorted(entry.name for entry in root.iterdir())[:10],
            fix=f"the transformer alone draws no video; {_how_to_fetch(source)}",
        )
    try:
        index = strict_json(read_limited(path, MAX_JSON))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="download the pipeline again") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is no JSON object", fix="download the pipeline again")
    return index


def _check_entry(root: Path, part: str, entry: list[Any]) -> None:
    """CheckpointError unless a part is a class of diffusers or transformers, in a folder of the pipeline's own."""
    good = len(entry) == 2 and entry[0] in _LIBRARIES and isinstance(entry[1], str) and entry[1].isidentifier()
    if not good or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", part):
        raise CheckpointError(
            f"{root / INDEX}: {part!r:.80} is {entry!r:.120}, and code of a model is never run",
            available=[f"[{library}, <class>]" for library in _LIBRARIES],
        )
    folder = root / part
    if folder.is_dir():
        if scripts := sorted(e.name for e in folder.iterdir() if e.suffix in (".py", ".pyc", ".so")):
            raise CheckpointError(f"{folder} holds code ({scripts[0]!r:.100}), which is never run", fix="remove it")
        allowed = allowed_folders(root)
        for path in (folder, *folder.rglob("*")):
            real_path(path, allowed)


def _problem(folder: Path, part: str) -> str | None:
    """What a part lacks, in words."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return f"{part}/ is missing"
    if part.startswith(_WEIGHTLESS):
        return None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [e.name for e in folder.iterdir() if e.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        return f"{part}/ has {'only pickled weights, which run code when loaded' if pickled else 'no weights'}"
    for path in weights:
        read_header(path)  # names a damaged file, before minutes of loading
    return None


def _how_to_fetch(source: str) -> str:
    local = os.path.isdir(os.path.expanduser(source))
    name = "ORG/NAME" if local else source
    return f"fetch the whole pipeline (hf download {name} --local-dir FOLDER) and give --pipeline FOLDER"
