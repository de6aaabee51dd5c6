"""The folder of a diffusers pipeline, which is checked before anything in it is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dvdquant.checkpoint.diffusers_folder import refuse_scripts
from dvdquant.checkpoint.locate import locate_model
from dvdquant.checkpoint.untrusted import MAX_JSON, UntrustedFolder, fix_of, reason_of
from dvdquant.deploy.pipelines.schedulers import CONDITIONS, check_scheduler_config, read_scheduler_config
from dvdquant.errors import CheckpointError, UnsupportedError
from dvdquant.model.families import Family, ImageInputs
from dvdquant.system.safetensors_reader import read_header_from

__all__ = ["PIPELINES", "PipelineClass", "PipelineFolder", "open_pipeline_folder", "pipeline_for"]


@dataclass(frozen=True)
class PipelineClass:
    """A pipeline class of diffusers that clips are drawn with.

    Args:
        family: The name of the family of its transformer.
        image: Whether its call takes the first frame as an image.
        last_image: Whether its call takes the last frame, too.
        other: The class for the same parts that takes an image, or that takes none; None if there is no such class.
    """

    family: str
    image: Literal["none", "optional", "required"] = "none"
    last_image: bool = False
    other: str | None = None


PIPELINES: Mapping[str, PipelineClass] = {
    "WanPipeline": PipelineClass("wan", other="WanImageToVideoPipeline"),
    "WanImageToVideoPipeline": PipelineClass("wan", "required", last_image=True, other="WanPipeline"),
    "HunyuanVideoPipeline": PipelineClass("hunyuan-video"),
    "HunyuanVideoImageToVideoPipeline": PipelineClass("hunyuan-video", "required"),
    "CogVideoXPipeline": PipelineClass("cogvideox"),
    "CogVideoXImageToVideoPipeline": PipelineClass("cogvideox", "required"),
    "LTXPipeline": PipelineClass("ltx-video", other="LTXImageToVideoPipeline"),
    "LTXImageToVideoPipeline": PipelineClass("ltx-video", "required", other="LTXPipeline"),
    CONDITIONS: PipelineClass("ltx-video", "optional", last_image=True),
}
_TAKE_IMAGES = (
    "Wan 2.1 I2V and FLF2V, Wan 2.2 I2V-A14B and TI2V-5B, HunyuanVideo-I2V, CogVideoX I2V, LTX-Video; and with a last image "
    "Wan 2.1 FLF2V, Wan 2.2 I2V-A14B, LTX-Video from 0.9.5 on"
)
INDEX = "model_index.json"
MAX_PARTS = 64
_TRANSFORMER = re.compile(r"transformer(_\d+)?")
_LIBRARIES = ("diffusers", "transformers")
# The files that a pipeline reads besides the transformers, which the engines replace.
_WANTED = (
    INDEX,
    *(f"{part}/*" for part in ("scheduler", "tokenizer*", "text_encoder*", "vae", "image_*", "feature_extractor")),
)
_TEXT = ("text_encoder", "tokenizer")
_WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on this machine.

    Args:
        root: The folder of the pipeline.
        class_name: The name of its diffusers class, one of :data:`PIPELINES`.
        transformers: The names of its transformers' folders.
        expand_timesteps: Whether it says that its pipeline gives a timestep for every token (Wan 2.2 TI2V).
        parts: The names of its other parts.
    """

    root: Path
    class_name: str
    transformers: tuple[str, ...]
    expand_timesteps: bool = False
    parts: tuple[str, ...] = ()

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Return the names of its text encoders and tokenizers."""
        return tuple(part for part in self.parts if part.startswith(_TEXT))


def open_pipeline_folder(source: str, family: str, *, text: bool = True) -> PipelineFolder:
    """Find and check the pipeline of a model.

    Args:
        source: The folder of the pipeline, or a hub id ``org/name``. Of a hub id, text encoder, tokenizer, VAE and
            scheduler are downloaded.
        family: The name of the export's family.
        text: Whether its text encoders are needed; else they may be missing, and are not downloaded.

    Raises:
        CheckpointError: There is no pipeline, parts are missing (the error names them), or weights are damaged or not
            safetensors.
        UnsupportedError: The class of the pipeline is not supported here, or belongs to another family.
    """
    # 1. The class of the pipeline.
    folder = UntrustedFolder.at(_find(source, text))
    root = folder.root
    index = _read_index(folder, source)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise UnsupportedError(
            f"{root} is a pipeline of class {name!r:.100}",
            available=PIPELINES,
            fix="put DvdqTransformer into that pipeline yourself, see dvdquant.deploy.pipelines.transformer",
        )
    if PIPELINES[name].family != family:
        raise UnsupportedError(f"{root} is a {name}, and the export is of family {family}", fix="give its own pipeline")
    # 2. Its parts: their entries first, then their files.
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    if len(parts) > MAX_PARTS:
        raise CheckpointError(
            f"{root / INDEX} names {len(parts)} parts, more than {MAX_PARTS}", fix="download it again"
        )
    for part, entry in parts.items():
        _check_entry(folder, part, entry)
    missing = [
        problem
        for part in parts
        if not _TRANSFORMER.fullmatch(part)
        and (text or not part.startswith(_TEXT))
        and (problem := _problem(folder, part)) is not None
    ]
    if missing:
        raise CheckpointError(
            f"the pipeline {root} is not complete: {'; '.join(missing)}",
            available=folder.listing(),
            fix=_how_to_fetch(source),
        )
    transformers = tuple(part for part in parts if _TRANSFORMER.fullmatch(part))
    others = tuple(part for part in parts if part not in transformers)
    return PipelineFolder(root, name, transformers, index.get("expand_timesteps") is True, others)


def pipeline_for(folder: PipelineFolder, family: Family, *, first: bool, last: bool) -> str:
    """Return the pipeline class that draws a clip from these images, and from text.

    Args:
        folder: The pipeline.
        family: The family of the transformer, which knows what images it needs.
        first: Whether the first frame is given.
        last: Whether the last one is.

    Raises:
        UnsupportedError: The model takes no such image, or needs one; the error says which and names the options.
    """
    needs, own = family.images(), PIPELINES[folder.class_name]
    if own.image == "none" and own.other == "WanImageToVideoPipeline" and not folder.expand_timesteps:
        needs = needs if needs.first == "required" else ImageInputs()
    if (first or last) and needs.first == "none":
        raise UnsupportedError(
            f"this model draws from text alone, and {'--image' if first else '--last-image'} is given",
            available=f"models that take images: {_TAKE_IMAGES}",
            fix="leave the image out, or export one of these models",
        )
    for name, given, need in (("--image", first, needs.first), ("--last-image", last, needs.last)):
        if need == "required" and not given:
            raise UnsupportedError(
                f"this model draws from {'a first and a last image' if needs.last == 'required' else 'an image'}, "
                f"and {name} is missing",
                fix=f"give {name} FILE",
            )
    if not first and not last:
        return folder.class_name if own.image != "required" or own.other is None else own.other
    name = folder.class_name if own.image != "none" or own.other is None else own.other
    takes = PIPELINES[name]
    if takes.image == "none":
        raise UnsupportedError(
            f"{folder.root} is a {name}, which takes no image, and the transformer is made for one",
            available=[
                other for other, kind in PIPELINES.items() if kind.family == own.family and kind.image != "none"
            ],
            fix="give the model's own pipeline for images with --pipeline",
        )
    if last and (needs.last == "none" or not takes.last_image):
        raise UnsupportedError(
            f"this model's {name} takes no last image",
            available=f"models that take images: {_TAKE_IMAGES}",
            fix="leave --last-image out",
        )
    if not first and takes.image == "required":
        raise UnsupportedError(f"a {name} takes a last image only beside a first one", fix="give --image FILE, too")
    return name


def _find(source: str, text: bool) -> Path:
    try:
        return locate_model(source, None, [glob for glob in _WANTED if text or not glob.startswith(_TEXT)])
    except CheckpointError as error:
        raise CheckpointError(
            f"the model the export was made from is needed for text, VAE and scheduler, and is not here: {error.what}",
            available=error.available,
            fix="give its folder or hub id with --pipeline, or run where the export was made"
            + (f"; or {error.fix}" if error.fix else ""),
        ) from error


def _read_index(folder: UntrustedFolder, source: str) -> dict[str, Any]:
    if INDEX not in folder.names():  # a folder that may not be listed raises an error of its own
        raise CheckpointError(
            f"{folder.root} is no diffusers pipeline: it has no {INDEX}",
            available=folder.listing(),
            fix=f"the transformer alone draws no video; {_how_to_fetch(source)}",
        )
    return folder.json(INDEX, MAX_JSON, fix="download the pipeline again")


def _check_entry(root: UntrustedFolder, part: str, entry: list[Any]) -> None:
    """Refuse a part unless it is a class of diffusers or transformers, in a folder inside the pipeline's own.

    These libraries read the folder by path, so every entry of it is checked.

    Raises:
        CheckpointError: The part is anything else.
    """
    good = len(entry) == 2 and entry[0] in _LIBRARIES and isinstance(entry[1], str) and entry[1].isidentifier()
    if not good or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,80}", part):
        raise CheckpointError(
            f"{root.root / INDEX}: {part!r:.80} is {entry!r:.120}, and code of a model is never run",
            available=[f"[{library}, <class>]" for library in _LIBRARIES],
        )
    if root.has_folder(part):
        folder = root.sub(part)
        refuse_scripts(folder.root, folder.names())
        folder.check_tree()


def _problem(root: UntrustedFolder, part: str) -> str | None:
    """Return in words what a part lacks, or None if it is complete."""
    folder = root.sub(part)
    names = folder.names() if root.has_folder(part) else []
    if not names:
        return f"{part}/ is missing"
    if part.startswith("scheduler") and folder.has("scheduler_config.json"):
        config = read_scheduler_config(folder, "scheduler_config.json", "download the pipeline again")
        check_scheduler_config(config, folder.root / "scheduler_config.json")
    if part.startswith(_WEIGHTLESS):
        return None
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        return f"{part}/ has {'only pickled weights, which run code when loaded' if pickled else 'no weights'}"
    for name in weights:  # a damaged file is reported before minutes of loading
        try:
            fd = folder.open(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder.root / name} cannot be read: {reason_of(error)}",
                fix=fix_of(error, "download the pipeline again"),
            ) from error
        try:
            read_header_from(fd, folder.root / name)
        finally:
            os.close(fd)
    return None


def _how_to_fetch(source: str) -> str:
    local = os.path.isdir(os.path.expanduser(source))
    name = "ORG/NAME" if local else source
    return f"fetch the whole pipeline (hf download {name} --local-dir FOLDER) and give --pipeline FOLDER"
