"""Single files and the authors' folders: which of the files in a folder are transformers, and what one file holds.

A folder of ComfyUI's holds files of many models. Only one that is the only transformer is taken without being named, or the
two that are named as the halves of one model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dvdquant.checkpoint.formats.gguf import MAGIC, read_gguf
from dvdquant.checkpoint.formats.stored import ShardTensor
from dvdquant.checkpoint.formats.translate import is_transformer
from dvdquant.checkpoint.locate import hub_file, locate_hub_file, start_of
from dvdquant.checkpoint.untrusted import FileIdentity, UntrustedFolder, few, fix_of, reason_of
from dvdquant.errors import CheckpointError
from dvdquant.system.recognize import recognize_bytes, recognize_tensors, tensor_names
from dvdquant.system.safetensors_reader import read_header_from
from dvdquant.text import shown

__all__ = [
    "HALVES",
    "SUFFIXES",
    "HeldFile",
    "check_order",
    "given_file",
    "halves",
    "model_files",
    "names_file",
    "read_file",
]

SUFFIXES = (".safetensors", ".gguf")
HALVES = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Component -> folder in the repository of Wan 2.2's authors. The first steps, of high noise, are the first transformer's."""
MOST_FILES = 200
"""Files whose first bytes are read to find the transformers among them."""
_PLACES = ("diffusion_models", "split_files/diffusion_models", "models/diffusion_models", "unet", "checkpoints")
"""Folders in which ComfyUI keeps transformers."""
# Weights of these names belong to the config.json of their folder.
_BY_DIFFUSERS = re.compile(r"diffusion_pytorch_model[.-]")
_HIGH = re.compile(r"(?<![a-z])(high[ _.-]?noise|high)(?![a-z])", re.IGNORECASE)
_LOW = re.compile(r"(?<![a-z])(low[ _.-]?noise|low)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class HeldFile:
    """The tensors of a single file, by its own names, in the form of :class:`dvdquant.checkpoint.reader.Checkpoint`.

    Args:
        tensors: Where each tensor lies, by name.
        metadata: The texts of the file's header, by their keys.
        headers: SHA-256 of the header, by the name of the file.
        files: What the file was when its header was read, by its name.
        layout: The layout, as :class:`.translate.SourceFormat` has it.
    """

    tensors: dict[str, ShardTensor]
    metadata: dict[str, str]
    headers: dict[str, str]
    files: dict[str, FileIdentity]
    layout: str


def names_file(model: str) -> bool:
    """Return whether a model is a single file, here or on the hub; nothing is downloaded.

    Args:
        model: A path, or an id on the hub with a file in it.
    """
    return hub_file(model) is not None or given_file(model) is not None


def given_file(model: str, revision: str | None = None) -> tuple[UntrustedFolder, str] | None:
    """Return the folder and the name of a file that was given as the model, None where it is no regular file.

    A file of the hub is downloaded, see :func:`dvdquant.checkpoint.locate.hub_file`. Links on the way to it are the user's own,
    the last one too, which is how the hub's cache keeps its files.

    Args:
        model: The model as it was given.
        revision: The revision of a file of the hub; None takes the newest.
    """
    if (there := hub_file(model)) is not None:
        model = str(locate_hub_file(*there, revision))
    try:
        path = Path(os.path.expanduser(model))
        if "\0" in model or not path.is_file():
            return None
        real = Path(os.path.realpath(path))
        parent = Path(os.path.realpath(path.parent))
    except (OSError, ValueError, RuntimeError):
        return None
    return UntrustedFolder(parent, tuple(dict.fromkeys((parent, real.parent)))), path.name


def halves(folder: UntrustedFolder) -> bool:
    """Return whether a folder is the repository of Wan 2.2's authors, with two transformers.

    Args:
        folder: The folder of the model.
    """
    return all(folder.has_folder(name) for name in HALVES.values())


def model_files(folder: UntrustedFolder, names: list[str]) -> dict[str, str]:
    """Return the transformers among the files of a folder: component -> name, {} where there is none.

    Args:
        folder: The folder, opened as untrusted.
        names: The names of the entries of the folder.

    Raises:
        CheckpointError: There are several, and they are not the two halves of one model; or what there may be is behind a link
            that leaves the folder.
    """
    linked: list[str] = []
    for place in ("", *_PLACES):
        if not place:
            listed = names
        elif folder.has_folder(place):
            listed = [f"{place}/{name}" for name in folder.sub(place).names()]
        else:
            continue
        found = [name for name in listed if name.lower().endswith(SUFFIXES) and not _BY_DIFFUSERS.match(name)]
        linked += [name for name in found if _leaves(folder, name)]
        found = [name for name in found[:MOST_FILES] if _is_transformer(folder, name)]
        if found:
            return _chosen(folder, found)
    if linked:
        raise CheckpointError(
            f"{folder.root / linked[0]} is a link that reads outside the folder",
            available=folder.listing(),
            fix="give the file itself as MODEL",
        )
    return {}


def _chosen(folder: UntrustedFolder, found: list[str]) -> dict[str, str]:
    if len(found) == 1:
        return {"transformer": found[0]}
    if len(found) == 2:
        for high, low in (found, found[::-1]):
            if _noise(high) == "high" and _noise(low) == "low" and _stem(high) == _stem(low):
                return {"transformer": high, "transformer_2": low}
    first = folder.root / found[0]
    raise CheckpointError(
        f"{folder.root} holds {len(found)} transformers, and nothing says which is meant",
        available=few(found),
        fix=f"give one of these files ({shown(first)}); for a model of two, the other with --transformer-2",
    )


def _noise(name: str) -> str:
    """Return "high" or "low" where a file is named as one half of a model, "" elsewhere."""
    base = name.rpartition("/")[2]
    high, low = _HIGH.search(base) is not None, _LOW.search(base) is not None
    return "" if high == low else "high" if high else "low"


def _stem(name: str) -> str:
    """Return what the names of two halves share."""
    return re.sub(r"[ _.-]+", "-", _LOW.sub("*", _HIGH.sub("*", name))).lower()


def check_order(first: str, second: str) -> None:
    """Refuse the halves of a model in the wrong order, which their names tell.

    Args:
        first: The name of the file that was given as the first transformer.
        second: The name of the second.

    Raises:
        CheckpointError: The first is named as the one of low noise and the second as that of high noise.
    """
    if _noise(first) == "low" and _noise(second) == "high":
        raise CheckpointError(
            f"MODEL {shown(first)} is named as the half for low noise, and --transformer-2 {shown(second)} as that for high",
            fix="give the file for high noise as MODEL, and that for low noise with --transformer-2",
        )


def _leaves(folder: UntrustedFolder, name: str) -> bool:
    try:
        folder.locate(name)
    except CheckpointError:
        return True
    return False


def _is_transformer(folder: UntrustedFolder, name: str) -> bool:
    start = start_of(folder, name)
    if start is None:
        return False
    if start.startswith(MAGIC):
        return True  # what it is of, its header says
    held = tensor_names(start)
    if not held or recognize_bytes(start) is not None or recognize_tensors(held) is not None:
        return False
    return is_transformer(held)


def read_file(folder: UntrustedFolder, name: str) -> HeldFile:
    """Read and check the header of a single file.

    Args:
        folder: The folder, opened as untrusted.
        name: The name of the file in it.

    Raises:
        CheckpointError: It is neither a safetensors file nor a GGUF file, is damaged, or changes meanwhile.
    """
    path = folder.root / name
    try:
        fd = folder.open(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", fix=fix_of(error, "download the file again")
        ) from error
    try:
        identity = FileIdentity.of(fd)
        tensors, metadata, digest, layout = _header(fd, path, name)
        if FileIdentity.of(fd) != identity:
            raise CheckpointError(f"{path} changed while it was read", fix="wait until it is written, then try again")
    finally:
        os.close(fd)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors", fix="download the file again")
    return HeldFile(dict(tensors), metadata, {name: digest}, {name: identity}, layout)


def _header(fd: int, path: Path, name: str) -> tuple[Mapping[str, ShardTensor], dict[str, str], str, str]:
    """(tensors, metadata, hash of the header, layout in words)."""
    if os.pread(fd, 4, 0) == MAGIC:
        held = read_gguf(fd, path, name)
        return held.tensors, {}, held.digest, "GGUF file"
    header = read_header_from(fd, path)
    tensors = {
        i.name: ShardTensor(i.name, i.dtype, i.shape, i.offset, i.nbytes, path, name) for i in header.tensors.values()
    }
    return tensors, header.metadata, header.digest, "single file"
