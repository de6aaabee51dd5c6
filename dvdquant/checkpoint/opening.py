"""Open a checkpoint: find the transformer in what was given, check its config and its headers, read no weight."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvdquant.checkpoint.diffusers_folder import (
    INDEX,
    MAX_INDEX,
    SINGLE,
    WEIGHTS,
    has_weights,
    is_shard,
    read_config,
    read_weights,
    refuse_code,
    refuse_scripts,
    transformers_in,
)
from dvdquant.checkpoint.formats.files import HALVES, HeldFile, given_file, model_files, read_file
from dvdquant.checkpoint.formats.translate import DIFFUSERS_FOLDER, translate
from dvdquant.checkpoint.locate import PICKLED, locate_model, recognize_file
from dvdquant.checkpoint.reader import Checkpoint
from dvdquant.checkpoint.untrusted import UntrustedFolder, few, fix_of, reason_of
from dvdquant.errors import CheckpointError
from dvdquant.system.recognize import CONTENTS, PICKLED_FILE
from dvdquant.text import shown

__all__ = ["open_checkpoint", "read_config_file"]


def open_checkpoint(
    model: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    component: str = "transformer",
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open a transformer and check its config, index and every header, without reading a weight.

    Args:
        model: A transformer folder (``config.json`` and safetensors), a pipeline folder (with the transformer in
            ``transformer/``), a folder of the model's authors, a single file of ComfyUI or in GGUF, a folder that holds
            one such file or the two of one model, or a hub id ``org/name``, or a single file of the hub,
            ``org/name/file.safetensors`` or ``org/name:file.gguf``. Of a hub id, only the config and the
            safetensors of the transformer, ``model_index.json`` and the config of the VAE are downloaded. A path that
            exists locally is never looked for elsewhere.
        subfolder: A folder inside ``model`` to look in.
        revision: The revision of a hub id.
        component: The folder of a pipeline; :meth:`Checkpoint.components` lists them.
        config: The config.json of a model that has none.

    Raises:
        CheckpointError: Something is wrong with the folder; the error names the file and the tensor.
        UnsupportedError: It is a pipeline without a transformer.
    """
    for part in (*(subfolder.split("/") if subfolder else ()), component):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
            raise CheckpointError(f"{part!r:.200} is no plain folder name", fix="name a folder inside the model")
    file = given_file(str(model), revision)
    if file is not None and (subfolder or component != "transformer"):
        raise CheckpointError(
            f"{shown(model)} is a file, and has no folder {shown(subfolder or component)!r}",
            fix="give a folder that has it",
        )
    folder = (
        file[0] if file else UntrustedFolder.at(locate_model(str(model), revision, _patterns(subfolder, component)))
    )
    try:
        if file is not None:
            beside = config if config is not None else _config_beside(folder, file[1])
            return _open_file(folder, file[1], str(model), component, beside)
        return _open(folder, str(model), subfolder, component, config)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or shown(model)} cannot be read: {reason_of(error)}",
            fix=fix_of(error, "give a folder that you may read"),
        ) from error


def _open(
    folder: UntrustedFolder, model: str, subfolder: str | None, component: str, given: Mapping[str, Any] | None
) -> Checkpoint:
    """Open and check the transformer in a local folder.

    Args:
        folder: The folder of the model.
        model: The model as given.
        subfolder: A folder inside ``folder`` to look in.
        component: The folder of a pipeline.
        given: The config.json that was given with the model, or None.

    Raises:
        CheckpointError: Something is wrong with the folder.
        UnsupportedError: It is a pipeline without a transformer.
        OSError: A file cannot be read.
    """
    top = folder
    if subfolder:
        folder = folder.sub(subfolder)
    file = ""
    if found := transformers_in(folder):
        if component not in found:
            raise CheckpointError(f"{folder.root} has no component {component!r}", available=few(found))
        if found[component].endswith("/"):
            folder = folder.sub(found[component].rstrip("/"))
        else:
            file = found[component]
    elif component != "transformer":
        raise CheckpointError(f"{folder.root} is not a pipeline and has no {component!r}", available=folder.listing())
    if not folder.root.is_dir():
        fix = "give a folder of the model with --subfolder, or leave it out"
        above = UntrustedFolder(folder.root.parent, folder.allowed)
        raise CheckpointError(f"{folder.root} is missing", available=above.listing(), fix=fix)
    if file:
        refuse_scripts(folder.root, folder.names())
        return _open_file(folder, file, model, component, given)
    names = folder.names()
    config = read_config(folder, names) if given is None else given
    held = _odd_file(folder, names)
    if held is not None:
        return _open_file(folder, held, model, component, config)
    tensors, headers, files = read_weights(folder, names, top)
    return _adopted(HeldFile(tensors, {}, headers, files, DIFFUSERS_FOLDER), config, folder, "", model, component)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a model that was given by its path, or by that of its folder.

    Args:
        path: The path of the file, or of the folder that holds it.

    Raises:
        CheckpointError: It is no JSON object, or asks for code.
    """
    place = Path(os.path.realpath(os.path.expanduser(path)))
    if place.is_dir():
        place /= "config.json"
    config = UntrustedFolder.at(place.parent).json(place.name, MAX_INDEX, "give the config.json of a transformer")
    refuse_code(config, place)
    return config


def _config_beside(folder: UntrustedFolder, name: str) -> dict[str, Any] | None:
    """Return the config.json in the folder of a file that was given alone, None where there is none of a transformer.

    Shapes do not tell all: where the folder does, it is right.

    Raises:
        CheckpointError: The file is one of a diffusers folder, and that has a config.json which cannot be used; or it is one
            of several shards.
    """
    if is_shard(name):
        raise CheckpointError(f"{folder.root / name} is one shard of several", fix=f"give the folder: {folder.root}")
    if not folder.has("config.json"):
        return None
    try:
        return read_config(folder, ["config.json"])
    except CheckpointError:
        if name == SINGLE:
            raise
        return None


def _odd_file(folder: UntrustedFolder, names: list[str]) -> str | None:
    """Open the only transformer in a folder that has none by the names of diffusers."""
    if has_weights(names):
        return None
    found = model_files(folder, names)
    return found["transformer"] if len(found) == 1 else None


def _open_file(
    folder: UntrustedFolder, name: str, model: str, component: str, config: Mapping[str, Any] | None
) -> Checkpoint:
    """Open a single file; CheckpointError says what it is where it is no weights."""
    found = recognize_file(folder, name)
    if found is not None and found is not CONTENTS["gguf"][1]:
        raise CheckpointError(f"{folder.root / name} is {found.what}", available=folder.listing(), fix=found.fix)
    if name.lower().endswith(PICKLED):
        raise CheckpointError(
            f"{folder.root / name} is a file of pickled weights, which run code when loaded", fix=PICKLED_FILE
        )
    return _adopted(read_file(folder, name), config, folder, name, model, component)


def _adopted(
    held: HeldFile,
    config: Mapping[str, Any] | None,
    folder: UntrustedFolder,
    file: str,
    model: str,
    component: str,
) -> Checkpoint:
    """Return the checkpoint of what was held, by the names of diffusers."""
    raw = Checkpoint(model, component, folder.root, {}, held.tensors, held.headers, folder, held.files)
    found = translate(
        held.tensors,
        config,
        place=str(folder.root / file),
        read=lambda info: raw.read_raw(info).numpy().tobytes(),
        metadata=held.metadata,
        layout=held.layout,
        file=file,
    )
    return replace(raw, config=found.config, tensors=found.tensors, source=found.source)


def _patterns(subfolder: str | None, component: str) -> list[str]:
    """Return the patterns of the files that are downloaded from the hub."""
    names = ["config.json", SINGLE, INDEX, f"{WEIGHTS}-*-of-*.safetensors"]
    base = f"{subfolder}/" if subfolder else ""
    # The VAE's config tells the scale of the latents (dvdquant.checkpoint.pipeline_facts).
    return [f"{base}model_index.json", f"{base}vae/config.json"] + [
        f"{base}{folder}{name}"
        for folder in ("", f"{component}/", f"{HALVES.get(component, component)}/")
        for name in names
    ]
